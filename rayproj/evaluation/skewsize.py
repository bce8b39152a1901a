"""SkewSize: bias as the skew, over classes, of the effect size of a subgroup on the predictions (Albuquerque et al. 2024,
"Evaluating Model Bias Requires Characterizing its Mistakes").

The value is not monotone in bias: one biased class among many raises it, bias in all classes brings it back. It is
therefore always given with the mean and quantiles of the effect sizes, a permutation null, intervals, and the classes whose
tables are too thin for an effect size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import scipy
import torch

OTHER = "(other)"  # rare predictions of a class, together
HEAT = 6  # predictions of which all residuals are told


def contingency(labels: np.ndarray, predictions: np.ndarray, groups: np.ndarray) -> dict[int, np.ndarray]:
    """For each class, counts [predictions that occur, groups that occur] over its examples."""
    tables = {}
    for label in np.unique(labels):
        rows, i = np.unique(predictions[labels == label], return_inverse=True)
        columns, j = np.unique(groups[labels == label], return_inverse=True)
        table = np.zeros((len(rows), len(columns)), np.int64)
        np.add.at(table, (i, j), 1)
        tables[int(label)] = table
    return tables


def cramers_v(table: np.ndarray, corrected: bool = True) -> float:
    """Cramér's V of a contingency table, bias-corrected (Bergsma 2013) by default; empty rows and columns do not count.

    A table of one row or one column has V = 0: there is nothing that could depend.
    """
    table = np.asarray(table)
    rows, columns = np.indices(table.shape)
    layout = _Layout(np.zeros(table.size, int), rows.ravel(), table.shape[0] + columns.ravel())
    return float(layout.effects(table.ravel().astype(np.float64), corrected)[0])


def skewness(values: np.ndarray) -> float:
    """Fisher-Pearson g1 = m3 / m2^(3/2); NaN for fewer than three values or no spread."""
    values = np.asarray(values, np.float64)
    if len(values) < 3:
        return math.nan
    centred = values - values.mean()
    m2 = (centred**2).mean()
    return float((centred**3).mean() / m2**1.5) if m2 > 1e-18 else math.nan


@dataclass
class SkewSizeConfig:
    """How SkewSize is worked out."""

    plain: bool = False  # Cramér's V without the correction of its bias
    together: int = 2  # grouping variables whose intersections are looked at too, at most
    min_examples: int = 10  # classes with fewer are left out
    permutations: int = 200  # of the groups within each class, for chance
    bootstraps: int = 200  # for intervals

    def problems(self) -> list[str]:
        names = ("min_examples", "permutations", "bootstraps")
        found = [f"skewsize.{name} must not be negative." for name in names if getattr(self, name) < 0]
        if self.together < 1:
            found.append(
                f"skewsize.together must be positive, not {self.together}; 1: each grouping variable by itself."
            )
        return found


class _Layout:
    """The cells of the tables of all classes, end to end; rows and columns are numbered through.

    Args:
        classes, rows, columns: int [cells]: what each cell belongs to.
    """

    def __init__(self, classes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
        self.classes, self.count = classes, int(classes.max(initial=-1)) + 1
        _, self.rows = np.unique(rows, return_inverse=True)
        _, self.columns = np.unique(columns, return_inverse=True)
        self.class_of_row, self.class_of_column = (
            np.zeros(side.max(initial=-1) + 1, int) for side in (self.rows, self.columns)
        )
        self.class_of_row[self.rows], self.class_of_column[self.columns] = classes, classes

    def expected(self, counts: np.ndarray) -> np.ndarray:
        """Of each cell, if predictions did not depend on groups; where there are no examples, 0."""
        rows, columns, total = self._sums(counts)
        return _over(rows[self.rows] * columns[self.columns], total[self.classes])

    def p_values(self, counts: np.ndarray) -> np.ndarray:
        """Of Pearson's χ² test of each class [classes]; 1 where there is nothing that could depend."""
        phi2, r, k, n, some = self._phi(counts)
        return np.where(some, scipy.stats.chi2.sf(n * phi2, (r - 1) * (k - 1)), 1.0)

    def effects(self, counts: np.ndarray, corrected: bool) -> np.ndarray:
        """V of each class [classes], from counts [cells]."""
        phi2, r, k, n, some = self._phi(counts)
        m = np.where(some, n - 1, 1)
        if corrected:
            phi2 = np.maximum(phi2 - (r - 1) * (k - 1) / m, 0)
            r, k = r - (r - 1) ** 2 / m, k - (k - 1) ** 2 / m
        return np.where(some, np.sqrt(_over(phi2, np.minimum(r, k) - 1)), 0.0)

    def described(self, counts: np.ndarray) -> list[dict[str, Any]]:
        """Of each class its examples, predictions and groups that occur, and the least expected count."""
        rows, columns, n = self._sums(counts)
        least = np.full(self.count, np.inf)
        np.minimum.at(least, self.classes, self.expected(counts))
        whole = (values.astype(int).tolist() for values in (n, *self._occurring(rows, columns)))
        keys = ("examples", "predictions", "groups", "least_expected")
        return [dict(zip(keys, row, strict=True)) for row in zip(*whole, least.tolist(), strict=True)]

    def _occurring(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many rows, and columns, of each class have examples, by their sums."""
        sides = ((self.class_of_row, rows), (self.class_of_column, columns))
        r, k = (np.bincount(of, sums > 0, self.count) for of, sums in sides)
        return r, k

    def _phi(self, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """By class χ² / n, its rows, columns (2 where there are fewer) and examples, and whether it has two of each."""
        rows, columns, n = self._sums(counts)
        # χ² / n = Σ O² / (row column) - 1, in which empty cells, rows and columns have no part.
        terms = _over(counts**2, rows[self.rows] * columns[self.columns])
        phi2 = np.maximum(np.bincount(self.classes, terms, self.count) - 1, 0)
        r, k = self._occurring(rows, columns)
        some = (r >= 2) & (k >= 2)
        return phi2, np.where(some, r, 2), np.where(some, k, 2), n, some

    def _sums(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rows, of columns, of classes."""
        return (
            np.bincount(self.rows, counts, len(self.class_of_row)),
            np.bincount(self.columns, counts, len(self.class_of_column)),
            np.bincount(self.classes, counts, self.count),
        )


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is not positive."""
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


class SkewSize:
    """Counts of (class, prediction, group), which add up over batches and ranks, and what follows from them.

    Args:
        corrected: whether V is bias-corrected. The two are not comparable: under no bias the one has a skew of about 0.2,
            the other of about 1.1.
        min_examples: classes with fewer are left out, and counted.
        rare: predictions that a class has fewer times than this are one, `OTHER`; for free texts.
        vocabulary: predictions beyond so many of the most common ones, over all classes, are `OTHER` too; 0: none.
    """

    def __init__(self, corrected: bool = True, min_examples: int = 10, rare: int = 0, vocabulary: int = 0) -> None:
        self.corrected, self.min_examples, self.rare, self.vocabulary = corrected, min_examples, rare, vocabulary
        self.counts: Counter[tuple[Any, Any, Any]] = Counter()
        self.dropped = 0  # examples without a group
        self.incomplete = 0  # without a class or a prediction

    def update(self, labels: Iterable[Any], predictions: Iterable[Any], groups: Iterable[Any]) -> None:
        """Add examples: of each its class, what was predicted, and its group; those that lack one, None or NaN, are counted
        and left out.

        Tensors of whole numbers [n] are counted where they are, on a GPU too.
        """
        given = [of for of in (labels, predictions, groups) if isinstance(of, torch.Tensor)]
        if len(given) == 3 and all(of.ndim == 1 and not of.is_floating_point() for of in given):
            cells, counts = torch.stack([of.to(given[0].device) for of in given]).unique(dim=1, return_counts=True)
            self.counts.update(dict(zip(zip(*cells.tolist(), strict=True), counts.tolist(), strict=True)))
            return
        labels, predictions, groups = (
            of.tolist() if isinstance(of, torch.Tensor) else of for of in (labels, predictions, groups)
        )
        for label, prediction, group in zip(labels, predictions, groups, strict=True):
            if _missing(label) or _missing(prediction):
                self.incomplete += 1
            elif _missing(group):
                self.dropped += 1
            else:
                self.counts[_plain(label), _plain(prediction), _plain(group)] += 1

    def merge(self, other: SkewSize) -> None:
        """Add what another rank counted."""
        self.counts.update(other.counts)
        self.dropped += other.dropped
        self.incomplete += other.incomplete

    def compute(
        self,
        permutations: int = 200,
        bootstraps: int = 200,
        level: float = 0.95,
        top: int = 5,
        names: Mapping[Any, str] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """SkewSize with what is needed to read it.

        Args:
            permutations: shuffles of the groups within each class, for the null.
            bootstraps: draws of each class's examples with replacement, for the intervals.
            top: classes whose shifted predictions are named.
            names: of classes and predictions, where they are numbers.

        Returns:
            "value" (None where undefined, with "reason"), its "interval" and "z" against the null; V by class
            ("effects"), of each what it rests on ("tables"): examples, predictions, groups and the least expected count,
            and its gap of accuracy between groups ("class_gaps"); their mean, quantiles and maximum, and the mean's
            interval; of the null its mean, deviation and the share at or above the value, which counts as one of it, and
            between what most V of single classes lie then; p-values by class, of Pearson's χ² test where
            Cochran's rule allows that and else by permutation, adjusted for their number (Benjamini and Hochberg 1995);
            the classes that drive the value, with the predictions that a group has more or less often than it would;
            accuracy overall, of the worst group and the gap; how many classes were skipped, and how many break Cochran's
            rule (no expected count under 1, at most a fifth under 5), so that their V means little.
        """
        shown = names or {}
        cells = self._cells()
        if not cells:
            return _nothing(self.corrected, self._classes(), self.dropped, self.incomplete)
        layout, counts, keys = cells
        own = list(dict.fromkeys(label for label, _, _ in keys))
        classes, gaps = [str(shown.get(c, c)) for c in own], self._class_gaps()
        effects = layout.effects(counts, self.corrected)
        rng = np.random.default_rng(seed)
        examples = _Examples(layout, counts)
        null = [layout.effects(examples.shuffled(rng), self.corrected) for _ in range(permutations)]
        drawn = [layout.effects(examples.drawn(rng), self.corrected) for _ in range(bootstraps)]
        value, under_null = skewness(effects), _finite([skewness(v) for v in null])
        higher = sum((v >= effects - 1e-12).astype(int) for v in null) if null else np.zeros(len(effects), int)
        # Permutations tell no p below one over their number, which many classes' adjustment takes for chance.
        thin = _thin(layout, counts)
        p = np.where(thin, (1 + higher) / (1 + permutations), layout.p_values(counts))
        q = scipy.stats.false_discovery_control(p)
        defined = math.isfinite(value)
        return {
            "value": value if defined else None,
            "reason": "" if defined else "fewer than three classes, or effect sizes without spread",
            "interval": _interval(value, _finite([skewness(v) for v in drawn]), level),
            "corrected": self.corrected,
            "z": (value - float(np.mean(under_null))) / float(np.std(under_null, ddof=1))
            if defined and len(under_null) > 1 and np.std(under_null) > 0
            else None,
            "effects": dict(zip(classes, effects.tolist(), strict=True)),
            "tables": dict(zip(classes, layout.described(counts), strict=True)),
            "class_gaps": {c: gaps[label] for c, label in zip(classes, own, strict=True)},
            "mean": float(effects.mean()),
            "mean_interval": _interval(float(effects.mean()), [float(v.mean()) for v in drawn], level),
            "median": float(np.quantile(effects, 0.5)),
            "q90": float(np.quantile(effects, 0.9)),
            "max": float(effects.max()),
            "null_mean": float(np.mean(under_null)) if under_null else None,
            "null_std": float(np.std(under_null, ddof=1)) if len(under_null) > 1 else None,
            "null_share_at_or_above": float((1 + np.sum(np.array(under_null) >= value)) / (1 + len(under_null)))
            if defined and under_null
            else None,
            "null_mean_effect": float(np.mean(null)) if null else None,
            "null_band": np.quantile(null, [(1 - level) / 2, (1 + level) / 2]).tolist() if null else None,
            "p_values": dict(zip(classes, q.tolist(), strict=True)),
            "significant": [c for c, one in zip(classes, q, strict=True) if one <= 1 - level],
            "drivers": _drivers(layout, counts, keys, effects, classes, top, shown),
            **self._accuracy(),
            "classes_skipped": self._classes() - len(classes),
            "classes_thin": int(thin.sum()),
            "examples": int(counts.sum()),
            "dropped": self.dropped,
            "incomplete": self.incomplete,
        }

    def _classes(self) -> int:
        return len({label for label, _, _ in self.counts})

    def _cells(self) -> tuple[_Layout, np.ndarray, list[tuple[Any, Any, Any]]] | None:
        """Every pair of a prediction and a group that a class has, in order; None if no class has enough examples."""
        by_class: dict[Any, Counter[tuple[Any, Any]]] = {}
        for (label, prediction, group), count in self.counts.items():
            by_class.setdefault(label, Counter())[prediction, group] += count
        keys, counts, known = list[tuple[Any, Any, Any]](), list[int](), self._known()
        for label in sorted(by_class, key=lambda c: (str(type(c)), c)):
            table = by_class[label]
            if table.total() < self.min_examples:
                continue
            often: Counter[Any] = Counter()
            for (prediction, _), count in table.items():
                often[prediction] += count
            merged: Counter[tuple[Any, Any]] = Counter()
            for (prediction, group), count in table.items():
                kept = often[prediction] >= self.rare and (known is None or prediction in known)
                merged[prediction if kept else OTHER, group] += count
            rows, columns = (sorted({key[side] for key in merged}, key=str) for side in (0, 1))
            keys += [(label, row, column) for row in rows for column in columns]
            counts += [merged[row, column] for row in rows for column in columns]
        if not keys:
            return None
        number = {key: i for i, key in enumerate(dict.fromkeys(label for label, _, _ in keys))}
        rows_of = {key: i for i, key in enumerate(dict.fromkeys((y, p) for y, p, _ in keys))}
        columns_of = {key: i for i, key in enumerate(dict.fromkeys((y, g) for y, _, g in keys))}
        layout = _Layout(
            np.array([number[y] for y, _, _ in keys]),
            np.array([rows_of[y, p] for y, p, _ in keys]),
            np.array([columns_of[y, g] for y, _, g in keys]),
        )
        return layout, np.array(counts, np.float64), keys

    def _known(self) -> set[Any] | None:
        """The vocabulary; None: all that was predicted."""
        often: Counter[Any] = Counter()
        for (_, prediction, _), count in self.counts.items():
            often[prediction] += count
        order = sorted(often, key=lambda prediction: (-often[prediction], str(prediction)))
        return set(order[: self.vocabulary]) if self.vocabulary else None

    def _class_gaps(self) -> dict[Any, float]:
        """Of each class the highest accuracy of a group less the lowest."""
        cells: dict[Any, dict[Any, list[int]]] = {}
        for (label, prediction, group), count in self.counts.items():
            cell = cells.setdefault(label, {}).setdefault(group, [0, 0])
            cell[0] += count * (label == prediction)
            cell[1] += count
        shares = {label: [right / n for right, n in of.values()] for label, of in cells.items()}
        return {label: max(of) - min(of) for label, of in shares.items()}

    def _accuracy(self) -> dict[str, Any]:
        right, all_of = Counter[Any](), Counter[Any]()
        for (label, prediction, group), count in self.counts.items():
            all_of[group] += count
            right[group] += count * (label == prediction)
        by_group = {group: right[group] / n for group, n in all_of.items()}
        worst = min(by_group, key=lambda group: by_group[group])
        return {
            "accuracy": right.total() / all_of.total(),
            "accuracy_by_group": {str(group): by_group[group] for group in sorted(by_group, key=str)},
            "worst_group": str(worst),
            "worst_group_accuracy": by_group[worst],
            "accuracy_gap": max(by_group.values()) - by_group[worst],
        }


class _Examples:
    """The examples behind counts, class by class."""

    def __init__(self, layout: _Layout, counts: np.ndarray) -> None:
        self.layout, self.cells = layout, len(counts)
        cell = np.repeat(np.arange(len(counts)), counts.astype(int))
        self.cell = cell[np.argsort(layout.classes[cell], kind="stable")]
        self.classes = layout.classes[self.cell]
        self.row, self.column = layout.rows[self.cell], layout.columns[self.cell]
        sizes = np.bincount(self.classes, minlength=layout.count)
        self.begin, self.size = (np.cumsum(sizes) - sizes)[self.classes], sizes[self.classes]
        # The cell of a row and a column of the same class.
        columns = np.bincount(layout.class_of_column, minlength=layout.count)
        first_row, first_column, first_cell = (
            np.array([np.flatnonzero(of == c)[0] for c in range(layout.count)])
            for of in (layout.class_of_row, layout.class_of_column, layout.classes)
        )
        self._row_at = first_cell[self.classes] + (self.row - first_row[self.classes]) * columns[self.classes]
        self._column_at = self.column - first_column[self.classes]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Counts [cells] after the groups changed hands within each class."""
        order = np.lexsort((rng.random(len(self.cell)), self.classes))
        return np.bincount(self._row_at + self._column_at[order], minlength=self.cells).astype(np.float64)

    def drawn(self, rng: np.random.Generator) -> np.ndarray:
        """Counts [cells] of as many examples of each class, drawn with replacement."""
        chosen = self.begin + (rng.random(len(self.cell)) * self.size).astype(int)
        return np.bincount(self.cell[chosen], minlength=self.cells).astype(np.float64)


def _drivers(
    layout: _Layout,
    counts: np.ndarray,
    keys: list[tuple[Any, Any, Any]],
    effects: np.ndarray,
    classes: list[str],
    top: int,
    names: Mapping[Any, str],
) -> list[dict[str, Any]]:
    """The classes of the largest effects, and of each the cells whose counts are farthest from independence."""
    expected = layout.expected(counts)
    residual = _over(counts - expected, np.sqrt(expected))
    found = []
    for number in np.argsort(-effects, kind="stable")[:top]:
        if effects[number] <= 0:
            break
        cells = np.flatnonzero(layout.classes == number)
        most = cells[np.argsort(-np.abs(residual[cells]), kind="stable")[:4]]
        shifted = [
            {
                "prediction": str(names.get(keys[i][1], keys[i][1])),
                "group": str(keys[i][2]),
                "count": int(counts[i]),
                "expected": float(expected[i]),
                "residual": float(residual[i]),
            }
            for i in most
        ]
        table = _heat(cells, residual, keys, names)
        found.append({"class": classes[number], "effect": float(effects[number]), "shifted": shifted, **table})
    return found


def _heat(
    cells: np.ndarray, residual: np.ndarray, keys: list[tuple[Any, Any, Any]], names: Mapping[Any, str]
) -> dict[str, Any]:
    """The residuals (O - E) / √E of a class's table, of the predictions that are farthest from independence."""
    predictions, groups = (list(dict.fromkeys(keys[i][side] for i in cells)) for side in (1, 2))
    table = residual[cells].reshape(len(predictions), len(groups))
    most = np.argsort(-np.abs(table).max(1), kind="stable")[:HEAT]
    return {
        "predictions": [str(names.get(predictions[k], predictions[k])) for k in most],
        "groups": [str(g) for g in groups],
        "residuals": table[most].tolist(),
    }


def _thin(layout: _Layout, counts: np.ndarray) -> np.ndarray:
    """Which classes break Cochran's rule (Cochran 1954), bool [classes]; one of a single row or column does not."""
    expected = layout.expected(counts)
    cells = np.bincount(layout.classes, minlength=layout.count)
    small = np.bincount(layout.classes, expected < 5, layout.count)
    tiny = np.bincount(layout.classes, expected < 1, layout.count)
    sides = [np.bincount(of, minlength=layout.count) for of in (layout.class_of_row, layout.class_of_column)]
    thin: np.ndarray = ((tiny > 0) | (small > 0.2 * cells)) & (sides[0] > 1) & (sides[1] > 1)
    return thin


def _nothing(corrected: bool, skipped: int, dropped: int, incomplete: int) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(
        ("value", "interval", "z", "mean", "mean_interval", "median", "q90", "max", "null_mean", "null_std",
         "null_share_at_or_above", "null_mean_effect", "null_band", "accuracy",
         "worst_group", "worst_group_accuracy", "accuracy_gap")
    )  # fmt: skip
    said = {
        "reason": "no class has enough examples",
        "corrected": corrected,
        "effects": {},
        "class_gaps": {},
        "tables": {},
        "p_values": {},
    }
    rest = {"significant": [], "drivers": [], "classes_skipped": skipped, "classes_thin": 0, "examples": 0}
    return {**empty, **said, **rest, "accuracy_by_group": {}, "dropped": dropped, "incomplete": incomplete}


def _interval(value: float, drawn: Sequence[float], level: float) -> list[float] | None:
    """The value, give or take the deviation over bootstraps (Efron and Tibshirani 1993, section 12). Their quantiles would
    not even hold it: V of tables drawn anew lies above that of the tables themselves."""
    if len(drawn) < 2 or not math.isfinite(value):
        return None
    by = float(scipy.stats.norm.ppf((1 + level) / 2) * np.std(drawn, ddof=1))
    return [value - by, value + by]


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _missing(value: Any) -> bool:
    return value is None or value != value


def _plain(value: Any) -> Any:
    """A numpy scalar as Python's own, so that counts of both kinds are one."""
    return value.item() if isinstance(value, np.generic) else value


def variables(attributes: Mapping[str, Iterable[Any]], together: int = 2) -> dict[str, list[Any]]:
    """Grouping variables and their intersections of up to so many at once, by name, such as "tone" and "tone × style"; None
    where one of them is."""
    found: dict[str, list[Any]] = {}
    for size in range(1, together + 1):
        for names in combinations(attributes, size):
            rows = zip(*(attributes[name] for name in names), strict=True)
            found[" × ".join(names)] = [
                None if any(map(_missing, row)) else _plain(row[0]) if size == 1 else " × ".join(map(str, row))
                for row in rows
            ]
    return found


def skewsize(
    labels: np.ndarray, predictions: np.ndarray, groups: np.ndarray, classes: tuple[str, ...],
    corrected: bool = True, min_examples: int = 10, permutations: int = 200, bootstraps: int = 200, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """`SkewSize` of arrays [n] of which labels and predictions are numbers of classes; classes without an example count as
    skipped."""
    metric = SkewSize(corrected, min_examples)
    metric.update(labels, predictions, groups)
    found = metric.compute(permutations, bootstraps, names=dict(enumerate(classes)), seed=seed)
    return {**found, "classes_skipped": len(classes) - len(found["effects"])}
