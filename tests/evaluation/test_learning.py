"""Patches that classifiers fall for and styles that are taken on, learned in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.engine.world import World
from rayproj.errors import Interrupted, UserError
from rayproj.evaluation.learning import LearnConfig, learn
from rayproj.obfuscation import Assets, AssetsConfig, obfuscate, scenes
from rayproj.obfuscation.composition import framed, laid
from rayproj.obfuscation.patches import train_patches
from rayproj.obfuscation.styles import RandomFilters, train_styles
from rayproj.storage.store import Store, to_json
from tests.support.regression import Recorder


def redness(images: Tensor) -> Tensor:
    """Logits of three classes: which channel is the brightest."""
    return 0.1 * images.mean((2, 3))


def test_a_patch_makes_a_classifier_say_its_class() -> None:
    images = scenes.pictures(12)[:, :, ::4, ::4].contiguous()
    patches, hit = train_patches([redness], images, [0, 2], side=8, steps=40, batch=8, seed=0)
    assert patches.shape == (2, 3, 8, 8) and patches.dtype is torch.uint8
    assert patches[0, 0].float().mean() > patches[0, 1:].float().mean() + 60, "towards red"
    assert patches[1, 2].float().mean() > patches[1, :2].float().mean() + 60, "towards blue"
    size = torch.full((12,), 0.25)
    plain = framed(images, torch.full((12,), 0.8))
    before = redness(plain).argmax(1)
    after = redness(laid(plain, patches[:1].expand(12, -1, -1, -1).float(), size)).argmax(1)
    assert (after == 0).sum() > (before == 0).sum() and 0 < hit <= 1


def test_a_patch_is_laid_so_that_its_gradient_arrives() -> None:
    images, patch = torch.zeros(1, 1, 20, 20), torch.ones(1, 1, 4, 4, requires_grad=True)
    shown = laid(images, patch, torch.tensor([0.2]))
    assert torch.equal(
        shown, torch.nn.functional.pad(torch.zeros(1, 1, 12, 12), (4, 4, 4, 4)) + shown.detach() * (shown > 0)
    )
    shown.sum().backward()
    assert patch.grad is not None and torch.allclose(patch.grad, torch.full_like(patch, 4.0)), "in four corners"


def test_styles_are_taken_on() -> None:
    paintings, textures = scenes.paintings(2), scenes.textures(2)
    images = torch.nn.functional.interpolate(scenes.pictures(8).float(), size=(32, 32), antialias=True, mode="bilinear")
    losses: list[float] = []
    network = train_styles(
        paintings, textures, images.to(torch.uint8), 60, 4, 0, told=lambda _, loss: losses.append(loss)
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    again = type(network).load(network.save())
    style = torch.arange(4)
    painted = network(images[:4], style)
    assert torch.equal(again(images[:4], style), painted) and (again.pictures, again.textures) == (2, 2)
    assert not torch.allclose(painted, network(images[:4], style.flip(0)), atol=5), "each style is another"
    filters = RandomFilters()
    examples = torch.nn.functional.interpolate(
        torch.cat([paintings, textures]).float(), size=(32, 32), antialias=True, mode="bilinear"
    )
    wanted, now, before = (filters(x / 127.5 - 1) for x in (examples, painted, images[:4]))
    nearer = [
        ((a - w).flatten(1).norm(dim=1) < (b - w).flatten(1).norm(dim=1))
        for a, b, w in zip(now, before, wanted, strict=True)
    ]
    assert torch.stack(nearer).float().mean() > 0.6


def write(uri: str) -> Dataset:
    dataset = Dataset.create(
        uri, Header("scenes", {"image": Field("png", (3, 32, 32)), "label": Field("int")}, 16, 16, ("a", "b"))
    )
    images = scenes.pictures(16)[:, :, ::4, ::4].numpy()
    samples = [{"key": f"{i:08d}", "image": np.ascontiguousarray(x), "label": i % 2} for i, x in enumerate(images)]
    commit_shard(dataset, 0, samples, "test", 0.0)
    return dataset


def test_what_was_learned_is_found_by_the_assets(tmp_path: Path) -> None:
    dataset, store = write(f"{tmp_path}/images"), Store(f"{tmp_path}/run")
    config = LearnConfig(dataset.uri, style_steps=3, style_side=32, styles=2, textures=3)
    found = learn(config, 0, store, World(0, 1, 0, "cpu"), Recorder("a"))
    assert found["style_loss"] > 0 and "patches" not in found
    store.put_once("result.json", to_json(found))
    assets = Assets.load(AssetsConfig(learned=store.uri))
    assert (
        assets.has("styles") and not assets.has("patches") and assets.styles is not None and assets.styles.textures == 3
    )
    images = torch.randint(0, 256, (2, 1, 20, 20), dtype=torch.uint8)
    assert obfuscate("StyleTransfer", images, torch.zeros(2, 3, dtype=torch.int64), 0, assets)[0].shape == images.shape


def test_what_cannot_be_learned_is_said(tmp_path: Path) -> None:
    dataset, store = write(f"{tmp_path}/images"), Store(f"{tmp_path}/run")
    with pytest.raises(UserError, match="There is no run"):
        learn(
            LearnConfig(dataset.uri, classifiers=[f"{tmp_path}/none"]), 0, store, World(0, 1, 0, "cpu"), Recorder("a")
        )

    class Stopping(Recorder):
        def stop_requested(self) -> bool:
            return True

    with pytest.raises(Interrupted):
        learn(LearnConfig(dataset.uri, style_steps=2, style_side=32), 0, store, World(0, 1, 0, "cpu"), Stopping("a"))
    assert LearnConfig(batch=0).problems()
