"""What all tests share: the embedded model, and an environment without network and chatter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("suite")

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the embedded default model."""
    from rayskip.model.checkpoint import resolve

    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a small random Llama in bfloat16; arguments are of LlamaConfig."""

    def save(name: str, seed: int, **config: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(seed)
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
        folder: Path = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **config}), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        return folder

    return save
