import numpy as np
import pytest
import torch
from rayproj.jobs.train_classifier import Config, worker
from scipy.stats import beta

from rayproj import classifiers
from rayproj import config as configuration
from rayproj.classifiers.adversary import ThreatConfig
from rayproj.data.dataset import Dataset, Field, Header
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.diffusion.sampling import SamplerConfig
from rayproj.diffusion.task import TrainedModel
from rayproj.engine.checkpoint import commits
from rayproj.errors import UserError
from rayproj.robustness.adaptive import AdaptiveConfig
from rayproj.robustness.autoattack import Attack, AttackConfig
from rayproj.robustness.checks import Checker, Checks, gathered
from rayproj.robustness.checks import header_of as header_of_checks
from rayproj.robustness.job import (
    COLUMNS,
    FROM_IMAGES,
    Attacker,
    DefenceConfig,
    DefenceKind,
    RobustnessConfig,
    builder,
    header_of,
    share,
    summary,
)
from rayproj.robustness.oracle import OfUnit
from rayproj.robustness.threats import Norm
from rayproj.storage.store import Store
from tests.support import runs
from tests.support.linear import digits
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder


def write(uri: str, part: slice) -> None:
    x, label = digits()
    images, labels = (255 * x[part]).round().byte().numpy(), label[part].numpy()
    fields = {"image": Field("png", (1, 8, 8)), "label": Field("int")}
    dataset = Dataset.create(uri, Header("digits", fields, len(images), 64, tuple("0123456789")))
    for shard in range(dataset.header.num_shards):
        samples = [
            {"key": f"{i}", "image": images[i], "label": int(labels[i])} for i in dataset.header.shard_range(shard)
        ]
        commit_shard(dataset, shard, samples, "test", 0.0)


def train(world, folder: str) -> None:  # type: ignore[no-untyped-def]
    values = {
        "data": f"{folder}/train",
        "augment": {"shift": 0, "flip": False},
        "classifier": {"channels": [16, 32], "dropout": 0.0},
        "train": {"steps": 120, "batch": 64, "engine": {"ema": 0.9, "optimizer": {"lr": 5e-3}}},
        "run": {"dir": f"{folder}/run"},
    }
    config = configuration.from_dict(Config, values)
    Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
    worker(configuration.to_dict(config), world, Recorder("a"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("robustness"))
    write(f"{path}/train", slice(0, 900))
    write(f"{path}/test", slice(900, 1000))
    run_ranks(train, 1, path)
    return path


def config_of(folder: str) -> RobustnessConfig:
    return RobustnessConfig(
        test=f"{folder}/test",
        out=f"{folder}/attacked",
        classifiers={"plain": f"{folder}/run"},
        defences={
            "anti": DefenceConfig("plain", DefenceKind.anti_adversary, {"steps": 2}),
            "noisy": DefenceConfig("plain", DefenceKind.noise),
        },
        threats={"linf": ThreatConfig(Norm.linf, 0.08), "l1": ThreatConfig(Norm.l1, 2.0)},
        attack=AttackConfig([Attack.apgd_ce, Attack.apgd_t], steps=10, targets=2),
        adaptive=AdaptiveConfig(steps=5, draws=2, votes=3, queries=20, radii=[0.01, 30.0], defence_steps=[1]),
        radii=[0.5, 1.0, 3.0],
        examples=60,
        shard_size=20,
    )


def made(config: RobustnessConfig, name: str, shards: range | None = None, out: str = "") -> Dataset:
    dataset = Dataset.create(out or f"{config.out}/{name}", header_of(config, name, 0))
    attacker = Attacker({"out": dataset.uri}, "cpu")
    for shard in shards or range(dataset.header.num_shards):
        commit_shard(dataset, shard, attacker.make(shard), "test", 0.0)
    return dataset


def checked(config: RobustnessConfig, attacked: dict[str, Dataset]) -> Checks:
    dataset = Dataset.create(f"{config.out}/checks-{'-'.join(attacked)}", header_of_checks(config, attacked, 0))
    checker = Checker({"out": dataset.uri}, "cpu")
    for shard in range(dataset.header.num_shards):
        commit_shard(dataset, shard, checker.make(shard), "test", 0.0)
    return gathered(dataset)


def test_the_tables_are_what_the_attacked_images_say(folder: str) -> None:
    config = config_of(folder)
    dataset = made(config, "plain")
    found, model = summary(dataset), classifiers.load(f"{folder}/run", "cpu")
    columns = Reader(dataset).gather(np.arange(60))
    clean = Reader(Dataset.open(config.test), ["image"]).gather(np.arange(60))["image"]
    x, label = torch.from_numpy(clean).float() / 255, torch.from_numpy(columns["label"])
    assert found["clean"]["value"] == (model(255 * x).argmax(1) == label).double().mean().item() > 0.8
    broken = torch.zeros(60, dtype=torch.bool)
    for name, threat in config.threats.items():
        images = torch.from_numpy(columns[f"{name}_image"])
        assert threat.threat.holds(x, images).all()
        wrong = model(255 * images).argmax(1) != label
        assert wrong.tolist() == (columns[f"{name}_by"] != "").tolist()
        one = found["threats"][name]
        assert one["robust"]["value"] == pytest.approx(1 - wrong.float().mean().item())
        assert sum(one["by"].values()) == pytest.approx(wrong.float().mean().item())
        curve = [point["value"] for point in one["curve"]]
        assert curve[0] > curve[1] > curve[2] and one["curve"][1]["radius"] == pytest.approx(threat.eps)
        broken |= wrong
    assert found["union"]["value"] == pytest.approx(1 - broken.float().mean().item())
    assert 0 < found["union"]["value"] < found["clean"]["value"]


def test_a_shard_is_the_same_whoever_makes_it_and_in_whatever_order(folder: str) -> None:
    config = config_of(folder)
    there, again = (made(config, "plain", shards, f"{folder}/{shards}") for shards in (range(3), range(2, 3)))
    assert again.records()[2].sha256 == there.records()[2].sha256


def test_a_defence_that_comes_later_leaves_what_is_there_as_it_was(folder: str) -> None:
    config = config_of(folder)
    before = {name: header_of(config, name, 0) for name in ("plain", "noisy")}
    config.defences["later"] = DefenceConfig("plain", DefenceKind.quantiser)
    assert {name: header_of(config, name, 0) for name in before} == before
    config.defences["noisy"].options = {"std": 0.1}
    assert header_of(config, "plain", 0) == before["plain"] and header_of(config, "noisy", 0) != before["noisy"]


def test_a_defence_is_judged_beside_its_base(folder: str) -> None:
    config = config_of(folder)
    config.examples = 20
    for name in ("anti", "noisy"):
        dataset = made(config, name)
        measured = checked(config, {name: dataset})
        found = summary(dataset, measured.costs[name], measured.probes[name])
        one = found["threats"]["linf"]
        assert one["columns"]["static"]["value"] < one["columns"]["clean"]["value"]
        assert found["clean"] == one["columns"]["defended"], "its own, and not the base's"
        held = [c["value"] for n, c in one["columns"].items() if n not in ("clean", "static")]
        assert one["robust"]["value"] <= min(held)
        assert [p["radius"] for p in one["curve"]] == pytest.approx([0.0008, 2.4])
        assert one["curve"][0]["value"] > 0.8 and one["curve"][1]["value"] == 0, "with no bound nothing stays right"
        assert [p["steps"] for p in one["defence_steps"]] == ([1] if name == "anti" else []), "noise has no steps"
        for search in ("square", "rays"):
            left = one["queries"][search]
            assert (left[0]["queries"], left[-1]["queries"]) == (0, 20)
            assert (left[0]["value"], left[-1]["value"]) == (
                one["columns"]["defended"]["value"],
                one["columns"][search]["value"],
            )
        assert len(one["checklist"]) == 13 and all(check["evidence"] for check in one["checklist"])
        assert found["cost"]["passes"] == ((4, 2) if name == "anti" else (4, 0)) and found["cost"]["seconds"][1] > 0
        assert (one["probe"]["deviation"] == 0) == (name == "anti") == (one["probe"]["apart"] == 0)
        assert one["probe"]["unbounded"] == 0 and one["probe"]["images"] == 20


def train_diffusion(world, folder: str) -> None:  # type: ignore[no-untyped-def]
    images = Dataset.open(f"{folder}/train")
    autoencoder = runs.autoencoder(world, f"{folder}/autoencoder", images, {"channels": [8, 8], "norm_groups": 4}, 60)
    latents = runs.latents(f"{folder}/latents", images, autoencoder)
    network = {"channels": [8, 8], "head_dim": 8, "norm_groups": 4, "layers_per_block": 1}
    runs.denoiser(world, f"{folder}/diffusion", latents, {"denoiser": network, "conditions": {}})


@pytest.fixture(scope="module")
def diffusion(folder: str) -> str:
    run_ranks(train_diffusion, 1, folder)
    return f"{folder}/diffusion"


OPTIONS: dict[DefenceKind, dict[str, float]] = {
    DefenceKind.hedge: {"steps": 2}, DefenceKind.entropy: {"steps": 2}, DefenceKind.generative: {"steps": 2},
    DefenceKind.auxiliary: {"steps": 2, "training": 20}, DefenceKind.one_step: {"doubt": 0.1, "training": 20},
    DefenceKind.self_supervised: {"steps": 1, "radii": 1}, DefenceKind.control: {"steps": 2},
    DefenceKind.contrastive: {"steps": 1, "training": 20}, DefenceKind.ode: {"steps": 2, "training": 20},
    DefenceKind.score: {"steps": 1, "copies": 1, "training": 20},
    DefenceKind.quantiser: {}, DefenceKind.noise: {"copies": 2}, DefenceKind.anti_adversary: {"steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(DefenceKind), ids=lambda kind: kind.value)
def test_every_kind_is_attacked_and_its_cost_told(folder: str, diffusion: str, kind: DefenceKind) -> None:
    config = config_of(folder)
    config.defences = {"it": DefenceConfig("plain", kind, OPTIONS[kind], diffusion, f"{folder}/train")}
    config.threats = {"linf": config.threats["linf"]}
    config.adaptive = AdaptiveConfig(steps=2, draws=2, votes=3, queries=5, repeats=2)
    config.examples = config.shard_size = 16
    config.out = f"{folder}/{kind.value}"
    dataset = made(config, "it")
    measured = checked(config, {"it": dataset})
    found = summary(dataset, measured.costs["it"], measured.probes["it"])
    columns = found["threats"]["linf"]["columns"]
    assert found["threats"]["linf"]["robust"]["value"] <= min(columns[c]["value"] for c in COLUMNS[2:])
    assert len(found["threats"]["linf"]["checklist"]) == 13
    assert (found["cost"]["passes"] is None) == (
        kind in (DefenceKind.entropy, DefenceKind.contrastive, DefenceKind.control, DefenceKind.ode)
    )
    said = dataset.header.provenance
    assert (said.get("model_commit"), said.get("images")) == (
        commits(Store(diffusion))[-1].step if kind is DefenceKind.generative else None,
        Dataset.open(f"{folder}/train").manifest_hash() if kind in FROM_IMAGES else None,
    ), "what it is made of is pinned"


def test_what_a_defence_learns_from_images_it_learns_as_long_as_it_is_told(folder: str) -> None:
    config, base = config_of(folder), OfUnit(classifiers.load(f"{folder}/run", "cpu"))
    x = torch.from_numpy(Reader(Dataset.open(config.test), ["image"]).gather(np.arange(10))["image"]).float() / 255

    def answers(kind: DefenceKind, **options: float) -> torch.Tensor:
        defence = DefenceConfig("plain", kind, {"steps": 1, **options}, images=f"{folder}/train")
        return builder(defence, config, base, "cpu", 0)(base)(x)

    for kind in (DefenceKind.auxiliary, DefenceKind.contrastive, DefenceKind.score, DefenceKind.ode):
        assert torch.equal(answers(kind, training=3), answers(kind, training=3)), "the same wherever it is built"
        assert not torch.equal(answers(kind, training=3), answers(kind, training=10))
    for kind in (DefenceKind.control, DefenceKind.hedge):
        with pytest.raises(UserError, match="no option 'training'"):
            answers(kind, training=3)


def test_an_option_that_a_diffusion_model_has_not(folder: str, diffusion: str) -> None:
    wrong = DefenceConfig("plain", DefenceKind.generative, {"noize": 0.5}, diffusion)
    with pytest.raises(UserError, match="no option 'noize'; it has noise, steps"):
        builder(wrong, config_of(folder), lambda z: z, "cpu", 0)


def test_a_diffusion_model_draws_images_again_by_their_number(folder: str, diffusion: str) -> None:
    model, config = TrainedModel(diffusion, "cpu"), SamplerConfig(steps=4, guidance=1.0)
    images = torch.from_numpy(Reader(Dataset.open(f"{folder}/test")).gather(np.arange(6))["image"])
    ids = torch.arange(6)
    again = model.redraw(images, ids, 0, config, 0.4)
    assert torch.equal(again[2:4], model.redraw(images[2:4], ids[2:4], 0, config, 0.4))
    assert not torch.equal(again, model.redraw(images, ids, 1, config, 0.4))
    codec = model.codec.decode(model.codec.encode(images)[0])
    hardly = model.redraw(images, ids, 0, config, 1e-4)
    assert (hardly.float() - codec.float()).abs().max() <= 2, "without noise it is what the autoencoder makes of it"
    assert (again.float() - codec.float()).abs().mean() > (hardly.float() - codec.float()).abs().mean() + 1


def test_checks_are_the_same_whoever_makes_them(folder: str) -> None:
    config = config_of(folder)
    config.out, config.classifiers = f"{folder}/transferred", {"plain": f"{folder}/run", "twin": f"{folder}/run"}
    config.threats = {"linf": config.threats["linf"]}
    config.defences = {"anti": DefenceConfig("plain", DefenceKind.anti_adversary, {"steps": 1})}
    config.adaptive = AdaptiveConfig(steps=2, queries=2, radii=[])
    datasets = {name: made(config, name) for name in config.attacked}
    header = header_of_checks(config, datasets, 0)
    tasks, where = header.provenance["tasks"], [Dataset.create(f"{config.out}/checks{k}", header) for k in range(2)]
    # Those of the second run are made the other way round, each by somebody who has made none before.
    one = Checker({"out": where[0].uri}, "cpu")
    for k in range(len(tasks)):
        commit_shard(where[0], k, one.make(k), "test", 0.0)
    for k in [k for k, (kind, _, _) in reversed(list(enumerate(tasks))) if kind in ("transfer", "probe")]:
        commit_shard(where[1], k, Checker({"out": where[1].uri}, "cpu").make(k), "other", 1.0)
    assert len(tasks) == 2 * (1 + 3) + 1 + 1 and len(where[1].records()) == 2 * 3 + 1
    assert all(where[0].records()[k].sha256 == record.sha256 for k, record in where[1].records().items())
    found = gathered(where[0])
    by = summary(datasets["plain"])["threats"]["linf"]["by"]
    broken = round(60 * sum(v for k, v in by.items() if k != "clean"))
    expected = {"twin": share(np.zeros(broken, bool))}
    assert found.transfer["linf"]["plain"] == expected, "what breaks it breaks its twin"
    assert found.transfer["linf"].keys() == {"plain", "twin"} and found.costs["anti"].passes == (3, 1)
    signs = found.masking["plain"]
    assert len(signs) == 7 and not any(sign["seen"] for sign in signs) and signs[0]["threat"] == "linf"


def test_intervals_are_clopper_and_pearsons() -> None:
    found = share(np.arange(100) < 5)
    assert (found["low"], found["high"]) == pytest.approx((0.0164319, 0.1128349), abs=1e-6)
    assert share(np.zeros(100, bool))["high"] == pytest.approx(beta.ppf(0.975, 1, 100))


def test_what_cannot_be(folder: str) -> None:
    config = config_of(folder)
    config.defences = {"plain": DefenceConfig("other")}
    assert [p.split(" ")[0] for p in config.problems()] == ["robustness.defences", "robustness:"]
    with pytest.raises(UserError, match="no option 'stepz'; it has steps, step"):
        builder(DefenceConfig("plain", options={"stepz": 1}), config, lambda x: x, "cpu", 0)
    with pytest.raises(UserError, match="A generative defence needs"):
        builder(DefenceConfig("plain", DefenceKind.generative), config, lambda x: x, "cpu", 0)
    with pytest.raises(UserError, match="of the kind 'one_step' needs"):
        builder(DefenceConfig("plain", DefenceKind.one_step), config, lambda x: x, "cpu", 0)
    for kind in (DefenceKind.control, DefenceKind.ode):
        with pytest.raises(UserError, match="a classifier of one network"):
            builder(DefenceConfig("plain", kind, images=f"{folder}/train"), config, lambda x: x, "cpu", 0)
    with pytest.raises(UserError, match="no trained classifier"):
        header_of(RobustnessConfig(test=f"{folder}/test", classifiers={"a": f"{folder}/nowhere"}), "a", 0)
