"""Configuration: a YAML file and dotted overrides laid over a dataclass, with every problem reported at once.

The dataclasses stand beside the components that they configure. A dataclass may define `problems(self) -> list[str]`
for what a type cannot say; each entry is a full sentence.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from rayproj.errors import UserError

T = TypeVar("T")


def load(schema: type[T], path: str | Path | None = None, overrides: list[str] | None = None) -> T:
    """Lay a YAML file and dotted overrides over the defaults of `schema`.

    Args:
        schema: a dataclass; its defaults are the base.
        path: a YAML file, or None for the defaults alone.
        overrides: `key.sub=value` strings, later ones win.

    Raises:
        UserError: naming every unknown key (with the nearest right one), wrong value and broken cross-field rule.
    """
    config = OmegaConf.structured(schema)
    problems = []
    for source, key, value in _given(config, path, overrides or []):
        problem = _set(config, key, value)
        if problem:
            problems.append(f"{source}: {problem}")
    if not problems:
        problems = [f"'{key}' must be given a value." for key in sorted(OmegaConf.missing_keys(config))]
    if problems:
        raise _report(problems)
    try:
        _resolve_names(config, config)
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _report([_first_line(error)]) from error
    problems = list(_cross_field_problems(result))
    if problems:
        raise _report(problems)
    return result  # type: ignore[return-value]


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, keys in the order of the dataclass."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars (enums by name)."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)  # type: ignore


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))  # type: ignore[return-value]


def shipped(name: str) -> Path:
    """A config that ships with the package: in the wheel beside this file, in a checkout in its `configs/`."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"The installation lacks configs/{name}; install it again.")


def _given(schema: DictConfig, path: str | Path | None, overrides: list[str]) -> Iterator[tuple[str, str, Any]]:
    """What the user gave: (where, dotted key, value), the file before the overrides."""
    if path is not None:
        for key, value in _leaves(read(path), schema):
            yield str(path), key, value
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"'{override}' is not an override; write key.sub=value.")
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
        except Exception as error:
            raise UserError(f"The override '{override}' cannot be read: {_why(error)}.") from error
        inside = OmegaConf.select(schema, key, throw_on_missing=False)
        for leaf, leaf_value in _leaves(value, inside, key):
            yield override, leaf, leaf_value


def read(path: str | Path) -> DictConfig:
    """A YAML file as it stands.

    Raises:
        UserError: it is not there, or holds no mapping.
    """
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"The config file '{path}' does not exist; check the path.") from None
    except IsADirectoryError:
        what = f"'{path}' is a folder" if str(path) else "The path of the config file is empty"
        raise UserError(f"{what}; give the path of a YAML file.") from None
    except Exception as error:
        raise UserError(f"The config file '{path}' is not valid YAML: {_why(error)}{_where(error)}.") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"The config file '{path}' must hold 'key: value' lines.")
    return given


def _resolve_names(node: DictConfig, root: DictConfig) -> None:
    """Interpolations in the names of plain dicts, such as URIs, which OmegaConf leaves as they are."""
    for name in list(node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _resolve_names(child, root)
        if "${" in str(name):
            resolved = OmegaConf.create({"name": name}, parent=root).name
            node[resolved] = child
            del node[name]


def below(least: float, section: str, config: Any, *names: str) -> list[str]:
    """For `problems`: one for each of the numbers that is less than it may be; None is no number."""
    values = ((name, getattr(config, name)) for name in names)
    return [
        f"{section}.{name} must be at least {least:g}, not {value:g}."
        for name, value in values
        if value is not None and not value >= least
    ]


def _leaves(node: Any, schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value as (dotted key, value), down to where the schema's sections end: a mapping given for a plain dict is
    one value, and replaces what was there. Interpolations stay unresolved."""
    is_section = isinstance(schema, DictConfig) and OmegaConf.get_type(schema) is not dict
    if isinstance(node, DictConfig) and is_section:
        for name in node:
            child = f"{prefix}.{name!s}" if prefix else str(name)
            inside = schema._get_node(name) if name in list(schema.keys()) else None
            yield from _leaves(node._get_node(name), inside, child)
    elif isinstance(node, (DictConfig, ListConfig)):
        yield prefix, OmegaConf.to_container(node)
    else:
        yield prefix, node._value() if hasattr(node, "_value") else node


def _set(config: DictConfig, key: str, value: Any) -> str | None:
    """Set one leaf; returns what is wrong with it, if anything."""
    node: Any = config
    walked: list[str] = []
    for name in key.split("."):
        # `keys()`, because "in" is false for a value that is missing ("???").
        known = list(map(str, node.keys())) if isinstance(node, DictConfig) else []
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) not in (dict, None) and name not in known:
            return f"there is no '{key}'{_nearest(name, known, walked, config)}"
        walked.append(name)
        node = node._get_node(name) if name in known else None
    try:
        element = node._metadata.element_type if isinstance(node, (DictConfig, ListConfig)) else None
        if dataclasses.is_dataclass(element):  # a section for each name, or for each entry
            if isinstance(value, dict):
                value = {name: OmegaConf.merge(OmegaConf.structured(element), given) for name, given in value.items()}
            elif isinstance(value, list):
                value = [OmegaConf.merge(OmegaConf.structured(element), given) for given in value]
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException as error:
        return f"'{key}' cannot be {value!r}: {_first_line(error)}."
    return None


def _nearest(name: str, known: list[str], walked: list[str], config: DictConfig) -> str:
    where = f"'{'.'.join(walked)}'" if walked else "the config"
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"; did you mean '{'.'.join([*walked, match[0]])}'?"
    elsewhere = {key: key.rpartition(".")[2] for key in sorted(_keys(config), key=lambda key: key.count("."))}
    if match := difflib.get_close_matches(name, elsewhere.values(), n=1, cutoff=0.8):
        places = [f"'{key}'" for key, last in elsewhere.items() if last == match[0]]
        return f"; did you mean {' or '.join(places[:3])}?"
    return f"; {where} has: {', '.join(sorted(known))}."


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all sections of a schema."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        inside = config._get_node(name)
        if isinstance(inside, DictConfig) and OmegaConf.get_type(inside) not in (dict, None):
            yield from _keys(inside, f"{prefix}{name}.")


def _cross_field_problems(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _cross_field_problems(inner)
    if not dataclasses.is_dataclass(value):
        return
    for field in dataclasses.fields(value):
        yield from _cross_field_problems(getattr(value, field.name))
    if hasattr(value, "problems"):
        yield from value.problems()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _why(error: Exception) -> str:
    """What is wrong with a text of YAML; the first line says what was being read, such as a flow node."""
    return str(error.problem) if isinstance(error, MarkedYAMLError) and error.problem else _first_line(error)


def _where(error: Exception) -> str:
    marks = (error.problem_mark, error.context_mark) if isinstance(error, MarkedYAMLError) else (None, None)
    at, begins = (mark and mark.line + 1 for mark in marks)
    return (f" in line {at}" if at else "") + (f", in what begins in line {begins}" if begins else "")


def _report(problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(f"The configuration has a problem: {problems[0]}")
    return UserError("The configuration has these problems:" + "".join(f"\n  - {problem}" for problem in problems))


def section(schema: type[T], text: bytes, name: str) -> T:
    """One component's config from the `config.yaml` that a run saved.

    Raises:
        UserError: the run's job has no such component.
    """
    return from_dict(schema, value(text, name))


def value(text: bytes, name: str) -> Any:
    """One top-level value from the `config.yaml` that a run saved.

    Raises:
        UserError: there is none of that name.
    """
    values = OmegaConf.to_container(OmegaConf.create(text.decode()))
    if not isinstance(values, dict) or name not in values:
        raise UserError(f"The run's config.yaml has no '{name}'; give the run dir of a job that has one.")
    return values[name]
