"""Reads a config: a YAML file, with `--set` overrides.

Does not know what the values do. Paths in a config are relative to the current directory, not to the file.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rayskip.config.job import JobConfig
from rayskip.config.messages import closest, explain, in_words, some_keys
from rayskip.errors import ConfigError

Mapping = dict[Any, Any]
Root = TypeVar("Root", bound=BaseModel)

_MERGE = "tag:yaml.org,2002:merge"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """The job that a YAML file describes; see `load_section`."""
    return load_section(JobConfig, path, overrides)


def load_section(kind: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """What a YAML file describes, after overrides of the form "sampling.max_tokens=64".

    An override's value is read as YAML. Raises ConfigError, one line naming the file, the key and what would
    be right.
    """
    values = _read(Path(path), kind)
    for override in overrides:
        _set(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error.errors(), kind)}") from error


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


def _read(path: Path, root: type[BaseModel]) -> Mapping:
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


def _set(values: Mapping, override: str) -> None:
    """Put one "a.b=c" into the nested values."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: expected key=value, such as sampling.max_tokens=64")
    try:
        value = _value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML ({_one_line(error)})") from error
    section = values
    for name in names[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f'--set {override}: "{name}" is {in_words(section)}, not a section')
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
