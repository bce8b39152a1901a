"""What runs of jobs/evaluate.py and jobs/judge.py say of a model, in the lines and tables of its card."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayproj import config as configuration
from rayproj.data.dataset import Dataset, Header
from rayproj.errors import UserError
from rayproj.evaluation.job import EvaluateConfig
from rayproj.evaluation.proportions import LEAST
from rayproj.export.card import describe
from rayproj.judging.scoring import JudgeConfig
from rayproj.storage.store import Store, from_json

NOT_RECORDED = "not recorded"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of markdown, with one more that is empty; none without rows."""
    cells = [[shown(value) for value in row] for row in rows]
    if not cells:
        return []
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)] + [""]


def shown(value: Any) -> str:
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", r"\|")


def words(name: str) -> str:
    return name.replace("_", " ")


def measured(quality: dict[str, Any], key: str) -> Any:
    """A measure of quality, said in words where the images are too few for it."""
    few = key == "frechet_distance_limit" and key in quality and quality[key] is None
    return "too few images" if few else quality.get(key)


def header_of(uri: str) -> Header | None:
    return Dataset.open(uri).header if Store(uri).exists("dataset.json") else None


@dataclass(frozen=True)
class Evaluation(ABC):
    """What one run says of a model.

    Attributes:
        names: of the model, or of the sets that it drew.
        tests: sentences on the real images that it was judged with.
    """

    result: dict[str, Any]
    names: list[str]
    tests: list[str] = field(default_factory=list)

    def factors(self) -> list[str]:
        return []

    @abstractmethod
    def metrics(self) -> list[str]: ...

    @abstractmethod
    def tables(self) -> list[str]: ...

    @abstractmethod
    def caveats(self) -> list[str]:
        """Measured ones alone."""


def evaluation_of(uri: str, run: Store, kind: str) -> Evaluation:
    """What the run of an evaluation says of the model of another run.

    Args:
        kind: of the model: classifier, diffusion or autoencoder.

    Raises:
        UserError: it is no finished evaluation, or not of this model.
    """
    store = Store(uri)
    if not store.exists("result.json") or not store.exists("config.yaml"):
        raise UserError(
            f"--evaluation={uri} is no finished run; give the run dir of jobs/evaluate.py or jobs/judge.py."
        )
    result, text = from_json(store.read("result.json")), store.read("config.yaml")
    if result.get("job") == "judge":
        found: Evaluation = OfJudge.of(configuration.section(JudgeConfig, text, "judge"), result, run)
    else:
        given = configuration.section(EvaluateConfig, text, "evaluate")
        sets = {"Test": given.test, **given.tests, "Reference": given.reference}
        tests = [_described(place, name) for name, place in sets.items() if place]
        if kind == "classifier":
            found = OfClassifier(result, [n for n, u in given.classifiers.items() if Store(u).uri == run.uri], tests,
                                 list(given.groups))  # fmt: skip
        else:
            found = OfGenerator(result, _drawn_by(run, given.synthetic), tests)
    if not found.names:
        raise UserError(f"--evaluation={uri} did not judge the model of '{run.uri}'; give one that did.")
    return found


def _described(uri: str, name: str) -> str:
    header = header_of(uri)
    return describe(header, name) if header else f"{name}: {NOT_RECORDED}"


def _drawn_by(run: Store, sets: dict[str, str]) -> list[str]:
    """The names of the datasets that a run's model drew."""
    made = {name: header.provenance.get("model") for name, uri in sets.items() if (header := header_of(uri))}
    return [name for name, model in made.items() if model is not None and Store(model).uri == run.uri]


@dataclass(frozen=True)
class OfClassifier(Evaluation):
    """By jobs/evaluate.py.

    Attributes:
        groups: variables by which it was measured.
    """

    groups: list[str] = field(default_factory=list)

    def factors(self) -> list[str]:
        return [f"{group}: measured by group, below" for group in self.groups]

    def metrics(self) -> list[str]:
        found = ["accuracy, with its 95 % interval (Wilson 1927)"]
        return [*found, "by group: worst group and gap"] if self.result.get("fairness") else found

    def tables(self) -> list[str]:
        sets = {"test": self.result, **self.result.get("tests", {})}
        rows = [
            (test, name, one["value"], f"{one['low']:.4g} to {one['high']:.4g}", one["n"])
            for test, found in sets.items()
            for name in self.names
            for one in [found["accuracy"][name]]
        ]
        lines = table(["test set", "as", "accuracy", "95 % interval", "images"], rows)
        by_group = [
            (test, variable, measure, one["overall"], f"{one['worst_group']}: {shown(one['worst'])}", one["gap"])
            for test, found in sets.items()
            for name in self.names
            for variable, of in (found.get("fairness") or {}).get(name, {}).items()
            for measure, one in of["measures"].items()
        ]
        return lines + table(["test set", "by", "measure", "overall", "worst group", "gap"], by_group)

    def caveats(self) -> list[str]:
        return [line for name in self.names for line in self._weak_spots(name)]

    def _weak_spots(self, name: str) -> list[str]:
        lines, recalls = [], dict[str, float]()
        for i, (label, row) in enumerate(zip(self.result["classes"], self.result["confusion"][name], strict=True)):
            if sum(row):
                recalls[label] = row[i] / sum(row)
        if recalls:
            worst = min(recalls, key=lambda c: recalls[c])
            lines.append(f"Of {worst} it gets {100 * recalls[worst]:.1f} % right, the least of all classes.")
        main = self.result["accuracy"][name]
        for test, found in self.result.get("tests", {}).items():
            one = found["accuracy"][name]
            if one["high"] < main["low"]:
                there, here = 100 * one["value"], 100 * main["value"]
                lines.append(f"On {test} its accuracy is lower: {there:.1f} % against {here:.1f} %.")
        for variable, of in (self.result.get("fairness") or {}).get(name, {}).items():
            for measure, one in of["measures"].items():
                if one["interval"] and one["interval"][0] is not None and one["interval"][0] > 0:
                    lines.append(
                        f"{measure} differs by {variable}: worst for {one['worst_group']} ({shown(one['worst'])}), gap "
                        f"{shown(one['gap'])} (95 % interval from {shown(one['interval'][0])})."
                    )
        return lines


class OfGenerator(Evaluation):
    """By jobs/evaluate.py, from the sets that a model drew."""

    def metrics(self) -> list[str]:
        quality = self.result["quality"]
        names = ", ".join(map(words, next(iter(quality["measures"].values()), {})))
        return [f"over {quality['samples']:,} images, features of {quality['feature_extractor']}: {names}"]

    def tables(self) -> list[str]:
        measures = self.result["quality"]["measures"]
        columns = [name for name in ("real", *self.names) if name in measures]
        heads = ["measure", *("real images" if name == "real" else f"set {name}" for name in columns)]
        known = dict.fromkeys(key for name in columns for key in measures[name])
        lines = table(heads, [(words(key), *(measured(measures[name], key) for name in columns)) for key in known])
        return lines + _marks(self.result, self.names)

    def caveats(self) -> list[str]:
        measures = self.result["quality"]["measures"]
        key, images = "frechet_distance", self.result["quality"]["samples"]
        return [
            f"Set {name}: the Fréchet distance to real images is {measures[name][key]:.4g}, that of real images to real "
            f"ones {measures['real'][key]:.4g}, at {images:,} images; it depends on their number."
            for name in self.names
            if name in measures and "real" in measures
        ]


class OfJudge(Evaluation):
    """By jobs/judge.py."""

    @classmethod
    def of(cls, given: JudgeConfig, result: dict[str, Any], run: Store) -> OfJudge:
        tests = [_described(given.reference, "Reference")] if given.reference else []
        return cls(result, _drawn_by(run, {**given.models, **given.attempts}), tests)

    def factors(self) -> list[str]:
        known = self.result.get("perception", {})
        right = {
            attribute: f", which is right on {100 * of['value']:.1f} % ({100 * of['low']:.1f} to {100 * of['high']:.1f}) of "
            f"{of['n']:,} labelled real images"
            for attribute, of in known.items()
        }
        return [
            f"{attribute}, as a classifier perceives it{right.get(attribute, ', how often it is right is not known')}: below"
            for attribute in self.result["attributes"]
        ]

    def metrics(self) -> list[str]:
        of_quality = [f"quality over {q['samples']:,} images, {name}" for name, q in self.result["quality"].items()]
        prompts = (
            f"{self.result['prompts']:,} prompts, mean with its 95 % interval over them, if there are {LEAST} or more"
        )
        return [f"alignment, {measure}: {prompts}" for measure in self.result["alignment"]] + of_quality

    def tables(self) -> list[str]:
        result, rows = self.result, []
        for measure, models in result["alignment"].items():
            for name, by in models.items():
                if name in self.names:
                    for category, one in by.items():
                        rows.append((measure, name, category, one["n"], one["mean"], _interval(one)))
        lines = table(["measure", "set", "prompts", "number", "mean", "95 % interval"], rows)
        for extractor, quality in result["quality"].items():
            measures = {name: of for name, of in quality["models"].items() if name in self.names}
            known = dict.fromkeys(key for of in measures.values() for key in of)
            lines += table(
                [f"{extractor}, {quality['samples']:,} images", *(f"set {name}" for name in measures)],
                [(words(key), *(measured(of, key) for of in measures.values())) for key in known],
            )
        perceived = [
            (attribute, name, kind, share["share"], ((models[name].get("adjusted") or {}).get(kind) or {}).get("share"))
            for attribute, models in result["attributes"].items()
            for name in self.names if name in models
            for kind, share in models[name]["distribution"].items()
        ]  # fmt: skip
        lines += table(
            ["attribute", "set", "perceived", "share of images", "without the classifier's mistakes"], perceived
        )
        copied = [
            (name, what, one[what]["count"], one[what]["of"], f"{one[what]['low']:.4g} to {one[what]['high']:.4g}")
            for name, one in result["extraction"].items() if name in self.names
            for what in ("images", "prompts")
        ]  # fmt: skip
        lines += table(["attempt at extraction", "of", "copies", "tried", "95 % interval of the share"], copied)
        return lines + self._preferred() + _marks(result, self.names)

    def _preferred(self) -> list[str]:
        """What the people of a study preferred."""
        people = self.result.get("people") or {"results": []}
        rows = [
            (of["question"], of["set"], name, row["elo"], _interval(row))
            for of in people["results"] if of["question"] != "count"
            for name, row in (of["models"] or {}).items() if name in self.names
        ]  # fmt: skip
        return table(["asked people", "prompts", "set", "Elo, 1000 in the mean of all models", "99 % interval"], rows)

    def caveats(self) -> list[str]:
        lines = []
        for attribute, models in self.result["attributes"].items():
            for name in (name for name in self.names if name in models):
                alike = models[name]["homogeneous"]
                lines.append(
                    f"Set {name}: all images of {alike['share']:.0%} of {alike['prompts']} prompts are of one {attribute} "
                    f"({alike['low']:.0%} to {alike['high']:.0%}); independent draws would give {alike['independent']:.0%}."
                )
        for name, one in self.result["extraction"].items():
            if name in self.names and (copied := one["images"])["count"]:
                lines.append(
                    f"{copied['count']} of {copied['of']} images of {name} are near copies of training images."
                )
        return lines


def _interval(one: dict[str, Any]) -> str:
    """Ends, or that there are too few prompts or raters for any, or too equal ones."""
    return "none" if one["low"] is None else f"{one['low']:.4g} to {one['high']:.4g}"


def _marks(result: dict[str, Any], names: list[str]) -> list[str]:
    marked = (result.get("watermark") or {}).get("sets", {})
    rows = [
        (name, attack, one["found"], one.get("area"))
        for name in names
        for attack, one in marked.get(name, {}).items()
    ]  # fmt: skip
    heads = ["set", "watermark after", "share of images found", "area under the curve of true over false positives"]
    return table(heads, rows)
