"""What prompts may ask for: rules in a YAML file, and what they decide of a text, with the reason.

Words are looked for in a plain reading of the text: compatibility forms as what they stand for (Unicode NFKD), no accents,
no invisible characters, one case, and letters of other alphabets that look like Latin ones as these. There a word is found
also with digits for letters, with letters repeated, and with the same mark or space between all of them. That meets trivial
evasion alone: paraphrases, other languages and images of words need a classifier, which a rule may name.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from rayproj import config as configuration
from rayproj.errors import UserError
from rayproj.responsibility.personal import places
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
    patterns: list[str] = field(default_factory=list)  # regular expressions, in any case
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


# Letters of other alphabets, in small, that are drawn as Latin ones (Unicode Technical Standard 39, the common confusables).
LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһкмтвнԛԝӏɡɑοανρτυικχϲβηωεσμ",
    "aeopcyxijsdhkmtbhqwlgaoavptuikxcbnweou",
)
LEET = {"a": "4@", "b": "8", "e": "3€", "g": "9", "i": "1!|", "l": "1|", "o": "0", "s": "5$", "t": "7+", "z": "2"}


class Reading:
    """A text in plain letters.

    Attributes:
        text: the plain letters.
        origin: of each, which character of the text it is of.
    """

    def __init__(self, text: str) -> None:
        found = [
            (plain, i)
            for i, character in enumerate(text)
            for plain in unicodedata.normalize("NFKD", character).casefold().translate(LOOKALIKES)
            # Marks go (Mn); so do invisible characters, such as joiners and soft hyphens (Cf).
            if unicodedata.category(plain) not in ("Mn", "Cf")
        ]
        self.text, self.origin = "".join(plain for plain, _ in found), [i for _, i in found]

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Of the text as it was given."""
        return self.origin[start], self.origin[end - 1] + 1


def pattern_of(word: str, group: str = "mark") -> str:
    """A regular expression for a word or phrase in a `Reading`, between what is no letter; * at its end is any ending.

    Args:
        group: name of the group that the expression has in it.
    """
    plain = Reading(word.removesuffix("*")).text
    parts = [[f"[{re.escape(c + LEET.get(c, ''))}]+" for c in part if c.isalnum()] for part in plain.split()]
    letters = [letter for part in parts for letter in part]
    forms = [r"[\W_]+".join(map("".join, parts)), "".join(letters)]
    if len(letters) > 2:  # a mark or space between all letters, everywhere the same
        forms.append(rf"{letters[0]}(?P<{group}>[\W_]{{1,3}})" + f"(?P={group})".join(letters[1:]))
    return rf"(?:{'|'.join(dict.fromkeys(forms))})" + (r"\w*" if word.endswith("*") else "")


def _finder(words: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """The spans of a `Reading`'s text in which one of the words is found."""
    any_of = "|".join(pattern_of(word, f"mark{i}") for i, word in enumerate(words))
    compiled = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)")

    def find(text: str) -> list[tuple[int, int]]:
        # Numbers are no words, though their digits may stand for letters.
        return [m.span() for m in compiled.finditer(text) if any(c.isalpha() for c in m[0])]

    return find


class _Rule:
    """A rule, ready to be applied."""

    def __init__(self, name: str, rule: PromptRule, base: PolicyConfig) -> None:
        self.name, self.rule = name, rule
        self.words, self.also = _finder(rule.words), _finder(rule.also)
        self.patterns = [re.compile(pattern, re.IGNORECASE) for pattern in rule.patterns]
        verb = "allows" if rule.action is Action.allow else "is against"
        self.reason = rule.reason or f"the rule '{name}' {verb} it"
        self.action = rule.otherwise if rule.action is Action.rewrite and not base.rewrite else rule.action

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the text, as it was given, has what is looked for; in order, without overlaps."""
        reading = Reading(text)
        if self.rule.also and not self.also(reading.text):
            return []
        plain = [reading.span(*span) for span in self.words(reading.text)]
        found = plain + [m.span() for pattern in self.patterns for m in pattern.finditer(text) if m[0]]
        if self.rule.personal:
            # Full-width digits and the like are read as what they stand for, but case and marks stay.
            wide = [(plain, i) for i, c in enumerate(text) for plain in unicodedata.normalize("NFKC", c)]
            found += [(wide[s][1], wide[e - 1][1] + 1) for _, s, e in places("".join(c for c, _ in wide))]
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
    """Those that are against no prompt.

    Args:
        section: of the config that has the policy, for messages.

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
            f"{section}.policy.blocked=drop to go on with the others, or give other rules in {section}.policy.file."
        )
    return found


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
