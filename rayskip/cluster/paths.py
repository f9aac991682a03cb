"""A job's local paths on a cluster: absolute, since a replica works in another directory, and in folders that last.

Does not know which nodes share a folder: each replica looks for itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rayskip.config import JobConfig
from rayskip.errors import OutputError
from rayskip.model import embedded

_KEYS = ("path", "adapter", "corpus")
"""Of a config's sections: what may be a file or folder here, or the name of something elsewhere."""

_FREE = ("chat_template_kwargs", "rename", "labels", "json_schema", "logit_bias")
"""Sections whose keys are the user's own."""

_COPIED = "runtime_resources/working_dir_files"
"""Where Ray puts the files that a submitted job brings along; it deletes them after the job."""


def absolute(job: JobConfig) -> JobConfig:
    """The job with the local paths in it made absolute."""
    sections = _absolute(job.model_dump())
    sections["output"]["path"] = absolute_output(job.output.path)
    return JobConfig.model_validate(sections)


def absolute_output(path: str) -> str:
    """The path of an output folder, there or not: absolute, or the url that it is."""
    return path if "://" in path else os.path.abspath(path)


def check_output(path: str) -> None:
    """Raises OutputError for an output folder that would not outlast a job submitted to a cluster."""
    if "://" not in path and _COPIED in Path(path).absolute().as_posix():
        raise OutputError(
            f"output.path: {path} would be among the files that the job brought along, which Ray deletes after it; "
            f"name a folder that all nodes share, from its root on, or s3:// or gs://"
        )


def _absolute(section: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    for key, value in section.items():
        if isinstance(value, dict):
            value = value if key in _FREE else _absolute(value)
        elif key in _KEYS and value and value != embedded.NAME and os.path.exists(value):
            value = os.path.abspath(value)
        changed[key] = value
    return changed
