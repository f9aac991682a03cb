"""Counters that add, so that a job's total is a sum over its shards.

Does not know who prints them. Seconds are wall seconds of the thread that did the work, or on a GPU those
that the device took for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields

PHASES = ("tokenize", "prefill", "decode", "sample", "write", "idle")


def _no_seconds() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)


@dataclass
class Stats:
    """What was done, in tokens, rows and seconds.

    rows, rows_failed, rows_cut: output rows (input rows x n); failed ones have finish_reason "error",
    those cut off at max_tokens or the context's end "length".
    prompt_tokens: tokens of the prompts; prefix_tokens of them were reused, not prefilled.
    steps, step_rows, step_slots: engine steps, sum of rows they ran, sum of rows they could have run.
    verify_rows: rows that decoded, summed over steps; cohort_rows of them were in the largest group of their step
    that runs the same layers. drafted: tokens proposed to them; accepted_lengths: how many of those rows accepted
    so many (keys are numbers as text, as in JSON); drafted_by, accepted_by: tokens by kind of drafter.
    decode_tokens: generated tokens that ran through the decoder for good, one a verified row and every draft that
    held; steady_tokens of them ran in steps without prompt tokens, which took steady_seconds.
    prompt_layer_tokens, decode_layer_tokens: layer executions, one per token and layer, of prompt tokens and of
    generated ones, as the skip policy wants them; draft_layer_tokens: of drafts that did not hold, and of
    rows that had ended while a step with them was on its way;
    padding_layer_tokens: those only there to fill a row tile.
    audits: generations also decoded at full depth, to compare; audit_*: sums over them of exact matches and of two
    similarities from 0 to 1 (see data/agreement.py).
    kv_bytes_saved: of pages that rows did without, because no token in them runs the layer. kv_bytes_held: of pages
    that rows held, summed over steps; kv_bytes_filled of them had a token's keys and values.
    labels: rows by "right label TAB label that was found", the latter empty where there is none; label_bins: of how
    sure their labels were, see data/labels.py.
    """

    rows: int = 0
    rows_failed: int = 0
    rows_cut: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    step_rows: int = 0
    step_slots: int = 0
    decode_tokens: int = 0
    steady_tokens: int = 0
    steady_seconds: float = 0.0
    verify_rows: int = 0
    cohort_rows: int = 0
    drafted: int = 0
    prompt_layer_tokens: int = 0
    decode_layer_tokens: int = 0
    draft_layer_tokens: int = 0
    padding_layer_tokens: int = 0
    kv_bytes_saved: int = 0
    kv_bytes_held: int = 0
    kv_bytes_filled: int = 0
    audits: int = 0
    audit_exact: int = 0
    audit_edit_similarity: float = 0.0
    audit_rouge_l: float = 0.0
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
    accepted_lengths: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    label_bins: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=_no_seconds)

    def __add__(self, other: Stats) -> Stats:
        total = Stats(
            **{f.name: copy(getattr(self, f.name)) for f in fields(self)},
        )
        total += other
        return total

    def __iadd__(self, other: Stats) -> Stats:
        for f in fields(self):
            own, added = getattr(self, f.name), getattr(other, f.name)
            if isinstance(own, dict):
                for key, value in added.items():
                    own[key] = own.get(key, 0) + value
            else:
                setattr(self, f.name, own + added)
        return self

    @property
    def batch_fill(self) -> float:
        """Share of the batch's rows that did work, over all steps (0 to 1)."""
        return self.step_rows / self.step_slots if self.step_slots else 0.0

    @property
    def kv_fill(self) -> float | None:
        """Share of the KV cache's pages in use that tokens filled (0 to 1); None when no step ran."""
        return self.kv_bytes_filled / self.kv_bytes_held if self.kv_bytes_held else None

    @property
    def layer_tokens_ideal(self) -> int:
        """Layer executions that the skip policy asks for."""
        return self.prompt_layer_tokens + self.decode_layer_tokens

    @property
    def layer_tokens(self) -> int:
        """Layer executions that took place."""
        return self.layer_tokens_ideal + self.draft_layer_tokens + self.padding_layer_tokens

    @property
    def mean_layers(self) -> float | None:
        """Layers run per generated token; None when none ran."""
        return self.decode_layer_tokens / self.decode_tokens if self.decode_tokens else None

    @property
    def cohort_fill(self) -> float | None:
        """Share of the decoding rows that were in the largest group of their step (0 to 1)."""
        return self.cohort_rows / self.verify_rows if self.verify_rows else None

    @property
    def accepted(self) -> int:
        """Drafted tokens that held."""
        return self.decode_tokens - self.verify_rows

    @property
    def mean_accepted(self) -> float | None:
        """Tokens gained per decoding row and step; 1 without a drafter."""
        return self.decode_tokens / self.verify_rows if self.verify_rows else None

    @property
    def agreement(self) -> dict[str, float]:
        """Means over the audits; empty where there are none."""
        if not self.audits:
            return {}
        return {
            "exact_match": self.audit_exact / self.audits,
            "edit_similarity": self.audit_edit_similarity / self.audits,
            "rouge_l": self.audit_rouge_l / self.audits,
        }

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall seconds of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
