"""A side-by-side study as a pure function of models, prompts and a seed: what each rating compares, and who gives it next.

The protocol is that of Imagen 3's report (Baldridge et al. 2024, arXiv 2408.07009, section "Human evaluation"): five
questions; all pairs of models; so many ratings of each pair on each question and prompt set, spread evenly over the
prompts; the sides shuffled for every rating; "indifferent" among the choices; nobody gives more than a part of the
ratings of a comparison.

A study is a row of slots, and a slot takes one rating. Which models, prompt and sides a slot has is drawn from its
number; which slot a rater gets next follows from the ratings that there are. So nothing is stored but the plan and
the ratings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from rayproj.data.parts import hashed
from rayproj.data.prompts import Prompt, read_prompts
from rayproj.errors import UserError

LEFT, RIGHT, INDIFFERENT = "left", "right", "indifferent"


class Question(Enum):
    """What is asked. All but the last are of two images side by side."""

    overall = "overall"  # which one somebody who wrote the prompt would rather have
    alignment = "alignment"  # which one shows what the prompt says
    appeal = "appeal"  # which one is more appealing; the prompt is hidden
    detailed = "detailed"  # which one is nearer to a reference photo, which is shown in the prompt's place
    count = "count"  # how many objects of a kind one image shows; the prompt is hidden


@dataclass
class SetConfig:
    """A set of prompts, and what is asked of the images of them."""

    # .csv with the columns prompt, category, and for `count` object (what is counted) and number; or .txt, a prompt a line.
    file: str = "???"
    questions: list[Question] = field(default_factory=lambda: [Question.overall, Question.alignment, Question.appeal])
    references: str = (
        ""  # dataset of the photos that `detailed` compares with, found by the prompt like the models' images
    )

    def problems(self) -> list[str]:
        if not self.questions or len(set(self.questions)) < len(self.questions):
            return [
                "study.sets: questions are a list of different ones of " + ", ".join(q.name for q in Question) + "."
            ]
        if (Question.detailed in self.questions) != bool(self.references):
            return ["study.sets: the question 'detailed' and 'references' go together; give both or neither."]
        return []


@dataclass
class StudyConfig:
    """Who is compared with whom, on what, and how often."""

    models: dict[str, str] = field(default_factory=dict)  # name -> dataset of its images, each with its prompt
    sets: dict[str, SetConfig] = field(default_factory=dict)  # name -> prompts
    pairs: list[list[str]] = field(default_factory=list)  # []: all; `rayproj study add` names those of a new model
    ratings: int = 2500  # of each pair, on each question and set; of each model where objects are counted
    per_rater: int = 200  # ratings that one rater may give
    share: float = 0.1  # of the ratings of a pair on a question and set that one rater may give
    block: int = (
        20  # ratings on one question that a rater gets in a row, with one attention check among them; 0: no checks
    )
    failed: float = 0.25  # a rater who fails more of the attention checks than this is left out
    size: list[int] = field(default_factory=list)  # height and width to bring all images to; []: they are alike

    def problems(self) -> list[str]:
        found = []
        if not self.models or not self.sets:
            found.append("study.models and study.sets must both name something.")
        paired = any(q is not Question.count for one in self.sets.values() for q in one.questions)
        if paired and len(self.models) < 2:
            found.append("study.models: a comparison needs two models.")
        for pair in self.pairs:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(self.models):
                found.append(f"study.pairs: {pair} is no pair of two of study.models.")
        if len({frozenset(pair) for pair in self.pairs}) < len(self.pairs):
            found.append("study.pairs: a pair is named twice.")
        if self.ratings < 1 or self.per_rater < 1 or self.block < 0:
            found.append("study.ratings and study.per_rater must be positive, and study.block not negative.")
        if not 0 < self.share <= 1 or not 0 <= self.failed <= 1:
            found.append("study.share and study.failed are shares, up to 1.")
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            found.append("study.size is [height, width], both positive.")
        return found


@dataclass(frozen=True)
class Comparison:
    """Two models on one question and prompt set, or one where objects are counted. The report calls it a study."""

    set: str
    question: Question
    models: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What is shown and asked.

    Attributes:
        models: whose image is on the left, and on the right; or the only one.
        check: the answer that an attention check asks for, a choice or a number; None of an ordinary rating.
    """

    comparison: Comparison
    prompt: Prompt
    models: tuple[str, ...]
    check: str | int | None = None

    @property
    def question(self) -> Question:
        return self.comparison.question


class Turn(NamedTuple):
    """What a rater is to do next: the slot of this number, or their attention check of this number."""

    check: bool
    number: int


@dataclass(frozen=True)
class Plan:
    """A study, fixed before its first rating."""

    seed: int
    models: dict[str, str]  # name -> hash of the contents of its dataset
    sets: dict[str, tuple[Prompt, ...]]
    comparisons: tuple[Comparison, ...]
    ratings: int
    per_rater: int
    share: float
    block: int
    failed: float

    @property
    def slots(self) -> int:
        return len(self.comparisons) * self.ratings

    @property
    def limit(self) -> int:
        """Ratings of one comparison that one rater may give: their share, rounded down, but for one."""
        return max(1, int(self.share * self.ratings + 1e-9))

    def prompt_of(self, slot: int) -> int:
        """Place in its set of the prompt of a slot. Every prompt has its n-th rating before any has its n+1-th."""
        number, position = divmod(slot, self.ratings)
        count = len(self.sets[self.comparisons[number].set])
        epoch, place = divmod(position, count)
        return int(_prompt_order(count, f"{number}/{epoch}", self.seed)[place])

    def task(self, slot: int) -> Task:
        """What a slot shows."""
        comparison = self.comparisons[slot // self.ratings]
        models = comparison.models
        if len(models) == 2 and _draw("side", str(slot), self.seed, 2):
            models = models[::-1]
        return Task(comparison, self.sets[comparison.set][self.prompt_of(slot)], models)

    def check(self, rater: str, number: int) -> Task:
        """A rater's attention check: the images of some slot like those of its block, with what to answer in place of the
        question."""
        key = f"{rater}/{number}"
        place = self._group_places(rater, number)
        alike = np.flatnonzero(place == place.min())
        chosen = int(alike[_draw("like", key, self.seed, len(alike))])
        task = self.task(chosen * self.ratings + _draw("check", key, self.seed, self.ratings))
        answer = _draw("answer", key, self.seed, 10)
        wanted = answer + 11 if task.question is Question.count else (LEFT, RIGHT)[answer % 2]
        return Task(task.comparison, task.prompt, task.models, wanted)

    def turn(self, turn: Turn, rater: str) -> Task:
        """Raises IndexError where there is no such slot."""
        if not turn.check and turn.number >= self.slots:
            raise IndexError(turn.number)
        return self.check(rater, turn.number) if turn.check else self.task(turn.number)

    def allows(self, own: Collection[int], slot: int) -> bool:
        """Whether a rater who has rated these slots may rate this one by their quotas, as when two tabs show
        different tasks."""
        same = sum(number // self.ratings == slot // self.ratings for number in own)
        return slot not in own and len(own) < self.per_rater and same < self.limit

    def next(self, rater: str, own: Collection[int], checks: Collection[int], taken: np.ndarray) -> Turn | None:
        """What a rater is to do now; None when there is nothing left for them.

        Blocks of one question on one set follow each other in an order of the rater's own. In a block the slots whose prompt
        has had the fewest ratings come first, and among these each rater has another order, so that two who rate at once
        hardly ever rate the same slot. Nobody compares the same two images on the same question twice.

        Args:
            own: slots that they have rated.
            checks: numbers of the attention checks that they have answered.
            taken: bool [slots]: has a rating that counts, of whomever.
        """
        if len(own) >= self.per_rater:
            return None
        block, within = divmod(len(own), self.block or self.per_rater)
        slot = self._next_slot(rater, own, block, taken)
        due = self.block and block not in checks
        if slot is not None and due and within >= _draw("place", f"{rater}/{block}", self.seed, self.block):
            return Turn(True, block)
        return None if slot is None else Turn(False, slot)

    def _next_slot(self, rater: str, own: Collection[int], block: int, taken: np.ndarray) -> int | None:
        """As `next`, without attention checks."""
        number = np.arange(self.slots) // self.ratings
        mine = np.array(sorted(own), np.int64)
        full = np.bincount(mine // self.ratings, minlength=len(self.comparisons)) >= self.limit
        open_slots = np.flatnonzero(~(taken | full[number]))
        open_slots = open_slots[~np.isin(open_slots, mine)]
        group = self._group_places(rater, block)
        prompts = np.array([len(self.sets[c.set]) for c in self.comparisons])
        of = number[open_slots]
        epoch = open_slots % self.ratings // prompts[of]
        own_order = _permuted(self.slots, "rater", rater, self.seed)[open_slots]
        seen = {(slot // self.ratings, self.prompt_of(slot)) for slot in own}
        for slot in open_slots[np.lexsort((own_order, epoch, group[of]))]:
            if (slot // self.ratings, self.prompt_of(int(slot))) not in seen:
                return int(slot)
        return None

    def _group_places(self, rater: str, block: int) -> np.ndarray:
        """int [comparisons]: of each, the place of its question and set in the order of a block."""
        groups = list(dict.fromkeys((c.set, c.question) for c in self.comparisons))
        places = _permuted(len(groups), "groups", f"{rater}/{block}", self.seed)
        return np.array([places[groups.index((c.set, c.question))] for c in self.comparisons])

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["comparisons"] = [{**asdict(c), "question": c.question.name} for c in self.comparisons]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        sets = {name: tuple(Prompt(**prompt) for prompt in prompts) for name, prompts in values["sets"].items()}
        comparisons = tuple(
            Comparison(c["set"], Question[c["question"]], tuple(c["models"])) for c in values["comparisons"]
        )
        return cls(**{**values, "sets": sets, "comparisons": comparisons})


def plan(config: StudyConfig, models: Mapping[str, str], seed: int) -> Plan:
    """The study of a config.

    Args:
        models: name -> hash of the contents of its dataset.

    Raises:
        UserError: a file of prompts cannot be read, or lacks what its questions need.
    """
    sets = {name: tuple(prompts_of(one)) for name, one in sorted(config.sets.items())}
    pairs = [tuple(pair) for pair in config.pairs] or list(combinations(sorted(models), 2))
    alone = sorted({name for pair in config.pairs for name in pair} or set(models))
    comparisons = tuple(
        Comparison(name, question, tuple(chosen))
        for name in sets
        for question in config.sets[name].questions
        for chosen in ([(model,) for model in alone] if question is Question.count else pairs)
    )
    return Plan(
        seed, dict(sorted(models.items())), sets, comparisons, config.ratings, config.per_rater, config.share,
        config.block, config.failed,
    )  # fmt: skip


def prompts_of(config: SetConfig) -> list[Prompt]:
    """The prompts of a set, in their order.

    Raises:
        UserError: the file cannot be read, or has no prompts, one twice, or not what the questions need.
    """
    prompts = read_prompts(config.file, "study.sets: file")
    texts = [prompt.text for prompt in prompts]
    if twice := next((text for text in texts if texts.count(text) > 1), None) if len(set(texts)) < len(texts) else None:
        raise UserError(f"The prompts '{config.file}' have '{twice}' twice; leave one of them out.")
    if Question.count in config.questions:
        for prompt in prompts:
            if not prompt.object or prompt.number is None:
                raise UserError(
                    f"The prompts '{config.file}' do not say what is to be counted on '{prompt.text}'; the question "
                    "'count' needs a .csv file with the columns prompt, object and number."
                )
    return prompts


def _draw(purpose: str, key: str, seed: int, below: int) -> int:
    """A keyed number in [0, below)."""
    return int.from_bytes(hashed(purpose, key, seed), "little") % below


@lru_cache(maxsize=1024)
def _prompt_order(count: int, key: str, seed: int) -> np.ndarray:
    return _permuted(count, "prompts", key, seed)


def _permuted(count: int, purpose: str, key: str, seed: int) -> np.ndarray:
    """A keyed permutation, int64 [count]."""
    bits = np.random.Philox(key=int.from_bytes(hashed(purpose, key, seed), "little"))
    return np.random.Generator(bits).permutation(count)
