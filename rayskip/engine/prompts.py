"""What callers give the engine, as rows it can run: prompts in three forms, and why one cannot run.

Knows neither the queue nor workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, SupportsIndex

from rayskip.config import SamplingParams
from rayskip.config.file import as_section
from rayskip.data.prompts import read_messages, read_text, row_key
from rayskip.data.records import Prompt
from rayskip.data.tokenizer import Encoder
from rayskip.decode.candidates import tree
from rayskip.errors import RowError, kind_of


class TokenArray(Protocol):
    """A one-dimensional array of integers: numpy's, torch's or the standard library's."""

    def tolist(self) -> Any:
        """Its items as Python's own numbers."""


PromptLike = str | Seq[SupportsIndex] | TokenArray | Seq[Mapping[str, Any]]
"""A prompt as text, as token ids or as chat messages."""

ParamsLike = SamplingParams | Mapping[str, Any]
"""Sampling parameters, or some of them by name."""

_FORMS = "a prompt is a text, a list of token ids or a list of messages ({role, content})"


@dataclass(frozen=True)
class Prompts:
    """For one model. encoder: None where its folder has no tokenizer."""

    encoder: Encoder | None
    vocab: int
    max_model_len: int

    def make(
        self,
        index: int,
        prompt: PromptLike,
        params: SamplingParams,
        row_file: str = "",
        what: str = "the prompt",
    ) -> Prompt:
        """Row `index` of a file, whose name is part of its random key as in a job; of none, by default.

        Raises RowError for text or messages that make no tokens; TypeError, which calls it `what`, for what is no
        prompt.
        """
        return Prompt(index, self._token_ids(prompt, what), params, row_key(params.seed, row_file, index))

    def candidates(self, candidates: Seq[PromptLike]) -> tuple[tuple[int, ...], ...]:
        """Texts or token ids as what may follow a prompt.

        Raises ValueError where one is empty or two are the same tokens; TypeError for what is neither.
        """
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Seq):
            raise TypeError(f"a list of candidates is wanted, not {kind_of(candidates)}")
        tokens = [tuple(self._candidate(one, f"candidate {at}")) for at, one in enumerate(candidates)]
        if not tokens or not all(tokens) or len(set(tokens)) < len(tokens):
            raise ValueError("candidates must be different texts, each with a token at least")
        return tuple(tokens)

    def _candidate(self, candidate: PromptLike, what: str) -> list[int]:
        """Text as it stands, without the model's start token."""
        if isinstance(candidate, str):
            return self._with_tokenizer.continuation(candidate)
        return self._token_ids(candidate, what)

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
        needed = len(token_ids) + 1 + len(tree(prompt.candidates).draft)
        if prompt.candidates and needed > self.max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt's {len(token_ids)} tokens and its candidates' need {needed} places; the context "
                f"holds {self.max_model_len}",
            )
        token_ids = [*token_ids, *chain(*prompt.candidates)]
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab:
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab)
            raise RowError("bad_token_id", f"token ids must be in [0, {self.vocab}), got {wrong}")

    def _token_ids(self, prompt: PromptLike, what: str) -> list[int]:
        """Text is encoded as it stands, messages through the chat template, both without special tokens of their
        own (see `Encoder`)."""
        if isinstance(prompt, str):
            return self._with_tokenizer.data(read_text(str(prompt), "the prompt"))
        items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(items, Seq):
            raise TypeError(f"{what} is {kind_of(prompt)}; {_FORMS}")
        if items and isinstance(items[0], Mapping):
            messages = [_message(item, place, what) for place, item in enumerate(items)]
            return self._with_tokenizer.chat(read_messages(messages, "the prompt"))
        return [_token_id(item, place, what) for place, item in enumerate(items)]

    @property
    def _with_tokenizer(self) -> Encoder:
        if self.encoder is None:
            raise RowError("no_tokenizer", "the model's folder has no tokenizer; give token ids")
        return self.encoder


def list_prompts(prompts: Iterable[PromptLike]) -> list[PromptLike]:
    """The prompts. Raises TypeError for one alone, and for a table, which Python goes through by column names."""
    if isinstance(prompts, Mapping) or hasattr(prompts, "columns") or hasattr(prompts, "column_names"):
        raise TypeError(
            f"a list of prompts is wanted, not {kind_of(prompts)}; give one of its columns, as a list, or have "
            "rayskip.run read the data as a job"
        )
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"a list of prompts is wanted, not {kind_of(prompts)}")
    return list(prompts)


def read_params(params: ParamsLike | Iterable[ParamsLike] | None, prompts: int) -> list[SamplingParams]:
    """The parameters of each of so many prompts: one for all, or one each.

    Raises ConfigError that names the first wrong one and its key; ValueError where there are more or fewer.
    """
    if params is None or isinstance(params, SamplingParams | Mapping):
        return [as_section(SamplingParams, params or {}, "params")] * prompts
    every = [as_section(SamplingParams, own, f"params[{place}]") for place, own in enumerate(params)]
    if len(every) != prompts:
        raise ValueError(f"{prompts} prompts and {len(every)} sampling params; one for each is wanted")
    return every


def _message(item: object, place: int, what: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise TypeError(
            f"{what}: message {place} is {kind_of(item)}; a message is a dict with role and content"
        )
    return dict(item)


def _token_id(item: Any, place: int, what: str) -> int:
    """A number of numpy's or torch's is one too; a bool is none, though Python holds it for an integer."""
    number = item.tolist() if hasattr(item, "tolist") else item
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(
            f"{what}: item {place} is {kind_of(item)}, neither a token id nor a message; {_FORMS}"
        )
    return int(number)
