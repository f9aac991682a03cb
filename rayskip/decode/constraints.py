"""Which tokens may follow under a constraint, at every place of a draft; by the llguidance library.

A mask depends on nothing but the constraint and the row's own tokens, so constrained tokens are the same in any
batch and with any drafter. Where only one token may follow, it is proposed as a draft is: it runs in the next
forward beside the row's newest token, and no step is spent on choosing it.

Knows neither logits nor batches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayskip.config.constraint import Constraint
from rayskip.decode.draft import NEWEST, Draft
from rayskip.errors import ConfigError, RowError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from rayskip.data.tokenizer import Tokenizer

GRAMMAR = "grammar"
"""What proposes the tokens that a constraint leaves no choice about."""

MOST_FORCED = 32
"""Tokens, about, of one row for which it gets places at once because nothing else may follow."""

_SEPARATORS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As Python's json.dumps writes."""


def grammar_of(constraint: Constraint) -> str:
    """A constraint as llguidance's grammar. Raises RowError for one that cannot be compiled."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in constraint.choice or ())
            grammar = LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        case "regex":
            grammar = LLMatcher.grammar_from_regex(constraint.regex or "")
        case "grammar":
            grammar = LLMatcher.grammar_from_lark(constraint.grammar or "")
        case _:
            options: Any = None if constraint.any_whitespace else _SEPARATORS
            grammar = LLMatcher.grammar_from_json_schema(constraint.json_schema or {}, overrides=options)
    if fault := LLMatcher.validate_grammar(grammar):
        raise _refused(constraint, fault)
    return grammar


def check_constraint(constraint: Constraint) -> None:
    """Raises ConfigError for a job's constraint that cannot be compiled."""
    try:
        grammar_of(constraint)
    except RowError as error:
        raise ConfigError(f"sampling.{error}") from error


def _refused(constraint: Constraint, fault: str) -> RowError:
    said = " ".join(fault.split())
    return RowError("invalid_constraint", f"constraint.{constraint.kind} cannot be compiled: {said[:300]}")


@dataclass(frozen=True)
class Mask:
    """Tokens that may follow. bits: one for each, the lowest of each byte first. only: the one, where no other
    may."""

    bits: NDArray[np.uint8]

    @cached_property
    def only(self) -> int | None:
        (places,) = self.bits.nonzero()
        if len(places) != 1 or (bits := int(self.bits[places[0]])).bit_count() != 1:
            return None
        return int(places[0]) * 8 + bits.bit_length() - 1

    def __contains__(self, token: int) -> bool:
        return bool(self.bits[token >> 3] >> (token & 7) & 1)


class Grammars:
    """Constraints compiled for one tokenizer, each once.

    vocab: tokens that the model has logits for. ends: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, ends: tuple[int, ...]) -> None:
        self._library = None if tokenizer is None else tokenizer.serialised
        self._vocab, self.ends = vocab, ends
        self._compiled: dict[str, LLMatcher | RowError] = {}

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._library is None:
            raise RowError(
                "invalid_constraint", "constraints need a tokenizer that the tokenizers library reads"
            )
        if not self.ends:
            raise RowError("invalid_constraint", "constraints need a model that names its end token")
        return LLTokenizer(self._library, n_vocab=self._vocab, eos_token=list(self.ends))

    @cached_property
    def end(self) -> Mask:
        """What may follow where nothing but an end may: the first end token."""
        bits = np.zeros(-(-self._vocab // 8), dtype=np.uint8)
        bits[self.ends[0] >> 3] = 1 << (self.ends[0] & 7)
        return Mask(bits)

    def matcher(self, constraint: Constraint) -> Matcher:
        """For one sample. Raises RowError for a constraint that cannot be compiled, or spelled by the tokenizer."""
        key = constraint.model_dump_json()
        if (compiled := self._compiled.get(key)) is None:
            try:
                compiled = self._compile(constraint)
            except RowError as error:
                compiled = error
            self._compiled[key] = compiled
        if isinstance(compiled, RowError):
            raise compiled
        return Matcher(compiled, self)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        tokenizer = self._tokenizer
        matcher = LLMatcher(tokenizer, grammar_of(constraint), log_level=0)
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        for text in constraint.choice or ():
            if tokenizer.decode_str(tokenizer.tokenize_str(text)) != text:
                raise _refused(constraint, f"the tokenizer cannot spell {text!r}")
        if not any(matcher.compute_bitmask()):
            raise _refused(constraint, "no token of the tokenizer begins such a text")
        return matcher


class Matcher:
    """One sample's place in its grammar. masks: by node of its draft, or NEWEST, what may follow there, None where
    nothing can; of the nodes that the grammar allows."""

    def __init__(self, compiled: LLMatcher, grammars: Grammars) -> None:
        """compiled: at its beginning."""
        self._compiled, self._grammars = compiled, grammars
        self._own = compiled.deep_copy()
        self._followed = 0
        self.masks: dict[int, Mask | None] = {}

    def anew(self) -> Matcher:
        """The same before its first token."""
        return Matcher(self._compiled, self._grammars)

    @property
    def error(self) -> str | None:
        """Why no token may follow any more, where the library has given up."""
        return " ".join(self._own.get_error().split())[:300] if self._own.is_error() else None

    def follow(self, generated: list[int], draft: Draft, depth: int, tokens: int) -> None:
        """Go to behind the known tokens, and have an empty draft hold what must follow: up to `tokens` of them, and
        no deeper than `depth`."""
        self._own.consume_tokens(generated[self._followed :])
        self._followed = len(generated)
        mask = self._mask()
        self.masks = {NEWEST: mask}
        node, passed = NEWEST, 0
        while mask is not None and mask.only is not None and len(draft) < min(depth, tokens):
            node = draft.add(node, mask.only, GRAMMAR)
            if mask.only in self._grammars.ends:
                self.masks[node] = None
                break
            self._own.consume_token(mask.only)
            passed += 1
            mask = self.masks[node] = self._mask()
        self._own.rollback(passed)

    def prune(self, draft: Draft) -> None:
        """Cut the draft behind the last token that the grammar allows. (One before it that is not allowed stays:
        nothing ever leads to it.)"""
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(draft.parents):
            children.setdefault(parent, []).append(node)
        self._walk(NEWEST, draft, children)
        draft.cut(max(self.masks) + 1)

    def _walk(self, node: int, draft: Draft, children: dict[int, list[int]]) -> None:
        if node not in self.masks:
            self.masks[node] = self._mask()
        if (mask := self.masks[node]) is None:
            return
        for child in children.get(node, ()):
            if (token := draft.tokens[child]) in self._grammars.ends:
                self.masks[child] = None
            elif token in mask:
                self._own.consume_token(token)
                self._walk(child, draft, children)
                self._own.rollback(1)

    def _mask(self) -> Mask | None:
        if not self._own.is_stopped():
            return Mask(np.frombuffer(self._own.compute_bitmask(), dtype=np.uint8))
        return None if self._own.is_error() else self._grammars.end
