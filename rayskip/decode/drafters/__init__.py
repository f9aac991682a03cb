"""Drafters by kind: a config's `decode.draft` becomes one drafter per lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rayskip.config import (
    AutoDraft,
    DraftConfig,
    KangarooDraft,
    LookaheadDraft,
    LookupDraft,
    NoDraft,
    RetrievalDraft,
)
from rayskip.data.tokenizer import Encoder, load_tokenizer
from rayskip.decode.drafters.auto import AutoDrafter
from rayskip.decode.drafters.costs import measure_costs
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.drafters.kangaroo import KangarooDrafter
from rayskip.decode.drafters.lookahead import LookaheadDrafter
from rayskip.decode.drafters.lookup import LookupDrafter
from rayskip.decode.drafters.none import NoDrafter
from rayskip.decode.drafters.retrieval import RetrievalDrafter
from rayskip.errors import ConfigError, ModelError
from rayskip.model.forward import Decoder
from rayskip.model.kangaroo import has_shipped, load_kangaroo
from rayskip.skip import SkipPolicy

KANGAROO_LAYERS = 1
"""Its adapter's keys and values."""


@dataclass(frozen=True)
class Drafters:
    """make: a drafter for one lane. cache_layers: layers that it keeps in the KV cache, after the model's."""

    make: Callable[[], Drafter]
    cache_layers: int = 0


def load_drafters(
    config: DraftConfig, decoder: Decoder, policy: SkipPolicy, threads: int, rows: int
) -> Drafters:
    """Load and measure what the drafter needs, once for all lanes.

    threads, rows: of a lane. Raises ConfigError or ModelError where something does not fit.
    """

    def kangaroo_of(path: str | None, gamma: int, eta: float) -> Callable[[], KangarooDrafter]:
        kangaroo = load_kangaroo(decoder, Path(path).expanduser() if path else None)
        return lambda: KangarooDrafter(gamma, eta, kangaroo, decoder, policy)

    match config:
        case NoDraft():
            return Drafters(NoDrafter)
        case LookupDraft():
            return Drafters(lambda: LookupDrafter(config))
        case LookaheadDraft():
            return Drafters(lambda: LookaheadDrafter(config))
        case RetrievalDraft():
            corpus = _corpus(config, decoder)
            return Drafters(lambda: RetrievalDrafter(config, corpus))
        case KangarooDraft():
            return Drafters(kangaroo_of(config.path, config.gamma, config.eta), KANGAROO_LAYERS)
        case AutoDraft():
            costs = measure_costs(decoder, threads, rows * (1 + config.tokens))
            if config.path is None and not has_shipped(decoder):
                return Drafters(lambda: AutoDrafter(config, costs, None))
            make = kangaroo_of(config.path, config.gamma, config.eta)
            return Drafters(lambda: AutoDrafter(config, costs, make()), KANGAROO_LAYERS)


def _corpus(config: RetrievalDraft, decoder: Decoder) -> list[list[int]]:
    """The corpus' lines as token ids."""
    if config.corpus is None:
        return []
    path = Path(config.corpus).expanduser()
    if not path.is_file():
        raise ConfigError(f"decode.draft.corpus: {path} is no file; a text file with a text a line is wanted")
    tokenizer = load_tokenizer(decoder.folder) if decoder.folder else None
    if tokenizer is None:
        raise ModelError("decode.draft.corpus: the model's folder has no tokenizer to read it with")
    encoder = Encoder(tokenizer)
    return [encoder.data(line) for line in path.read_text().splitlines() if line]
