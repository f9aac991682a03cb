"""Reads a config, with overrides: a YAML file with those of `--set`, or what Python has in its place.

Does not know what the values do. Paths in a config are relative to the current directory, not to the file.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rayskip.config.job import JobConfig
from rayskip.config.messages import closest, explain, in_words, some_keys
from rayskip.errors import ConfigError, kind_of

Values = dict[Any, Any]
Overrides = Iterable[str] | Mapping[str, Any]
"""As text, "sampling.max_tokens=64", whose value is read as YAML; or values by key, {"sampling.max_tokens": 64}."""

Root = TypeVar("Root", bound=BaseModel)

_MERGE = "tag:yaml.org,2002:merge"


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | JobConfig, overrides: Overrides = ()
) -> JobConfig:
    """The job that a YAML file, a dict or a JobConfig describes; see `load_section`."""
    return load_section(JobConfig, source, overrides)


def load_section(
    kind: type[Root], source: str | os.PathLike[str] | Mapping[str, Any] | Root, overrides: Overrides = ()
) -> Root:
    """What a YAML file, a nested dict or a section describes, after overrides.

    Raises ConfigError, one line naming the file, the key and what would be right; TypeError for another object.
    """
    where = ""
    if isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        values = _read(Path(source), kind)
    elif isinstance(source, kind | Mapping):
        values = _plain(source)
    else:
        raise TypeError(
            f"a {kind.__name__}, a dict or a path of a YAML file is wanted, not {kind_of(source)}"
        )
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(values, key, value, key)
    else:
        for override in overrides:
            _set_text(values, override)
    return as_section(kind, values, where)


def as_section(kind: type[Root], values: Mapping[str, Any] | Root, where: str = "") -> Root:
    """A section given as a dict, or as it is. where: what messages begin with, as a file or an argument's name.

    Raises ConfigError, one line naming the key and what would be right; TypeError for another object.
    """
    if not isinstance(values, kind | Mapping):
        raise TypeError(f"{where}: a {kind.__name__} or a dict is wanted, not {kind_of(values)}")
    try:
        return kind.model_validate(values if isinstance(values, kind) else _plain(values))
    except ValidationError as error:
        said = explain(error.errors(), kind)
        raise ConfigError(f"{where}: {said}" if where else said) from error


def _plain(value: Any) -> Any:
    """Mappings and sections as dicts, copied, so that overrides change nothing of the caller's."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)  # what it leaves open stays so
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's own would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _MERGE and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'key "{key.value}" is given twice', key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


# A date is text until a key reads it: YAML would fail at the 30th of February, and make no name of a day.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)


def _read(path: Path, root: type[BaseModel]) -> Values:
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as {some_keys(root)}, got {in_words(values)}")
    return values


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # safe: a SafeLoader


def _value(text: str) -> Any:
    """A template's braces are no YAML; they may stand in a mapping or a list."""
    start = text.lstrip()
    if "{{" not in text:
        return _parse(text)
    if start.startswith(("{", "[")) and not start.startswith("{{"):
        with suppress(yaml.YAMLError):
            return _parse(text)
    return text


def _set_text(values: Values, override: str) -> None:
    """Put one "a.b=c" into the nested values."""
    said = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{said}: expected key=value, such as sampling.max_tokens=64")
    try:
        value = _value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{said}: the value is not YAML ({_one_line(error)})") from error
    _set(values, key.strip(), value, said)


def _set(values: Values, key: str, value: Any, said: str) -> None:
    """Put a value under "a.b" into the nested values. said: the override as messages name it."""
    names = key.split(".")
    if not all(names):
        raise ConfigError(f"{said}: expected key=value, such as sampling.max_tokens=64")
    section = values
    for name in names[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f'{said}: "{name}" is {in_words(section)}, not a section')
    section[names[-1]] = value


def _one_line(error: yaml.YAMLError) -> str:
    """A YAML error as `line 3: …`."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return line + str(error.problem or "not valid YAML")


def _nearest_file(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = closest(path.name, beside)
    return f"; did you mean {path.parent / near}?" if near else ""
