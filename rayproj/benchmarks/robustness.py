"""Attacks against those of pyautoattack, foolbox and torchattacks at equal robust accuracy, soups at once against one by
one, and a step of co-training against two passes.

The attacked network is trained here, adversarially, on the embedded Fashion-MNIST; what each attack leaves standing is
in its row's name, and must be the same to two points.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayproj.benchmarks.runtime import Row
from rayproj.classifiers.adapters import CLEAN
from rayproj.classifiers.adversary import AdversaryConfig, ThreatConfig, Training, losses
from rayproj.classifiers.networks import ClassifierConfig, Network, build
from rayproj.classifiers.soups import Stack, grid, soup
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.sources.base import Channels, SourceConfig
from rayproj.data.sources.fashion_mnist import open as fashion
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.robustness.apgd import apgd
from rayproj.robustness.autoattack import AttackConfig, autoattack
from rayproj.robustness.losses import cross_entropy
from rayproj.robustness.oracle import OfUnit, Oracle
from rayproj.robustness.pgd import pgd
from rayproj.robustness.threats import Norm, Threat
from rayproj.tracking.progress import say

ROUNDS, THREADS = 3, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES, EPS = 1024 if DEVICE == "cuda" else 128, 0.06
SAME = 0.02  # points of robust accuracy in which attacks of the same strength may differ


def _images(count: int) -> tuple[Tensor, Tensor]:
    """uint8 [n, 1, 28, 28] and labels."""
    rows = fashion(SourceConfig(image_size=28, channels=Channels.grey)).rows()
    some = [row for row, _ in zip(rows, range(count), strict=False)]
    label = torch.tensor([row["label"] for row in some], device=DEVICE)
    return torch.from_numpy(np.stack([row["image"] for row in some])).to(DEVICE), label


def _trained(images: Tensor, label: Tensor, steps: int = 150) -> nn.Module:
    torch.manual_seed(0)
    model = build(ClassifierConfig(dropout=0.0), 1, 28, 10).to(DEVICE)
    adversary = AdversaryConfig(Training.adversarial, [ThreatConfig(Norm.linf, EPS)], steps=2, step=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.randint(0, len(images), (96,), generator=torch.Generator().manual_seed(step)).to(DEVICE)
        optimizer.zero_grad()
        row = _keys(step, rows)
        _losses(model, images[rows], label[rows], row, adversary).mean().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def _keys(step: int, rows: Tensor) -> Tensor:
    """int64 [B, 3]: what draws are keyed by."""
    return torch.stack([torch.zeros_like(rows), torch.full_like(rows, step), rows], 1)


def _losses(model: nn.Module, images: Tensor, label: Tensor, row: Tensor, config: AdversaryConfig) -> Tensor:
    def objective(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, label.repeat(len(logits) // len(label)), reduction="none")

    return losses(model, images, label, row, objective, config, 0)


def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    try:
        import foolbox
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise UserError(f"The benchmark of attacks needs {error.name}; pip install 'rayproj[dev]'.") from None
    torch.set_num_threads(THREADS)
    images, label = _images(2000 + IMAGES)
    model = OfUnit(_trained(images[:2000], label[:2000])).eval()
    x, y = images[2000:].float() / 255, label[2000:]
    threat, ids = Threat(Norm.linf, EPS), torch.arange(IMAGES, device=DEVICE)
    keys = _keys(0, ids)

    def left(broken: Tensor) -> float:
        with torch.no_grad():
            return float((model(broken).argmax(1) == y).float().mean())

    def theirs(kinds: list[str]) -> Callable[[], float]:
        attack = AutoAttack(model, norm="Linf", eps=EPS, version="custom", attacks=kinds, seed=0, device=DEVICE)
        attack.apgd.n_restarts = 1
        return lambda: left(attack.run_standard_evaluation(x, y, batch_size=IMAGES)[0].to(DEVICE))

    by_foolbox = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=40)
    around = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    standard = AttackConfig()
    rows = [
        _row("APGD on the cross-entropy, 100 steps", "pyautoattack",
             lambda: left(apgd(Oracle(model), x, y, keys, threat, cross_entropy, 100).images), theirs(["apgd-ce"]), 1.3),
        _row("AutoAttack, standard", "pyautoattack",
             lambda: left(autoattack(model, x, y, ids, threat, standard).images),
             theirs(["apgd-ce", "apgd-t", "fab-t", "square"]), 1.3, rounds=2, warm=0),
        _row("PGD, 40 steps", "foolbox",
             lambda: left(pgd(Oracle(model), x, y, None, threat, 40, 0.25, go_on=False).images),
             lambda: left(by_foolbox(around, x, y, epsilons=EPS)[1]), 1.3),
    ]  # fmt: skip
    rows += _against_torchattacks(model, x, y, left)
    return [*rows, _soups(images[:512], label[:512]), _co_training(images[:64], label[:64])]


def _against_torchattacks(model: nn.Module, x: Tensor, y: Tensor, left: Callable[[Tensor], float]) -> list[Row]:
    """The same against torchattacks, at the same steps: its own AutoAttack takes a tenth of them. It is no test extra, as it
    asks for versions that nothing else here goes with: `pip install --no-deps torchattacks`."""
    try:
        import torchattacks
    except ImportError:
        say("torchattacks is not compared: pip install --no-deps torchattacks")
        return []
    threat, ids, steps = Threat(Norm.linf, EPS), torch.arange(len(x), device=DEVICE), AttackConfig().steps
    told = {"eps": EPS, "steps": steps, "seed": 0}
    apgd_ce = torchattacks.APGD(model, **told)
    whole = torchattacks.MultiAttack([
        apgd_ce, torchattacks.APGDT(model, n_classes=10, **told),
        torchattacks.FAB(model, multi_targeted=True, n_classes=10, **told),
        torchattacks.Square(model, eps=EPS, n_queries=AttackConfig().queries, seed=0),
    ])  # fmt: skip
    by_pgd = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=40, random_start=False)
    return [
        _row("APGD on the cross-entropy, 100 steps", "torchattacks",
             lambda: left(apgd(Oracle(model), x, y, _keys(0, ids), threat, cross_entropy, steps).images),
             lambda: left(apgd_ce(x, y)), 1.3),
        _row("PGD, 40 steps", "torchattacks",
             lambda: left(pgd(Oracle(model), x, y, None, threat, 40, 0.25, go_on=False).images),
             lambda: left(by_pgd(x, y)), 1.3),
        _row("AutoAttack, standard", "torchattacks", lambda: left(autoattack(model, x, y, ids, threat).images),
             lambda: left(whole(x, y)), 1.3, rounds=1, warm=0),
    ]  # fmt: skip


def _soups(images: Tensor, label: Tensor) -> Row:
    """All soups of a grid on the images of a dataset: as `jobs/soup.py` goes over it, and one soup after the other, as it is
    done with an evaluation of one model."""
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(_vit().state_dict())
    network, weights = _vit().eval(), grid(3, 5)
    with TemporaryDirectory() as folder:
        fields = {"image": Field("png", tuple(images.shape[1:])), "label": Field("int")}
        dataset = Dataset.create(folder, Header("fashion", fields, len(images), 64, tuple("0123456789")))
        for shard in range(dataset.header.num_shards):
            rows = [
                {"key": f"{i:08d}", "image": images[i].cpu().numpy(), "label": int(label[i])}
                for i in dataset.header.shard_range(shard)
            ]
            commit_shard(dataset, shard, rows, "benchmark", 0.0)
        reader = Reader(dataset, ["image", "label"])

        def batches() -> Iterator[Tensor]:
            for shard in range(dataset.header.num_shards):
                some = reader.gather(np.array(dataset.header.shard_range(shard)))["image"]
                yield torch.from_numpy(some).to(DEVICE).float()

        @torch.no_grad()
        def shared() -> Tensor:
            stack = Stack(network, states, weights)
            return torch.cat([stack(x) for x in batches()], 1)

        @torch.no_grad()
        def one_by_one() -> Tensor:
            found = []
            for row in weights:
                network.load_state_dict(soup(states, row.tolist()))
                found.append(torch.cat([network(x) for x in batches()]))
            return torch.stack(found)

        torch.testing.assert_close(shared(), one_by_one(), rtol=1e-3, atol=1e-3)
        what = f"{len(weights)} soups of three ViTs on {len(images)} images of a dataset"
        return _row(what, "one by one", shared, one_by_one, 2.0, len(images))


def _vit(adapters: list[str] | None = None) -> nn.Module:
    config = ClassifierConfig(Network.vit, dropout=0.0, layers=3, dim=48, heads=3, patch=4, adapters=adapters or [])
    return build(config, 1, 28, 10).to(DEVICE)


def _co_training(images: Tensor, label: Tensor) -> Row:
    """The update's own passes: both branches in one, against one pass for each; the attack is the same for both."""
    torch.manual_seed(0)
    model = _vit(["token"])
    config = AdversaryConfig(Training.co_training, [ThreatConfig(Norm.linf, EPS)], steps=1)
    row = _keys(0, torch.arange(len(images), device=DEVICE))
    clean = F.one_hot(torch.full((len(images),), CLEAN, device=DEVICE), 2).float()

    def ours() -> None:
        model.zero_grad()
        _losses(model, images, label, row, config).mean().backward()

    def two_passes() -> None:
        model.zero_grad()
        attacked = AdversaryConfig(Training.adversarial, config.threats, steps=1)
        (0.5 * _losses(model, images, label, row, attacked).mean()).backward()
        (0.5 * F.cross_entropy(model(images.float(), mix=clean), label)).backward()

    return _row(f"step of co-training, {len(images)} images", "two passes", ours, two_passes, 1.0, len(images))


def _row(
    what: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], goal: float, images: int = IMAGES,
    rounds: int = ROUNDS, warm: int = 1,
) -> Row:  # fmt: skip
    """Both in turns, after rounds that are not counted."""
    found: list[list[float]] = [[], []]
    stands: list[Any] = [None, None]
    for number in range(warm + rounds):
        for k in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            stands[k] = (ours, theirs)[k]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            found[k].append(images / (time.perf_counter() - began))
    if isinstance(stands[0], float):
        # Weaker attacks are no comparison; one that counts every point on the way may be a little stronger.
        if stands[0] > stands[1] + SAME:
            raise UserError(f"{what}: ours leaves {stands[0]:.1%} standing and {peer} {stands[1]:.1%}; ours is weaker.")
        what += f" (robust accuracy {stands[0]:.1%}, theirs {stands[1]:.1%})"
    speed = [values[warm:] for values in found]
    ratios = [a / b for a, b in zip(*speed, strict=True)]
    return {
        "metric": what, "unit": "1/s", "peer": peer, "better": "higher", "goal": goal,
        "ours": statistics.median(speed[0]), "peer_value": statistics.median(speed[1]), "ratios": ratios,
        "ratio": statistics.median(ratios),
    }  # fmt: skip
