"""What prompts may ask for: rules in a YAML file, and what they decide of a text, with the reason.

Words are looked for in a plain `Reading` of the text. There a word is found also with digits for letters, with letters
repeated, with marks between its letters, in pieces of one or two letters, and with x's around it. That meets trivial evasion
alone: misspellings, synonyms, paraphrases, languages that no list has and images of words need a classifier, which a rule
may name. What a rule allows is taken as it is written, or it would let disguises through.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from itertools import groupby, zip_longest
from typing import Any

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.responsibility.personal import places
from rayproj.responsibility.reading import Reading, as_written, readings
from rayproj.storage.store import to_json

NAMED = 5  # prompts that an error names
DECISIONS = "decisions.jsonl"  # of a run: what was decided of each prompt, and why


class Action(Enum):
    allow = "allow"
    rewrite = "rewrite"
    block = "block"


class Blocked(Enum):
    """What is done when the policy blocks some of the prompts of a dataset or study."""

    refuse = "refuse"  # nothing is drawn or shown; the prompts are named
    drop = "drop"  # the others are; the run records those that are not, and why


@dataclass
class ClassifierRule:
    """When a text classifier of transformers is against a text."""

    model: str = ""  # its folder, with the tokenizer
    labels: list[str] = field(default_factory=list)
    at_least: float = 0.5  # probability of the labels together

    def problems(self) -> list[str]:
        if self.model and not self.labels:
            return ["policy: a classifier needs labels, those of its answers that count."]
        return []


@dataclass
class PromptRule:
    """What is looked for, and what follows if it is there."""

    action: Action = Action.block
    words: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)  # regular expressions, in any case; what nobody sees is left out
    personal: bool = False  # addresses and numbers that may lead to a person
    classifier: ClassifierRule = field(default_factory=ClassifierRule)
    also: list[str] = field(default_factory=list)  # words of which one must be there too
    instead: str = ""  # of rewrite: what is put in the place of what was found
    otherwise: Action = Action.allow  # of rewrite: what is done while rewriting is off
    reason: str = ""

    def problems(self) -> list[str]:
        if not (self.words or self.patterns or self.personal or self.classifier.model):
            return ["policy: a rule needs words, patterns, personal or a classifier."]
        if self.classifier.model and (self.action is not Action.block or self.also):
            return ["policy: a rule with a classifier has action=block, and no `also`: it judges the whole text."]
        if self.otherwise is Action.rewrite:
            return ["policy: `otherwise` is allow or block."]
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                return [f"policy: '{pattern}' is no regular expression ({error})."]
        return []


@dataclass
class Rules:
    """What a policy's file holds."""

    rules: dict[str, PromptRule] = field(default_factory=dict)


@dataclass
class PolicyConfig:
    """By which rules prompts are judged."""

    use: bool = True
    file: str = ""  # "": configs/policy.yaml, which comes with the package
    rewrite: bool = False  # let rules with action=rewrite change prompts; each change is recorded
    blocked: Blocked = Blocked.refuse


@dataclass(frozen=True)
class Decision:
    """What the policy says of one prompt.

    Attributes:
        rule: the one that blocked it, or those that rewrote it or that exempted some of it; "" where none did.
        before: as it was given.
        prompt: as it is to be drawn; of a blocked one as it was given.
    """

    action: Action
    rule: str
    reason: str
    before: str
    prompt: str

    def record(self) -> dict[str, str]:
        """For a log. Nothing is hidden: whoever may read it is to be chosen with care."""
        return {**asdict(self), "action": self.action.value}


LEET = {
    "a": "4@",
    "b": "8",
    "e": "3€",
    "g": "9",
    "i": "1!|",
    "l": "1|",
    "o": "0",
    "s": "5$",
    "t": "7+",
    "u": "v",
    "z": "2",
}
MARKS = "".join(form for forms in LEET.values() for form in forms if not form.isalnum())
# Scripts that are written without spaces: beside them a Latin word begins and ends as it does beside a space.
UNSPACED = "\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
LETTER = rf"[^\W\d_{UNSPACED}]"
BEGIN = rf"(?<!{LETTER})(?!(?<=(?P<before>.))(?P=before))(?:xx+)?"  # of equal marks at the first alone, to be linear
END = rf"(?:xx+)?(?!{LETTER})"
APART = 8  # characters between letters at most, and letters in a row where the next may be the same
REPEATED = 40  # letters in a row at most


def pattern_of(word: str, marks: bool = False, spaces: bool = False) -> str:
    """A regular expression for a word or phrase in a plain `Reading`; * at its end is any ending.

    Args:
        marks: may stand between letters, and not between the words of a phrase alone.
        spaces: so may these, too.
    """
    letters = [  # what each may be, and of which word of the phrase it is
        (letter + LEET.get(letter, ""), number)
        for number, part in enumerate(Reading(word.removesuffix("*")).text.split())
        for letter in part
        if letter.isalnum()
    ]
    found = ""
    for (forms, number), after in zip_longest(letters, letters[1:]):
        # Bounds, and no second try (`+`) unless the next letter may be the same character, keep the time linear.
        shared = set(forms) & set(after[0]) if after else set()
        often = "" if after and forms == after[0] else f"{{1,{APART}}}" if shared else f"{{1,{REPEATED}}}+"
        found += f"[{re.escape(forms)}]{often}"
        if after and marks and (spaces or after[1] == number):
            no_marks = re.escape("".join(form for form in after[0] if form in MARKS)) + ("" if spaces else r"\s")
            found += rf"(?:[^\w{no_marks}]|_){{0,{APART}}}+"
        elif after and after[1] > number:
            found += rf"[\W_]{{0,{APART}}}"
    return found + ("" if not word.endswith("*") else r"\w{0,2}" if marks else r"\w*")


def _finder(words: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """The spans of a plain `Reading`'s text in which one of the words is found."""
    whole, marked, apart = (
        re.compile(rf"(?=(?P<found>{BEGIN}(?:{'|'.join(pattern_of(word, *between) for word in words)}){END}))")
        for between in ((False, False), (True, False), (True, True))
    )

    def find(text: str) -> list[tuple[int, int]]:
        found = [m.span("found") for pattern in (whole, marked) for m in pattern.finditer(text)]
        found += [m.span("found") for m in apart.finditer(text) if _spelt(m["found"])]
        # Numbers are no words, though their digits may stand for letters.
        return [span for span in found if any(c.isalpha() for c in text[slice(*span)])]

    return find if words else lambda text: []


def _spelt(found: str) -> bool:
    """Whether spaces part it into pieces that are too short to be words; "the pen is" has other words in it."""
    return all(len(list(groupby(c for c in piece if c.isalnum() or c in MARKS))) <= 2 for piece in found.split())


def _exact(phrases: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """The spans of a text in which one of the phrases stands as it is, with one space or hyphen between its words."""
    forms = "|".join(
        "[ -]".join(map(re.escape, re.split("[ -]", phrase.removesuffix("*")))) + r"\w*" * phrase.endswith("*")
        for phrase in phrases
    )
    compiled = re.compile(rf"\b(?:{forms})\b", re.IGNORECASE)
    return lambda text: [m.span() for m in compiled.finditer(text)] if phrases else []


class _Rule:
    """A rule, ready to be applied."""

    def __init__(self, name: str, rule: PromptRule, base: PolicyConfig) -> None:
        self.name, self.rule = name, rule
        self.exact = _exact(rule.words if rule.action is Action.allow else [])
        self.words, self.also = _finder([] if rule.action is Action.allow else rule.words), _finder(rule.also)
        self.patterns = [re.compile(pattern, re.IGNORECASE) for pattern in rule.patterns]
        verb = "allows" if rule.action is Action.allow else "is against"
        self.reason = rule.reason or f"the rule '{name}' {verb} it"
        self.action = rule.otherwise if rule.action is Action.rewrite and not base.rewrite else rule.action

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the text, as it was given, has what is looked for; in order, without overlaps."""
        plain, written = readings(text), Reading(text, as_written)
        if self.rule.also and not any(self.also(reading.text) for reading in plain):
            return []
        found = self.exact(text)
        found += [reading.span(*span) for reading in plain for span in self.words(reading.text)]
        found += [written.span(*m.span()) for p in self.patterns for m in p.finditer(written.text) if m[0]]
        if self.rule.personal:
            found += [(start, end) for _, start, end in places(text)]
        merged: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if merged and start < merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        return merged

    @cached_property
    def classifier(self) -> TextClassifier | None:
        return TextClassifier(self.rule.classifier) if self.rule.classifier.model else None


class PromptPolicy:
    """Decides of prompts; what it says depends on the prompt, the rules and the classifiers alone.

    Raises:
        UserError: a file that is not there, or rules that are wrong.
    """

    def __init__(self, config: PolicyConfig) -> None:
        path = config.file or configuration.shipped("policy.yaml")
        self.config, given = config, configuration.load(Rules, path)
        self.rules = [_Rule(name, rule, config) for name, rule in given.rules.items()] if config.use else []
        self.digest = hashlib.sha256(to_json(configuration.to_dict(given))).hexdigest()[:16]

    def decide(self, prompt: str) -> Decision:
        """What is to be done with a prompt."""
        text, seen = prompt, prompt  # `seen`: without what a rule allowed
        changed, exempted = list[_Rule](), list[_Rule]()
        for rule in self.rules:
            spans = rule.spans(seen)
            against = rule.classifier is not None and rule.classifier.probability(seen) >= rule.rule.classifier.at_least
            if not spans and not against:
                continue
            if rule.action is Action.block:
                return Decision(Action.block, rule.name, rule.reason, prompt, prompt)
            if rule.action is Action.rewrite:
                text, seen = (_replaced(given, spans, rule.rule.instead) for given in (text, seen))
                changed.append(rule)
            elif rule.rule.action is Action.allow:
                seen = _replaced(seen, spans, None)  # of the same length, so that places are the same in both
                exempted.append(rule)
        said = changed or exempted
        names, reasons = ", ".join(rule.name for rule in said), "; ".join(rule.reason for rule in said)
        if not changed:
            return Decision(Action.allow, names, reasons, prompt, prompt)
        text = " ".join(text.split())
        if not text:
            return Decision(Action.block, names, f"nothing would be left of it: {reasons}", prompt, prompt)
        return Decision(Action.rewrite, names, reasons, prompt, text)

    def described(self, decisions: Iterable[Decision]) -> dict[str, Any]:
        """For the header of a dataset: by which rules, how many prompts each blocked or rewrote, and why; no prompt."""
        counts, reasons = Counter[str](), dict[str, str]()
        for decision in decisions:
            told = decision.action.value
            if decision.action is not Action.allow:
                told += f" {decision.rule}"
                reasons[told] = decision.reason
            counts[told] += 1
        found = {"rules": self.digest, "rewrite": self.config.rewrite, "decisions": dict(sorted(counts.items()))}
        return {**found, **({"reasons": dict(sorted(reasons.items()))} if reasons else {})}


def allowed(config: PolicyConfig, decisions: Sequence[Decision], section: str) -> list[Decision]:
    """Those whose prompts may be drawn.

    Args:
        section: where a config has the policy's, for messages.

    Raises:
        UserError: some are, and `blocked` is refuse; or all are.
    """
    blocked = [decision for decision in decisions if decision.action is Action.block]
    found = [decision for decision in decisions if decision.action is not Action.block]
    if blocked and (config.blocked is Blocked.refuse or not found):
        named = "; ".join(f"'{d.before[:80]}' ({d.rule}: {d.reason})" for d in blocked[:NAMED])
        more = f"; and {len(blocked) - NAMED} more" if len(blocked) > NAMED else ""
        raise UserError(
            f"The policy blocks {len(blocked)} of {len(decisions)} prompts: {named}{more}. Take them out, say "
            f"{section}.blocked=drop to go on with the others, or give other rules in {section}.file."
        )
    return found


def judged(prompts: Sequence[str], config: PolicyConfig, section: str) -> list[str]:
    """Prompts as a policy leaves them, each once; else as `allowed`."""
    policy = PromptPolicy(config) if prompts else None
    decisions = [policy.decide(prompt) for prompt in prompts] if policy else []
    return list(dict.fromkeys(d.prompt for d in allowed(config, decisions, section)))


def records(decisions: Iterable[Decision]) -> bytes:
    """What is kept in `DECISIONS`: a line of JSON for each."""
    return "".join(json.dumps(d.record(), ensure_ascii=False) + "\n" for d in decisions).encode()


def _replaced(text: str, spans: list[tuple[int, int]], instead: str | None) -> str:
    """With something in the place of the spans; None: as many commas."""
    for start, end in reversed(spans):
        text = text[:start] + ("," * (end - start) if instead is None else instead) + text[end:]
    return text


class TextClassifier:
    """A text classifier of transformers in a folder, whose answers exclude each other or not, as its config says.

    Raises:
        UserError: it cannot be loaded, or does not know a label.
    """

    def __init__(self, config: ClassifierRule) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
            self.model = AutoModelForSequenceClassification.from_pretrained(config.model, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"policy: the classifier '{config.model}' cannot be loaded ({str(error).splitlines()[0]}); give a folder "
                "with a text classifier of transformers and its tokenizer."
            ) from error
        known = {str(name): int(number) for name, number in self.model.config.label2id.items()}
        if wrong := sorted(set(config.labels) - set(known)):
            raise UserError(
                f"policy: the classifier '{config.model}' has no label '{wrong[0]}'; it has {', '.join(known)}."
            )
        self.places = [known[name] for name in config.labels]

    def probability(self, text: str) -> float:
        """Of the labels together: their sum if the answers exclude each other, else that of the likeliest."""
        import torch

        with torch.no_grad():
            logits = self.model(**self.tokenizer(text, truncation=True, return_tensors="pt")).logits[0].double()
        if self.model.config.problem_type == "multi_label_classification":
            return float(logits.sigmoid()[self.places].max())
        return float(logits.softmax(0)[self.places].sum())
