"""Epistemic networks on problems whose answer is known: the testbed of Osband et al. 2022 ("The Neural Testbed: Evaluating
Joint Predictions").

Labels of a problem are drawn by a random network of the inputs; an agent sees a few of them, and its joint prediction of
others is compared with the network itself by the divergence KL(network ‖ agent), which a good ensemble, of many networks,
brings down and a single one does not, however well it predicts one label. All agents have the same base network, the same
number of steps and the same L2 on what is trained; none is tuned to a problem.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj import keyed
from rayproj.benchmarks.runtime import Row
from rayproj.classifiers.ensembles import BatchEnsemble, Ensemble, MCDropout
from rayproj.classifiers.epinet import Epinet, EpistemicConfig, EpistemicNetwork
from rayproj.evaluation.joint import divergence, log_mean_exp

CLASSES, WIDTH = 2, 50
DIMENSIONS, EXAMPLES, TEMPERATURES, SEEDS = (2, 10), (1, 10, 100), (0.01, 0.1, 0.5), (0, 1, 2)
TAU, TESTS, INDICES = 10, 1000, 200
STEPS, RATE, DECAY = 500, 5e-3, 1.0


Gaps = dict[int, list[tuple[float, float]]]
"""By how many labels, of each problem the divergence, and the share of labels that the agent thought possible."""


class Perceptron(nn.Module):
    """Two hidden layers of 50 (ibid., section 3), as the base of an epistemic network."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def pooled(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]

    def classify(self, pooled: Tensor) -> Tensor:
        return self.head(pooled)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of inputs fp32 [B, D]."""
        return self.classify(self.pooled(x))


@dataclass(frozen=True)
class Problem:
    """Inputs x ~ N(0, I) and labels by a random network.

    Attributes:
        temperature: of the network's logits: how much of a label is chance.
        n: labels that an agent sees.
    """

    dimensions: int
    n: int
    temperature: float
    seed: int

    def examples(self, count: int, stream: str) -> tuple[Tensor, Tensor]:
        """Inputs fp32 [count, D], and the log-probabilities fp64 [count, classes] of their labels."""
        torch.manual_seed(self.seed)
        truth = Perceptron(self.dimensions)
        x = keyed.normal(self.seed, stream, keyed.places(count), (self.dimensions,))
        with torch.no_grad():
            return x, (truth(x).double() / self.temperature).log_softmax(1)


def agent(name: str, inputs: int) -> EpistemicNetwork:
    if name == "base":
        return Ensemble([Perceptron(inputs)])
    if name.startswith("ensemble"):
        members = [Perceptron(inputs) for _ in range(10)]
        priors = [Perceptron(inputs) for _ in range(10)] if name.endswith("priors") else []
        return Ensemble(members, priors)
    if name == "dropout":
        return MCDropout(EpistemicConfig(dropout=0.1), Perceptron(inputs))
    if name == "batch ensemble":
        return BatchEnsemble(EpistemicConfig(members=10), Perceptron(inputs))
    return Epinet(EpistemicConfig(index=8, hidden=(15, 15), prior=4.0), Perceptron(inputs), (inputs,))


AGENTS = ("base", "ensemble of 10", "ensemble of 10 with priors", "dropout", "batch ensemble", "epinet")


def trained(name: str, problem: Problem) -> EpistemicNetwork:
    """An agent that has seen the labels of the problem, all of them in each step."""
    x, log_p = problem.examples(problem.n, "training")
    y = drawn(log_p, keyed.uniform(problem.seed, "labels", keyed.places(problem.n)).double())
    torch.manual_seed(1000 + problem.seed)
    network = agent(name, problem.dimensions).train()
    learned = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=RATE)
    for step in range(STEPS):
        row = keyed.places(problem.n)
        row[:, 1] = step
        logits = network(x, network.training_indices(problem.seed, row))
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))
        loss = loss + DECAY / problem.n * sum(p.square().sum() for p in learned) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def drawn(log_p: Tensor, u: Tensor) -> Tensor:
    """Labels int64 [n] of log-probabilities [n, classes], by a uniform draw for each."""
    return (log_p.exp().cumsum(1)[:, :-1] < u[:, None]).sum(1)


@torch.no_grad()
def gap(network: EpistemicNetwork, problem: Problem, tau: int) -> tuple[float, float]:
    """KL(network of the problem ‖ agent) of `tau` labels of two inputs, or of one if tau is 1, and the share of the draws
    that the agent thinks possible."""
    kappa = min(tau, 2)
    anchors, true = problem.examples(kappa * TESTS, "test")
    place = keyed.uniform(problem.seed, "anchors", keyed.places(TESTS), (tau,)).double()
    at = (torch.arange(TESTS)[:, None] * kappa + (place * kappa).long()).flatten()
    y = drawn(true[at], keyed.uniform(problem.seed, "answers", keyed.places(len(at))).double())
    log = network(anchors, network.indices(INDICES)).double().log_softmax(2)[:, at]
    chosen = log.gather(2, y.expand(len(log), -1)[..., None])[..., 0].unflatten(1, (TESTS, tau))
    theirs = true[at].gather(1, y[:, None])[:, 0].view(TESTS, tau).sum(1)
    return divergence(theirs.numpy(), log_mean_exp(chosen.sum(2).numpy()))


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`: the mean over the problems, each agent's a ratio of the base's."""
    torch.set_num_threads(1)
    problems = [
        Problem(d, d * k, t, seed) for d, k, t, seed in itertools.product(DIMENSIONS, EXAMPLES, TEMPERATURES, SEEDS)
    ]
    found: dict[str, Gaps] = {name: {1: [], TAU: []} for name in AGENTS}
    for problem in problems:
        for name in AGENTS:
            network = trained(name, problem)
            for tau, values in found[name].items():
                values.append(gap(network, problem, tau))
    return [_row(name, tau, found) for tau in (1, TAU) for name in AGENTS[1:]]


def _row(name: str, tau: int, found: dict[str, Gaps]) -> Row:
    ours, base = ([value for value, _ in found[who][tau]] for who in (name, "base"))
    return {
        "metric": f"KL from the truth, labels together: {tau}, {name}", "unit": "nats", "peer": "the base alone",
        "better": "lower", "goal": None, "ours": statistics.mean(ours), "peer_value": statistics.mean(base),
        "ratio": statistics.mean(ours) / statistics.mean(base),
        "possible": statistics.mean(share for _, share in found[name][tau]),
        "ratios": [a / b for a, b in zip(ours, base, strict=True)],
    }  # fmt: skip
