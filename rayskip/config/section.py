"""The base of every section, and the section that names a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["bfloat16", "float32", "float16"]


def as_text(value: object) -> object:
    """A number as its text, where texts are wanted. Raises ValueError for what YAML reads as true or false and was
    perhaps yes or no."""
    if isinstance(value, bool):
        raise ValueError(
            f"has {str(value).lower()}, which is no text; in YAML put yes, no, on, off in quotes"
        )
    return str(value) if isinstance(value, int | float) else value


UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or url; "~" at its beginning is the home folder."""


class Section(BaseModel):
    """A config section: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: object) -> object:
        """A path from Python, such as pathlib's, is as good as its text."""
        if not isinstance(values, dict):
            return values
        return {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in values.items()
        }


class ModelConfig(Section):
    """Which checkpoint, in which precision."""

    path: UserPath = Field(
        description="smollm2-135m-instruct, a local folder with safetensors, a .gguf file, or a hub id"
    )
    dtype: Dtype = "bfloat16"
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    adapter: UserPath | None = Field(None, description="local folder with a LoRA adapter to merge")

    @property
    def adapter_folder(self) -> Path | None:
        return Path(self.adapter) if self.adapter else None
