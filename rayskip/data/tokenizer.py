"""Loading a tokenizer from a local folder, encoding text with it. Knows no rows, models or network."""

from __future__ import annotations

import copy
import json
import re
import threading
from datetime import date
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import jinja2

from rayskip.errors import ModelError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around a number: no template changes them, no tokenizer's special token has them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


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


TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)
"""What a template raises when a row's values are not what its expressions expect."""


class Encoder:
    """Text to token ids, keeping apart what the job wrote and what the data says.

    `shield` replaces every special token in data by a mark that survives templating; `trusted` then encodes
    the marks as the plain text they stand for and the special tokens around them as such. Thread-safe: it has
    its own copy of the tokenizer, behind a lock, because choosing how special tokens are read changes it.
    day: what chat templates tell as today's date; by default the day on which this is made.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.chat_template = _on_day(tokenizer.chat_template, day or date.today())
        self._lock = threading.Lock()
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first, so that no token hides behind one that starts like it; the mark itself is data too.
        special |= set(tokenizer.all_special_tokens)
        self._shielded = [_OPEN, *sorted(special, key=lambda text: (-len(text), text))]
        self._index = {text: index for index, text in enumerate(self._shielded)}
        self._special = re.compile("|".join(map(re.escape, self._shielded)))

    def shield(self, text: str) -> str:
        """`text` with marks in place of special tokens."""
        return self._special.sub(lambda found: f"{_OPEN}{self._index[found[0]]}{_CLOSE}", text)

    def data(self, text: str) -> list[int]:
        """Token ids of a plain prompt: the model's start token, if it has one, and no other special token."""
        return self._encode(text, plain=True, start=True)

    def trusted(self, text: str, start: bool) -> list[int]:
        """Token ids of the job's text with shielded data inside. start: with the model's start token."""
        ids: list[int] = []
        for place, piece in enumerate(_MARK.split(text)):  # text, mark's index, text, ...
            if place % 2:
                ids += self._encode(self._shielded[int(piece)], plain=True, start=False)
            elif piece or place == 0:
                ids += self._encode(piece, plain=False, start=start and place == 0)
        return ids

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant's answer begins.

        Raises ModelError when the model has no chat template, RowError when that refuses them.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError("the model has no chat template; give plain prompts, without input.chat")
        shielded = [{key: self._shield_all(value) for key, value in message.items()} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(shielded, add_generation_prompt=True, tokenize=False)
        except TEMPLATE_FAULTS as error:
            raise RowError("bad_messages", f"the chat template refuses the messages: {error}") from error
        return self.trusted(str(text), start=False)

    def _shield_all(self, value: Any) -> Any:
        """Tool calls and their like are nested: shield every text in them."""
        if isinstance(value, str):
            return self.shield(value)
        if isinstance(value, list):
            return [self._shield_all(item) for item in value]
        if isinstance(value, dict):
            return {key: self._shield_all(item) for key, item in value.items()}
        return value

    def _encode(self, text: str, plain: bool, start: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=start, split_special_tokens=plain))
