"""One evaluator for all epistemic networks: what their predictions come to on labelled images, and what they cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rayproj import keyed
from rayproj.classifiers.ensembles import Ensemble
from rayproj.classifiers.epinet import EpistemicNetwork
from rayproj.evaluation.accuracy import wilson_interval
from rayproj.evaluation.fairness import calibration_error
from rayproj.evaluation.joint import exact_polyadic_nll, joint_nll, marginal_nll, polyadic_nll
from rayproj.evaluation.uncertainty import (
    brier_score,
    decomposition,
    detection,
    margin,
    risk_coverage_area,
    rms_calibration_error,
    variation_ratio,
)

INDICES_AT_ONCE = 100  # in one forward of a batch
TOGETHER = (1, 2, 5, 10, 20, 50)  # labels of two images whose joint loss is shown
ROUNDS = 5  # of a measured time


@dataclass(frozen=True)
class Outcome:
    """What a network said of n images, as far as the measures need it.

    Attributes:
        log_p: fp32 [Z, n], log probabilities of the labels by index.
        probabilities: fp64 [n, classes], their mean over the indices.
        doubt: "total", "aleatoric" and "epistemic" (`uncertainty.decomposition`), and "variation", [n] each.
    """

    log_p: np.ndarray
    probabilities: np.ndarray
    doubt: dict[str, np.ndarray]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Outcome:
        """Of logits [Z, n, classes], divided by a temperature."""
        log = (logits / temperature).log_softmax(2)
        chosen = log.gather(2, labels.expand(len(log), -1)[..., None])[..., 0]
        p = log.double().exp().cpu().numpy()
        return cls(chosen.cpu().numpy(), p.mean(0), {**decomposition(p), "variation": variation_ratio(p)})

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """Of all the images of the parts, in their order."""
        return cls(
            np.concatenate([part.log_p for part in parts], 1),
            np.concatenate([part.probabilities for part in parts]),
            {name: np.concatenate([part.doubt[name] for part in parts]) for name in parts[0].doubt},
        )

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Of what is of no class, which is to have higher ones, [n] each."""
        return {"confidence": 1 - self.probabilities.max(1), "margin": margin(self.probabilities), **self.doubt}


def logits_of(network: EpistemicNetwork, images: Tensor, z: Tensor) -> Tensor:
    """[Z, B, classes] of uint8 images and indices that they share; a hundred indices at once."""
    encoded = network.encode(images)
    return torch.cat([network.decode(encoded, some) for some in z.split(INDICES_AT_ONCE)])


def with_indices(network: EpistemicNetwork, count: int) -> EpistemicNetwork:
    """The network as it is used with so many indices: of an ensemble no more members work than are asked."""
    return network.first(count) if isinstance(network, Ensemble) else network


def measures(found: Outcome, labels: np.ndarray, tau: int = 10, kappa: int = 2, seed: int = 0) -> dict[str, float]:
    """Every measure of labelled images, by name; of losses also the standard error of their mean.

    "error_auroc" says how well confidence tells wrong guesses from right ones (Hendrycks and Gimpel 2017), left out if
    all are of one kind. "joint_nll" is of tau images that follow each other; "dyadic_nll" of tau draws of kappa anchors,
    "dyadic_nll_exact" its mean over all draws, and "dyadic_nll_independent" what that would be of labels that are
    independent given the marginal prediction.
    """
    log_p, right = found.log_p.astype(np.float64), found.probabilities.argmax(1) == labels
    marginal = marginal_nll(log_p)
    losses = {
        "marginal_nll": marginal,
        "joint_nll": joint_nll(log_p, tau),
        "dyadic_nll": polyadic_nll(log_p, tau, kappa, seed),
        "dyadic_nll_exact": exact_polyadic_nll(log_p, tau, kappa),
        "dyadic_nll_independent": exact_polyadic_nll(-marginal[None], tau, kappa),
    }
    low, high = wilson_interval(int(right.sum()), len(labels))
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **{name: float(values.mean()) for name, values in losses.items()},
        **{f"{name}_error": float(v.std() / math.sqrt(len(v))) for name, v in losses.items()},
        "brier": brier_score(labels, found.probabilities),
        "calibration_error": calibration_error(labels, found.probabilities),
        "rms_calibration_error": rms_calibration_error(labels, found.probabilities),
        "risk_coverage_area": risk_coverage_area(labels, found.probabilities),
        **_error_auroc(found.scores["confidence"], right),
        **{f"doubt_{name}": float(values.mean()) for name, values in found.doubt.items()},
    }


def _error_auroc(doubt: np.ndarray, right: np.ndarray) -> dict[str, float]:
    if right.all() or not right.any():
        return {}
    return {"error_auroc": detection(doubt[right], doubt[~right])["auroc"]}


def by_labels_together(found: Outcome) -> dict[str, float]:
    """The exact dyadic log-loss for each label, by how many labels of two images are asked for together."""
    log_p = found.log_p.astype(np.float64)
    return {str(n): float(exact_polyadic_nll(log_p, n).mean() / n) for n in TOGETHER}


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """What logits [Z, n, classes] are to be divided by for the least marginal NLL (Guo et al. 2017, section 4.2)."""

    def loss(log_temperature: float) -> float:
        log = (logits / math.exp(log_temperature)).log_softmax(2)
        chosen = log.gather(2, labels.expand(len(log), -1)[..., None])[..., 0]
        return float(-(chosen.logsumexp(0) - math.log(len(log))).mean())

    return math.exp(
        scipy.optimize.minimize_scalar(loss, bounds=(-2.5, 2.5), method="bounded", options={"xatol": 0.01}).x
    )


def inference_cost(network: EpistemicNetwork, images: Tensor, count: int) -> dict[str, float]:
    """Of predicting a batch with so many indices, for one image: matrix products' and convolutions' operations, and measured
    seconds, the median of some rounds."""
    used = with_indices(network, count)
    z = used.indices(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits_of(used, images, z)
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            logits_of(used, images, z)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return {
        "inference_flops": counter.get_total_flops() / len(images),
        "inference_seconds": statistics.median(seconds) / len(images),
    }


def training_flops(network: EpistemicNetwork, images: Tensor) -> float:
    """Of one example's loss and its gradient, as autograd does them: what is frozen has no backward."""
    z = network.training_indices(0, keyed.places(len(images), images.device))
    with FlopCounterMode(display=False) as counter:
        network(images, z).log_softmax(2)[..., 0].mean().backward()
    network.zero_grad()
    return counter.get_total_flops() / len(images)


def parameters(network: EpistemicNetwork, count: int) -> dict[str, int]:
    """How many a prediction with so many indices needs, and how many of these were trained in the network's own run."""
    used: Any = with_indices(network, count)
    return {
        "parameters": sum(p.numel() for p in used.parameters()),
        "trained": sum(p.numel() for p in used.parameters() if p.requires_grad),
    }
