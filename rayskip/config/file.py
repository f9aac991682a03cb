"""From a YAML file and `--set` overrides to a JobConfig, and from pydantic's errors to one line for people.

Does not know what the values do. Paths in a config are relative to the current directory, not to the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rayskip.config import JobConfig
from rayskip.errors import ConfigError, shown

Mapping = dict[Any, Any]
Root = TypeVar("Root", bound=BaseModel)

# What a value should be, for the pydantic errors whose own words are made for programmers.
_WANTED = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a shorter text",
    "tuple_type": "a list",
    "too_long": "a shorter list",
}
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
        raise ConfigError(f"{path}: {_explain(error.errors(), kind)}") from error


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
        raise ConfigError(f"{path}: expected keys such as {_names(root)}, got {_kind(values)}")
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
            raise ConfigError(f'--set {override}: "{name}" is {_kind(section)}, not a section')
    section[names[-1]] = value


def _explain(errors: Sequence[ErrorDetails], root: type[BaseModel]) -> str:
    """One line for the first thing that is wrong; a union's branches count as one thing."""
    # An unknown key is the likeliest cause of a missing one, so it is named first.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    names, field = _locate(first["loc"], root)
    key = ".".join(names)
    match first["type"]:
        case "extra_forbidden":
            return f'unknown key "{key}"; {_suggest(first["loc"], root)}'
        case "missing":
            return f'missing key "{key}"{_explained(field)}'
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            if field and (tags := list(_kinds(field))):
                given = "" if isinstance(first["input"], dict) else f", got {_kind(first['input'])}"
                one = first["input"] if first["input"] in tags else tags[0]
                return f'"{key}" needs its kind, as in {{kind: {one}}}{given}; {_known(tags)}'
            section = _section(first["loc"], root)
            return f'"{key}" is a section with keys such as {_names(section)}, got {_kind(first["input"])}'
        case "union_tag_invalid":
            kinds, tag = list(_kinds(field)) if field else [], str(first["ctx"]["tag"])
            return f'"{key}.kind" is "{tag}"; {_nearest(tag, kinds) or _known(kinds)}'
        case "value_error":
            reason = str(first["ctx"]["error"])
            return f'"{key}": {reason}' if key else reason
    # Every branch of a union has its own error, deeper ones for the items of a list.
    alike = [error for error in errors if _locate(error["loc"], root)[0][: len(names)] == names]
    wanted = " or ".join(dict.fromkeys(_wanted(error, len(names), root) for error in alike))
    return f'"{key}" should be {wanted}{_optional(field)}, got {shown(first["input"])}{_explained(field)}'


def _wanted(error: ErrorDetails, depth: int, root: type[BaseModel]) -> str:
    """What a value should be; an error below `depth` is about an item of it."""
    if len(_locate(error["loc"], root)[0]) > depth:
        return "a list"
    return _WANTED.get(error["type"]) or error["msg"].removeprefix("Input should be ")


def _locate(loc: Iterable[int | str], root: type[BaseModel]) -> tuple[list[str], FieldInfo | None]:
    """The config's own names in an error's location (union branches are in it too), and the last's field."""
    section: type[BaseModel] | None = root
    names: list[str] = []
    field: FieldInfo | None = None
    for part in loc:
        if field is not None and part in (kinds := _kinds(field)):
            section = kinds[str(part)]
        elif section is not None:
            names.append(str(part))
            field = section.model_fields.get(str(part))
            section = _model(field) if field else None
        elif isinstance(part, int):
            names.append(str(part))
    return names, field


def _section(loc: Iterable[int | str], root: type[BaseModel]) -> type[BaseModel]:
    """The innermost section on the way along an error's location."""
    section, field = root, None
    for part in loc:
        kinds: dict[str, type[BaseModel]] = _kinds(field) if field else {}
        field = None if part in kinds else section.model_fields.get(str(part))
        section = kinds.get(str(part)) or (_model(field) if field else None) or section
    return section


def _model(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _kinds(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The sections a field may hold, by the `kind` that tells them apart; none where it holds but one."""
    sections = [kind for kind in get_args(field.annotation) if isinstance(kind, type)]
    return {
        str(tag): section
        for section in sections
        if issubclass(section, BaseModel) and "kind" in section.model_fields
        for tag in get_args(section.model_fields["kind"].annotation)
    }


def _suggest(loc: Sequence[int | str], root: type[BaseModel]) -> str:
    """The nearest name beside the unknown one, or the kinds of this section or another section that have it."""
    section, unknown = _section(loc[:-1], root), str(loc[-1])
    if near := _nearest(unknown, section.model_fields):
        return near
    field = _locate(loc[:-1], root)[1]
    if kinds := [
        tag for tag, kind in (_kinds(field) if field else {}).items() if unknown in kind.model_fields
    ]:
        return f"kinds that have it: {', '.join(kinds)}; {_known(section.model_fields)}"
    elsewhere = [
        f"{outer}.{unknown}"
        for outer, field in root.model_fields.items()
        if (model := _model(field)) and unknown in model.model_fields
    ]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}"?'
    return _known(section.model_fields)


def _nearest(unknown: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f'did you mean "{near[0]}"?' if near else None


def _known(names: Iterable[str]) -> str:
    return f"known: {', '.join(names)}"


def _names(section: type[BaseModel]) -> str:
    return ", ".join(list(section.model_fields)[:4])


def _explained(field: FieldInfo | None) -> str:
    return f" ({field.description})" if field and field.description else ""


def _optional(field: FieldInfo | None) -> str:
    return " or null" if field and type(None) in get_args(field.annotation) else ""


def _kind(value: object) -> str:
    """What a YAML value is, in words."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a section"
        case list():
            return "a list"
    return shown(value)


def _one_line(error: yaml.YAMLError) -> str:
    """A YAML error as `line 3: …`."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return line + str(error.problem or "not valid YAML")


def _nearest_file(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
