"""When a completion ends, and what its text is. Does not know the engine or other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayskip.config import SamplingParams

if TYPE_CHECKING:
    from rayskip.data.tokenizer import Tokenizer


class Stopper:
    """Ends completions. Text needs a tokenizer; without one (token ids in, token ids out) there is none."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._special = tokenizer.special_ids if tokenizer is not None else {}
        """Tokens that the completion's text does not show; a stop string may have them."""

    def text(self, token_ids: Sequence[int], params: SamplingParams) -> str | None:
        """The completion's text, cut before the first stop string, or behind it."""
        if self._tokenizer is None:
            return None
        for stop in filter(self._has_special, params.stop):
            token_ids = self._before(token_ids, stop)
        text = self._decode(token_ids)
        cuts = [(at, len(stop)) for stop in params.stop if (at := text.find(stop)) >= 0]
        if not cuts:
            return text
        first, size = min(cuts)
        return text[: first + size if params.include_stop_str_in_output else first]

    def reason(
        self, token_ids: Sequence[int], params: SamplingParams, room: int
    ) -> Literal["stop", "length"] | None:
        """Why the completion ends with its newest token, if it does.

        room: tokens that the context still has place for.
        """
        newest = token_ids[-1]
        if newest in params.stop_token_ids or (newest in self._eos and not params.ignore_eos):
            return "stop"
        if params.stop and self._stops(token_ids, params.stop):
            return "stop"
        return "length" if len(token_ids) >= params.max_tokens or room <= 0 else None

    def _stops(self, token_ids: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether a stop string stands in the text. Decodes the tail first: a stop string ends in the newest
        token, and a token that shows at all is at least one byte of it."""
        tail = token_ids[-(max(len(stop.encode()) for stop in stops) + 8) :]
        for special in {self._has_special(stop) for stop in stops}:
            alike = [stop for stop in stops if self._has_special(stop) == special]
            if any(stop in self._decode(tail, special) for stop in alike):
                text = self._decode(token_ids, special)
                if any(stop in text for stop in alike):
                    return True
        return False

    def _has_special(self, stop: str) -> bool:
        return any(token in stop for token in self._special)

    def _before(self, token_ids: Sequence[int], stop: str) -> Sequence[int]:
        """The tokens before a stop string with special tokens; all where it is not there."""
        at = self._decode(token_ids, special=True).find(stop)
        count = len(token_ids)
        while at >= 0 and count and len(self._decode(token_ids[:count], special=True)) > at:
            count -= 1
        return token_ids[:count]

    def _decode(self, token_ids: Sequence[int], special: bool = False) -> str:
        """special: with special tokens."""
        if self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        return self._tokenizer.decode(token_ids, skip_special_tokens=not special)
