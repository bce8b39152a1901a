from pathlib import Path

import pytest

from rayproj.data.prompts import Prompt, read_prompts
from rayproj.errors import UserError


def test_plain_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a  dog \n\n a cat, sitting\na  dog\n")
    assert [p.text for p in read_prompts(str(tmp_path / "a.txt"), "x")] == ["a dog", "a cat, sitting", "a dog"]


def test_a_table_says_more_of_each(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        '\ufeffprompt,object,number,category\n"two cats, asleep",cat,2,animals\n,,,\none,,,\n'
    )
    expected = [Prompt("two cats, asleep", "animals", "cat", 2), Prompt("one")]
    assert read_prompts(str(tmp_path / "a.csv"), "x") == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "prompt\na cat, on a mat\n", r"x='.*a\.csv', line 2, has more cells than columns"),
        ("a.csv", 'prompt\n"' + "a" * 200_000, "is a quote left open"),
        ("a.csv", "prompt,note\na cat,x\n", "its first line is to name prompt"),
        ("a.csv", "prompt,number\na cat,1.5\n", "line 2: '1.5' is no number from 0 to 999"),
        ("a.txt", "\n", "has no line with a prompt"),
        ("none.txt", "", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, says: str) -> None:
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(str(tmp_path / name), "x")
