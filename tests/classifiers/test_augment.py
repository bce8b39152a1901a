"""Random changes of images, against loops and PIL."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from torch import Tensor

from rayproj import keyed
from rayproj.classifiers.augment import (
    OPERATIONS,
    AugmentConfig,
    augmented,
    coloured,
    cropped,
    crops,
    rand_augmented,
    shifted_and_flipped,
)
from rayproj.obfuscation import Assets, AssetsConfig, ObfuscateConfig, obfuscate


def rows(n: int, step: int = 0) -> Tensor:
    return torch.stack([torch.arange(n), torch.full((n,), step), torch.zeros(n, dtype=torch.long)], 1)


def drawn(n: int, channels: int = 3, side: int = 12) -> Tensor:
    return torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_shifts_and_flips_written_out() -> None:
    images, row = torch.randint(0, 256, (40, 2, 9, 7), dtype=torch.uint8), rows(40)
    found = shifted_and_flipped(images, row, 5, 2, True)
    draws = keyed.uniform(5, "augment", row, (3,))
    for i in range(40):
        dy, dx = (int(u * 5) - 2 for u in draws[i, :2])
        y = np.clip(np.arange(9) + dy, 0, 8)
        x = np.clip(np.arange(7) + dx, 0, 6)
        x = x[::-1] if draws[i, 2] < 0.5 else x
        assert np.array_equal(found[i].numpy(), images[i].numpy()[:, y][:, :, x])
    assert torch.equal(shifted_and_flipped(images, row, 5, 0, False), images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(colour=0.8),
        AugmentConfig(rand_augment=2),
        AugmentConfig(1, False),
        AugmentConfig(0, False, [0.08, 1.0]),
        AugmentConfig(0, False, obfuscate=ObfuscateConfig(["training"], share=0.9)),
    ],
)
def test_an_image_is_changed_alike_whatever_its_mates(channels: int, config: AugmentConfig) -> None:
    images = drawn(16, channels)
    whole = augmented(images, rows(16), 3, config)
    assert whole.shape == images.shape and whole.dtype is torch.uint8
    torch.testing.assert_close(augmented(images[5:9], rows(16)[5:9], 3, config), whole[5:9], rtol=0, atol=1)
    assert not torch.equal(augmented(images, rows(16, step=1), 3, config), whole), "another step, another change"


@pytest.mark.parametrize(
    ("size", "area", "ratio"),
    [((20, 31), [0.08, 1.0], [3 / 4, 4 / 3]), ((31, 20), [1.0, 1.0], [2.0, 3.0]), ((9, 40), [0.9, 1.0], [0.5, 2.0])],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_pils_of_the_parts_that_torchvision_would_take(
    size: tuple[int, int], area: list[float], ratio: list[float], channels: int
) -> None:
    (height, width), row, none = size, rows(60, step=4), 0
    images = torch.randint(0, 256, (60, channels, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    found = cropped(images, row, 5, area, ratio).numpy()
    for i, tries in enumerate(keyed.uniform(5, "crop", row, (10, 4)).tolist()):
        for share, shape, y, x in tries:
            pixels = height * width * (area[0] + share * (area[1] - area[0]))
            wide = np.exp(np.log(ratio[0]) + shape * np.log(ratio[1] / ratio[0]))
            w, h = round(np.sqrt(pixels * wide)), round(np.sqrt(pixels / wide))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
                break
        else:
            none, w, h = none + 1, width, height
            if width / height < ratio[0]:
                h = round(width / ratio[0])
            elif width / height > ratio[1]:
                w = round(height * ratio[1])
            top, left = (height - h) // 2, (width - w) // 2
        picture = Image.fromarray(images[i, 0].numpy() if channels == 1 else np.moveaxis(images[i].numpy(), 0, 2))
        part = picture.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BILINEAR)
        expected = np.asarray(part)[None] if channels == 1 else np.moveaxis(np.asarray(part), 2, 0)
        assert np.abs(found[i].astype(int) - expected.astype(int)).max() <= 1, "PIL rounds after each axis"
    assert (none > 0) == (area[0] > 0.5), "where no part has the ratio and the area, the middle is taken"


def test_areas_ratios_and_places_of_crops_are_even() -> None:
    side, n = 4096, 4000  # a part of at most 3/4 of the area is inside at the first try
    top, left, height, width = (crops(rows(n), 9, (side, side), [0.1, 0.75], [3 / 4, 4 / 3]).double().numpy()).T
    even = [(height * width / side**2 - 0.1) / 0.65, np.log(width / height * 4 / 3) / np.log(16 / 9)]
    even += [top / (side - height + 1), left / (side - width + 1)]
    assert all(stats.kstest(of, "uniform").pvalue > 0.01 for of in even)
    whole = drawn(20)
    assert torch.equal(cropped(whole, rows(20), 0, [1.0, 1.0], [1.0, 1.0]), whole)


def test_colours_at_strength_zero_stay() -> None:
    images = drawn(8)
    assert (coloured(images, rows(8), 0, 1e-9).int() - images.int()).abs().max() <= 1


def test_a_turn_of_hue_leaves_grey_and_turns_colours() -> None:
    grey = torch.full((50, 3, 4, 4), 120, dtype=torch.uint8)
    changed = coloured(grey, rows(50), 0, 1.0).float()
    assert (changed.std(1) < 1).all(), "grey has no hue"
    assert changed.mean((1, 2, 3)).std() > 10, "but brightness"
    red = torch.zeros(200, 3, 2, 2, dtype=torch.uint8)
    red[:, 0], red[:, 1:] = 160, 80
    hues = [colorsys.rgb_to_hsv(*(coloured(red, rows(200), 0, 0.5)[i, :, 0, 0] / 255).tolist())[0] for i in range(200)]
    turned = np.minimum(np.array(hues), 1 - np.array(hues))
    assert 0.02 < turned.mean() < 0.12 and turned.max() < 0.2


def test_operations_are_drawn_evenly_and_are_pils() -> None:
    images, n = drawn(300), len(OPERATIONS)
    draw = keyed.uniform(7, "rand_augment", rows(300), (1, 2)).numpy()[:, 0]
    found = rand_augmented(images, rows(300), 7, 1, 9.0).numpy()
    names, seen = list(OPERATIONS), set()
    for i in range(300):
        name = names[int(draw[i, 0] * n)]
        seen.add(name)
        picture = Image.fromarray(np.moveaxis(images[i].numpy(), 0, 2))
        if name == "identity":
            expected = picture
        elif name == "equalize":
            expected = ImageOps.equalize(picture)
        elif name == "solarize":
            expected = ImageOps.solarize(picture, round(256 * 0.7))
        elif name == "translate x":
            by = (1 if draw[i, 1] >= 0.5 else -1) * 0.45 * 0.3 * 12
            expected = picture.transform((12, 12), Image.Transform.AFFINE, (1, 0, by, 0, 1, 0),
                                         Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))  # fmt: skip
        else:
            continue
        assert np.array_equal(found[i], np.moveaxis(np.asarray(expected), 2, 0)), name
    assert seen == set(names)


def test_the_magnitude_is_how_far_it_goes() -> None:
    images = drawn(100)
    far = [(rand_augmented(images, rows(100), 1, 1, m).float() - images.float()).abs().mean() for m in (3.0, 27.0)]
    assert far[0] < far[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": 1.5}, {"magnitude": 31.0}, {"shift": -1}, {"rand_augment": -1}, {"crop": [0.5]}, {"crop": [0.0, 1.0]},
        {"crop": [0.5, 1.1]}, {"crop": [0.9, 0.5]}, {"crop_ratio": [0.0, 1.0]}, {"crop_ratio": [2.0, 1.0]},
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(wrong: dict[str, object]) -> None:
    assert AugmentConfig(**wrong).problems() and not AugmentConfig().problems()  # type: ignore[arg-type]


def test_a_share_of_images_is_obfuscated_each_by_one_of_the_names() -> None:
    names, images, row = ["InvertLines", "LineShift", "RotateImage"], drawn(300), rows(300)
    config = AugmentConfig(0, False, obfuscate=ObfuscateConfig(names, share=0.4))
    changed = augmented(images, row, 7, config)
    ways = [obfuscate(name, images, row, 7, Assets.load(AssetsConfig()))[0] for name in names]
    same = [(changed == other).flatten(1).all(1) for other in (images, *ways)]
    assert (torch.stack(same).sum(0) >= 1).all(), "as it was, or as one of them makes it"
    shares = [float(s.float().mean()) for s in same]
    assert abs(shares[0] - 0.6) < 0.08 and all(abs(s - 0.4 / 3) < 0.07 for s in shares[1:])
    assert torch.equal(augmented(images, row, 7, AugmentConfig(0, False)), images)


def test_what_is_left_out_is_never_drawn_and_weights_say_how_often_the_rest_is() -> None:
    images, row = drawn(400), rows(400)
    given = ObfuscateConfig(["transformation", "held_out"], 1.0, ["held_out", "SwirlWarp"], {"LineShift": 3.0})
    assert given.drawn == ("LineShift", "PerspectiveTransform", "RotateBlocks", "RotateImage", "WavyColorWarp")
    changed = augmented(images, row, 7, AugmentConfig(0, False, obfuscate=given))
    for name, weight in zip(given.drawn, (3, 1, 1, 1, 1), strict=True):
        way = obfuscate(name, images, row, 7, Assets.load(AssetsConfig()))[0]
        assert abs(float((changed == way).flatten(1).all(1).float().mean()) - weight / 7) < 0.07, name


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"names": ["SwirlWarp"], "without": ["transformation"]}, "leaves none"),
        ({"names": ["SwirlWarp"], "weights": {"LineShift": 2.0}}, "'LineShift', which is not drawn"),
        ({"names": ["SwirlWarp"], "weights": {"SwirlWarp": 0.0}}, "must be positive"),
        ({"names": ["SwirlWarp"], "without": ["Blur"]}, "no obfuscation 'Blur'"),
        ({"names": ["Blurring"]}, "no obfuscation 'Blurring'"),
        ({"names": ["StyleTransfer"]}, "StyleTransfer needs the run dir"),
        ({"share": 1.5}, "must lie in"),
    ],
)
def test_obfuscations_that_cannot_be_had(wrong: dict[str, object], said: str) -> None:
    assert said in ObfuscateConfig(**wrong).problems()[0]  # type: ignore[arg-type]
    assert not ObfuscateConfig(["all"]).problems(), "of sets, what was not learned is left out"
