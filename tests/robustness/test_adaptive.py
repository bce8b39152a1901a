from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rayproj.robustness.adaptive import (
    AdaptiveConfig,
    Cost,
    Probe,
    Verdict,
    checklist,
    deviation,
    evaluate,
    passes,
    probe,
    right,
    shortened,
    withstood,
)
from rayproj.robustness.apgd import apgd
from rayproj.robustness.autoattack import Attack, AttackConfig, autoattack
from rayproj.robustness.defences import (
    AntiAdversary,
    AuxiliaryPurifier,
    ClosedLoopControl,
    Contrast,
    ContrastiveReversal,
    Defence,
    EntropyAdaptation,
    GenerativePurifier,
    Hedge,
    OneStep,
    Quantiser,
    RandomNoise,
    ScorePurifier,
    SelfSupervised,
    StableEquilibria,
    trained_discriminator,
)
from rayproj.robustness.losses import margin, target_alone
from rayproj.robustness.ode import StableODE
from rayproj.robustness.oracle import Oracle
from rayproj.robustness.rays import rays
from rayproj.robustness.square import square
from rayproj.robustness.threats import Norm, Threat
from tests.support.linear import digits, trained

THREAT = Threat(Norm.linf, 0.09)
STATIC, QUICK = (
    AttackConfig([Attack.apgd_ce, Attack.apgd_t], steps=30, targets=4),
    AdaptiveConfig(steps=20, queries=150),
)
NEVER = {"square": np.full(400, -1), "rays": np.full(400, -1)}
GOOD = Probe(deviation=0.0, half=0.3, whole=0.3, unbounded=0.0, apart=0.0, images=64)


@pytest.fixture(scope="module")
def data():  # type: ignore[no-untyped-def]
    x, label = digits()
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
    return trained(network, x[:600], label[:600], 120), x[600:680], label[600:680]


def verdict(data, defence, config: AdaptiveConfig = QUICK) -> Verdict:  # type: ignore[no-untyped-def]
    base, x, label = data
    return evaluate(defence, base, x, label, torch.arange(len(x)), THREAT, STATIC, config)


def failed(found: Verdict) -> set[str]:
    columns = {name: r.numpy() for name, r in found.correct.items()}
    return {
        check.item
        for check in checklist(columns, GOOD, Cost((2, 1), (1.0, 2.0)), [(0.1, 0.0)], NEVER, QUICK)
        if not check.passed
    }


def test_doing_nothing_gives_exactly_the_base(data) -> None:  # type: ignore[no-untyped-def]
    found, (base, x, label) = verdict(data, Defence), data
    expected = autoattack(base, x, label, torch.arange(len(x)), THREAT, STATIC).robust
    assert torch.equal(found.correct["static"], expected) and torch.equal(
        found.correct["defended"], found.correct["clean"]
    )
    # The static points are among those that are transferred, and the other attacks find nearly the same.
    assert not (found.worst & ~expected).any() and (expected & ~found.worst).sum() <= 2
    assert 0.05 < expected.float().mean() < 0.9
    assert passes(Defence, base, x) == (1, 0) and deviation(Defence(base), x, label, QUICK) == 0
    assert "It is more robust than its base" in failed(found)
    for right_now in found.correct.values():
        assert not (found.worst & ~right_now).any() or right_now is found.correct["static"]


def test_a_search_tells_after_how_many_queries_it_broke_an_image(data) -> None:  # type: ignore[no-untyped-def]
    found, (base, x, label) = verdict(data, Defence), data
    ids = torch.arange(len(x))
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 51)], 1)
    for budget in (3, 40):  # a search that may ask fewer begins as the longer one does
        short = {
            "square": square(Oracle(base), x, label, row, THREAT, budget),
            "rays": rays(Oracle(base), x, label, THREAT, budget),
        }
        for name, one in short.items():
            queries = found.queries[name]
            assert torch.equal(one.broken & found.correct["defended"], (queries > 0) & (queries <= budget)), name
    assert torch.equal(found.queries["square"] == -1, found.correct["square"])
    assert torch.equal(found.queries["rays"] == 0, ~found.correct["defended"])


def test_a_point_of_a_curve_is_the_worst_of_three_ascents(data) -> None:  # type: ignore[no-untyped-def]
    base, x, label = data
    defence, ids = AntiAdversary(base, steps=3), torch.arange(len(x))
    given = (defence, base, x, label, ids)
    at = [withstood(*given, Threat(Norm.linf, radius), QUICK) for radius in (1e-6, 0.05, 0.1, 1.0)]
    assert torch.equal(at[0], right(defence, x, label, 1)) and not at[3].any()
    assert at[0].sum() > at[1].sum() > at[2].sum()
    row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 52)], 1)
    expected = right(defence, x, label, 1)
    for model in (base, defence, defence.surrogate):
        point = apgd(Oracle(model), x, label, row, Threat(Norm.linf, 0.05), steps=QUICK.steps, go_on=True).images
        expected &= defence(point).argmax(1) == label
    assert torch.equal(at[1], expected)
    assert [shortened(one).steps for one in (defence, AntiAdversary(base, 1), Defence(base))] == [2, 1, 0]
    assert torch.equal(shortened(defence)(x), AntiAdversary(base, steps=2)(x)) and defence.steps == 3


@pytest.mark.parametrize("levels", [4])
def test_one_that_hides_its_gradient_looks_robust_and_is_shown_not_to_be(data, levels: int) -> None:  # type: ignore[no-untyped-def]
    found = verdict(data, lambda base: Quantiser(base, levels))
    share = {name: r.float().mean().item() for name, r in found.correct.items()}
    assert share["direct"] > share["bpda"] + 0.1  # the code's own gradient is zero
    assert found.worst.float().mean() <= share["bpda"]
    assert "The gradient of the code is not masked" in failed(found)


def test_the_anti_adversary_fails_as_it_did_in_the_paper(data) -> None:  # type: ignore[no-untyped-def]
    """Attacked directly it gains, and what is transferred from its base shows that it does not."""
    found = verdict(data, lambda base: AntiAdversary(base, steps=4))
    share = {name: r.float().mean().item() for name, r in found.correct.items()}
    assert share["direct"] > share["static"] + 0.1
    assert share["transfer"] <= share["static"] + 0.03
    amiss = {"It is more robust than its base", "Attacks on the defence find more than those on its base do"}
    assert amiss <= failed(found)
    # What it is taken for, four steps there and back, the answer.
    assert passes(lambda base: AntiAdversary(base, steps=4), data[0], data[1]) == (6, 4)


def test_noise_is_averaged_out_and_judged_by_votes(data) -> None:  # type: ignore[no-untyped-def]
    found = verdict(data, lambda base: RandomNoise(base, 0.1, copies=2), AdaptiveConfig(steps=15, queries=50))
    share = {name: r.float().mean().item() for name, r in found.correct.items()}
    assert share["bpda"] < share["defended"] - 0.1
    defence = RandomNoise(data[0], 0.1, copies=2)
    assert 0 < deviation(defence, found.images, data[2], AdaptiveConfig(repeats=8, votes=1)) < 0.1
    assert passes(lambda base: RandomNoise(base, copies=2), data[0], data[1]) == (2, 0)


def test_luck_ends_no_search_of_a_random_model() -> None:
    """One answer in three is wrong, whatever the image: every query is asked, and votes alone say what is broken."""
    generator = torch.Generator().manual_seed(0)

    def model(x: torch.Tensor) -> torch.Tensor:
        wrong = torch.rand(len(x), generator=generator) < 1 / 3
        return torch.stack([(~wrong).float(), wrong.float()], 1)

    x, label = torch.rand(200, 1, 6, 6), torch.zeros(200, dtype=torch.long)
    row = torch.stack([torch.arange(200), torch.zeros(200, dtype=torch.long), torch.zeros(200, dtype=torch.long)], 1)
    lucky, voted = Oracle(model), Oracle(model, 4, True, 25)
    assert square(lucky, x, label, row, THREAT, 40).broken.all() and lucky.forwards < 5 * 200
    found = square(voted, x, label, row, THREAT, 40)
    assert voted.forwards >= 40 * 4 * 200 and found.broken.float().mean() < 0.05
    fooled = Oracle(model, random=True, votes=25).fooled(x, torch.eye(2)[[1]].expand(200, 2), label)
    assert fooled.float().mean() < 0.12, "of 25 answers more than half, each wrong with 1/3: 4 %"


def test_an_answer_is_that_of_more_than_half() -> None:
    answers = iter([0, 1, 1, 0, 1, 0, 0])

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(2)[[next(answers)]]

    assert right(model, torch.zeros(1, 1), torch.tensor([1]), 5).tolist() == [True]  # 0 1 1 0 1
    assert right(model, torch.zeros(1, 1), torch.tensor([0]), 2).tolist() == [True]


def test_entropy_is_lessened_for_each_example_by_itself(data) -> None:  # type: ignore[no-untyped-def]
    base, x, _ = data
    defence = EntropyAdaptation(base, steps=3, lr=0.05)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        p = logits.log_softmax(1)
        return -(p.exp() * p).sum(1)

    before, after = entropy(base(x)), entropy(defence(x))
    assert (after <= before + 1e-4).float().mean() > 0.95 and after.sum() < 0.8 * before.sum()
    torch.testing.assert_close(defence(x[3:4]), defence(x)[3:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(EntropyAdaptation(base, steps=0)(x), base(x), rtol=1e-4, atol=1e-4)
    point = x[:4].clone().requires_grad_()  # an attack may go through the steps
    (gradient,) = torch.autograd.grad(defence(point).sum(), point)
    assert gradient.abs().sum() > 0


def test_a_purifier_climbs_what_it_says_it_climbs(data) -> None:  # type: ignore[no-untyped-def]
    base, x, _ = data
    hedge = Hedge(base, steps=5)
    total = lambda z: -base(z).log_softmax(1).sum(1)  # noqa: E731
    purified = hedge.purify(x)
    assert Threat(Norm.linf, 8 / 255).holds(x, purified).all() and total(purified).sum() > total(x).sum()
    attacked = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    discriminator = trained_discriminator(x, attacked)
    assert ((discriminator(attacked) > 0).float().mean() + (discriminator(x) < 0).float().mean()) / 2 > 0.9
    purified = AuxiliaryPurifier(base, discriminator).purify(attacked)
    assert discriminator(purified).mean() < discriminator(attacked).mean() - 0.5
    assert Threat(Norm.linf, 8 / 255).holds(attacked, purified).all()


def test_views_are_made_to_agree_as_one_image_after_the_other_is(data) -> None:  # type: ignore[no-untyped-def]
    base, x, _ = data
    found, step = SelfSupervised(base, steps=3, step=0.03, radii=2).purify(x[:5]), 0.03
    for one, now in zip(x[:5, None], found[:, None], strict=True):
        tried = []
        for radius in (0, 1, 2):
            point = one.clone()
            for _ in range(3 if radius else 0):
                z = point.clone().requires_grad_()
                loss = nn.functional.mse_loss(base(z.roll(-1, 3)), base(z.roll(1, 3)))
                loss.backward()  # type: ignore[no-untyped-call]
                point = one + (point - step * z.grad.sign() - one).clamp(-radius * step, radius * step)
                point = point.clamp(0, 1)
            tried.append((nn.functional.mse_loss(base(point.roll(-1, 3)), base(point.roll(1, 3))).item(), point))
        torch.testing.assert_close(now, min(tried, key=lambda pair: pair[0])[1], atol=1e-6, rtol=0)


def test_views_of_one_image_are_brought_together_beside_others(data) -> None:  # type: ignore[no-untyped-def]
    base, x, _ = data

    class Features(nn.Module):
        def pooled(self, z: torch.Tensor) -> torch.Tensor:
            return base[:-1](z)

    contrast = Contrast(Features(), x[:60], steps=40, dim=8)
    untrained = Contrast(Features(), x[:60], steps=0, dim=8)
    assert contrast(x[60:]).mean() < untrained(x[60:]).mean() - 0.1
    others = contrast.others.numpy()
    for one, found in zip(x[60:63, None], contrast(x[60:63]), strict=True):
        views = [one.roll(-1, 2), one.roll(1, 2), one.roll(-1, 3), one.roll(1, 3)]
        z = [contrast.project(base[:-1](view))[0].detach().numpy() for view in views]
        z, losses = [v / np.linalg.norm(v) for v in z], []
        for i in range(4):
            among = sum(np.exp(z[i] @ z[k] / 0.2) for k in range(4) if k != i) + np.exp(others @ z[i] / 0.2).sum()
            losses += [-np.log(np.exp(z[i] @ z[j] / 0.2) / among) for j in range(4) if j != i]
        assert found.item() == pytest.approx(np.mean(losses), rel=1e-4)
    attacked = (x[60:] + 0.1 * torch.randn(x[60:].shape, generator=torch.Generator().manual_seed(0)).sign()).clamp(0, 1)
    purified = ContrastiveReversal(base, contrast, steps=5).purify(attacked)
    assert contrast(purified).sum() < contrast(attacked).sum()
    assert Threat(Norm.linf, 10 / 255).holds(attacked, purified).all()


def test_a_single_step_is_half_as_long_where_a_discriminator_doubts() -> None:
    weight = torch.linspace(-1, 1, 16).view(1, 4, 4)
    defence = OneStep(lambda z: z, lambda z: (weight * z).sum((1, 2, 3)), 0.1)
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found, halves = defence.purify(x), 0
    for one, now in zip(x, found, strict=True):
        probability = 1 / (1 + np.exp(-(weight * one).sum().item()))
        halves += 0.3 < probability < 0.7
        step = 0.05 if 0.3 < probability < 0.7 else 0.1
        torch.testing.assert_close(now, (one - step * weight.sign()).clamp(0, 1))
    assert 5 < halves < 45 and shortened(defence).steps == 1


def test_controls_are_those_of_the_normal_equations() -> None:
    """Where what the head sees is linear in the image the best controls are known: Σ ½‖P_t (A_t u + s_t)‖² + c/2 ‖u‖²."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, 5).double(), nn.Linear(5, 3).double()

        def pooled(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x.flatten(1))

        def classify(self, pooled: torch.Tensor) -> torch.Tensor:
            return self.head(pooled)

    torch.manual_seed(0)
    network, c = Linear(), 0.1
    clean = (torch.rand(40, 3) @ torch.rand(3, 16) + 0.02 * torch.rand(40, 16)).view(40, 1, 4, 4).double()
    defence, x = ClosedLoopControl(network, clean, 600, 0.01, 0.9, c), torch.rand(4, 1, 4, 4).double()
    with torch.no_grad():
        weight, bias = network.body.weight.numpy(), network.body.bias.numpy()
    states, projections = (clean.flatten(1).numpy(), clean.flatten(1).numpy() @ weight.T + bias), []
    for state in states:
        values, vectors = np.linalg.eigh(np.cov(state.T))
        order = np.argsort(values)[::-1]
        count = int(np.argmax(np.cumsum(values[order]) / values.sum() >= 0.9)) + 1
        kept = vectors[:, order[:count]]
        projections.append(np.eye(len(values)) - kept @ kept.T)
    assert all(0 < np.trace(p) < len(p) for p in projections)
    maps = [np.eye(16, 21), np.hstack([weight, np.eye(5)])]
    for one, *now in zip(x.flatten(1).numpy(), *defence.controls(x), strict=True):
        shifts = [one - states[0].mean(0), weight @ one + bias - states[1].mean(0)]
        square = c * np.eye(21) + sum(a.T @ p @ a for a, p in zip(maps, projections, strict=True))
        right_side = -sum(a.T @ p @ s for a, p, s in zip(maps, projections, shifts, strict=True))
        expected = np.linalg.solve(square, right_side)
        assert np.abs(np.concatenate([u.flatten().numpy() for u in now]) - expected).max() < 1e-3
    defence.steps = 3
    first, second = defence.controls(x)
    logits = network.head(network.body((x + first).flatten(1)) + second)
    torch.testing.assert_close(defence(x), logits.float())
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defence(point)[:, 0].sum(), point)
    assert torch.allclose(gradient.flatten(1), (network.head.weight @ network.body.weight)[0].expand(4, -1), atol=1e-5)


def test_a_generative_purifier_is_attacked_around(data) -> None:  # type: ignore[no-untyped-def]
    def blurred(z: torch.Tensor, seed: int) -> torch.Tensor:
        noise = 0.05 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        return nn.functional.avg_pool2d(nn.functional.pad(z + noise, (1, 1, 1, 1), "replicate"), 3, 1).clamp(0, 1)

    found = verdict(data, lambda b: GenerativePurifier(b, blurred), AdaptiveConfig(steps=15, queries=50))
    share = {name: r.float().mean().item() for name, r in found.correct.items()}
    assert share["direct"] > share["bpda"] + 0.1  # nothing leads back through it
    assert "The gradient of the code is not masked" in failed(found)


def flat(z: torch.Tensor) -> torch.Tensor:
    return z.flatten(1)


def test_a_purifier_climbs_the_score_of_a_gaussian_as_far_as_the_formula_says() -> None:
    """Of N(μ, v) each step is λ of the way to μ; of variances that differ α = λ Σs² / Σ(s²/v)."""
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    one = ScorePurifier(flat, lambda z: (0.5 - z) / 0.09, sigma=0.0, steps=7, rate=0.1)
    torch.testing.assert_close(one.purify(x), 0.5 + 0.9**7 * (x - 0.5), atol=1e-4, rtol=0)
    variance = torch.linspace(0.02, 0.3, 16).view(1, 4, 4)
    several, point = ScorePurifier(flat, lambda z: (0.5 - z) / variance, sigma=0.0, steps=3, rate=0.1), x
    for _ in range(3):
        score = (0.5 - point) / variance
        length = 0.1 * score.square().sum((1, 2, 3)) / (score.square() / variance).sum((1, 2, 3))
        assert length.min() > several.stop and length.max() < several.BOUNDS[1]
        point = point + length[:, None, None, None] * score
    torch.testing.assert_close(several.purify(x), point, atol=1e-4, rtol=0)
    # Where the score falls off fast the image stays; where it hardly does the step is bounded.
    fast, slow = (ScorePurifier(flat, lambda z, v=v: (0.5 - z) / v, sigma=0.0, steps=1) for v in (0.01, 9.0))
    assert torch.equal(fast.purify(x), x)
    torch.testing.assert_close(slow.purify(x), x + 0.1 * (0.5 - x) / 9)
    away = ScorePurifier(flat, lambda z: z - 0.5, sigma=0.0)  # on the way to nowhere
    assert torch.equal(away.purify(x), x) and torch.equal(ScorePurifier(flat, torch.zeros_like, 0.0).purify(x), x)


def test_it_is_its_base_without_steps_and_noise_and_else_a_mean_over_noise() -> None:
    x = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ScorePurifier(flat, lambda z: 0.5 - z, sigma=0.0, steps=0, copies=2)(x), flat(x))
    found = ScorePurifier(flat, lambda z: (0.5 - z) / 0.09, sigma=0.2, steps=4, copies=3, rate=0.1, seed=5)(x)
    generator, expected = torch.Generator().manual_seed(5), []
    for _ in range(3):
        noisy = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        expected.append(flat(0.5 + 0.9**4 * (noisy - 0.5)))
    torch.testing.assert_close(found, torch.stack(expected).mean(0), atol=1e-4, rtol=0)
    assert passes(lambda base: ScorePurifier(base, lambda z: 0.5 - z, copies=3), flat, x) == (3, 0)


def test_a_gradient_goes_through_the_scores_and_around_them() -> None:
    x = (0.3 + 0.4 * torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    defence = ScorePurifier(flat, lambda z: (0.5 - z) / 0.09, sigma=0.01, steps=4, copies=2, rate=0.1)
    for model, expected in ((defence, 0.9**4), (defence.surrogate, 1.0)):  # lengths and noise are constants
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(gradient, torch.full_like(x, expected), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def equilibria(data):  # type: ignore[no-untyped-def]
    base, x, label = data

    class Features(nn.Module):
        def pooled(self, z: torch.Tensor) -> torch.Tensor:
            return base[:-1](z)

        def classify(self, pooled: torch.Tensor) -> torch.Tensor:
            return base[-1](pooled)

    return Features(), StableODE(Features(), x[:60], label[:60], 60, 12)  # type: ignore[arg-type]


def test_what_flows_to_an_equilibrium_is_attacked_through_the_flow_and_around_it(data, equilibria) -> None:  # type: ignore[no-untyped-def]
    (base, x, _), (network, ode) = data, equilibria
    logits, defence = base(x), StableEquilibria(network, ode, 4)
    still = StableEquilibria(network, ode, 0)
    torch.testing.assert_close(still(x), logits - logits.mean(1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert shortened(defence).steps == 2 and not torch.equal(shortened(defence)(x), defence(x))
    assert (defence(x) - still(x)).abs().mean() > 0.01, "it flows"
    torch.testing.assert_close(defence.surrogate(x), defence(x), atol=1e-4, rtol=1e-4)
    point = x[:4].clone().requires_grad_()
    through, around, without = (
        torch.autograd.grad(model(point)[:, 1].sum(), point)[0] for model in (defence, defence.surrogate, still)
    )
    torch.testing.assert_close(around, without)
    assert through.abs().sum() > 0 and not torch.allclose(through, around, rtol=0.01)


def test_features_are_matched_with_those_of_another_class(data, equilibria) -> None:  # type: ignore[no-untyped-def]
    (base, x, label), (network, ode) = data, equilibria
    defence, ids = StableEquilibria(network, ode, 4), torch.arange(20)
    second = base(x[:20]).scatter(1, label[:20, None], -torch.inf).argmax(1)
    row = torch.stack([ids, torch.zeros_like(ids), torch.zeros_like(ids)], 1)
    given = (x[:20], label[:20], row, THREAT, target_alone, 20)
    found = apgd(Oracle(defence.likeness), *given, target=second, go_on=True).images
    before, after = ((network.pooled(z)[:, None] - ode.seen).abs().sum(2) for z in (x[:20], found))
    nearest = [
        torch.stack([d[ode.label == k].min() for d, k in zip(of, second, strict=True)]) for of in (before, after)
    ]
    assert (nearest[1] < nearest[0]).all() and nearest[1].mean() < 0.9 * nearest[0].mean()


def test_what_only_matching_features_breaks_counts_as_broken_around_it(data) -> None:  # type: ignore[no-untyped-def]
    base, x, label = data

    class Masked(Defence):
        def __init__(self, base: nn.Module, known: bool) -> None:
            super().__init__(base)
            self.likeness = base if known else None

        def __call__(self, z: torch.Tensor) -> torch.Tensor:
            return base(z.detach())

        def surrogate(self, z: torch.Tensor) -> torch.Tensor:
            return base(z.detach())

    some, config = (base, x[:40], label[:40]), AdaptiveConfig(steps=10, queries=2)
    known, unknown = (verdict(some, lambda b, k=k: Masked(b, k), config).correct for k in (True, False))
    assert known["bpda"].sum() < unknown["bpda"].sum() - 5
    assert all(torch.equal(known[name], unknown[name]) for name in known if name != "bpda")


def test_a_better_one_is_told_from_chance() -> None:
    rng = np.random.default_rng(0)
    static, better = rng.random(400) < 0.4, rng.random(400) < 0.7
    columns, curve = (
        {n: better for n in ("defended", "transfer", "direct", "bpda", "fewer", "square", "rays")},
        [(0.1, 0.3)],
    )
    right_now = {"clean": better, "static": static, **columns}
    items = {c.item: c for c in checklist(right_now, GOOD, Cost(None, (1.0, 3.0)), curve, NEVER, QUICK)}
    assert all(c.passed for c in items.values())
    assert "3.0 times as long" in items["It costs less than ten times its base"].evidence
    columns = {n: static for n in columns}
    right_now, shaky = {"clean": static, "static": static, **columns}, replace(GOOD, deviation=0.05)
    items = {c.item: c for c in checklist(right_now, shaky, Cost(None, (1.0, 30.0)), curve, NEVER, QUICK)}
    assert {n for n, c in items.items() if not c.passed} == {
        "It is more robust than its base", "Another evaluation would say the same", "It costs less than ten times its base",
    }  # fmt: skip


def test_what_an_evaluation_lacks_is_told() -> None:
    columns = ("clean", "static", "defended", "transfer", "direct", "bpda", "square", "rays")
    right_now = {**dict.fromkeys(columns, np.arange(100) < 50), "fewer": np.arange(100) < 40}
    tried, late = AdaptiveConfig(steps=21, queries=10), {"rays": np.array([-1] * 90 + [6] * 4 + [5] * 6)}
    bad = Probe(deviation=0.0, half=0.5, whole=0.4, unbounded=0.1, apart=None, images=64)
    items = {
        c.item: c for c in checklist(right_now, bad, Cost(None, (1.0, 1.0)), [(0.2, 0.3), (0.1, 0.2)], late, tried)
    }
    lacking = {
        "A gradient through fewer of its steps finds no more", "More steps of an attack find no more",
        "A larger radius leaves fewer", "An attack without a bound leaves none", "An answer depends on no other image",
        "More queries find no more",
    }  # fmt: skip
    assert lacking | {"It is more robust than its base"} == {n for n, c in items.items() if not c.passed}
    more = items["More steps of an attack find no more"].evidence
    assert more == "Of 64 images 50.0% stay right after 11 steps of an attack, 40.0% after 21."
    assert "half of 10 queries broke 4.0% (rays) of" in items["More queries find no more"].evidence
    assert "0, 0.1, 0.2: 50.0%, 20.0%, 30.0%" in items["A larger radius leaves fewer"].evidence


def test_a_few_images_say_what_the_checklist_asks(data) -> None:  # type: ignore[no-untyped-def]
    base, x, label = data
    x, label, ids = x[:40], label[:40], torch.arange(40)

    class OfTheBatch(Defence):
        def purify(self, z: torch.Tensor) -> torch.Tensor:
            return z - 0.9 * (z.mean(0) - x.mean(0))

    tried = (x, x, label, ids, THREAT, AdaptiveConfig(steps=9))
    found, of_batch = probe(Defence(base), *tried), probe(OfTheBatch(base), *tried)
    for steps, held_now in ((5, found.half), (9, found.whole)):
        row = torch.stack([ids, torch.zeros_like(ids), torch.full_like(ids, 53)], 1)
        assert held_now == 1 - apgd(Oracle(base), x, label, row, THREAT, margin, steps).broken.float().mean().item()
    assert found.deviation == found.unbounded == found.apart == 0 and found.half >= found.whole > 0
    alone = [base(one - 0.9 * (one - x.mean(0)))[0].argmax() for one in x[:, None]]
    assert of_batch.apart == (torch.stack(alone) != base(x).argmax(1)).float().mean().item() > 0
    noisy = probe(RandomNoise(base, 0.3, 1), *tried[:-1], AdaptiveConfig(steps=2, draws=1, votes=1))
    assert noisy.apart is None and noisy.deviation > 0
