"""Drafters by kind: a config's `decode.draft` becomes one drafter per worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
from rayskip.decode.drafters.auto import AutoDrafter
from rayskip.decode.drafters.costs import StepCosts, measure_costs
from rayskip.decode.drafters.draft_model import DraftModelDrafter
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.drafters.kangaroo import (
    KANGAROO,
    KangarooDrafter,
    LayerSkipped,
    check_policy,
    most_drafted,
)
from rayskip.decode.drafters.lookahead import LookaheadDrafter
from rayskip.decode.drafters.lookup import LookupDrafter
from rayskip.decode.drafters.medusa import MedusaDrafter
from rayskip.decode.drafters.none import NoDrafter
from rayskip.decode.drafters.retrieval import RetrievalDrafter, Store
from rayskip.errors import ConfigError, ModelError
from rayskip.model.cache.kv_cache import KVCache
from rayskip.model.checkpoint import check, load, read_spec, resolve
from rayskip.model.decoder import Decoder
from rayskip.model.kangaroo import Kangaroo, KangarooLabel, load_kangaroo
from rayskip.model.medusa import MedusaLabel, load_medusa
from rayskip.model.trained import find_trained, has_shipped
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
            kangaroo = load_kangaroo(decoder, _adapter(config, decoder.folder, policy))
            return Drafters(lambda threads, rows: own(config, kangaroo), KANGAROO_LAYERS)
        case MedusaDraft():
            medusa = load_medusa(decoder, _folder(config.path))
            _check_branches(config.branches, len(medusa.token_ids))
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
            folder = _adapter(config, decoder.folder, policy)
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


def check_files(config: DraftConfig, model: Path, policy: SkipPolicy) -> None:
    """Whether the files that the drafter needs are there and fit the model in the folder and the policy; loads no
    weights.

    Raises ConfigError or ModelError.
    """
    match config:
        case KangarooDraft() | AutoDraft():
            _adapter(config, model, policy)
        case MedusaDraft():
            heads, _ = find_trained(MedusaLabel, model, _folder(config.path))
            _check_branches(config.branches, heads.tokens)
        case DraftModelDraft():
            folder = resolve(config.model.path, config.model.revision)
            spec = check(folder, _folder(config.model.adapter))
            _check_same_tokens(folder, spec.vocab, model, read_spec(model).vocab)
        case RetrievalDraft():
            _corpus(config)


def _adapter(config: KangarooDraft | AutoDraft, model: Path | None, policy: SkipPolicy) -> Path | None:
    """The folder of the Kangaroo adapter that drafts for the model in the folder `model`. None: auto goes without,
    since it names none, and none ships or the policy skips a layer that the one that ships follows.

    Raises ConfigError or ModelError.
    """
    named = config.path is not None or config.kind == KANGAROO
    if not named and not has_shipped(KangarooLabel, model):
        return None
    label, folder = find_trained(KangarooLabel, model, _folder(config.path))
    if not 0 < label.exit_layer < len(policy.until):
        raise ModelError(
            f"decode.draft.path: {folder} follows layer {label.exit_layer} of a model that has {len(policy.until)}"
        )
    try:
        check_policy(label.exit_layer, policy)
    except LayerSkipped:
        if named:
            raise
        return None
    _check_branches(config.branches, label.tokens)
    return folder


def _check_branches(branches: int, tokens: int) -> None:
    if branches > tokens:
        raise ConfigError(
            f"decode.draft.branches: {branches} is more than the {tokens} tokens that a draft is chosen from"
        )


def _folder(path: str | None) -> Path | None:
    return None if path is None else Path(path)


def _draft_model(config: DraftModelDraft, decoder: Decoder) -> Decoder:
    """Raises ModelError when the two do not share their tokens."""
    folder = resolve(config.model.path, config.model.revision)
    adapter = _folder(config.model.adapter)
    dtype = getattr(torch, config.model.dtype)
    model = Decoder(*load(folder, dtype, decoder.backend.device, adapter), folder=folder)
    _check_same_tokens(folder, model.spec.vocab, decoder.folder, decoder.spec.vocab)
    return model


def _check_same_tokens(folder: Path, vocab: int, target_folder: Path | None, target_vocab: int) -> None:
    own = load_tokenizer(folder)
    target = load_tokenizer(target_folder) if target_folder else None
    told = (own.get_vocab(), target.get_vocab()) if own and target else (vocab, target_vocab)
    if told[0] != told[1]:
        raise ModelError(
            f"decode.draft.model: {folder} has other tokens than {target_folder or 'the model'}; a model with the "
            "same tokenizer is wanted"
        )


def _corpus(config: RetrievalDraft) -> Path | None:
    path = _folder(config.corpus)
    if path is not None and not path.is_file():
        raise ConfigError(f"decode.draft.corpus: {path} is no file; a text file with a text a line is wanted")
    return path


def _read_corpus(config: RetrievalDraft, decoder: Decoder) -> Store:
    store = Store()
    path = _corpus(config)
    if path is None:
        return store
    tokenizer = load_tokenizer(decoder.folder) if decoder.folder else None
    if tokenizer is None:
        raise ModelError("decode.draft.corpus: the model's folder has no tokenizer to read it with")
    encoder = Encoder(tokenizer)
    for line in path.read_text().splitlines():
        store.add(encoder.data(line))
    return store
