"""The config of a side-by-side study, and the plan that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from rayproj.data.prompts import Prompt, read_prompts
from rayproj.errors import UserError
from rayproj.preferences.plan import Comparison, Plan, Question
from rayproj.responsibility.policy import Decision, PolicyConfig, PromptPolicy, allowed
from rayproj.responsibility.safety import SafetyConfig


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
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # what prompts may ask for
    # What images and reference photos have to pass; a prompt one of whose does not is left out. `tries` says nothing here.
    safety: SafetyConfig = field(default_factory=SafetyConfig)
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


def decisions_of(config: StudyConfig) -> list[Decision]:
    """What the policy says of every prompt, in the order of sets and files.

    Raises:
        UserError: a file of prompts or the policy's cannot be read, or lacks what its questions need.
    """
    policy = PromptPolicy(config.policy)
    texts = [prompt.text for _, one in sorted(config.sets.items()) for prompt in prompts_of(one)]
    return [policy.decide(text) for text in dict.fromkeys(texts)]


def plan(
    config: StudyConfig, models: Mapping[str, str], seed: int, references: Mapping[str, str] | None = None
) -> Plan:
    """The study of a config, of the prompts that its policy allows, as it left them.

    Args:
        models: name -> hash of the contents of its dataset.
        references: set -> that of the dataset of its photos.

    Raises:
        UserError: a file of prompts cannot be read, or lacks what its questions need; or the policy blocks some.
    """
    texts = {
        decision.before: decision.prompt for decision in allowed(config.policy, decisions_of(config), "study.policy")
    }
    sets = {name: _left(prompts_of(one), texts) for name, one in sorted(config.sets.items())}
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
        config.block, config.failed, dict(references or {}),
    )  # fmt: skip


def _left(prompts: Sequence[Prompt], texts: Mapping[str, str]) -> tuple[Prompt, ...]:
    """The prompts with these texts in the place of theirs, each once; without those that have none."""
    left = [replace(prompt, text=texts[prompt.text]) for prompt in prompts if prompt.text in texts]
    return tuple({prompt.text: prompt for prompt in reversed(left)}.values())[::-1]


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
