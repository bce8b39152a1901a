"""The analysis against other libraries, printed values, closed forms and simulated raters of known strengths."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import LogisticRegression

from rayproj.preferences import analysis
from rayproj.preferences.analysis import Games
from rayproj.preferences.results import summary
from tests.support import imagen3

# The four on which the ranking of the fit is the report's, and how far, in Elo, its printed numbers are from the fit.
FOUR = {
    "alignment, GenAI-Bench": 8.5, "overall preference, GenAI-Bench": 20.4,
    "detailed alignment, DOCCI": 23.3, "visual appeal, GenAI-Bench": 41.8,
}  # fmt: skip


def simulated(theta: np.ndarray, ratings: int, raters: int, seed: int, ties: float = 0.0, spread: float = 0.0) -> Games:
    """Raters whose preferences are Davidson's with ν = `ties`; each values every model differently by `spread`."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(len(theta)) for j in range(i)])
    first, second = np.repeat(pairs, ratings, axis=0).T
    rater = rng.integers(0, raters, len(first))
    own = theta + spread * rng.normal(size=(raters, len(theta)))
    a, b = np.exp(own[rater, first]), np.exp(own[rater, second])
    total = a + b + ties * np.sqrt(a * b)
    u = rng.uniform(size=len(a)) * total
    score = np.where(u < a, 1.0, np.where(u < a + b, 0.0, 0.5))
    return Games(tuple("abcdefghij"[: len(theta)]), first, second, score, rater)


def test_wins_and_rates_are_those_of_a_plain_loop() -> None:
    games = simulated(np.array([0.5, 0.0, -0.5, 0.1]), 30, 7, seed=1, ties=0.6)
    wins = np.zeros((7, 4, 4))
    for i, j, score, rater in zip(games.first, games.second, games.score, games.rater, strict=True):
        wins[rater, i, j] += score
        wins[rater, j, i] += 1 - score
    assert np.array_equal(games.by_rater(), wins) and np.array_equal(games.wins(), wins.sum(0))
    rates = analysis.win_rates(wins.sum(0))
    assert np.isnan(rates.diagonal()).all()
    off = ~np.eye(4, dtype=bool)
    assert np.allclose((rates + rates.T)[off], 1)
    assert games.ties().sum() == 2 * (games.score == 0.5).sum()


def test_strengths_are_those_of_a_logistic_regression() -> None:
    games = simulated(np.array([0.7, 0.2, 0.0, -0.4, -0.5]), 60, 20, seed=2)
    design = np.zeros((len(games.first), 5))
    design[np.arange(len(design)), games.first], design[np.arange(len(design)), games.second] = 1, -1
    fitted = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=1000).fit(design, games.score == 1)
    expected = fitted.coef_[0] - fitted.coef_[0].mean()
    assert np.allclose(analysis.bradley_terry(games.wins(), prior=0), expected, atol=1e-4)


def test_ties_are_half_wins_and_batches_are_fits_of_their_own() -> None:
    games = simulated(np.array([0.7, 0.0, -0.7]), 80, 20, seed=3, ties=0.8)
    wins = games.wins()

    def loss(theta: np.ndarray) -> float:
        return float((wins * np.logaddexp(0, theta[None, :] - theta[:, None])).sum())

    precise = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 9999}
    expected = optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options=precise).x
    assert np.allclose(analysis.bradley_terry(wins, prior=0), expected - expected.mean(), atol=1e-5)
    several = np.stack([wins, 2 * wins + np.arange(9.0).reshape(3, 3), wins.T])
    each = np.stack([analysis.bradley_terry(one) for one in several])
    assert np.allclose(analysis.bradley_terry(several), each, atol=1e-9)


def test_who_always_wins_has_a_finite_strength_and_who_never_meets_is_refused() -> None:
    always = np.array([[0, 10, 10], [0, 0, 5], [0, 5, 0]], float)
    theta = analysis.bradley_terry(always)
    assert np.isfinite(theta).all() and theta[0] > theta[1] + 1 and np.isclose(theta[1], theta[2])
    # Of two, half a win to each side is the closed form log((w + ½) / (l + ½)).
    two = analysis.bradley_terry(np.array([[0, 9.0], [0, 0]]))
    assert np.isclose(two[0] - two[1], math.log(9.5 / 0.5))
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[2, 3] = 5
    with pytest.raises(ValueError, match="never met"):
        analysis.bradley_terry(apart)


def test_the_printed_matrices_of_imagen_3_are_rightly_copied() -> None:
    for figure in (*imagen3.FULL.values(), *imagen3.ADDED.values()):
        wins, elo = figure.wins(), figure.strengths()
        met = wins + wins.T
        assert np.allclose(met[met > 0], imagen3.RATINGS, atol=0.001 * imagen3.RATINGS), "both shares are 100 %"
        assert (np.diff(elo) <= 0).all() and abs(elo.mean() - 1000) < 0.5, "the best first; on the mean of ours"
        assert len(figure.names()) == len(elo) == len(wins)


@pytest.mark.parametrize("name", FOUR)
def test_the_rankings_of_the_four_printed_matrices_of_imagen_3_are_reproduced(name: str) -> None:
    """To the last place, and its numbers as a straight line of ours that is wider: with ties left out instead of halved
    it would be, and of these the report prints nothing."""
    figure = imagen3.FULL[name]
    found, printed = analysis.elo(analysis.bradley_terry(figure.wins(), prior=0)), figure.strengths()
    assert list(np.argsort(-found)) == list(range(6))
    assert np.abs(found - printed).max() == pytest.approx(FOUR[name], abs=0.1)
    slope, start = np.polyfit(found, printed, 1)
    assert 1 < slope < 1.35 and np.abs(slope * found + start - printed).max() < 11
    assert np.abs(analysis.elo(analysis.bradley_terry(figure.wins())) - found).max() < 0.2, "half a win weighs little"


@pytest.mark.parametrize("name", [*imagen3.FULL, *imagen3.ADDED])
def test_other_printed_rankings_are_reproduced_but_for_models_that_nobody_can_tell_apart(name: str) -> None:
    """Of 315 printed pairs of models two come out the other way round; the report has them 2 and 6 points apart."""
    figure = (imagen3.FULL | imagen3.ADDED)[name]
    found = analysis.elo(analysis.bradley_terry(figure.wins()))
    names, turned = figure.names(), set()
    for i, j in combinations(range(len(names)), 2):
        if found[i] < found[j]:
            turned.add((names[i], names[j]))
    known = {
        "overall preference, DALL·E 3 Eval": {("MJ-v6", "SD-3")},
        "alignment, DrawBench": {("DALL·E-3", "MJ-v6")},
    }
    assert turned == known.get(name, set())
    for a, b in turned:
        assert figure.strengths()[names.index(a)] - figure.strengths()[names.index(b)] < 6.5


def test_a_study_of_the_printed_ratings_reports_the_printed_matrix() -> None:
    """By the way that a study's ratings take: rows, games, matrices, strengths."""
    figure, rng = imagen3.FULL["overall preference, GenAI-Bench"], np.random.default_rng(0)
    names, wins, rows = figure.names(), figure.wins(), []
    for i, j in combinations(range(6), 2):
        for score in rng.permutation(np.arange(imagen3.RATINGS) < wins[i, j]):
            rows.append(
                {"first": names[i], "second": names[j], "score": float(score), "rater": f"r{rng.integers(150)}"}
                | {"set": "GenAI-Bench", "question": "overall", "category": "", "answer": "left", "counts": True}
                | {"prompt": f"p{len(rows) % 1600}"}
            )
    (result,) = summary(rows, replicates=200)["results"]
    for (i, a), (j, b) in permutations(enumerate(names), 2):
        assert 100 * result["win_rates"][a][b] == pytest.approx(wins[i, j] / 25, abs=0.11)
    assert list(result["models"]) == names
    assert {n: round(of["elo"], 1) for n, of in result["models"].items()} == pytest.approx(
        dict(zip(names, analysis.elo(analysis.bradley_terry(wins)).tolist(), strict=True)), abs=0.2
    )
    first, second = result["models"]["Imagen-3"], result["models"]["SD-3"]
    assert first["low"] > second["high"], "significantly more preferred (section 3.1.1)"
    third, fourth = result["models"]["DALL·E-3"], result["models"]["MJ-v6"]
    assert third["low"] < fourth["high"], "a point apart"


@pytest.mark.parametrize("name", imagen3.ADDED)
def test_models_that_were_added_met_whom_the_report_says(name: str) -> None:
    """Figure 14: the four better and the four worse of each, by the Elo that they came to."""
    figure = imagen3.ADDED[name]
    names, wins = figure.names(), figure.wins()
    ratings = {n: elo - 0.01 * i for i, (n, elo) in enumerate(zip(names, figure.strengths(), strict=True))}
    for i, model in enumerate(names):
        assert set(analysis.opponents(ratings, model)) == {n for n, won in zip(names, wins[i], strict=True) if won}


def test_simulated_raters_of_known_strengths_are_recovered_within_the_intervals() -> None:
    """Sixty studies of five models: the 99 % intervals cover the strengths as often as they say, with raters of one mind and
    with raters who differ."""
    theta = np.array([0.6, 0.25, 0.0, -0.25, -0.6])
    for spread, ties in ((0.0, 0.0), (0.3, 0.0)):
        covered = []
        for seed in range(60):
            games = simulated(theta, 100, 60, seed, ties, spread)
            low, high = analysis.bootstrap(games, replicates=300, seed=seed)
            # Differences among raters draw strengths together: that of the average rater's choices is what is estimated.
            truth = analysis.elo(analysis.bradley_terry(_rates(theta, spread), prior=0))
            covered.append((low <= truth) & (truth <= high))
        assert np.mean(covered) > 0.96, (spread, np.mean(covered))
    games = simulated(theta, 2500, 200, seed=0)
    assert np.abs(analysis.elo(analysis.bradley_terry(games.wins())) - analysis.elo(theta)).max() < 12


def _rates(theta: np.ndarray, spread: float) -> np.ndarray:
    """Win rates of models over raters whose values of two differ by a normal of this spread in each."""
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    difference = theta[:, None] - theta[None, :]
    rates = (1 / (1 + np.exp(-(difference[..., None] + math.sqrt(2) * spread * points)))) @ (weights / weights.sum())
    return 100 * np.where(np.eye(len(theta), dtype=bool), 0, rates)


def test_the_bootstrap_over_raters_is_as_wide_as_their_differences_make_it() -> None:
    """Of two models the closed form: the standard error of a mean over raters."""
    rng = np.random.default_rng(0)
    per, raters = 20, 150
    rate = rng.beta(4, 4, raters)
    score = (rng.uniform(size=(raters, per)) < rate[:, None]).astype(float).ravel()
    ones = np.ones(raters * per, np.int64)
    games = Games(("a", "b"), 0 * ones, ones, score, np.repeat(np.arange(raters), per))
    low, high = analysis.bootstrap(games, replicates=4000)
    error = score.reshape(raters, per).mean(1).std(ddof=1) / math.sqrt(raters)
    mean = score.mean()
    of_elo = analysis.SCALE / 2 * error / (mean * (1 - mean))  # delta method; of two models each moves by half
    assert np.allclose(high - low, 2 * 2.576 * of_elo, rtol=0.06)
    naive = analysis.SCALE / 2 * math.sqrt(1 / (mean * (1 - mean) * len(score)))
    assert (high - low > 1.5 * 2 * 2.576 * naive).all(), "raters are alike with themselves"


def test_ties_modelled_are_recovered() -> None:
    theta = np.array([0.8, 0.0, -0.3, -0.5])
    games = simulated(theta, 4000, 50, seed=4, ties=0.7)
    found, nu = analysis.davidson(games.wins(), games.ties())
    assert np.abs(found - theta).max() < 0.05 and abs(nu - 0.7) < 0.05
    halves = analysis.bradley_terry(games.wins())
    assert list(np.argsort(halves)) == list(np.argsort(found)) and np.ptp(halves) < np.ptp(found), (
        "halves draw together"
    )
    without = simulated(theta, 200, 50, seed=4)
    assert np.allclose(analysis.davidson(without.wins(), without.ties())[0], analysis.bradley_terry(without.wins()))


def test_agreement_is_that_of_krippendorffs_own_example() -> None:
    """Four observers, twelve units (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C)."""
    observers = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    table = [line.split() for line in observers]
    units = [[float(row[i]) for row in table if row[i] != "."] for i in range(12)]
    assert math.isclose(analysis.krippendorff(units, nominal=True), 0.743, abs_tol=5e-4)
    assert math.isclose(analysis.krippendorff(units), 0.849, abs_tol=5e-4)
    assert math.isnan(analysis.krippendorff([[1.0], [2.0]]))
    assert analysis.krippendorff([[1, 1], [0, 0], [0.5, 0.5]]) == 1
    rng = np.random.default_rng(0)
    assert abs(analysis.krippendorff(rng.integers(0, 3, (2000, 3)).tolist())) < 0.05


def test_a_new_model_meets_the_best_and_then_its_neighbours() -> None:
    ratings = {f"m{i}": 1000 + 20.0 * i for i in range(12)}
    assert analysis.opponents(ratings, "new") == ["m11"]
    assert analysis.opponents({**ratings, "new": 1105.0}, "new") == ["m9", "m8", "m7", "m6", "m5", "m4", "m3", "m2"]
    assert len(analysis.opponents({f"m{i}": float(i) for i in range(99)} | {"new": 50.0}, "new")) == 8, "at most"
    assert analysis.opponents({**ratings, "new": 1500.0}, "new") == ["m11", "m10", "m9", "m8"]
    assert analysis.opponents({"a": 1.0, "new": 0.0}, "new") == ["a"]


def test_a_model_added_cheaply_is_placed_as_if_it_had_met_all() -> None:
    """Twelve models and one more: it meets the best, then its neighbours, and comes to where its strength is."""
    theta = np.append(np.linspace(-1, 1, 12), 0.32)
    rng = np.random.default_rng(5)
    rate = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    wins = rng.binomial(1000, np.triu(rate, 1)).astype(float)
    wins = wins + np.tril(1000 - wins.T, -1)
    names = [f"m{i:02d}" for i in range(12)] + ["new"]
    known, met = wins.copy(), set[str]()
    known[12], known[:, 12] = 0, 0
    ratings = dict(zip(names[:12], analysis.elo(analysis.bradley_terry(known[:12, :12])).tolist(), strict=True))
    for _ in range(2):
        for name in set(analysis.opponents(ratings, "new")) - met:
            i = names.index(name)
            known[12, i], known[i, 12] = wins[12, i], wins[i, 12]
            met.add(name)
        ratings = dict(zip(names, analysis.elo(analysis.bradley_terry(known)).tolist(), strict=True))
    assert "m11" in met and len(met) <= 9, "the best, four better and four worse"
    full = dict(zip(names, analysis.elo(analysis.bradley_terry(wins)).tolist(), strict=True))
    assert sorted(ratings, key=ratings.__getitem__) == sorted(full, key=full.__getitem__)
    assert abs(ratings["new"] - full["new"]) < 15
