import foolbox
import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack

from rayproj.robustness.autoattack import CLEAN, Attack, AttackConfig, _runs, autoattack, ranked
from rayproj.robustness.oracle import Oracle, straight_through
from rayproj.robustness.pgd import fgsm, pgd
from rayproj.robustness.threats import Norm, Threat
from tests.support.linear import digits, exactly_robust, linear_network, small_network

THREATS = [Threat(Norm.linf, 0.07), Threat(Norm.l2, 0.5), Threat(Norm.l1, 2.0)]
THEIRS = {Norm.linf: "Linf", Norm.l2: "L2", Norm.l1: "L1"}
QUICK = AttackConfig(steps=40, queries=300)


@pytest.fixture(scope="module")
def small():  # type: ignore[no-untyped-def]
    x, label = digits()
    return small_network(x[:600], label[:600]), x[600:700], label[600:700]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_linear_classifier_to_the_last_image(threat: Threat) -> None:
    x, label = digits()
    model = linear_network(x, label)
    x, label = x[1300:1500], label[1300:1500]
    found = autoattack(model, x, label, torch.arange(200), threat, QUICK)
    weight, bias = (p.double().numpy() for p in model[1].parameters())
    expected = exactly_robust(weight, bias, x.flatten(1).double().numpy(), label.numpy(), threat)
    assert (found.robust.numpy() == expected).all()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_no_weaker_than_the_published_one(small, threat: Threat) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small
    ours = autoattack(model, x, label, torch.arange(100), threat, QUICK)
    kinds = ["apgd-ce", "apgd-t", "fab-t"]
    theirs = AutoAttack(model, norm=THEIRS[threat.norm], eps=threat.eps, version="custom", attacks=kinds, seed=0)
    theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = 40
    theirs.apgd.n_restarts, theirs.fab.n_restarts = 1, 1
    broken, _ = theirs.run_standard_evaluation(x, label, batch_size=100)
    left = (model(broken).argmax(1) == label).sum().item()
    assert 5 < left < 95
    # 40 random starts differ by an image or two.
    assert ours.robust.sum().item() <= left + 1 and abs(ours.robust.sum().item() - left) <= 3
    wrong = [i for i, by in enumerate(ours.by) if by]
    assert (model(ours.images[wrong]).argmax(1) != label[wrong]).all()
    assert threat.holds(x, ours.images).all()


def test_each_image_is_broken_by_the_first_that_can_and_alone_as_in_a_crowd(small) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small
    ids, quick = torch.arange(100) + 5000, AttackConfig(steps=15, targets=3, queries=100)
    whole = autoattack(model, x, label, ids, THREATS[0], quick, seed=3)
    assert {CLEAN if p != y else "" for p, y in zip(model(x).argmax(1), label, strict=True)} <= set(whole.by)
    assert [by == CLEAN for by in whole.by] == (model(x).argmax(1) != label).tolist()
    assert whole.by.count("apgd_ce") > 20
    alone = [
        by
        for part in torch.arange(100).split(33)
        for by in autoattack(model, x[part], label[part], ids[part], THREATS[0], quick, seed=3).by
    ]
    assert sum((a == "") != (b == "") for a, b in zip(whole.by, alone, strict=True)) <= 1  # but for rounding


def test_radius_zero_and_a_radius_without_end(small) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small
    quick = AttackConfig([Attack.apgd_ce, Attack.square], steps=10, queries=20)
    clean = model(x).argmax(1) == label
    for norm, whole in ((Norm.linf, 1.0), (Norm.l2, 1e3), (Norm.l1, 1e6)):
        assert torch.equal(autoattack(model, x, label, torch.arange(100), Threat(norm, 0.0), quick).robust, clean)
        assert not autoattack(model, x, label, torch.arange(100), Threat(norm, whole), quick).robust.any()


def test_a_purifier_without_gradients_falls_to_a_straight_through_one(small) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small

    def purify(z: torch.Tensor) -> torch.Tensor:
        return (z * 8).round() / 8

    config = AttackConfig([Attack.apgd_ce, Attack.apgd_t], steps=40)
    blind, through, bare = (
        autoattack(m, x, label, torch.arange(100), THREATS[0], config).robust.sum().item()
        for m in (lambda z: model(purify(z) + 0 * z), lambda z: model(straight_through(purify)(z)), model)
    )
    assert blind > through + 20 and through <= bare + 25


def test_the_mean_over_draws_is_the_gradient_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) + torch.randn(len(x), 12, generator=generator)) @ w.T

    x, label = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    oracle = Oracle(noisy, draws=4000)
    losses, gradient, logits = oracle.ask(x, label, (label + 1) % 3, lambda z, y, t: z[range(5), t] - z[range(5), y])
    expected = (w[(label + 1) % 3] - w[label]).view_as(x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(logits, x.flatten(1) @ w.T, rtol=0, atol=0.3)
    assert oracle.forwards == oracle.backwards == 20000 and losses.shape == (5,)


def test_a_random_model_falls_as_its_mean_does() -> None:
    """A linear classifier of noisy images, whose mean over the draws is exactly robust as without the noise."""
    torch.manual_seed(0)
    generator, layer = torch.Generator().manual_seed(0), torch.nn.Linear(16, 4).requires_grad_(False)
    x, threat = torch.rand(60, 1, 4, 4), Threat(Norm.linf, 0.06)
    label = layer(x.flatten(1)).argmax(1)

    def noisy(z: torch.Tensor) -> torch.Tensor:
        return layer(z.flatten(1) + 0.3 * torch.randn(len(z), 16, generator=generator))

    weight, bias = (p.double().numpy() for p in layer.parameters())
    exact = exactly_robust(weight, bias, x.flatten(1).double().numpy(), label.numpy(), threat)
    attacks = [Attack.apgd_ce, Attack.apgd_dlr]
    held = {
        draws: autoattack(
            noisy, x, label, torch.arange(60), threat, AttackConfig(attacks, 40, draws=draws)
        ).robust.numpy()
        for draws in (1, 400)
    }
    assert 15 < exact.sum() < 45 and (held[400] != exact).sum() <= 6, "but for images near the edge of their balls"
    assert held[1].sum() < exact.sum() - 8, "one draw takes luck for success"


def test_ascents_in_l1_restart_at_least_five_times() -> None:
    logits, count = torch.zeros(1, 10), {}
    for norm in (Norm.linf, Norm.l1):
        for restarts in (1, 2, 7):
            config = AttackConfig([Attack.apgd_ce], restarts=restarts)
            count[norm, restarts] = len(list(_runs(Attack.apgd_ce, config, Threat(norm, 1.0), logits, 0)))
    assert [count[Norm.linf, k] for k in (1, 2, 7)] == [1, 2, 7] and [count[Norm.l1, k] for k in (1, 2, 7)] == [5, 5, 7]


def test_fewer_classes_than_the_losses_need() -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 1, 2, 2)
    for classes in (2, 3, 4):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes)).requires_grad_(False)
        label = model(x).argmax(1)
        for threat in THREATS:
            config = AttackConfig(list(Attack), steps=20, queries=50)
            robust = autoattack(model, x, label, torch.arange(40), threat, config).robust
            weight, bias = (p.double().numpy() for p in model[1].parameters())
            exact = exactly_robust(weight, bias, x.flatten(1).double().numpy(), label.numpy(), threat)
            assert np.abs(robust.numpy().astype(int) - exact).sum() <= 1


def test_pgd_is_foolbox(small) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1))
    for steps, attack in (
        (1, foolbox.attacks.FGSM()),
        (7, foolbox.attacks.LinfPGD(rel_stepsize=0.2, steps=7, random_start=False)),
    ):
        _, expected, broken = attack(theirs, x, label, epsilons=0.07)
        threat = THREATS[0]
        found = (
            fgsm(Oracle(model), x, label, threat) if steps == 1 else pgd(Oracle(model), x, label, None, threat, 7, 0.2)
        )
        torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-5)
        assert torch.equal(found.broken, broken)
        if steps > 1:
            stopped = pgd(Oracle(model), x, label, None, threat, 7, 0.2, go_on=False)
            assert stopped.broken[broken].all() and threat.holds(x, stopped.images).all()
            assert torch.equal(model(stopped.images).argmax(1) != label, stopped.broken)
            torch.testing.assert_close(stopped.images[~stopped.broken], expected[~stopped.broken], rtol=0, atol=1e-5)
    _, expected, _ = foolbox.attacks.L2PGD(rel_stepsize=0.2, steps=7, random_start=False)(
        theirs, x, label, epsilons=0.5
    )
    found = pgd(Oracle(model), x, label, None, THREATS[1], 7, 0.2)
    assert (found.images - expected).abs().amax((1, 2, 3)).median() < 1e-5


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_one_step_and_many_are_what_they_are_alone(small, threat: Threat) -> None:  # type: ignore[no-untyped-def]
    model, x, label = small
    ids, right = torch.arange(100), model(x).argmax(1) == label
    by = {kind: autoattack(model, x, label, ids, threat, AttackConfig([kind], steps=40)) for kind in
          (Attack.fgsm, Attack.pgd, Attack.apgd_ce)}  # fmt: skip
    expected = right & ~fgsm(Oracle(model), x, label, threat).broken
    assert (by[Attack.fgsm].robust == expected).all() and set(by[Attack.fgsm].by) == {CLEAN, "fgsm", ""}
    left = [found.robust.sum().item() for found in by.values()]
    assert left[0] > left[1] >= left[2] - 2 and threat.holds(x, by[Attack.pgd].images).all()


def test_targets_are_the_likeliest_others() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    label = torch.tensor([0, 0])
    assert ranked(logits, label, 1).tolist() == [2, 1] and ranked(logits, label, 2).tolist() == [1, 2]


def test_a_config_that_cannot_be() -> None:
    assert AttackConfig(steps=0, attacks=[]).problems() == [
        "attack.steps must be positive.",
        "attack.attacks is empty.",
    ]
    assert Threat(eps=-1).problems()
