"""The obfuscations against loops, closed forms, PIL and scipy; what all of them promise."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from rayproj.benchmarks.obfuscation_plain import PLAIN, learned
from rayproj.errors import UserError
from rayproj.obfuscation import (
    CLEAN,
    HELD_OUT,
    OBFUSCATIONS,
    TRAINING,
    Assets,
    chosen,
    obfuscate,
    pixels,
    regenerate,
    scenes,
)
from rayproj.obfuscation.assets import AssetsConfig
from rayproj.obfuscation.base import Harder
from rayproj.obfuscation.colour import ColorNoiseBlocks, Halftoning, LowContrastTriangles
from rayproj.obfuscation.registry import ObfuscateConfig
from rayproj.obfuscation.styles import StyleNetwork

# The names of the benchmark's data, and which of them it holds out.
PUBLISHED = [
    "AdversarialPatches",
    "BackgroundBlurComposition",
    "ColorNoiseBlocks",
    "Halftoning",
    "HighContrastBorder",
    "IconOverlay",
    "ImageOverlay",
    "Interleave",
    "InvertLines",
    "LineShift",
    "PerspectiveTransform",
    "PhotoComposition",
    "RotateBlocks",
    "RotateImage",
    "StyleTransfer",
    "SwirlWarp",
    "TextOverlay",
    "Texturize",
    "WavyColorWarp",
]
PUBLISHED_HELD_OUT = ["ColorPatternOverlay", "LowContrastTriangles", "PerspectiveComposition"]
PERMUTE = ("LineShift", "RotateBlocks")


@pytest.fixture(scope="module")
def assets() -> Assets:
    torch.manual_seed(0)
    patches = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return Assets(scenes.pictures(5), patches, StyleNetwork(2, 3, width=4).eval().requires_grad_(False))


def pictures(n: int = 6, channels: int = 3, height: int = 40, width: int = 40) -> Tensor:
    """Smooth pictures, so that a shift of a thousandth of a pixel is seen as less than a level."""
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.normal(size=(n, channels, height, width)), (0, 0, 2.5, 2.5))
    x = (x - x.min((2, 3), keepdims=True)) / np.ptp(x, axis=(2, 3), keepdims=True)
    return torch.from_numpy((255 * x).round().astype(np.uint8))


def rows(n: int, first: int = 0) -> Tensor:
    return torch.stack(
        [torch.arange(first, first + n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)], 1
    )


def test_what_was_not_learned_cannot_be_all_that_is_asked_for() -> None:
    assert "need the run dir of jobs/learn_obfuscations.py" in ObfuscateConfig(["learned"]).problems()[0]
    assert ObfuscateConfig(["learned", "colour"]).problems() and not ObfuscateConfig(["training"]).problems()
    assert "StyleTransfer" not in chosen(["training"], AssetsConfig()) and "StyleTransfer" in chosen(["training"])


def test_names_and_split_are_those_of_the_benchmark() -> None:
    assert list(TRAINING) == PUBLISHED and list(HELD_OUT) == PUBLISHED_HELD_OUT
    assert list(OBFUSCATIONS) == PUBLISHED + PUBLISHED_HELD_OUT and CLEAN not in OBFUSCATIONS
    assert set(chosen(["colour", "Interleave"])) == {"ColorNoiseBlocks", "Halftoning", "InvertLines", "Interleave"}
    assert chosen(["training"]) == TRAINING and chosen(["all"]) == tuple(OBFUSCATIONS)
    with pytest.raises(UserError, match="no obfuscation 'Blur'"):
        chosen(["Blur"])


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 28, 28), (3, 24, 37), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("name", OBFUSCATIONS)
def test_the_stored_parameters_give_the_same_image_whatever_its_mates(
    name: str, shape: tuple[int, ...], assets: Assets
) -> None:
    images = pictures(5, *shape)
    before = images.clone()
    whole, records = obfuscate(name, images, rows(5), 3, assets)
    assert whole.shape == images.shape and whole.dtype is torch.uint8 and torch.equal(images, before)
    kept = json.loads(json.dumps(records))
    assert torch.equal(regenerate(name, images[[3, 1]], [kept[3], kept[1]], assets), whole[[3, 1]])
    alone, record = obfuscate(name, images[4:], rows(1, 4), 3, assets)
    assert torch.equal(alone, whole[4:]) and record == records[4:]
    other, _ = obfuscate(name, images, rows(5), 4, assets)
    assert not torch.equal(other, whole), "another seed, other parameters"
    assert all((whole[i].float() - images[i].float()).abs().mean() > 0.5 for i in range(5)), "each is changed"


@pytest.mark.parametrize("name", OBFUSCATIONS)
def test_parameters_fill_their_ranges_and_no_more(name: str) -> None:
    kind = OBFUSCATIONS[name]
    drawn = kind.draw(rows(2000), 0)
    for field, r in kind.ranges().items():
        values = getattr(drawn, field).double()
        assert values.shape == ((2000, r.count) if r.count else (2000,))
        assert values.min() >= r.low - 1e-6 and values.max() <= r.high + 1e-6
        unit = (values - r.low) / (r.high - r.low)
        assert abs(float(unit.mean()) - 0.5) < 0.04 and unit.max() > 0.97 and unit.min() < 0.03
    with pytest.raises(UserError, match=f"{name} has the parameters"):
        kind.of([{"strength": 1.0, "of": 2}])


@pytest.mark.parametrize("name", OBFUSCATIONS)
def test_a_severity_is_a_fifth_of_each_strength_and_all_of_them_are_its_range(name: str) -> None:
    kind, draws = OBFUSCATIONS[name], 400
    whole, by = kind.draw(rows(draws), 0), [kind.draw(rows(draws), 0, severity) for severity in range(1, 6)]
    graded = {field: r for field, r in kind.ranges().items() if r.harder is not Harder.none}
    for field, r in kind.ranges().items():
        if field not in graded:
            assert all(torch.equal(getattr(one, field), getattr(whole, field)) for one in by), "what is no strength"
            continue
        unit = [(getattr(one, field).double() - r.low) / (r.high - r.low) for one in by]
        inner, outer = ([(u - 0.5).abs().aminmax() for u in unit][k] for k in (0, 4))
        for severity, u in enumerate(unit, 1):
            place = {
                Harder.more: u, Harder.less: 1 - u, Harder.outer: 2 * (u - 0.5).abs(), Harder.inner: 1 - 2 * (u - 0.5).abs()
            }[r.harder]  # fmt: skip
            assert place.min() >= (severity - 1) / 5 - 1e-5 and place.max() <= severity / 5 + 1e-5
            assert place.max() - place.min() > 0.18, "as far as the fifth goes"
            assert r.harder in (Harder.more, Harder.less) or (u > 0.5).double().mean().sub(0.5).abs() < 0.1
        assert (inner.max < outer.min) == (r.harder is Harder.outer)
    assert graded, "each can be made stronger"


def records_of(name: str, seed: int = 0, n: int = 6, **fixed: Any) -> list[dict[str, Any]]:
    return [{**record, **fixed} for record in OBFUSCATIONS[name].draw(rows(n), seed).records()]


@pytest.mark.parametrize("name", PERMUTE)
@pytest.mark.parametrize("size", [(40, 40), (33, 50)])
def test_what_moves_pixels_loses_none(name: str, size: tuple[int, int], assets: Assets) -> None:
    images = pictures(6, 3, *size)
    changed, _ = obfuscate(name, images, rows(6), 0, assets)
    assert torch.equal(changed.flatten(2).sort()[0], images.flatten(2).sort()[0])


def test_lines_are_shifted_as_in_a_loop(assets: Assets) -> None:
    images = pictures(6, 3, 40, 50)
    records = records_of("LineShift")
    changed = regenerate("LineShift", images, records, assets).numpy()
    for i, r in enumerate(records):
        width, shift = max(1, round(r["width"] * 40)), max(1, round(r["shift"] * 40))
        x = images[i].numpy() if not r["across"] else images[i].numpy().transpose(0, 2, 1)
        expected = np.stack(
            [np.roll(x[:, k], -shift if k // width % 2 == 0 else shift, 1) for k in range(x.shape[1])], 1
        )
        assert np.array_equal(changed[i], expected if not r["across"] else expected.transpose(0, 2, 1))


def test_blocks_are_turned_by_quarters(assets: Assets) -> None:
    images = pictures(6, 3, 40, 50)
    records = records_of("RotateBlocks", size=0.1)
    changed = regenerate("RotateBlocks", images, records, assets).numpy()
    seen = set()
    for i in range(6):
        for y in range(0, 40, 4):
            for x in range(0, 48, 4):
                block, found = images[i, :, y : y + 4, x : x + 4].numpy(), changed[i, :, y : y + 4, x : x + 4]
                turns = [k for k in range(4) if np.array_equal(np.rot90(block, k, (1, 2)), found)]
                assert turns and turns != [0]
                seen |= set(turns)
        assert np.array_equal(changed[i, :, :, 48:], images[i, :, :, 48:].numpy()), "what fills no block stays"
    assert {1, 2, 3} <= seen


def test_lines_inverted_twice_are_as_before(assets: Assets) -> None:
    images, records = pictures(), records_of("InvertLines")
    once = regenerate("InvertLines", images, records, assets)
    assert torch.equal(regenerate("InvertLines", once, records, assets), images)
    i, r = next((i, r) for i, r in enumerate(records) if not r["across"])
    width = max(1, round(r["width"] * 40))
    inverted = np.arange(40) // width % 2 == (1 - r["first"])
    assert np.array_equal(
        once[i].numpy(), np.where(inverted[None, :, None], 255 - images[i].numpy(), images[i].numpy())
    )


def test_offsets_of_blocks_touch_one_channel(assets: Assets) -> None:
    images = torch.full((40, 3, 40, 40), 128, dtype=torch.uint8)
    records = records_of("ColorNoiseBlocks", n=40, size=0.1, share=0.7, strength=0.5)
    moved = regenerate("ColorNoiseBlocks", images, records, assets).int() - 128
    blocks = moved.unfold(2, 4, 4).unfold(3, 4, 4)
    assert (blocks.amax((4, 5)) == blocks.amin((4, 5))).all(), "the same within a block"
    channels = (blocks[..., 0, 0] != 0).sum(1)
    assert channels.max() == 1 and abs(float(channels.float().mean()) - 0.7) < 0.02
    assert moved.abs().max() <= 64 * 2 and abs(float(moved[moved != 0].float().mean())) < 3
    bright = regenerate("ColorNoiseBlocks", torch.full_like(images, 250), records, assets)
    assert bright.max() == 255, "cut at white, not wrapped around"
    assert isinstance(OBFUSCATIONS["ColorNoiseBlocks"].of(records), ColorNoiseBlocks)


@pytest.mark.parametrize("method", range(4))
@pytest.mark.parametrize("level", [20, 100, 128, 200, 240])
def test_a_halftone_is_as_bright_as_its_image(method: int, level: int, assets: Assets) -> None:
    images = torch.full((1, 1, 720, 720), level, dtype=torch.uint8)
    printed = regenerate("Halftoning", images, records_of("Halftoning", n=1, method=method, size=1 / 9), assets)
    assert set(printed.unique().tolist()) <= {0, 255}
    assert printed.float().mean() == pytest.approx(level, abs=255 * 0.03)
    assert Halftoning.draw(rows(1), 0).records()


def test_means_of_blocks_against_a_loop() -> None:
    images, sizes = pictures(3, 2, 19, 23), torch.tensor([2, 5, 7])
    for offset in (0, 1):
        found = pixels.block_means(images, sizes, offset).numpy()
        for i, s in enumerate(sizes.tolist()):
            for y in range(19):
                for x in range(23):
                    top, left = ((p + offset) // s * s - offset for p in (y, x))
                    block = images[i, :, max(0, top) : top + s, max(0, left) : left + s].numpy()
                    assert found[i, :, y, x] == pytest.approx(block.mean((1, 2)), rel=1e-6)


def test_triangles_lower_contrast_each_about_its_grey(assets: Assets) -> None:
    images = pictures()
    records = records_of("LowContrastTriangles")
    changed = regenerate("LowContrastTriangles", images, records, assets).float()
    for i, r in enumerate(records):
        candidates = [
            level + c * (images[i].float() - level) for level, c in zip(r["level"], r["contrast"], strict=True)
        ]
        distance = torch.stack([(changed[i] - c).abs() for c in candidates]).amax(1)
        nearest = distance.min(0)
        assert nearest[0].max() <= 0.51 and len(nearest[1].unique()) == 3
    flat = regenerate("LowContrastTriangles", images, [{**r, "contrast": [1.0] * 3} for r in records], assets)
    assert (flat.int() - images.int()).abs().max() <= 1
    assert LowContrastTriangles.held_out


def interpolated(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear, black outside, as scipy has it: [C, H, W]."""
    return np.stack([ndimage.map_coordinates(c.astype(float), [y, x], order=1, mode="grid-constant") for c in image])


def test_the_image_is_rotated_as_pil_and_numpy_do_it(assets: Assets) -> None:
    images, records = pictures(6, 3, 41, 41), records_of("RotateImage")
    changed = regenerate("RotateImage", images, records, assets).numpy().astype(int)
    for i, r in enumerate(records):
        picture = Image.fromarray(images[i].numpy().transpose(1, 2, 0))
        expected = np.asarray(picture.rotate(r["angle"], Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
        inside = np.hypot(*np.meshgrid(np.arange(41) - 20, np.arange(41) - 20)) < 18
        assert np.abs(changed[i] - expected)[:, inside].max() <= 2, "PIL is exact to a level"
    quarter = regenerate("RotateImage", images, records_of("RotateImage", angle=90.0), assets).numpy()
    assert np.array_equal(quarter, np.rot90(images.numpy(), 1, (2, 3)))


def test_a_swirl_is_scikit_images(assets: Assets) -> None:
    """By its formula: strength * exp(-rho / radius') with radius' = radius / (5 ln 2)."""
    images, records = pictures(6, 3, 40, 50), records_of("SwirlWarp")
    changed = regenerate("SwirlWarp", images, records, assets)
    y, x = np.mgrid[:40, :50].astype(float)
    for i, r in enumerate(records):
        cx, cy = r["centre"][0] * 49, r["centre"][1] * 39
        rho, theta = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
        strength = r["strength"] * (-1 if r["clockwise"] else 1)
        theta = theta + strength * np.exp(-rho / (r["radius"] * 40 / 5 / math.log(2)))
        expected = interpolated(images[i].numpy(), cy + rho * np.sin(theta), cx + rho * np.cos(theta))
        # skimage turns (x, y) by +theta, and so does y sin + ...: the same up to the sense of rotation.
        mirrored = interpolated(images[i].numpy(), cy + rho * np.sin(2 * np.arctan2(y - cy, x - cx) - theta),
                                cx + rho * np.cos(2 * np.arctan2(y - cy, x - cx) - theta))  # fmt: skip
        assert min(np.abs(changed[i].numpy() - e).max() for e in (expected, mirrored)) <= 0.6


def test_a_perspective_takes_its_points_where_it_says(assets: Assets) -> None:
    """Against a homography that is solved as eight equations for each image."""
    images, records = pictures(6, 3, 40, 50), records_of("PerspectiveTransform")
    changed = regenerate("PerspectiveTransform", images, records, assets)
    centres = (
        np.array([[0.25 * 50, 0.25 * 40], [0.75 * 50, 0.25 * 40], [0.75 * 50, 0.75 * 40], [0.25 * 50, 0.75 * 40]]) - 0.5
    )
    y, x = np.mgrid[:40, :50].astype(float)
    for i, r in enumerate(records):
        moved = centres + 40 * np.array(r["moved"]).reshape(4, 2)
        a = np.zeros((8, 9))
        for k, ((px, py), (qx, qy)) in enumerate(zip(moved, centres, strict=True)):
            a[2 * k] = [px, py, 1, 0, 0, 0, -qx * px, -qx * py, -qx]
            a[2 * k + 1] = [0, 0, 0, px, py, 1, -qy * px, -qy * py, -qy]
        h = np.linalg.svd(a)[2][-1].reshape(3, 3)
        u, v, w = np.einsum("ij,jhw->ihw", h / h[2, 2], np.stack([x, y, np.ones_like(x)]))
        expected = np.where(w > 0, interpolated(images[i].numpy(), v / w, u / w), 0)
        assert np.abs(changed[i].numpy() - expected).max() <= 0.6
        assert (changed[i] > 0).float().mean() > 0.3, "most of it is seen"


def test_waves_against_scipy(assets: Assets) -> None:
    images, records = pictures(3, 3, 40, 50), records_of("WavyColorWarp", n=3, hue=0.0)
    changed = regenerate("WavyColorWarp", images, records, assets)
    y, x = np.mgrid[:40, :50].astype(float)
    for i, r in enumerate(records):
        for c in range(3):
            phase = [r["phase"][k] + c * r["lag"] for k in (0, 1)]
            dy = r["height"][0] * 40 * np.sin(phase[0] + 2 * np.pi * r["waves"][0] * x / 50)
            dx = r["height"][1] * 40 * np.sin(phase[1] + 2 * np.pi * r["waves"][1] * y / 40)
            place = [np.clip(y + dy, 0, 39), np.clip(x + dx, 0, 49)]
            expected = ndimage.map_coordinates(images[i, c].numpy().astype(float), place, order=1, mode="nearest")
            assert np.abs(changed[i, c].numpy() - expected).max() <= 0.6


def test_hues_are_turned_about_grey() -> None:
    x = torch.rand(4, 3, 5, 5) * 255
    third = pixels.hue_turned(x, torch.full((4,), 120.0))
    torch.testing.assert_close(third, x.roll(1, 1), rtol=1e-4, atol=1e-2)
    turned = pixels.hue_turned(x, torch.tensor([10.0, 77.0, 180.0, 300.0]))
    torch.testing.assert_close(turned.mean(1), x.mean(1)), "brightness stays"
    torch.testing.assert_close(turned.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1.0)
    pure = pixels.saturated(torch.tensor([0.0, 1 / 3, 2 / 3]), 3)[:, :, 0, 0]
    assert torch.equal(pure.round(), 255 * torch.eye(3))


@pytest.mark.parametrize("name", ["BackgroundBlurComposition", "PhotoComposition"])
def test_the_small_copy_is_the_image(name: str, assets: Assets) -> None:
    images = pictures(6, 3, 80, 80)
    records = records_of(name, size=0.4, place=[0.0, 1.0])
    changed = regenerate(name, images, records, assets)
    corner = changed[:, :, :32, 48:].float()
    expected = torch.nn.functional.interpolate(images.float(), size=32, mode="bilinear", antialias=True)
    assert (corner - expected).abs().mean() < 2.5
    outside = changed[:, :, 40:].float()
    if name == "PhotoComposition":
        bank = assets.photos(torch.tensor([r["photo"] for r in records]), images.shape[1:])
        assert torch.equal(changed[:, :, 32:], bank[:, :, 32:])
    else:
        assert (outside - images[:, :, 40:].float()).abs().mean() < 60
        rough = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean()  # noqa: E731
        assert rough(outside) < 0.5 * rough(images.float())


def test_blur_against_scipy() -> None:
    images = pictures(2, 3, 48, 48)
    found = pixels.blurred(images, torch.tensor([0.05, 0.1]))
    for i, sigma in enumerate((0.05 * 48, 0.1 * 48)):
        weight = ndimage.gaussian_filter(np.ones((48, 48)), sigma, mode="constant", truncate=8)
        expected = [
            ndimage.gaussian_filter(c.numpy().astype(float), sigma, mode="constant", truncate=8) / weight
            for c in images[i]
        ]
        assert np.abs(found[i].numpy() - np.stack(expected)).max() < 0.2


def test_the_border_is_noise_of_the_full_range_and_the_inside_faint(assets: Assets) -> None:
    images = pictures(6, 3, 80, 80)
    records = records_of("HighContrastBorder", size=0.5, contrast=0.2, level=128.0)
    changed = regenerate("HighContrastBorder", images, records, assets)
    border = changed[:, :, :19].float()
    assert abs(float(border.mean()) - 127.5) < 3 and abs(float(border.std()) - 255 / math.sqrt(12)) < 2
    inside = changed[:, :, 20:60, 20:60].float()
    assert (inside - 128).abs().max() <= 0.2 * 128 + 1
    assert not torch.equal(changed[0, :, :19], changed[1, :, :19])


def test_perspective_composition_keeps_the_image_within_its_corners(assets: Assets) -> None:
    images = torch.full((6, 3, 60, 60), 255, dtype=torch.uint8)
    records = records_of("PerspectiveComposition", corners=[0.25] * 8)
    changed = regenerate("PerspectiveComposition", images, records, assets)
    bank = assets.photos(torch.tensor([r["photo"] for r in records]), images.shape[1:])
    inner = torch.zeros(60, 60, dtype=torch.bool)
    inner[15:45, 15:45] = True
    assert (changed[:, :, inner] == 255).all() and torch.equal(changed[:, :, ~inner], bank[:, :, ~inner])


def test_overlays_at_their_ends(assets: Assets) -> None:
    images = pictures()
    photo = assets.photos(torch.full((6,), 3), images.shape[1:])
    for opacity, expected in ((0.0, images), (1.0, photo)):
        records = records_of("ImageOverlay", opacity=opacity, photo=3)
        assert torch.equal(regenerate("ImageOverlay", images, records, assets), expected)
    for name in ("IconOverlay", "TextOverlay"):
        assert torch.equal(regenerate(name, images, records_of(name, opacity=0.0), assets), images)
    records = records_of("IconOverlay", opacity=1.0, count=4, hue=1 / 3)
    changed = regenerate("IconOverlay", images, records, assets)
    weight = (changed - images).abs().sum(1) > 0
    cells = weight.unfold(1, 10, 10).unfold(2, 10, 10)
    assert (cells == cells[:, :1, :1]).float().mean() > 0.95, "the same icon in every cell"
    assert 0.02 < weight.float().mean() < 0.7


def test_interleaving_takes_bands_in_turn(assets: Assets) -> None:
    images, records = pictures(), records_of("Interleave")
    changed = regenerate("Interleave", images, records, assets).numpy()
    bank = assets.photos(torch.tensor([r["photo"] for r in records]), images.shape[1:]).numpy()
    for i, r in enumerate(records):
        band = np.arange(40) // max(1, round(r["width"] * 40)) % 2 == 1
        mask = band[None, None, :] if r["across"] else band[None, :, None]
        assert np.array_equal(changed[i], np.where(mask, bank[i], images[i].numpy()))


def test_a_text_is_repeated_without_a_seam(assets: Assets) -> None:
    """Along a line the text has the period of its bank, and lines repeat."""
    v, u = torch.meshgrid(torch.arange(96) / 48, torch.arange(1200) / 48, indexing="ij")
    for number in range(8):
        shown = assets.texts(torch.tensor([number]), v[None], u[None])[0, 0]
        assert torch.equal(shown[:48], shown[48:]) and 0.03 < shown.mean() < 0.5


def test_patterns_have_their_colour_and_the_rest_a_tint(assets: Assets) -> None:
    images = torch.full((6, 3, 60, 60), 100, dtype=torch.uint8)
    records = records_of("ColorPatternOverlay", hue=0.0, opacity=0.75, tint=0.2)
    changed = regenerate("ColorPatternOverlay", images, records, assets)
    assert set(changed[:, 0].unique().tolist()) == {131, 216} and set(changed[:, 1].unique().tolist()) == {25, 80}
    assert {r["pattern"] for r in records} <= {0, 1, 2}


def test_the_patch_is_in_all_four_corners(assets: Assets) -> None:
    images = pictures(6, 3, 80, 80)
    records = records_of("AdversarialPatches", patch_size=0.2, patch=1)
    changed = regenerate("AdversarialPatches", images, records, assets)
    corners = [changed[:, :, y, x] for y in (slice(16), slice(64, 80)) for x in (slice(16), slice(64, 80))]
    assert assets.patches is not None
    assert all(torch.equal(c, assets.patches[1].expand_as(c)) for c in corners)


def test_styles_are_mixed_as_strongly_as_drawn(assets: Assets) -> None:
    images = pictures()
    assert torch.equal(regenerate("StyleTransfer", images, records_of("StyleTransfer", strength=0.0), assets), images)
    grey = regenerate("Texturize", images, records_of("Texturize", colour=0.0), assets)
    assert (grey.amax(1) == grey.amin(1)).all()


def test_what_was_not_learned_is_said() -> None:
    bare = Assets(scenes.pictures(1))
    for name in ("AdversarialPatches", "StyleTransfer", "Texturize"):
        with pytest.raises(UserError, match=f"{name} needs .* jobs/learn_obfuscations.py"):
            obfuscate(name, pictures(1), rows(1), 0, bare)


# Mean difference in levels from what PIL, NumPy and SciPy make by the same parameters; of random blocks, small icons and
# texts none can be said.
ALIKE = {
    "BackgroundBlurComposition": 8, "Halftoning": 1, "ImageOverlay": 1, "Interleave": 0, "InvertLines": 0, "LineShift": 0,
    "PerspectiveTransform": 3, "PhotoComposition": 8, "RotateImage": 3, "SwirlWarp": 1, "WavyColorWarp": 1,
    "ColorPatternOverlay": 1, "LowContrastTriangles": 1, "PerspectiveComposition": 5,
    "AdversarialPatches": 8, "StyleTransfer": 1, "Texturize": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_the_benchmark_measures_against_the_same_thing(name: str, assets: Assets) -> None:
    images, records = pictures(6, 3, 96, 96), records_of(name)
    photos = [
        np.ascontiguousarray(x.permute(1, 2, 0).numpy()) for x in assets.photos(torch.arange(5), images.shape[1:])
    ]
    assert assets.patches is not None and assets.styles is not None
    patches = [np.ascontiguousarray(x) for x in assets.patches.permute(0, 2, 3, 1).numpy()]
    peers = PLAIN | learned(patches, assets.styles)
    ours = regenerate(name, images, records, assets).permute(0, 2, 3, 1).numpy().astype(float)
    for i, record in enumerate(records):
        plain = peers[name](np.ascontiguousarray(images[i].permute(1, 2, 0).numpy()), record, photos)
        assert np.abs(ours[i] - plain).mean() <= ALIKE[name] + 0.05


@pytest.mark.parametrize("name", ["HighContrastBorder", "SwirlWarp", "AdversarialPatches"])
def test_what_is_done_in_parts_is_the_same(name: str, assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(7)
    whole, records = obfuscate(name, images, rows(7), 0, assets)
    monkeypatch.setattr("rayproj.obfuscation.base.AT_ONCE", 2 * images[0].numel())
    assert torch.equal(regenerate(name, images, records, assets), whole)
