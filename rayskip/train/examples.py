"""Supervised examples out of a dataset: prompt tokens and answer tokens, split and batched.

Does not know models or losses.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayskip.config.train import DataConfig
from rayskip.data.prompts import PromptBuilder, check_input, prompt_columns
from rayskip.data.sources import discover, every_row
from rayskip.data.tokenizer import Encoder
from rayskip.data.values import text_of
from rayskip.errors import RowError

WINDOW = 16
"""Batches whose examples are sorted by length together."""

TEXT, FINISH_REASON, LOGPROBS, SKIP_POLICY = "text", "finish_reason", "logprobs", "skip_policy"
"""Columns of a job's output: a completion, why it ended, what else might have followed, which layers ran."""

IGNORED = -100
"""Label of a position that has no loss, as in torch's cross_entropy."""


@dataclass(frozen=True)
class Example:
    """prompt: token ids. answer: token ids, the end token included. group: rows that stay together in a split.

    top_ids, top_logprobs [tokens of the answer, K]: what a model held likeliest in each place, where that is known.
    """

    prompt: list[int]
    answer: list[int]
    group: str
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TrainBatch:
    """Examples side by side: prompts padded on the left to `prompt_width`, answers on the right.

    input_ids, attention_mask [B, T]; labels [B, T - prompt_width]: the answers, IGNORED where padded.
    top_ids, top_logprobs [A, K]: of all A answer tokens, row by row, if all examples have them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_width: int
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def to(self, device: torch.device) -> TrainBatch:
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def read_examples(
    config: DataConfig,
    encoder: Encoder,
    builder: PromptBuilder,
    end: int,
    logprobs_vocab: int | None = None,
) -> list[Example]:
    """Every row that has an answer; of a job's own output, those that did not fail.

    logprobs_vocab: read what a job wrote in its logprobs column too, where the answers are that job's text; the
    token ids must be below it. Raises InputError when the answer's column is missing, or RowError naming what is
    wrong with a row.
    """
    source = discover(config.input, {config.answer, config.group or config.answer})
    source.require(config.input.path, "data.answer", config.answer)
    check_input(config.input, source.columns)
    columns = prompt_columns(config.input) | {config.answer, FINISH_REASON, LOGPROBS, SKIP_POLICY}
    examples = []
    for shard, index, row in every_row(
        source, columns | {config.group or config.answer}, config.input.max_rows
    ):
        if row.get(FINISH_REASON) == "error":
            continue
        prompt = builder.build(row, index, shard.name).token_ids
        group = text_of(row[config.group]) if config.group else f"{shard.name}:{index}"
        if logprobs_vocab is not None and config.answer == TEXT and row.get(LOGPROBS):
            where = f"{shard.name}: row {index}"
            examples.append(_with_logprobs(prompt, row, group, where, logprobs_vocab))
            continue
        cut = row.get(FINISH_REASON) == "length"  # a job's own output: such an answer has no end
        answer = encoder.data(text_of(row[config.answer])) + ([] if cut else [end])
        examples.append(Example(prompt, answer, group))
    return examples


def _with_logprobs(prompt: list[int], row: dict[str, Any], group: str, where: str, vocab: int) -> Example:
    """The tokens of a job's logprobs column, and the likeliest ones at each."""
    if row.get(SKIP_POLICY) not in (None, "none"):
        raise RowError(
            "bad_logprobs",
            f"{where}: written under {row[SKIP_POLICY]}; answers of the whole model are wanted",
        )
    try:
        tops = [entry["top"] or [entry] for entry in row[LOGPROBS]]
        answer = [int(entry["token_id"]) for entry in row[LOGPROBS]]
        ids = np.array([[other["token_id"] for other in top] for top in tops], np.int32)
        logprobs = np.array([[other["logprob"] for other in top] for top in tops], np.float32)
    except (TypeError, KeyError, ValueError) as error:
        raise RowError(
            "bad_logprobs",
            f"{where}: {LOGPROBS} is not what a job writes: a list with token_id, logprob and equally many top "
            f"per token ({error!r})",
        ) from error
    if not 0 <= min(ids.min(), *answer) <= max(ids.max(), *answer) < vocab:
        raise RowError(
            "bad_logprobs", f"{where}: {LOGPROBS} has tokens past the model's {vocab}; another model wrote it"
        )
    return Example(prompt, answer, group, ids, logprobs)


def split(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; a group is in one of them as a whole, by the hash of its name.

    The held-out ones come in order of their hash, so that the first few are of all files.
    """

    def place(example: Example) -> float:
        digest = hashlib.blake2b(example.group.encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64

    return (
        [example for example in examples if place(example) >= held_out],
        sorted((example for example in examples if place(example) < held_out), key=place),
    )


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches: every pass in another order, none with examples left over from the pass before.

    Neighbours in length share a batch (fewer padded columns), out of windows of WINDOW batches in random order.
    """
    order = random.Random(seed)
    while True:
        shuffled = order.sample(list(examples), len(examples))
        whole = len(shuffled) - len(shuffled) % size
        for start in range(0, whole, size * WINDOW):
            window = shuffled[start : min(start + size * WINDOW, whole)]
            window.sort(key=lambda example: (len(example.prompt) // 8, len(example.answer)))
            parts = [window[at : at + size] for at in range(0, len(window), size)]
            yield from order.sample(parts, len(parts))


def collate(examples: Sequence[Example], pad: int) -> TrainBatch:
    prompt_width = max(len(example.prompt) for example in examples)
    answer_width = max(len(example.answer) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        left, right = prompt_width - len(example.prompt), answer_width - len(example.answer)
        ids.append([pad] * left + example.prompt + example.answer + [pad] * right)
        mask.append([0] * left + [1] * (len(example.prompt) + len(example.answer)) + [0] * right)
        labels.append(example.answer + [IGNORED] * right)
    return TrainBatch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(labels),
        prompt_width,
        _joined([example.top_ids for example in examples], 0),
        _joined([example.top_logprobs for example in examples], -np.inf),
    )


def _joined(parts: Sequence[NDArray[Any] | None], filler: float) -> Tensor | None:
    """All rows of all parts, as wide as the widest; None unless all are known."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    widest = max(part.shape[1] for part in known)
    padded = [np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=filler) for part in known]
    return torch.from_numpy(np.concatenate(padded))
