from pathlib import Path

import numpy as np
import pytest
import torch
from rayproj.jobs.train_classifier import Config, worker

from rayproj import config as configuration
from rayproj.classifiers.adversary import ThreatConfig
from rayproj.classifiers.model import StartConfig, began_with, of_run
from rayproj.classifiers.networks import ClassifierConfig, Network
from rayproj.classifiers.soups import Learned, soup
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Dataset
from rayproj.data.reader import Reader
from rayproj.data.writer import commit_shard
from rayproj.errors import UserError
from rayproj.evaluation.corruptions import corrupted
from rayproj.robustness.mixing import (
    CLEAN,
    Judge,
    LearnConfig,
    SoupConfig,
    candidates,
    ensemble,
    header_of,
    learned_soups,
    matrix,
    of_learned,
    summary,
)
from rayproj.robustness.threats import Norm
from rayproj.storage.store import Store, to_json
from tests.robustness.test_job import write
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

VIT = {"network": "vit", "layers": 1, "dim": 24, "heads": 2, "patch": 2, "dropout": 0.0}


def train(world, folder: str) -> None:  # type: ignore[no-untyped-def]
    linf, l2 = (
        {"training": "adversarial", "threats": [{"norm": n, "eps": e}]} for n, e in (("linf", 0.1), ("l2", 0.8))
    )
    runs = {
        "base": {"steps": 200},
        "linf": {"steps": 30, "start": {"run": f"{folder}/base"}, "adversary": linf},
        "l2": {"steps": 30, "start": {"run": f"{folder}/base"}, "adversary": l2},
        "half": {"steps": 0, "start": {"soup": {f"{folder}/linf": 0.5, f"{folder}/l2": 0.5}}},
        "both": {
            "steps": 30, "start": {"run": f"{folder}/base"}, "classifier": {**VIT, "adapters": ["token"]},
            "adversary": {**linf, "training": "co_training"},
        },
        "merged": {"steps": 0, "start": {"run": f"{folder}/both", "mix": [0.25, 0.75]}},
    }  # fmt: skip
    for name, values in runs.items():
        given = {
            "data": f"{folder}/train",
            "augment": {"shift": 0, "flip": False},
            "classifier": VIT,
            "run": {"dir": f"{folder}/{name}"},
            **{key: value for key, value in values.items() if key != "steps"},
        }
        given["train"] = {"steps": values["steps"], "batch": 64, "engine": {"ema": 0.8, "optimizer": {"lr": 3e-3}}}
        config = configuration.from_dict(Config, given)
        Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        worker(configuration.to_dict(config), world, Recorder("a"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("soups"))
    write(f"{path}/train", slice(0, 900))
    write(f"{path}/test", slice(900, 1000))
    run_ranks(train, 1, path)
    return path


def weights(folder: str, name: str) -> dict[str, torch.Tensor]:
    return of_run(f"{folder}/{name}", Dataset.open(f"{folder}/train").header).state_dict()


def test_a_run_of_no_steps_is_the_soup_it_starts_from(folder: str) -> None:
    expected = soup([weights(folder, "linf"), weights(folder, "l2")], [0.5, 0.5])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder, "half").items())
    assert not torch.equal(
        weights(folder, "linf")["net.classifier.weight"], weights(folder, "l2")["net.classifier.weight"]
    )


def test_candidates_in_one_batch_hold_what_each_holds_by_itself(folder: str) -> None:
    threat = ThreatConfig(Norm.linf, 0.1)
    config = SoupConfig({"linf": f"{folder}/linf", "l2": f"{folder}/l2"}, f"{folder}/test", f"{folder}/batched",
                        threats={"linf": threat}, parts=2, steps=4, examples=20)  # fmt: skip
    dataset = Dataset.create(config.out, header_of(config, "test", 0))
    judge = Judge({"out": dataset.uri}, "cpu")
    assert judge.stack.at_once == 1
    batch = judge.reader.gather(np.arange(20))
    x, label = torch.from_numpy(batch["image"]).float() / 255, torch.from_numpy(batch["label"])
    given = (threat.threat, x, label, torch.arange(20), judge.stack(255 * x))
    each = judge._each_held(*given)
    judge.stack.at_once = 2
    judge.stack.network.net.set_attn_implementation("eager")
    together = judge._all_held(*given)
    assert each.shape == together.shape == (judge.count, 20) and 0 < each.sum() < each.numel()
    assert (each != together).sum() <= 1, "but for rounding"


def test_a_run_with_adapters_is_merged_into_one_network(folder: str) -> None:
    header = Dataset.open(f"{folder}/train").header
    both, merged = of_run(f"{folder}/both", header), of_run(f"{folder}/merged", header)
    x = torch.from_numpy(Reader(Dataset.open(f"{folder}/test"), ["image"]).gather(np.arange(20))["image"])
    mix = torch.tensor([[0.25, 0.75]]).expand(20, 2)
    torch.testing.assert_close(merged.eval()(x), both.eval()(x, mix), rtol=1e-4, atol=1e-4)
    assert not torch.equal(both.tokens[0], both.tokens[1])  # each was trained


def test_every_candidate_is_judged_as_it_would_be_alone(folder: str, tmp_path: Path) -> None:
    config = SoupConfig(
        members={"linf": f"{folder}/linf", "l2": f"{folder}/l2"}, test=f"{folder}/test", out=str(tmp_path),
        shifts={"same": f"{folder}/train"}, corruptions=["gaussian_noise"], severity=5,
        threats={"linf": ThreatConfig(Norm.linf, 0.08)}, parts=4, steps=5,
        shots=[10, 20], examples=40, shard_size=16,
        learn=LearnConfig([Learned.affine, Learned.convex_by_layer], shots=30, steps=5),
    )  # fmt: skip
    sets = {}
    for name in ("test", "same", "gaussian_noise"):
        learned = learned_soups(config, name, 0, Store(f"{tmp_path}/run"))
        sets[name] = Dataset.create(f"{tmp_path}/{name}", header_of(config, name, 0, learned))
        judge = Judge({"out": sets[name].uri}, "cpu")
        for shard in range(sets[name].header.num_shards):
            commit_shard(sets[name], shard, judge.make(shard), "test", 0.0)
    right, given = matrix(sets["test"]), np.array(sets["test"].header.provenance["weights"])
    assert right[CLEAN].shape == right["linf"].shape == (5, 40) and matrix(sets["same"]).keys() == {CLEAN}
    batch = Reader(Dataset.open(config.test), ["image", "label"]).gather(np.arange(40))
    network = of_run(f"{folder}/linf", Dataset.open(config.test).header).eval()
    assert sets["test"].header.provenance["members"] == ["l2", "linf"]
    for k, row in enumerate(given):
        network.load_state_dict(soup([weights(folder, "l2"), weights(folder, "linf")], row.tolist()))
        expected = network(torch.from_numpy(batch["image"])).argmax(1).numpy() == batch["label"]
        assert (right[CLEAN][k] != expected).sum() <= 1  # but for rounding
        assert not (right["linf"][k] & ~right[CLEAN][k]).any() and right["linf"][k].mean() < right[CLEAN][k].mean()
    members = [of_run(f"{folder}/{name}", Dataset.open(config.test).header).eval() for name in ("l2", "linf")]
    shares = sum(member(torch.from_numpy(batch["image"])).softmax(1) for member in members)
    together = ensemble(sets["test"])
    assert (together[CLEAN] == (shares.argmax(1).numpy() == batch["label"])).all()
    assert together["linf"].sum() < together[CLEAN].sum() and not (together["linf"] & ~together[CLEAN]).any()
    given_by = {name: sets[name].header.provenance["learned"] for name in sets}
    assert given_by["gaussian_noise"] != given_by["test"] == learned_soups(config, "test", 0, Store(f"{tmp_path}/run"))
    assert (
        sum(given_by["test"]["affine"]) == pytest.approx(1) and "net.classifier" in given_by["test"]["convex_by_layer"]
    )
    for how, one in of_learned(sets["test"]).items():
        network.load_state_dict(soup([weights(folder, "l2"), weights(folder, "linf")], given_by["test"][how]))
        expected = network(torch.from_numpy(batch["image"])).argmax(1).numpy() == batch["label"]
        assert (one[CLEAN] != expected).sum() <= 1 and not (one["linf"] & ~one[CLEAN]).any()
    task = ClassificationTask(
        configuration.from_dict(ClassifierConfig, VIT), Dataset.open(config.test).header, 0,
        start=StartConfig(learned=f"{tmp_path}/test:convex_by_layer"),
    )  # fmt: skip
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in task.build().state_dict().items())
    start = configuration.to_dict(StartConfig(learned=f"{tmp_path}/test:affine"))
    Store(f"{tmp_path}/later").write("config.yaml", to_json({"start": start}))
    assert sorted(began_with(f"{tmp_path}/later")) == sorted(f"{folder}/{name}" for name in ("l2", "linf"))
    noisy = matrix(sets["gaussian_noise"])
    assert noisy.keys() == {CLEAN} and (noisy[CLEAN] != right[CLEAN]).any()
    row = torch.stack([torch.arange(40), torch.zeros(40).long(), torch.full((40,), 81)], 1)
    images = corrupted(torch.from_numpy(batch["image"]), row, "gaussian_noise", 5)
    expected = members[0](images).argmax(1).numpy() == batch["label"]
    assert (noisy[CLEAN][given.tolist().index([1.0, 0.0])] == expected).all()
    found = summary(config, sets["test"], {name: sets[name] for name in ("same", "gaussian_noise")}, 0)
    own = of_learned(sets["test"])["affine"]
    assert found["learned"]["affine"]["weights"] == given_by["test"]["affine"]
    assert found["learned"]["affine"]["union"]["value"] == (own[CLEAN] & own["linf"]).mean()
    own = of_learned(sets["gaussian_noise"])
    assert found["few_shot"]["gaussian_noise"]["learned"] == {how: one[CLEAN].mean() for how, one in own.items()}
    assert found["few_shot"]["gaussian_noise"]["best_member"] == noisy[CLEAN][:2].mean(1).max()
    assert found["ensemble"]["union"]["value"] == together["linf"].mean()
    assert [one["linf"]["value"] for one in found["soups"]] == pytest.approx(right["linf"].mean(1).tolist())
    union = (right[CLEAN] & right["linf"]).mean(1)
    assert found["soups"][found["best"]["union"]]["union"]["value"] == union.max()
    assert found["soups"][found["greedy"]]["union"]["value"] >= max(union[:2])
    assert found["barriers"]["l2 - linf"] < 0.2  # they have one start
    assert set(found["few_shot"]["same"]["chosen"]) == {"10", "20"}
    compared = found["beats_specialist"]["linf"]
    assert compared["only_soup"] - compared["only_alone"] == round(20 * (compared["soup"] - compared["alone"]))


def test_candidates_are_members_even_mixtures_and_the_grid_once_each() -> None:
    found = candidates(SoupConfig(members={"a": "", "b": "", "c": ""}, parts=4), 3)
    assert len({tuple(row) for row in found.round(9)}) == len(found) and np.allclose(found.sum(1), 1)
    assert (
        found[:3].tolist() == np.eye(3).tolist()
        and [1 / 3] * 3 in found.tolist()
        and [0.5, 0.25, 0.25] in found.tolist()
    )


def test_a_set_too_small_to_learn_on(folder: str, tmp_path: Path) -> None:
    config = SoupConfig(members={"a": f"{folder}/linf"}, test=f"{folder}/test", examples=80)
    config.learn = LearnConfig([Learned.affine], shots=21)
    with pytest.raises(UserError, match="has 100 images: too few for"):
        learned_soups(config, "test", 0, Store(str(tmp_path)))


def test_a_start_that_cannot_be(folder: str) -> None:
    header = Dataset.open(f"{folder}/train").header
    vit = ClassifierConfig(Network.vit, layers=1, dim=24, heads=2, patch=2, dropout=0.0)
    with pytest.raises(UserError, match="has no adapters to mix"):
        ClassificationTask(vit, header, 0, start=StartConfig(f"{folder}/base", mix=[1.0, 0.0])).build()
    with pytest.raises(UserError, match="another network than `classifier` describes"):
        ClassificationTask(ClassifierConfig(), header, 0, start=StartConfig(f"{folder}/base")).build()
    with pytest.raises(UserError, match="mix has 3 weights; the branches are clean, adversarial"):
        ClassificationTask(vit, header, 0, start=StartConfig(f"{folder}/both", mix=[1.0, 0.0, 0.0])).build()
    with pytest.raises(UserError, match="learned there: none"):
        ClassificationTask(vit, header, 0, start=StartConfig(learned=f"{folder}/test:affine")).build()
    assert StartConfig("a", {"b": 1.0}).problems() and StartConfig(soup={"a": 0.5, "b": 0.6}).problems()
    assert StartConfig(mix=[1.0, 0.0]).problems() and not StartConfig("a", mix=[1.0, 0.0]).problems()
    config = SoupConfig(members={"a": f"{folder}/base", "b": f"{folder}/both"}, test=f"{folder}/test")
    assert len(candidates(config, 3)) > 60 and header_of(config, "test", 0).provenance["members"] == [
        "a",
        "b:clean",
        "b:adversarial",
    ]
