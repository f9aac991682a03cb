"""Drafters by kind: a config's `decode.draft` becomes one drafter per worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from rayskip.config import (
    AutoDraft,
    DraftConfig,
    DraftModelDraft,
    KangarooDraft,
    LookaheadDraft,
    LookupDraft,
    MedusaDraft,
    NoDraft,
    RetrievalDraft,
)
from rayskip.data.tokenizer import Encoder, load_tokenizer
from rayskip.decode.draft_files import (
    adapter_folder,
    check_branches,
    check_parts,
    check_same_tokens,
    corpus_file,
    named_folder,
)
from rayskip.decode.drafters.auto import AutoDrafter
from rayskip.decode.drafters.costs import StepCosts, measure_costs
from rayskip.decode.drafters.draft_model import DraftModelDrafter
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.drafters.kangaroo import (
    KangarooDrafter,
    most_drafted,
)
from rayskip.decode.drafters.lookahead import LookaheadDrafter
from rayskip.decode.drafters.lookup import LookupDrafter
from rayskip.decode.drafters.medusa import MedusaDrafter
from rayskip.decode.drafters.none import NoDrafter
from rayskip.decode.drafters.retrieval import RetrievalDrafter, Store
from rayskip.errors import ModelError
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import load, resolve
from rayskip.model.decoder import Decoder
from rayskip.model.kangaroo import Kangaroo, load_kangaroo
from rayskip.model.medusa import load_medusa
from rayskip.skip import SkipPolicy

KANGAROO_LAYERS = 1
"""Its adapter's keys and values."""


@dataclass(frozen=True)
class Drafters:
    """make(threads, rows): a drafter for a worker with so many threads and places. cache_layers: layers that it
    keeps in the KV cache, after the model's. own_layers: memory of caches of its own, in layers of the model's."""

    make: Callable[[int, int], Drafter]
    cache_layers: int = 0
    own_layers: int = 0


def load_drafters(config: DraftConfig, decoder: Decoder, policy: SkipPolicy) -> Drafters:
    """Load what the drafter needs, once for all workers.

    Raises ConfigError or ModelError where something does not fit.
    """

    def own(config: KangarooDraft | AutoDraft, kangaroo: Kangaroo) -> KangarooDrafter:
        return KangarooDrafter(config.gamma, config.eta, config.branches, kangaroo, decoder)

    if isinstance(config, KangarooDraft | MedusaDraft):
        check_parts(decoder.spec, f"decode.draft: {config.kind}")
    match config:
        case NoDraft():
            return Drafters(lambda threads, rows: NoDrafter())
        case LookupDraft():
            return Drafters(lambda threads, rows: LookupDrafter(config))
        case LookaheadDraft():
            return Drafters(lambda threads, rows: LookaheadDrafter(config))
        case RetrievalDraft():
            completions, corpus = Store(config.max_tokens), _read_corpus(config, decoder)
            return Drafters(lambda threads, rows: RetrievalDrafter(config, completions, corpus))
        case KangarooDraft():
            kangaroo = load_kangaroo(decoder, adapter_folder(config, decoder.folder, policy))
            return Drafters(lambda threads, rows: own(config, kangaroo), KANGAROO_LAYERS)
        case MedusaDraft():
            medusa = load_medusa(decoder, named_folder(config.path))
            check_branches(config.branches, len(medusa.token_ids))
            return Drafters(lambda threads, rows: MedusaDrafter(config, medusa))
        case DraftModelDraft():
            model = _draft_model(config, decoder)
            cached, one = (
                KVCache.bytes_per_position(of.spec, layers, of.backend.dtype)
                for of, layers in ((model, model.depth), (decoder, 1))
            )
            vocab = decoder.spec.vocab
            return Drafters(
                lambda threads, rows: DraftModelDrafter(config, model, vocab), own_layers=-(-cached // one)
            )
        case AutoDraft():
            folder = adapter_folder(config, decoder.folder, policy)
            beside = None if folder is None else load_kangaroo(decoder, folder)

            @cache
            def costs(threads: int, rows: int) -> StepCosts:
                widest = 1 + config.tokens + most_drafted(config.gamma, config.branches)
                return measure_costs(decoder, threads, rows, rows * widest)

            return Drafters(
                lambda threads, rows: AutoDrafter(
                    config, costs(threads, rows), None if beside is None else own(config, beside)
                ),
                KANGAROO_LAYERS if beside else 0,
            )


def _draft_model(config: DraftModelDraft, decoder: Decoder) -> Decoder:
    """Raises ModelError when the two do not share their tokens."""
    folder = resolve(config.model.path, config.model.revision)
    adapter = named_folder(config.model.adapter)
    dtype = getattr(torch, config.model.dtype)
    model = Decoder(*load(folder, dtype, decoder.backend.device, adapter), folder=folder)
    check_same_tokens(folder, model.spec.vocab, decoder.folder, decoder.spec.vocab)
    return model


def _read_corpus(config: RetrievalDraft, decoder: Decoder) -> Store:
    store = Store()
    path = corpus_file(config)
    if path is None:
        return store
    tokenizer = load_tokenizer(decoder.folder) if decoder.folder else None
    if tokenizer is None:
        raise ModelError("decode.draft.corpus: the model's folder has no tokenizer to read it with")
    encoder = Encoder(tokenizer)
    for line in path.read_text().splitlines():
        store.add(encoder.data(line))
    return store
