"""Loading a tokenizer from a local folder, encoding text with it. Knows no rows, models or network."""

from __future__ import annotations

import copy
import json
import math
import threading
from contextlib import suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import jinja2

from rayskip.data.marks import Marks
from rayskip.data.templates import Templates, too_long
from rayskip.errors import ModelError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_MOST = 1 << 20
"""Characters that are always encoded, in case a tokenizer joins or drops some of the text."""

_PROBE = "The first of two words, and 1234: Grüße!"

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved in `folder`; None where there is none (token ids in, token ids out).

    Raises ModelError when it cannot be read.
    """
    if not any((folder / name).exists() for name in _FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise what a damaged file happens to make them
        raise ModelError(f"{folder}: cannot load the tokenizer: {' '.join(str(error).split())}") from error
    if not (folder / "tokenizer.json").exists():
        _check_converted(folder / "tokenizer.model", tokenizer)
    return tokenizer


_NOW = "strftime_now"
"""What chat templates call for the date."""


def tells_date(folder: Path) -> bool:
    """Whether a chat template in `folder` asks what day it is; loads no tokenizer."""
    files = [folder / "tokenizer_config.json", *folder.rglob("*.jinja")]
    return any(_NOW in file.read_text(encoding="utf-8") for file in files if file.is_file())


_STRFTIME = (
    "{% macro strftime_now(format) %}{% for text in format.split('%%') %}{% set now = namespace(text=text) %}"
    "{% for code, value in CODES.items() %}{% set now.text = now.text.replace(code, value) %}{% endfor %}"
    "{{ now.text if loop.first else '%' + now.text }}{% endfor %}{% endmacro %}\n"
)
"""Python's strftime for one moment, CODES: a template gets no functions from outside, so it brings its own."""

_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]


def _on_day(template: Any, day: date) -> Any:
    """A chat template, or several by name, for which it is always midnight of `day`; None where there is none."""
    if isinstance(template, dict):
        return {name: _on_day(one, day) for name, one in template.items()}
    if template is None or _NOW not in template:
        return template
    codes = json.dumps({code: day.strftime(code) for code in _CODES})
    return _STRFTIME.replace("CODES", codes) + template


def _check_converted(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a SentencePiece model that transformers, by what the configs beside it say, reads as other tokens."""
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor()
    try:
        own.Load(str(file))
    except (OSError, RuntimeError):
        return  # of another kind
    prefixed = tokenizer.init_kwargs.get("add_prefix_space") is not False
    if prefixed and own.encode(_PROBE) != tokenizer.encode(_PROBE, add_special_tokens=False):
        raise ModelError(
            f"{file}: transformers makes other tokens of it than SentencePiece does; a tokenizer.json is wanted "
            "(tokenizer_class in tokenizer_config.json may name the wrong class)"
        )


def ends_with_assistant(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[-1].get("role") == "assistant"


def special_tokens(folder: Path) -> set[str]:
    """The special tokens of a model's tokenizer, as text, by its files; loads no tokenizer. Empty where they do not
    tell, or cannot be read."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        found = list(config.get("added_tokens_decoder", {}).values())
        if not found:
            found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return {str(token["content"]) for token in found if token.get("special") and token.get("content")}


class Encoder:
    """Text to token ids, keeping apart what a template wrote and what the data says (see `Marks`).

    Thread-safe: it has its own copy of the tokenizer, behind a lock, because choosing how special tokens are read
    changes it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int | None = None,
        templates: Templates | None = None,
        day: date | None = None,
    ) -> None:
        """max_model_len: positions of the context; a text that is too long for it in any case is not encoded. day:
        what chat templates tell as today's date; by default the day on which this is made."""
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.chat_template = _on_day(tokenizer.chat_template, day or date.today())
        self._lock = threading.Lock()
        self._templates = templates or Templates()
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._marks = Marks(special | set(tokenizer.all_special_tokens))
        self._most = math.inf if max_model_len is None else _most_characters(tokenizer, max_model_len)

    def data(self, text: str) -> list[int]:
        """Token ids of a plain prompt: the model's start token, if it has one, and no other special token."""
        self._check_length(text)
        return self._encode(text, plain=True, start=True)

    def with_special_tokens(self, text: str) -> list[int]:
        """Token ids of a text whose special tokens are such, as of a chat that was rendered before; with the
        model's start token, if it has one, once."""
        self._check_length(text)
        bos = self._tokenizer.bos_token
        return self._encode(text, plain=False, start=not (bos and text.startswith(str(bos))))

    def mark(self, template: str) -> str:
        """A template's source, ready to be rendered by `render`. Raises jinja2.TemplateSyntaxError."""
        return self._marks.mark(template)

    def render(self, template: str, values: dict[str, Any]) -> str:
        """What a job's template makes of a row's values. Raises RowError."""
        _check_text(values)
        return self._templates.plain(template, values, self._most)

    def written(self, rendered: str) -> list[int]:
        """Token ids of what a marked template rendered, with the model's start token, if it has one, once."""
        bos = self._tokenizer.bos_token
        return self._marked(rendered, start=not (bos and self._marks.begins_with(rendered, str(bos))))

    def chat(
        self,
        messages: list[dict[str, Any]],
        values: dict[str, Any] | None = None,
        continue_final: bool = True,
    ) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins; of one that ends with the
        assistant's message, ending with that, unless `continue_final` is false. values: what else the template may
        read.

        Raises ModelError when the model has no chat template, RowError when that refuses them.
        """
        source, special = self._chat_template
        _check_text([messages, values])
        goes_on = continue_final and ends_with_assistant(messages)
        text = self._templates.chat(source, messages, {**(values or {}), **special}, goes_on, self._most)
        return self._marked(text, start=False)

    @cached_property
    def _chat_template(self) -> tuple[str, dict[str, str]]:
        """Its marked source, and the special tokens that it may name."""
        if self._tokenizer.chat_template is None:
            raise ModelError("the model has no chat template; give plain prompts, without input.chat")
        names = self._tokenizer.special_tokens_map
        try:
            source = self.mark(self._tokenizer.get_chat_template())
        except (jinja2.TemplateSyntaxError, ValueError) as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error
        return source, {name: self._marks.tokens(token) for name, token in names.items()}

    def _marked(self, rendered: str, start: bool) -> list[int]:
        ids: list[int] = []
        for place, (text, special) in enumerate(self._marks.runs(rendered)):
            ids += self._encode(text, plain=not special, start=start and place == 0)
        return ids

    def _check_length(self, text: str) -> None:
        if len(text) > self._most:
            raise too_long(len(text), self._most)

    def _encode(self, text: str, plain: bool, start: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=start, split_special_tokens=plain))


def _most_characters(tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> int:
    """Characters beyond which no text fits the context: as many of the longest token."""
    return max(_LEAST_MOST, max_model_len * max(map(len, tokenizer.get_vocab()), default=1))


def _check_text(values: Any) -> None:
    """Refuse what JSON or UTF-8 cannot hold, wherever it is nested. Raises RowError."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeError as error:
        raise RowError("invalid_utf8", f"the row's text is not valid UTF-8: {error}") from error
    except (RecursionError, TypeError, ValueError) as error:
        raise RowError("bad_prompt", f"the row's values cannot be read: {error}") from error
