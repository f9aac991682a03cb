"""What callers give the engine, as rows it can run: prompts in three forms, and why one cannot run.

Knows neither the queue nor workers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from rayskip.config import SamplingParams
from rayskip.data.prompts import row_key
from rayskip.data.records import Prompt
from rayskip.data.tokenizer import Encoder
from rayskip.errors import RowError

PromptLike = str | Seq[int] | Seq[dict[str, str]]
"""A prompt as text, as token ids or as chat messages."""


@dataclass(frozen=True)
class Prompts:
    """For one model. encoder: None where its folder has no tokenizer."""

    encoder: Encoder | None
    vocab: int
    max_model_len: int

    def make(self, index: int, prompt: PromptLike, params: SamplingParams, row_file: str = "") -> Prompt:
        """Row `index` of a file, whose name is part of its random key as in a job; of none, by default.

        Raises RowError for text or messages without a tokenizer.
        """
        return Prompt(index, self._token_ids(prompt), params, row_key(params.seed, row_file, index))

    def check(self, prompt: Prompt) -> None:
        """Raises RowError when the row has no token, no room to generate or cannot be sampled as it asks."""
        token_ids = prompt.token_ids
        if prompt.params.stop and self.encoder is None:
            raise RowError("no_tokenizer", "stop strings need a tokenizer, and the model's folder has none")
        if not token_ids:
            raise RowError("empty_prompt", "the prompt has no tokens")
        if len(token_ids) >= self.max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens; the context holds {self.max_model_len}, one of them new",
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab:
            raise RowError("bad_token_id", f"token ids must be in [0, {self.vocab})")

    def _token_ids(self, prompt: PromptLike) -> list[int]:
        """Text is encoded as it stands, messages through the chat template, both without special tokens of their
        own (see `Encoder`)."""
        if not isinstance(prompt, Seq):
            raise TypeError(f"a prompt is a text, a list of token ids or a list of messages, not {prompt!r}")
        ids = [part for part in prompt if isinstance(part, int)]
        if len(ids) == len(prompt):
            return ids
        if self.encoder is None:
            raise RowError("no_tokenizer", "the model's folder has no tokenizer; give token ids")
        if isinstance(prompt, str):
            return self.encoder.data(prompt)
        return self.encoder.chat([part for part in prompt if isinstance(part, dict)])
