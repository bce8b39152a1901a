"""Configuration: what is wrong is said at once, with the key, the value and the nearest right name."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from rayproj import config
from rayproj.errors import UserError


class Color(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Inner:
    lr: float = 1e-3
    sides: tuple[int, int] = (1, 2)
    color: Color = Color.red


@dataclass
class Schema:
    data: str = "???"
    steps: int = 3
    inner: Inner = field(default_factory=Inner)
    parts: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        return [] if self.steps > 0 else ["steps must be positive."]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: images\nsteps: 5\ninner:\n  lr: 1e-2\n  color: blue\n")
    found = config.load(Schema, path, ["steps=7", "inner.sides=[3,4]", "parts.a=0.5"])
    assert found == Schema("images", 7, Inner(1e-2, (3, 4), Color.blue), {"a": 0.5})


def test_interpolation_reaches_across_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: runs/${steps}\n")
    assert config.load(Schema, path, ["steps=9"]).data == "runs/9"


def test_a_mapping_replaces_a_dict_and_a_dotted_key_adds_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: x\nparts: {a: 0.5, b: 0.5}\n")
    assert config.load(Schema, path, ["parts={c: 1.0}"]).parts == {"c": 1.0}
    assert config.load(Schema, path, ["parts.c=1.0"]).parts == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert config.load(Schema, path, ["inner={lr: 2}"]).inner == Inner(2.0)


@dataclass
class Listed:
    inner: list[Inner] = field(default_factory=list)


def test_a_list_of_sections_has_their_defaults_and_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "inner: [{lr: 2}, {color: blue}]\n")
    assert config.load(Listed, path).inner == [Inner(2.0), Inner(color=Color.blue)]
    assert config.load(Listed, path, ["inner=[{sides: [3, 4]}]"]).inner == [Inner(sides=(3, 4))]
    with pytest.raises(UserError, match="'inner' cannot be"):
        config.load(Listed, path, ["inner=[{lrr: 2}]"])


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "stepz: 1\ninner:\n  lr: fast\n")
    with pytest.raises(UserError) as error:
        config.load(Schema, path, ["inner.colour=red", "inner.color=green"])
    message = str(error.value)
    assert "there is no 'stepz'; did you mean 'steps'?" in message
    assert "'inner.lr' cannot be 'fast'" in message
    assert "did you mean 'inner.color'?" in message
    assert "'inner.color' cannot be 'green'" in message
    assert message.count("\n") == 4


def test_a_name_like_no_other_lists_the_right_ones() -> None:
    with pytest.raises(UserError, match="'inner' has: color, lr, sides"):
        config.load(Schema, None, ["data=x", "inner.zzz=1"])


def test_a_missing_value_and_a_broken_rule() -> None:
    with pytest.raises(UserError, match="'data' must be given a value"):
        config.load(Schema)
    with pytest.raises(UserError, match=r"steps must be positive\."):
        config.load(Schema, None, ["data=x", "steps=0"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "must hold 'key: value' lines"), (None, "does not exist")],
)
def test_an_unreadable_file(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        config.load(Schema, path)


def test_an_override_without_a_value() -> None:
    with pytest.raises(UserError, match=r"write key\.sub=value"):
        config.load(Schema, None, ["steps"])


def test_plain_values_and_back() -> None:
    original = Schema("x", 4, Inner(2.0, (5, 6), Color.blue), {"a": 1.0})
    assert config.from_dict(Schema, config.to_dict(original)) == original
    saved = config.to_yaml(original).encode()
    assert config.section(Inner, saved, "inner") == original.inner
    assert config.value(saved, "data") == "x"
    with pytest.raises(UserError, match="has no 'outer'"):
        config.section(Inner, saved, "outer")
