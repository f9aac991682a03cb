"""What a generation may be: one of some texts, what a pattern or a grammar describes, or JSON of a schema."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_validator

from rayskip.config.section import Section, as_text

KINDS = ("choice", "regex", "json_schema", "grammar")

MOST = 1 << 20
"""Characters of a pattern, a grammar or a schema as JSON."""

Source = Annotated[str, Field(min_length=1, max_length=MOST)]


class Constraint(Section):
    """One of four ways to say which texts a generation may be. A row may have its own."""

    choice: tuple[Source, ...] | None = Field(
        None, min_length=1, max_length=10_000, description="one of these texts"
    )
    regex: Source | None = Field(None, description="a regular expression that the whole text matches")
    json_schema: dict[str, Any] | None = Field(
        None,
        description="JSON of this schema; in a job's config also the path of a .json file, or of a pydantic model "
        "as module:Class",
    )
    grammar: Source | None = Field(
        None, description="a grammar in Lark's notation, whose rule start the text is"
    )
    any_whitespace: bool = Field(
        False,
        strict=True,
        description="with json_schema: any white space between JSON's tokens, and not just a space after each "
        "comma and colon",
    )

    @field_validator("json_schema", mode="before")
    @classmethod
    def _read_schema(cls, value: object) -> object:
        """A schema as text, as data has it, and a pydantic model, as Python has it, are its dict."""
        if isinstance(value, type) and issubclass(value, BaseModel):
            return value.model_json_schema()
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"is no JSON ({error})") from error
        if isinstance(value, dict) and len(json.dumps(value)) > MOST:
            raise ValueError(f"is longer than {MOST:,} characters of JSON")
        return value

    @field_validator("choice", mode="before")
    @classmethod
    def _read_choice(cls, value: object) -> object:
        return [as_text(text) for text in value] if isinstance(value, list | tuple) else value

    @field_validator("choice")
    @classmethod
    def _check_choice(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a text twice")
        return value

    @model_validator(mode="after")
    def _check_one(self) -> Constraint:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def read_schema(named: str) -> dict[str, Any]:
    """The schema that a job's config names: a .json file, or a pydantic model as module:Class, whose module is
    imported from here or from where Python looks.

    Raises ValueError that says what is wrong.
    """
    module, colon, name = named.partition(":")
    if not colon or named.endswith(".json"):
        try:
            return dict(json.loads(Path(named).expanduser().read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{named} cannot be read as a JSON Schema ({error})") from error
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises
        raise ValueError(f"{named} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove("")
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ValueError(f"{named} is no pydantic model")
    return model.model_json_schema()
