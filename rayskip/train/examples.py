"""Supervised examples out of a dataset: prompt tokens and answer tokens, split and batched.

Does not know models or losses.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayskip.config import DataConfig
from rayskip.data.prompts import PromptBuilder
from rayskip.data.sources import discover, every_row
from rayskip.data.tokenizer import Encoder

WINDOW = 16
"""Batches whose examples are sorted by length together."""

FINISH_REASON = "finish_reason"
"""Column of a job's output that tells why a completion ended."""

IGNORED = -100
"""Label of a position that has no loss, as in torch's cross_entropy."""


@dataclass(frozen=True)
class Example:
    """prompt: token ids. answer: token ids, the end token included. group: rows that stay together in a split."""

    prompt: list[int]
    answer: list[int]
    group: str


@dataclass(frozen=True)
class Batch:
    """Examples side by side: prompts padded on the left to `prompt_width`, answers on the right.

    input_ids, attention_mask [B, T]; labels [B, T - prompt_width]: the answers, IGNORED where padded.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_width: int

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.prompt_width,
        )


def read_examples(config: DataConfig, encoder: Encoder, builder: PromptBuilder, end: int) -> list[Example]:
    """Every row that has a prompt and an answer.

    Raises InputError when the answer's column is missing, or RowError naming what is wrong with a row.
    """
    source = discover(config.input)
    source.require(config.input.path, "data.answer", config.answer)
    examples = []
    for shard, index, row in every_row(source, config.input.max_rows):
        prompt = builder.build(row, index, shard.name).token_ids
        cut = row.get(FINISH_REASON) == "length"  # a job's own output: such an answer has no end
        answer = encoder.data(str(row[config.answer])) + ([] if cut else [end])
        group = str(row[config.group]) if config.group else f"{shard.name}:{index}"
        examples.append(Example(prompt, answer, group))
    return examples


def split(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; a group is in one of them as a whole, by the hash of its name."""

    def is_held_out(example: Example) -> bool:
        digest = hashlib.blake2b(example.group.encode(), digest_size=8).digest()
        return int.from_bytes(digest) < held_out * 2**64

    return (
        [example for example in examples if not is_held_out(example)],
        [example for example in examples if is_held_out(example)],
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


def collate(examples: Sequence[Example], pad: int) -> Batch:
    prompt_width = max(len(example.prompt) for example in examples)
    answer_width = max(len(example.answer) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        left, right = prompt_width - len(example.prompt), answer_width - len(example.answer)
        ids.append([pad] * left + example.prompt + example.answer + [pad] * right)
        mask.append([0] * left + [1] * (len(example.prompt) + len(example.answer)) + [0] * right)
        labels.append(example.answer + [IGNORED] * right)
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels), prompt_width)
