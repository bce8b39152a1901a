import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rayproj.jobs.train_classifier import Config, worker
from safetensors.torch import load_file

from rayproj import classifiers, keyed
from rayproj import config as configuration
from rayproj.classifiers.adapters import Adapted
from rayproj.classifiers.adversary import (
    ERRORS,
    LATEST,
    AdversaryConfig,
    Losses,
    Several,
    ThreatConfig,
    Training,
    drawn,
    losses,
    prepare,
)
from rayproj.classifiers.augment import AugmentConfig
from rayproj.classifiers.model import KEPT, weights_of
from rayproj.classifiers.networks import ClassifierConfig, Network, build
from rayproj.classifiers.objective import GROUP_WEIGHTS, Cells, Objective, ObjectiveConfig
from rayproj.classifiers.objective import Loss as ObjectiveLoss
from rayproj.classifiers.task import ClassificationTask
from rayproj.data.dataset import Field, Header
from rayproj.engine import memory
from rayproj.engine.checkpoint import load_ema
from rayproj.engine.world import World
from rayproj.export import export
from rayproj.robustness.autoattack import AttackConfig, autoattack
from rayproj.robustness.oracle import OfUnit, Oracle
from rayproj.robustness.pgd import pgd, steepest
from rayproj.robustness.threats import Norm, Threat
from rayproj.storage.store import Store
from tests.robustness.test_job import write
from tests.support.linear import digits
from tests.support.ranks import run_ranks
from tests.support.regression import Recorder

PLAIN = ClassifierConfig(Network.vit, layers=1, dim=16, heads=2, patch=4, dropout=0.2)
BRANCHED = ClassifierConfig(Network.vit, layers=1, dim=16, heads=2, patch=4, dropout=0.2, adapters=["token", "norms"])
THREE = dataclasses.replace(BRANCHED, branches=["clean", "linf", "l2"])
LINF = ThreatConfig(Norm.linf, 0.1)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    row = torch.stack([torch.arange(count) + 7, torch.full((count,), 3), torch.zeros(count).long()], 1)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=g, dtype=torch.uint8), torch.arange(count) % 4, row


def network(config: ClassifierConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(config, 1, 8, 4)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()  # without dropout, so that losses can be compared


def each(label: torch.Tensor) -> Losses:
    return lambda logits: F.cross_entropy(logits, label.repeat(len(logits) // len(label)), reduction="none")


def found(model: torch.nn.Module, config: AdversaryConfig, label: torch.Tensor | None = None) -> torch.Tensor:
    images, own, row = batch()
    label = own if label is None else label
    return losses(model, images, label, row, each(label), config, seed=5)


def attacked(model, config: AdversaryConfig, mix: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[no-untyped-def]
    images, label, row = batch()
    told = {} if mix is None else {"mix": mix}
    oracle = Oracle(lambda z: model(255 * z, **told))
    return pgd(oracle, images / 255, label, row, LINF.threat, config.steps, config.step, seed=5).images


def test_adversarial_training_is_the_loss_of_what_pgd_finds() -> None:
    model, config = network(PLAIN), AdversaryConfig(Training.adversarial, [LINF])
    z = attacked(model, config)
    assert LINF.threat.holds(batch()[0] / 255, z).all()
    torch.testing.assert_close(found(model, config), F.cross_entropy(model(255 * z), batch()[1], reduction="none"))
    assert (found(model, config) > F.cross_entropy(model(batch()[0]), batch()[1], reduction="none")).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("config", [PLAIN, BRANCHED], ids=["one network", "two branches"])
def test_together_is_the_sum_of_two_passes(config: ClassifierConfig, alpha: float) -> None:
    model, images, label = network(config), batch()[0], batch()[1]
    first, second = ({"mix": torch.eye(2)[k].expand(6, 2)} if isinstance(model, Adapted) else {} for k in (0, 1))
    adversary = AdversaryConfig(Training.co_training, [LINF], alpha=alpha)
    z = attacked(model, adversary, second.get("mix"))
    clean = F.cross_entropy(model(images, **first), label, reduction="none")
    hard = F.cross_entropy(model(255 * z, **second), label, reduction="none")
    torch.testing.assert_close(found(model, adversary), alpha * clean + (1 - alpha) * hard, rtol=1e-5, atol=1e-6)


def test_trades_is_the_cross_entropy_and_beta_times_the_divergence() -> None:
    model, images, label = network(PLAIN), batch()[0], batch()[1]
    clean = F.cross_entropy(model(images), label, reduction="none")
    one, six = (found(model, AdversaryConfig(Training.trades, [LINF], beta=b)) for b in (1.0, 6.0))
    divergence = one - clean
    assert (divergence > 0).all()
    torch.testing.assert_close(six, clean + 6 * divergence, rtol=1e-4, atol=1e-5)
    # What is attacked is the prediction: labels have no part in it.
    others = found(model, AdversaryConfig(Training.trades, [LINF], beta=1.0), label=(label + 1) % 4)
    clean = F.cross_entropy(model(images), (label + 1) % 4, reduction="none")
    torch.testing.assert_close(others - clean, divergence, rtol=1e-4, atol=1e-5)


def test_an_attack_leaves_the_model_as_it_was_but_for_the_gradient_of_the_loss() -> None:
    model = network(BRANCHED).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    loss = found(model, AdversaryConfig(Training.co_training, [LINF], steps=4))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(generator)  # dropout drew once for both passes, and not in the attack
    again = found(model, AdversaryConfig(Training.co_training, [LINF], steps=1))
    assert loss.shape == again.shape
    loss.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_each_step_draws_one_of_several_threats_evenly() -> None:
    counts = [0, 0, 0]
    for row in (torch.tensor([[9, step, 0], [10, step, 0]]) for step in range(600)):
        counts[drawn(3, row, 0)] += 1
        assert drawn(3, row[1:], 0) == drawn(3, row[:1], 0)  # whoever has which part of the batch
    assert min(counts) > 160


def test_threats_are_drawn_in_proportion_to_their_errors() -> None:
    counts = np.zeros(3)
    for step in range(1500):
        counts[drawn(3, torch.tensor([[9, step, 0]]), 0, torch.tensor([0.0, 0.3, 0.6]))] += 1
    assert counts[0] == 0 and counts[2] / counts[1] == pytest.approx(2, rel=0.15)


def test_the_extremes_are_drawn_by_running_errors_as_a_loop_does() -> None:
    """Croce and Hein 2022: a threat is drawn by 1 - its running robust accuracy, evenly until each has one."""
    threats = [ThreatConfig(Norm.linf, 0.2), ThreatConfig(Norm.l1, 0.5)]
    config = AdversaryConfig(Training.adversarial, threats, Several.extreme, steps=2)
    plain = dataclasses.replace(PLAIN, dropout=0.0)
    model, (images, label, row) = network(plain), batch()
    with torch.no_grad():
        label = model(images).argmax(1)  # so that the weak attack leaves all as they are, and the strong one some
        label[:1] = (label[:1] + 1) % 4
    right, seen, expected, numbers = [0, 0], [0, 0], [], []
    for step in range(40):
        row[:, 1] = step
        shares = [1 - r / n for r, n in zip(right, seen, strict=True)] if all(seen) else [0.5, 0.5]
        u = float(keyed.uniform(5, "threat", torch.tensor([[0, step, 0]])))
        k = int(u >= shares[0] / sum(shares))
        point = pgd(
            Oracle(lambda z: model(255 * z)), images / 255, label, row, threats[k].threat, 2, 0.5, seed=5
        ).images
        logits = model(255 * point)
        right[k] += int((logits.argmax(1) == label).sum())
        seen[k] += len(label)
        numbers.append(k)
        expected.append(F.cross_entropy(logits, label, reduction="none"))
    assert min(seen) > 0 and seen[0] > 1.5 * seen[1] and right[1] == 5 * seen[1] // 6

    def found(parts: int) -> torch.Tensor:
        model.train()
        prepare(model, config)
        own = [torch.cat([losses(model, x, y, r, each(y), config, 5)
               for x, y, r in zip(images.chunk(parts), label.chunk(parts), at.chunk(parts), strict=True)])
               for at in (torch.stack([row[:, 0], torch.full((6,), s), row[:, 2]], 1) for s in range(40))]  # fmt: skip
        return torch.stack(own)

    for parts in (1, 3):  # micro-batches of a step have one threat
        torch.testing.assert_close(found(parts), torch.stack(expected), rtol=1e-4, atol=1e-5)
        errors, latest = getattr(model, ERRORS).clone(), getattr(model, LATEST)
        errors[latest[1]] += latest[2:]
        assert errors.tolist() == [[n - r, n] for r, n in zip(right, seen, strict=True)] and latest[0] == 39


def test_of_several_threats_each_image_gets_the_attack_of_the_highest_loss() -> None:
    model, threats = network(PLAIN), [ThreatConfig(Norm.linf, 0.05), ThreatConfig(Norm.l2, 0.35)]
    alone = torch.stack([found(model, AdversaryConfig(Training.adversarial, [threat])) for threat in threats])
    assert set(alone.argmax(0).tolist()) == {0, 1}  # neither is the worse one for all
    together = found(model, AdversaryConfig(Training.adversarial, threats, Several.worst))
    torch.testing.assert_close(together, alone.amax(0))


def test_the_average_over_threats_is_the_mean_of_their_losses() -> None:
    threats = [ThreatConfig(Norm.linf, 0.05), ThreatConfig(Norm.l2, 0.35), ThreatConfig(Norm.l1, 2)]
    for training in (Training.adversarial, Training.co_training, Training.trades):
        each = torch.stack([found(network(PLAIN), AdversaryConfig(training, [threat])) for threat in threats])
        together = found(network(PLAIN), AdversaryConfig(training, threats, Several.average))
        torch.testing.assert_close(together, each.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("several", [Several.average, Several.worst, Several.drawn])
def test_each_threat_attacks_its_own_branch_and_teaches_it(several: Several) -> None:
    """Three branches in one batch, against passes of their own."""
    model, (images, label, _) = network(THREE), batch()
    threats = [ThreatConfig(Norm.linf, 0.05), ThreatConfig(Norm.l2, 0.45)]
    config = AdversaryConfig(Training.co_training, threats, several, random_start=False)
    hard = []
    for k, threat in enumerate(threats):
        mix = torch.eye(3)[1 + k].expand(6, 3)
        oracle = Oracle(lambda z, mix=mix: model(255 * z, mix=mix))
        z = pgd(oracle, images / 255, label, None, threat.threat, config.steps, config.step).images
        hard.append(F.cross_entropy(model(255 * z, mix=mix), label, reduction="none"))
    picked = torch.stack(hard)
    if several is Several.worst:
        assert len(set(picked.argmax(0).tolist())) == 2
    number = drawn(2, batch()[2], 5)
    chosen = {Several.average: picked.mean(0), Several.worst: picked.amax(0), Several.drawn: picked[number]}[several]
    clean = F.cross_entropy(model(images, mix=torch.eye(3)[0].expand(6, 3)), label, reduction="none")
    torch.testing.assert_close(found(model, config), 0.5 * clean + 0.5 * chosen, rtol=1e-4, atol=1e-5)
    found(model, config).sum().backward()
    assert [bool(g.any()) for g in model.tokens.grad] == (
        [True, *(k == number for k in range(2))] if several is Several.drawn else [True] * 3
    )


def test_the_steepest_of_several_threats_is_followed_step_by_step_as_a_loop_does() -> None:
    """Against the algorithm written out for one example at a time, and it is PGD where there is one threat."""
    model, images, label = network(PLAIN), batch()[0], batch()[1]
    threats = [ThreatConfig(Norm.linf, 0.06), ThreatConfig(Norm.l2, 0.35), ThreatConfig(Norm.l1, 1.5)]
    config = AdversaryConfig(Training.adversarial, threats, Several.steepest, steps=4, random_start=False)
    expected, taken = [], set()
    for i in range(len(images)):
        x, y = images[i : i + 1] / 255, label[i : i + 1]
        point = x
        for _ in range(config.steps):
            z = point.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(255 * z), y), z)
            reached = []
            for threat in (t.threat for t in threats):
                step = point + threat.eps * config.step * steepest(gradient, threat.norm)
                reached.append(threat.project(x, step))
            values = [F.cross_entropy(model(255 * z), y).item() for z in reached]
            taken.add(int(np.argmax(values)))
            point = reached[int(np.argmax(values))]
        expected.append(F.cross_entropy(model(255 * point), y))
    assert len(taken) > 1  # else it were the attack of one threat
    torch.testing.assert_close(found(model, config), torch.stack(expected))
    alone = AdversaryConfig(Training.adversarial, [LINF], Several.steepest)
    torch.testing.assert_close(found(model, alone), found(model, AdversaryConfig(Training.adversarial, [LINF])))


def test_counts_stay_what_a_checkpoint_keeps_to_the_last_one() -> None:
    """Which has fp32 of them; their ratio stays."""
    config = AdversaryConfig(Training.adversarial, [LINF, ThreatConfig(Norm.l1, 3.0)], Several.extreme, steps=1)
    model = network(dataclasses.replace(PLAIN, dropout=0.0)).train()
    prepare(model, config)
    getattr(model, ERRORS).copy_(torch.tensor([[2**22 - 2, 2**23], [30, 100]]))
    getattr(model, LATEST).copy_(torch.tensor([2, 0, 4, 8]))  # of the step before that of the batch
    found(model, config)
    assert getattr(model, ERRORS).tolist() == [[2**21 + 1, 2**22 + 4], [30, 100]]
    assert getattr(model, LATEST)[[0, 3]].tolist() == [3, 6]


def extreme_on(world: World) -> tuple[list[float], list[list[int]]]:
    """This rank's losses of its half at some steps, and the counts afterwards."""
    config = AdversaryConfig(Training.adversarial, [LINF, ThreatConfig(Norm.l1, 3.0)], Several.extreme, steps=1)
    model, (images, label, row) = network(dataclasses.replace(PLAIN, dropout=0.0)).train(), batch()
    prepare(model, config)
    mine, found = slice(world.rank * 6 // world.world_size, (world.rank + 1) * 6 // world.world_size), []
    for step in range(6):
        row[:, 1] = step
        x, y, r = images[mine], label[mine], row[mine]
        found += losses(model, x, y, r, each(y), config, 5).tolist()
    return found, [getattr(model, ERRORS).tolist(), getattr(model, LATEST).tolist()]


def test_two_ranks_draw_and_count_as_one_does() -> None:
    (whole, counts), two = extreme_on(World(0, 1, 0, "cpu")), run_ranks(extreme_on, 2)
    assert [found[1] for found in two] == [counts, counts]
    assert sum(n for _, n in counts[0]) + counts[1][3] == 36
    both = torch.cat([torch.tensor(found[0]).view(6, 3) for found in two], 1)
    torch.testing.assert_close(both, torch.tensor(whole).view(6, 6), rtol=1e-4, atol=1e-5)


def train_extreme(world: World, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Without a stop, and with one after the third of eight steps."""
    found = {}
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        values = {
            "data": f"{folder}/data",
            "augment": {"shift": 0, "flip": False},
            "classifier": {"network": "vit", "layers": 1, "dim": 16, "heads": 2, "dropout": 0.1},
            "adversary": {
                "training": "adversarial", "several": "extreme", "steps": 1,
                "threats": [{"norm": "linf", "eps": 0.1}, {"norm": "l1", "eps": 4}],
            },
            "objective": {"loss": "group_dro", "dro_step": 0.5},
            "train": {"steps": 8, "batch": 16, "engine": {"zero_stage": 2, "ema": 0.5, "optimizer": {"lr": 1e-3}}},
            "run": {"dir": f"{folder}/{name}"},
        }  # fmt: skip
        config = configuration.from_dict(Config, values)
        Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        for number, stop in enumerate(stops):
            worker(configuration.to_dict(config), world, Recorder(f"a{number}", stop))
        assert not {ERRORS, LATEST} & set(weights_of(config.run.dir))
        found[name] = load_ema(Store(config.run.dir))[0]
    return found


def test_a_stop_changes_no_bit_of_what_the_running_errors_come_to(tmp_path: Path) -> None:
    write(f"{tmp_path}/data", slice(0, 64))
    (found,) = run_ranks(train_extreme, 1, str(tmp_path))
    assert found["whole"][LATEST][0] == 7 and found["whole"][ERRORS].view(2, 2)[:, 1].sum() == 7 * 16
    assert all(torch.equal(tensor, found["stopped"][name]) for name, tensor in found["whole"].items())
    state = load_file(export(f"{tmp_path}/whole", str(tmp_path / "out")) / "model.safetensors")
    assert state.keys() == found["whole"].keys() - KEPT, "what the training kept is no part of the model"


@pytest.mark.parametrize("several", Several)
@pytest.mark.parametrize("training", [Training.adversarial, Training.trades, Training.co_training])
def test_its_memory_can_be_planned(training: Training, several: Several) -> None:
    config = AdversaryConfig(training, [LINF, ThreatConfig(Norm.l1, 4.0)], several, steps=1)
    header = Header("x", {"image": Field("png", (1, 8, 8)), "label": Field("int")}, 8, 8, tuple("abcd"))
    model = memory.Model(ClassificationTask(BRANCHED, header, 0, adversary=config))
    fields = {"image": ((1, 8, 8), torch.uint8), "label": ((), torch.int64)}
    assert model.forward_and_backward(model.batch(4, fields)) > 0


def test_groups_are_weighed_once_a_step_however_many_attack() -> None:
    """GroupDRO's weights after a step against three times the same threat are those after one against it."""
    cells, weights = Cells(np.arange(8) % 2, ("a", "b")), []
    for count in (1, 3):
        task_config = AdversaryConfig(Training.adversarial, [LINF] * count, Several.average, random_start=False)
        objective = Objective(ObjectiveConfig(ObjectiveLoss.group_dro, dro_step=0.5), cells)
        header = Header("x", {"image": Field("png", (1, 8, 8)), "label": Field("int")}, 8, 8, tuple("abcd"))
        torch.manual_seed(0)
        task = ClassificationTask(
            dataclasses.replace(PLAIN, dropout=0.0),
            header,
            0,
            AugmentConfig(0, False),
            objective,
            adversary=task_config,
        )
        model = task.build().train()
        images, label, row = batch()
        row[:, 0] -= 7
        task.losses(model, {"image": images, "label": label, "row": row})
        weights.append(getattr(model, GROUP_WEIGHTS).tolist())
    assert weights[0] == weights[1] and weights[0][0] != weights[0][1]


def test_a_targeted_attack_goes_towards_another_class_drawn_for_each_image_and_step() -> None:
    """Against the attack written out, whose targets are any class but the label, each as often."""
    model, (images, label, row) = network(PLAIN), batch()
    config = AdversaryConfig(Training.adversarial, [LINF], targeted=True, random_start=False)
    others = torch.stack([torch.tensor([k for k in range(4) if k != y]) for y in label])
    u = keyed.uniform(5, "target", row)
    target = others.gather(1, (u * 3).long()[:, None])[:, 0]
    assert len(set(target.tolist())) > 1
    x = point = images / 255
    for _ in range(config.steps):
        z = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(255 * z), target, reduction="sum"), z)
        point = LINF.threat.project(x, point - 0.5 * LINF.eps * gradient.sign())
    torch.testing.assert_close(found(model, config), F.cross_entropy(model(255 * point), label, reduction="none"))
    towards, away = (F.cross_entropy(model(255 * z), target) for z in (point, attacked(model, config)))
    assert towards < F.cross_entropy(model(images), target) and towards < away


def test_what_a_config_cannot_be() -> None:
    bad = AdversaryConfig(Training.co_training, [], steps=0, alpha=2)
    assert len(bad.problems()) == 3
    (problem,) = AdversaryConfig(Training.trades, targeted=True).problems()
    assert "knows no classes" in problem
    four = dataclasses.replace(BRANCHED, branches=["clean", "linf", "l2", "l1"])
    many = Config(data="x", classifier=four, adversary=AdversaryConfig(Training.co_training, [LINF, LINF]))
    assert ["for each, not 3" in problem for problem in many.problems()] == [True]
    many = dataclasses.replace(many, classifier=THREE)
    assert not many.problems()
    many.adversary.several = Several.steepest
    assert ["of one branch" in problem for problem in many.problems()] == [True]
    assert dataclasses.replace(BRANCHED, branches=["a", "a"]).problems()


def train_by_stages(world, folder: str) -> dict[int, dict[str, torch.Tensor]]:  # type: ignore[no-untyped-def]
    found = {}
    for stage in (0, 1, 2, 3):
        values = {
            "data": f"{folder}/data",
            "augment": {"shift": 0, "flip": False},
            "classifier": {"network": "vit", "layers": 1, "dim": 16, "heads": 2, "dropout": 0.0, "adapters": ["token"]},
            "adversary": {"training": "co_training", "threats": [{"norm": "linf", "eps": 0.1}], "steps": 2},
            "train": {"steps": 5, "batch": 16, "engine": {"zero_stage": stage, "ema": 0.5, "optimizer": {"lr": 1e-3}}},
            "run": {"dir": f"{folder}/stage{stage}"},
        }
        config = configuration.from_dict(Config, values)
        if world.rank == 0:
            Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        worker(configuration.to_dict(config), world, Recorder("a"))
        found[stage] = weights_of(config.run.dir)
    return found


def test_it_is_the_same_at_every_zero_stage(tmp_path: Path) -> None:
    write(f"{tmp_path}/data", slice(0, 64))
    (found,) = run_ranks(train_by_stages, 1, str(tmp_path))
    for stage in (1, 2, 3):
        for name, tensor in found[stage].items():
            torch.testing.assert_close(tensor, found[0][name], rtol=0, atol=2e-4)


def train_wide(world, folder: str) -> None:  # type: ignore[no-untyped-def]
    for training in ("none", "adversarial", "trades"):
        values = {
            "data": f"{folder}/data",
            "augment": {"shift": 0, "flip": False},
            "classifier": {"network": "wide_resnet", "depth": 10, "width": 1, "dropout": 0.0},
            "adversary": {"training": training, "threats": [{"norm": "linf", "eps": 0.15}], "steps": 3},
            "train": {"steps": 60, "batch": 64, "engine": {"ema": 0.9, "optimizer": {"lr": 1e-2}}},
            "run": {"dir": f"{folder}/{training}"},
        }
        config = configuration.from_dict(Config, values)
        Store(config.run.dir).write("config.yaml", configuration.to_yaml(config).encode())
        worker(configuration.to_dict(config), world, Recorder("a"))


def test_a_wide_resnet_learns_to_stand_what_one_that_was_not_told_of_does_not(tmp_path: Path) -> None:
    """Attacked by the whole ensemble, trained by adversarial training and by TRADES."""
    write(f"{tmp_path}/data", slice(0, 900))
    run_ranks(train_wide, 1, str(tmp_path))
    x, label = (part[900:1000] for part in digits())
    clean, robust = {}, {}
    for training in ("none", "adversarial", "trades"):
        network = OfUnit(classifiers.load(f"{tmp_path}/{training}", "cpu"))
        clean[training] = float((network(x).argmax(1) == label).float().mean())
        attack = AttackConfig(steps=20, queries=200)
        found = autoattack(network, x, label, torch.arange(100), Threat(Norm.linf, 0.15), attack)
        robust[training] = float(found.robust.float().mean())
    assert min(clean.values()) > 0.8
    assert min(robust["adversarial"], robust["trades"]) > robust["none"] + 0.15
