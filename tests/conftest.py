"""What all tests share: the embedded model, and an environment without network and chatter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
