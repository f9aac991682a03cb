"""Columns of the JSON that a schema describes: each property one, with an Arrow type of its own.

What no single Arrow type holds (alternatives, free objects, schemas that contain themselves) is JSON text.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

Schema = dict[str, Any]

_SIMPLE = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


def columns_of(schema: Schema) -> dict[str, pa.DataType]:
    """Type of each property of a schema for objects; empty for another one."""
    found = _type(schema, schema, ())
    return {field.name: field.type for field in found} if pa.types.is_struct(found) else {}


def values_of(text: str | None, columns: dict[str, pa.DataType]) -> dict[str, Any]:
    """What a text has for each column: None where it is not there, or the text is no JSON, as one that was cut."""
    try:
        parsed = json.loads(text or "")
    except ValueError:
        parsed = None
    said = parsed if isinstance(parsed, dict) else {}
    return {name: _fit(said.get(name), kind) for name, kind in columns.items()}


def _type(schema: Any, root: Schema, within: tuple[str, ...]) -> pa.DataType:
    """within: references that are being followed."""
    if not isinstance(schema, dict):
        return pa.string()
    if isinstance(ref := schema.get("$ref"), str):
        return pa.string() if ref in within else _type(_resolve(ref, root), root, (*within, ref))
    if others := [
        one for key in ("anyOf", "oneOf") for one in schema.get(key, ()) if one != {"type": "null"}
    ]:
        kinds = {_type(one, root, within) for one in others}
        return kinds.pop() if len(kinds) == 1 else pa.string()
    if "enum" in schema or "const" in schema:
        return _of_values(schema.get("enum", [schema.get("const")]))
    named = schema.get("type")
    match [kind for kind in (named if isinstance(named, list) else [named]) if kind != "null"]:
        case [("string" | "integer" | "number" | "boolean") as kind]:
            return _SIMPLE[kind]
        case ["array"] if isinstance(schema.get("items"), dict) and "prefixItems" not in schema:
            return pa.list_(_type(schema["items"], root, within))
        case ["object"] if schema.get("properties"):
            own = schema["properties"].items()
            return pa.struct([(name, _type(property, root, within)) for name, property in own])
        case _:
            return pa.string()


def _of_values(values: list[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.bool_() if kinds == {bool} else pa.string()


def _resolve(ref: str, root: Schema) -> Any:
    at: Any = root
    for name in ref.removeprefix("#").strip("/").split("/") if ref != "#" else ():
        at = at.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
    return at


def _fit(value: Any, kind: pa.DataType) -> Any:
    """A parsed value as its column holds it; None for one that it cannot, such as a number too large."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        own = value if isinstance(value, dict) else {}
        return {field.name: _fit(own.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_fit(item, kind.value_type) for item in value] if isinstance(value, list) else None
    if pa.types.is_string(kind):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
