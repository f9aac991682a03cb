"""Whether the files that a drafter needs are there and fit its model. Loads no weights, and no torch."""

from __future__ import annotations

from pathlib import Path

from rayskip.config import AutoDraft, DraftConfig, DraftModelDraft, KangarooDraft, MedusaDraft, RetrievalDraft
from rayskip.data.tokenizer import load_tokenizer
from rayskip.errors import ConfigError, ModelError
from rayskip.model.checkpoint import check, read_spec, resolve
from rayskip.model.spec import Spec
from rayskip.model.trained import KangarooLabel, MedusaLabel, find_trained, has_shipped
from rayskip.skip import FOREVER, SkipPolicy


def check_files(config: DraftConfig, model: Path, policy: SkipPolicy) -> None:
    """Whether the files that the drafter needs are there and fit the model in the folder and the policy; loads no
    weights.

    Raises ConfigError or ModelError.
    """
    if isinstance(config, KangarooDraft | MedusaDraft):
        check_parts(read_spec(model), f"decode.draft: {config.kind}")
    match config:
        case KangarooDraft() | AutoDraft():
            adapter_folder(config, model, policy)
        case MedusaDraft():
            heads, _ = find_trained(MedusaLabel, model, named_folder(config.path))
            check_branches(config.branches, heads.tokens)
        case DraftModelDraft():
            folder = resolve(config.model.path, config.model.revision)
            spec = check(folder, named_folder(config.model.adapter))
            check_same_tokens(folder, spec.vocab, model, read_spec(model).vocab)
        case RetrievalDraft():
            corpus_file(config)


def adapter_folder(config: KangarooDraft | AutoDraft, model: Path | None, policy: SkipPolicy) -> Path | None:
    """The folder of the Kangaroo adapter that drafts for the model in the folder `model`. None: auto goes without,
    since it names none, and none ships or the policy skips a layer that the one that ships follows.

    Raises ConfigError or ModelError.
    """
    named = config.path is not None or config.kind == KangarooLabel.KIND
    if not named and not has_shipped(KangarooLabel, model):
        return None
    label, folder = find_trained(KangarooLabel, model, named_folder(config.path))
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
    check_branches(config.branches, label.tokens)
    return folder


def check_parts(spec: Spec, what: str) -> None:
    """Raises ModelError where `what` needs a decoder's parts, and transformers' modules have them."""
    if spec.hosted:
        raise ModelError(
            f"{what} needs a model of a family of ours; a {spec.road} has no parts that it knows"
        )


def check_branches(branches: int, tokens: int) -> None:
    if branches > tokens:
        raise ConfigError(
            f"decode.draft.branches: {branches} is more than the {tokens} tokens that a draft is chosen from"
        )


def named_folder(path: str | None) -> Path | None:
    return None if path is None else Path(path)


def check_same_tokens(folder: Path, vocab: int, target_folder: Path | None, target_vocab: int) -> None:
    own = load_tokenizer(folder)
    target = load_tokenizer(target_folder) if target_folder else None
    told = (own.get_vocab(), target.get_vocab()) if own and target else (vocab, target_vocab)
    if told[0] != told[1]:
        raise ModelError(
            f"decode.draft.model: {folder} has other tokens than {target_folder or 'the model'}; a model with the "
            "same tokenizer is wanted"
        )


def corpus_file(config: RetrievalDraft) -> Path | None:
    path = named_folder(config.corpus)
    if path is not None and not path.is_file():
        raise ConfigError(f"decode.draft.corpus: {path} is no file; a text file with a text a line is wanted")
    return path


class LayerSkipped(ConfigError):
    """The policy skips a layer that the adapter follows: verification could not share it."""


def check_policy(exit_layer: int, policy: SkipPolicy) -> None:
    """Raises LayerSkipped when the policy skips one of the first `exit_layer` layers."""
    if skipped := [layer for layer in range(exit_layer) if policy.until[layer] != FOREVER]:
        raise LayerSkipped(
            f"decode.draft: the adapter follows {exit_layer} layers, and {policy.name} skips layer "
            f"{skipped[0]}; a policy that keeps the bottom {exit_layer} is wanted (skipdecode: warmup)"
        )
