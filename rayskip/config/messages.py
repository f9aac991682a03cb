"""What is wrong with a config, in one line: pydantic's errors in the config's own words.

Does not know where the values came from; the reader adds the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rayskip.errors import shown

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
    "invalid_key": "text",
    "tuple_type": "a list",
    "too_long": "a shorter list",
    "too_short": "a list that is not empty",
    "dict_type": "a mapping",
}


def explain(errors: Sequence[ErrorDetails], root: type[BaseModel]) -> str:
    """One line for the first thing that is wrong; a union's branches count as one thing.

    root: the section that the errors' locations start from.
    """
    # An unknown key is the likely cause of a missing one, so it is named first.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    place = _locate(first["loc"], root)
    key, kinds, given = place.key, list(_kinds(place.annotation)), first["input"]
    match first["type"]:
        case "extra_forbidden":
            return f'unknown key "{key}"; {_suggest(first["loc"], root)}'
        case "missing":
            return f'missing key "{key}"{_description(place)}'
        case "model_type" | "model_attributes_type" | "union_tag_not_found":
            got = f", got {in_words(given)}"
            if not kinds:
                return f'"{key}" is a section with keys such as {some_keys(place.section)}{got}'
            example = given if given in kinds else kinds[0]
            needs = f'"{key}" needs its kind, as in {{kind: {example}}}'
            return f"{needs}{'' if isinstance(given, dict) else got}; {_known(kinds)}"
        case "union_tag_invalid":
            tag = str(first["ctx"]["tag"])
            return f'"{key}.kind" is "{tag}"; {_did_you_mean(tag, kinds) or _known(kinds)}'
        case "value_error":
            reason = str(first["ctx"]["error"])
            return f'"{key}": {reason}' if key else reason
    # Every branch of a union has its own error, deeper ones for the items of a list.
    places = [(error, _locate(error["loc"], root).names) for error in errors]
    alike = [(error, names) for error, names in places if names[: len(place.names)] == place.names]
    wanted = [
        "a list" if len(names) > len(place.names) else _WANTED.get(error["type"]) or _pydantics(error)
        for error, names in alike
    ]
    if type(None) in _branches(place.annotation):
        wanted.append("null")
    right = " or ".join(dict.fromkeys(wanted))
    return f'"{key}" should be {right}, got {shown(given)}{_description(place)}'


def some_keys(section: type[BaseModel]) -> str:
    """A section's first keys, as an example of what belongs in it."""
    return ", ".join(list(section.model_fields)[:4])


def in_words(value: object) -> str:
    """What a YAML value is."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a section"
        case list():
            return "a list"
    return shown(value)


def closest(unknown: str, known: Iterable[str]) -> str | None:
    """The known name that `unknown` may be a slip of."""
    return next(iter(difflib.get_close_matches(unknown, list(known), n=1)), None)


@dataclass
class _Place:
    """Where in a config an error is.

    names: the keys and list indexes on the way. section: the innermost section on the way. field: of the last key;
    None for one that does not exist. annotation: the type of the value there.
    """

    names: list[str]
    section: type[BaseModel]
    field: FieldInfo | None
    annotation: Any

    @property
    def key(self) -> str:
        return ".".join(self.names)


def _locate(loc: Iterable[int | str], root: type[BaseModel]) -> _Place:
    """The place of an error's location, in which names of a union's branches stand between the config's own."""
    place = _Place([], root, None, root)
    for part in loc:
        if part in (kinds := _kinds(place.annotation)):
            place.section = place.annotation = kinds[str(part)]
            continue
        section, items = _only_section(place.annotation), _item_type(place.annotation)
        if section is not None:
            place.field = section.model_fields.get(str(part))
            place.annotation = place.field and place.field.annotation
        elif items is not None and part != "[key]":
            place.annotation = items
        elif not isinstance(part, int):
            continue  # the name of a branch
        place.names.append(str(part))
        place.section = _only_section(place.annotation) or place.section
    return place


def _branches(annotation: Any) -> tuple[Any, ...]:
    """The types that a union allows; of another type, itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    types = _branches(annotation)
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _only_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a type is or may be; None where there is none or several."""
    sections = _sections(annotation)
    return sections[0] if len(sections) == 1 else None


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections that a union allows, by the `kind` that distinguishes them; empty where it allows but one."""
    sections = _sections(annotation)
    if len(sections) < 2:
        return {}
    return {tag: section for section in sections for tag in get_args(section.model_fields["kind"].annotation)}


def _item_type(annotation: Any) -> Any:
    """The type of a list's items or a mapping's values; None for what is neither, and for one of several types."""
    match get_origin(annotation), get_args(annotation):
        case type() as origin, (item, last) if origin is tuple and last is Ellipsis:
            return item
        case type() as origin, (_, value) if origin is dict:
            return value
    return None


def _suggest(loc: Sequence[int | str], root: type[BaseModel]) -> str:
    """The nearest name beside the unknown one, or the kinds of this section or another section that have it."""
    above, unknown = _locate(loc[:-1], root), str(loc[-1])
    known = above.section.model_fields
    if near := _did_you_mean(unknown, known):
        return near
    kinds = _kinds(above.field.annotation) if above.field else {}
    if having := [kind for kind, section in kinds.items() if unknown in section.model_fields]:
        return f"kinds that have it: {', '.join(having)}; {_known(known)}"
    for name, field in root.model_fields.items():
        section = _only_section(field.annotation)
        if section is not None and unknown in section.model_fields:
            return f'did you mean "{name}.{unknown}"?'
    return _known(known)


def _did_you_mean(unknown: str, known: Iterable[str]) -> str | None:
    near = closest(unknown, known)
    return f'did you mean "{near}"?' if near else None


def _known(names: Iterable[str]) -> str:
    return f"known: {', '.join(names)}"


def _description(place: _Place) -> str:
    return f" ({place.field.description})" if place.field and place.field.description else ""


def _pydantics(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Input should be ")
