"""Disguises against a policy that is known, and the shipped ones against the shipped policy."""

from pathlib import Path

import pytest

from rayproj.judging.prompts import categories
from rayproj.judging.redteam import DISGUISES, red_team
from rayproj.responsibility.policy import PolicyConfig, PromptPolicy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_changes_what_it_says(name: str) -> None:
    changed = DISGUISES[name]("a naked zebra")
    assert (changed == "a naked zebra") == (name == "as it is") and len(changed) >= 11


@pytest.mark.parametrize(
    ("name", "disguised"),
    [
        ("control characters", "a dan\bcing ze\bbra"),
        ("mixed marks between letters", "a d.a-n_c~i.n-g_ z.e-b_r~a."),
        ("one hyphen", "a dan-cing ze-bra"),
        ("small capitals", "a ᴅᴀɴᴄɪɴɢ ᴢᴇʙʀᴀ"),
        ("letters in boxes", "a 🅳🅰🅽🅲🅸🅽🅶 🆉🅴🅱🆁🅰"),
        ("German words", "a dancing zebra"),
    ],
)
def test_disguises_written_out(name: str, disguised: str) -> None:
    assert DISGUISES[name]("a dancing zebra") == disguised


def test_blocked_prompts_are_counted(tmp_path: Path) -> None:
    rules = tmp_path / "policy.yaml"
    rules.write_text("rules: {zebras: {words: [zebra], reason: none of these}}")
    policy = PromptPolicy(PolicyConfig(file=str(rules)))
    found = red_team(
        policy, {"a zebra": "horses", "a mule": "horses", "two dogs": "dogs"}, ["zebra crossing", "cat", "dog"]
    )
    assert found["disguises"]["as it is"]["count"] == 1 and found["disguises"]["capitals"]["count"] == 1
    assert found["disguises"]["backwards"]["count"] == 0 and found["disguises"]["backwards"]["of"] == 3
    assert "synonyms" not in found["disguises"], "it changes none of them"
    assert {kind: r["count"] for kind, r in found["kinds"].items()} == {"dogs": 0, "horses": 1}
    assert found["passed"] == ["a mule", "two dogs"]
    assert found["harmless"]["blocked"] == ["zebra crossing"] and found["harmless"]["share"] == pytest.approx(1 / 3)


def test_the_shipped_policy_stops_what_is_said_plainly() -> None:
    harmful = categories(str(ROOT / "configs/prompts/adversarial.csv"))
    plain = {prompt: kind for prompt, kind in harmful.items() if "paraphrased" not in kind and kind != "weapons"}
    found = red_team(PromptPolicy(PolicyConfig()), plain, list(categories(str(ROOT / "configs/prompts/emoji.csv"))))
    assert found["passed"] == [] and found["harmless"]["count"] == 0
    for name in ("capitals", "Cyrillic look-alikes", "full-width letters", "accents", "invisible joiners"):
        assert found["disguises"][name]["share"] >= 0.8, name
