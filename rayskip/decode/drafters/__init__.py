"""Drafters by kind: a config's `decode.draft` becomes one drafter per lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayskip.config import DraftConfig, KangarooDraft, LookupDraft, NoDraft
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.drafters.kangaroo import KangarooDrafter
from rayskip.decode.drafters.lookup import LookupDrafter
from rayskip.decode.drafters.none import NoDrafter
from rayskip.model.forward import Decoder
from rayskip.model.kangaroo import load_kangaroo
from rayskip.skip import SkipPolicy


@dataclass(frozen=True)
class Drafters:
    """make: a drafter for one lane. cache_layers: layers that it keeps in the KV cache, after the model's."""

    make: Callable[[], Drafter]
    cache_layers: int = 0


def load_drafters(config: DraftConfig, decoder: Decoder, policy: SkipPolicy) -> Drafters:
    """Load what the drafter needs, once for all lanes. Raises ConfigError or ModelError where it does not fit."""
    match config:
        case NoDraft():
            return Drafters(NoDrafter)
        case LookupDraft():
            return Drafters(lambda: LookupDrafter(config))
        case KangarooDraft():
            kangaroo = load_kangaroo(decoder, Path(config.path).expanduser() if config.path else None)
            return Drafters(lambda: KangarooDrafter(config, kangaroo, decoder, policy), cache_layers=1)
