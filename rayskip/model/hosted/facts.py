"""What transformers makes of a config of no family of ours: the sizes of its decoder, and whether it can run.

That takes seconds to find out, so it is kept in the user's cache: where it is known, this loads neither torch nor
transformers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayskip.errors import ModelError
from rayskip.model.config import reader
from rayskip.model.files import read_json
from rayskip.model.spec import Spec
from rayskip.user_cache import recall


@dataclass(frozen=True)
class Facts:
    """Sizes as in a Spec. windows: positions that each layer sees, None: all."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    scale: float
    attn_softcap: float | None
    windows: list[int | None]

    @property
    def spec(self) -> Spec:
        sizes = asdict(self)
        del sizes["windows"]
        return Spec(**sizes, hosted=True)


def read_facts(folder: Path) -> Facts:
    """Of the checkpoint in the folder, from its config alone.

    Raises ModelError where its decoder cannot run through transformers' modules.
    """
    file = folder / "config.json"
    return Facts(**recall("facts", lambda: [*reader(), file.read_bytes()], lambda: _facts(folder)))


def _facts(folder: Path) -> dict[str, Any]:
    from rayskip.model.hosted.examine import facts_of  # brings transformers along

    try:
        return asdict(facts_of(folder))
    except ModelError as error:
        raise refused(folder, error) from error


def refused(folder: Path, error: ModelError) -> ModelError:
    """The same error, in words for whoever named the model."""
    model_type = read_json(folder / "config.json").get("model_type")
    return ModelError(
        f"model.path: {folder}: a {model_type} does not run through transformers' modules: {error}"
    )
