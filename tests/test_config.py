"""Configuration: what is wrong is said at once, with the key, the value and the nearest right name."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from rayproj import chain, config
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
    several: list[Inner] = field(default_factory=list)

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


def test_interpolation_in_the_names_of_a_dict(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", 'data: here\nparts: {"${data}/a": 0.5, b: 0.25, "${data}-${steps}": 1.0}\n')
    loaded = config.load(Schema, file, ["data=s3://x.y/z"])
    assert loaded.parts == {"s3://x.y/z/a": 0.5, "b": 0.25, "s3://x.y/z-3": 1.0}
    with pytest.raises(UserError, match="nowhere"):
        config.load(Schema, file, ["data=x", 'parts={"${nowhere}": 1.0}'])


# Of numbers that may be negative: -1 has a meaning of its own, or the sign has; and those that only some of the others use.
SIGNED = {
    *("RunConfig.seed", "ImportConfig.seed", "RuleConfig.at_least", "RuleConfig.at_most", "RuleConfig.outputs"),
    *("RetryConfig.max_failures", "RetryConfig.max_hangs", "RetryConfig.max_store_failures"),
    *("RetryConfig.max_preemptions", "DuplicatesConfig.hash_bits", "SamplerConfig.guidance", "ShareConfig.guidance"),
    *("DenoiserConfig.attention_from", "DiffusionConfig.time_mean", "AutoencoderConfig.adversarial_from"),
    *("ObjectiveConfig.dro_adjustment", "DiscoverConfig.least_ratio", "Config.wait_seconds"),
    *("ClassifierConfig.depth", "GeneratorConfig.size"),
}


def sections(schema: type) -> Iterator[type]:
    """A schema and every one within it."""
    yield schema
    waiting = [get_type_hints(schema)[f.name] for f in fields(schema)]
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if is_dataclass(hint):
            yield from sections(hint)  # type: ignore[arg-type]


def test_no_job_takes_a_negative_number_without_a_word_where_it_means_nothing() -> None:
    jobs = [import_module(f"rayproj.jobs.{name}").Config for name in chain.jobs() if name != "benchmark"]
    silent = set()
    for schema in {part for job in jobs for part in sections(job)}:
        for one in fields(schema):
            hint = get_type_hints(schema)[one.name]
            kinds = {hint, *get_args(hint)} - {type(None), ...}
            if get_origin(hint) is dict or not kinds & {int, float}:
                continue
            values = [[-1, -1], [0, 0]] if get_origin(hint) in (list, tuple) else [-1, 0]
            said = []
            for value in [getattr(schema(), one.name), *values]:  # 0 is often good, but must not be divided by
                given = schema()
                setattr(given, one.name, value)
                said.append(set(given.problems()) if hasattr(given, "problems") else set())
            if said[1] <= said[0]:
                silent.add(f"{schema.__name__}.{one.name}")
    assert silent == SIGNED


@pytest.mark.parametrize("value", ["-3", "nan"])
def test_what_is_less_than_it_may_be_is_said_with_its_bound(value: str) -> None:
    one = Inner(lr=float(value))
    assert config.below(1, "inner", one, "lr") == [f"inner.lr must be at least 1, not {value}."]
    assert config.below(1, "inner", Inner(lr=1), "lr") == []


def test_a_mapping_replaces_a_dict_and_a_dotted_key_adds_to_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: x\nparts: {a: 0.5, b: 0.5}\n")
    assert config.load(Schema, path, ["parts={c: 1.0}"]).parts == {"c": 1.0}
    assert config.load(Schema, path, ["parts.c=1.0"]).parts == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert config.load(Schema, path, ["inner={lr: 2}"]).inner == Inner(2.0)


def test_a_list_of_sections(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "data: x\nseveral: [{lr: 2, color: blue}, {sides: [3, 4]}]\n")
    assert config.load(Schema, path).several == [Inner(2.0, color=Color.blue), Inner(sides=(3, 4))]
    assert config.load(Schema, path, ["several=[{lr: 3}]"]).several == [Inner(3.0)]
    with pytest.raises(UserError, match=r"several.*rate"):
        config.load(Schema, path, ["several=[{rate: 3}]"])


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


@pytest.mark.parametrize("name", ["lr", "colour"])
def test_a_name_from_elsewhere_is_found_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"there is no '{name}'; did you mean 'inner.{name.replace('u', '')}'\\?"):
        config.load(Schema, write(tmp_path / "c.yaml", f"data: x\n{name}: 1\n"))


def test_a_missing_value_and_a_broken_rule() -> None:
    with pytest.raises(UserError, match="'data' must be given a value"):
        config.load(Schema)
    with pytest.raises(UserError, match=r"steps must be positive\."):
        config.load(Schema, None, ["data=x", "steps=0"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: [1", r"not valid YAML: .*expected ',' or ']'.* in line \d, in what begins in line 2\.$"),
        ("a:\n\tb: 1", r"not valid YAML: found character .* in line 2.*\.$"),
        ("- 1\n- 2\n", "must hold 'key: value' lines"),
        (None, "does not exist"),
    ],
)
def test_an_unreadable_file(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        config.load(Schema, path)


def test_no_file() -> None:
    with pytest.raises(UserError, match=r"^The path of the config file is empty; give the path of a YAML file\.$"):
        config.load(Schema, "")
    with pytest.raises(UserError, match=r"'\.' is a folder"):
        config.load(Schema, ".")


def test_an_override_that_is_no_yaml() -> None:
    with pytest.raises(UserError, match=r"'steps=\[' cannot be read: .*expected .*node content.*\.$"):
        config.load(Schema, None, ["steps=["])


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
