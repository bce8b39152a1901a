"""Obfuscations, other changes of images and epistemic networks on an accelerator: what they make of tensors there, all of
them on it, is what they make in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rayproj.classifiers.augment import AugmentConfig, augmented
from rayproj.classifiers.epinet import Bootstrap, EpistemicConfig, EpistemicKind, EpistemicNetwork, weights
from rayproj.classifiers.networks import ClassifierConfig, build
from rayproj.evaluation.epistemic import Outcome, logits_of
from rayproj.evaluation.shift import ShiftConfig, conditions
from rayproj.obfuscation import OBFUSCATIONS, Assets, ObfuscateConfig, obfuscate, regenerate, scenes
from rayproj.obfuscation.styles import StyleNetwork
from tests.support.accelerator import Accelerator, There, moved


@pytest.fixture(scope="module")
def assets() -> tuple[Assets, Assets]:
    torch.manual_seed(0)
    photos, patches = scenes.pictures(3), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    styles = StyleNetwork(2, 3, width=4).eval().requires_grad_(False)
    return Assets(photos, patches, styles), Assets(There(photos), There(patches), moved(copy.deepcopy(styles)))


def pictures(channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, channels, 24, 30), dtype=torch.uint8, generator=generator)


ROWS = torch.tensor([[k, 5, 0] for k in range(4)])


def test_the_accelerator_is_as_strict_as_one() -> None:
    x = torch.arange(3.0)
    with Accelerator():
        there = x.to("cuda:0")
        assert there.is_cuda and (2 * there + torch.tensor(1.0)).cpu().equal(2 * x + 1) and there[torch.tensor(2)] == 2
        assert torch.zeros(3, device=there.device).add_(there).tolist() == x.tolist()
        with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
            there + x
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OBFUSCATIONS)
def test_obfuscations(name: str, channels: int, assets: tuple[Assets, Assets]) -> None:
    images = pictures(channels)
    expected, records = obfuscate(name, images, ROWS, 3, assets[0], 4)
    with Accelerator():
        found, kept = obfuscate(name, There(images), There(ROWS), 3, assets[1], 4)
        again = regenerate(name, There(images), records, assets[1])
    assert isinstance(found, There) and isinstance(again, There) and kept == records
    assert torch.equal(again.here, found.here)
    # A style network rounds otherwise in a batch than image by image.
    assert (found.here.int() - expected.int()).abs().max() <= (1 if OBFUSCATIONS[name].needs == "styles" else 0)


def test_changes_of_images() -> None:
    changes = AugmentConfig(colour=0.5, rand_augment=2, obfuscate=ObfuscateConfig(["overlay", "colour"], 0.8))
    expected = augmented(pictures(), ROWS, 3, changes)
    shift = ShiftConfig(test="t", corruptions=["fog", "shot_noise"], severities=[3], obfuscations=["Interleave"])
    with Accelerator():
        found = augmented(There(pictures()), There(ROWS), 3, changes)
        assert isinstance(found, There) and torch.equal(found.here, expected)
        for condition in conditions(shift):
            changed = condition.change(There(pictures()), There(ROWS))
            assert isinstance(changed, There) and torch.equal(changed.here, condition.change(pictures(), ROWS))


@pytest.mark.parametrize("kind", [kind for kind in EpistemicKind if kind is not EpistemicKind.none])
def test_epistemic_networks(kind: EpistemicKind) -> None:
    torch.manual_seed(0)
    config = EpistemicConfig(kind, index=6, members=4, samples=3, predict=9, conv_prior=0.5, mlp_prior=0.5)
    network = build(ClassifierConfig(channels=(8, 16), dropout=0.0, epistemic=config), 3, 24, 5).eval()
    assert isinstance(network, EpistemicNetwork)
    away, images, labels = copy.deepcopy(network), pictures()[..., :24], torch.tensor([0, 4, 1, 2])
    outcomes = []
    with torch.no_grad():
        z = network.training_indices(0, ROWS)
        expected = [network(images), network(images, z)]
        outcomes.append(Outcome.of(logits_of(network, images, network.indices(5)), labels))
        if kind is not EpistemicKind.mc_dropout:
            expected.append(weights(Bootstrap.exponential, network.quantiles(0, ROWS[:, 0], z)))
        with Accelerator():
            moved(away)
            z, there = away.training_indices(0, There(ROWS)), There(images)
            found = [away(there), away(there, z)]
            outcomes.append(Outcome.of(logits_of(away, there, away.indices(5)), There(labels)))
            if kind is not EpistemicKind.mc_dropout:
                found.append(weights(Bootstrap.exponential, away.quantiles(0, There(ROWS)[:, 0], z)))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, There)
        torch.testing.assert_close(one.here, other, rtol=1e-4, atol=1e-5)
    assert outcomes[0].log_p == pytest.approx(outcomes[1].log_p, abs=1e-5)
