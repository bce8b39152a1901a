"""Joint prediction by an epinet: a thousand indices at once against a loop over them, and against an ensemble.

All ways give the same log-probabilities, which is checked before anything is timed. They take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rayproj.benchmarks.runtime import Row, in_turns
from rayproj.classifiers.epinet import EpistemicConfig, EpistemicKind, EpistemicNetwork
from rayproj.classifiers.networks import ClassifierConfig, build
from rayproj.evaluation.epistemic import logits_of

ROUNDS, THREADS = 5, 1
PART = 20  # the loop over the whole network is timed over this part of the indices, and counted as often
BATCH, INDICES, CLASSES, SIDE = 64, 1000, 10, 32
MEMBERS = 10


def of(kind: EpistemicKind, members: int = MEMBERS) -> EpistemicNetwork:
    torch.manual_seed(0)
    epistemic = EpistemicConfig(kind, members=members, prior=1.0 if kind is EpistemicKind.epinet else 0.0)
    built = build(ClassifierConfig(dropout=0.0, epistemic=epistemic), 3, SIDE, CLASSES).eval()
    assert isinstance(built, EpistemicNetwork)
    return built


def at_once(model: EpistemicNetwork, images: Tensor, z: Tensor) -> Tensor:
    return logits_of(model, images, z)


def by_index(model: EpistemicNetwork, images: Tensor, z: Tensor) -> Tensor:
    """The features of the base once, then index by index."""
    encoded = model.encode(images)
    return torch.cat([model.decode(encoded, z[k : k + 1]) for k in range(len(z))])


def by_network(model: EpistemicNetwork, images: Tensor, z: Tensor) -> Tensor:
    """The whole network for each index, as f(x, z) is written."""
    return torch.cat([model(images, z[k : k + 1]) for k in range(len(z))])


def by_example(model: EpistemicNetwork, images: Tensor, z: Tensor) -> Tensor:
    """A hundred indices at once, of each example its own: the index meets the last layer after the examples."""
    encoded = model.encode(images)
    return torch.cat([model.decode(encoded, some.expand(-1, len(images), -1)) for some in z.split(100)])


@torch.no_grad()
def measure() -> list[Row]:
    """Rows for `jobs/benchmark.py`."""
    torch.set_num_threads(THREADS)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    epinet, ensemble = of(EpistemicKind.epinet), of(EpistemicKind.ensemble)
    z = epinet.indices(INDICES)
    expected = at_once(epinet, images, z)
    what = f"joint prediction of {BATCH} images, epinet, {INDICES:,} indices"
    few, members = z[: INDICES // PART], ensemble.indices(MEMBERS)
    peers: dict[str, tuple[int, Callable[[], Any]]] = {
        "loop over the indices, features once": (1, lambda: by_index(epinet, images, z)),
        f"loop over the whole network ({len(few)} indices x {PART})": (PART, lambda: by_network(epinet, images, few)),
        "an index for each example": (1, lambda: by_example(epinet, images, z)),
        f"an ensemble of {MEMBERS} of its base": (1, lambda: logits_of(ensemble, images, members)),
    }
    for name, (_, way) in peers.items():
        if not name.startswith("an ensemble"):
            found = way()
            torch.testing.assert_close(found, expected[: len(found)], rtol=1e-3, atol=1e-3, msg=f"{name}: it differs")
    return [
        in_turns(what, lambda: at_once(epinet, images, z), name, way, ROUNDS, part)
        for name, (part, way) in peers.items()
    ]
