"""A checkpoint's tokenizer as transformers reads it, and encoding text with it. Knows no rows, models or network.

transformers takes seconds to import, so what it made of a tokenizer is kept in the user's cache: one that was read
before needs nothing but the tokenizers library.
"""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import jinja2

from rayskip.data.marks import Marks
from rayskip.data.templates import Templates, too_long
from rayskip.errors import ModelError, RowError
from rayskip.user_cache import recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_MOST = 1 << 20
"""Characters that are always encoded, in case a tokenizer joins or drops some of the text."""

_PROBE = "The first of two words, and 1234: Grüße!"

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

_READ = (
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "tekken.json",
    "*vocab*",
    "merges.txt",
    "*.model*",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    "*/*.jinja",
)
"""Of a folder, what may decide its tokenizer: by the names that transformers' classes look for, as it also converts
those of other models."""

_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "mistral-common", "tiktoken")
"""transformers reads other files where one of the latter is installed."""

_METHODS = ("encode", "_encode_plus", "decode", "_decode", "get_vocab")
"""Of a tokenizer of transformers', those that are to be its base class's, which leave all to the library."""


@dataclass(frozen=True)
class _Facts:
    """named: special tokens by the name that templates have for each, as bos_token. special_ids: the added tokens
    that are special. added: texts of all that are added. decoders: kinds of the steps by which the library makes
    text of tokens. chat_template: one, several by name, or None. longest: characters of the longest token."""

    named: dict[str, str]
    all_special: list[str]
    special_ids: dict[str, int]
    added: list[str]
    decoders: list[str]
    chat_template: str | dict[str, str] | None
    longest: int


class Tokenizer:
    """Token by token what transformers' tokenizer does. Thread-safe.

    named_tokens: special tokens by name, as bos_token. special_ids: ids of the added tokens that are special.
    special_tokens: the texts of all. added_tokens: the texts of all added ones. decoders: kinds of the steps by
    which the library makes text of tokens, empty where there is none. chat_template: one, several by name, or None.
    longest: characters of the longest token. serialised: as the tokenizers library writes it; None where that
    does not do all that it does.
    """

    def __init__(
        self,
        facts: _Facts,
        encode: Callable[[str, bool, bool], list[int]],
        decode: Callable[[list[int], bool], str],
        vocab: Callable[[], dict[str, int]],
        serialised: str | None = None,
    ) -> None:
        """encode(text, add_special_tokens, split_special_tokens), decode(token_ids, skip_special_tokens)."""
        self.named_tokens, self.special_ids = facts.named, facts.special_ids
        self.special_tokens = frozenset(facts.special_ids) | frozenset(facts.all_special)
        self.added_tokens, self.decoders = frozenset(facts.added), frozenset(facts.decoders)
        self.chat_template, self.longest = facts.chat_template, facts.longest
        self._lock = threading.Lock()  # how special tokens are read is a setting of the library's object
        self._encode, self._decode, self.get_vocab = encode, decode, vocab
        self.serialised = serialised

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
        """One of transformers', as it is now."""
        own = copy.deepcopy(tokenizer)
        return cls(
            _facts(own),
            lambda text, add, split: own.encode(text, add_special_tokens=add, split_special_tokens=split),
            lambda ids, skip: str(own.decode(ids, skip_special_tokens=skip)),
            own.get_vocab,
            _serialised(own),
        )

    @classmethod
    def _of_library(cls, facts: _Facts, serialised: str) -> Tokenizer:
        from tokenizers import Tokenizer as Library

        own = Library.from_str(serialised)

        def encode(text: str, add: bool, split: bool) -> list[int]:
            own.encode_special_tokens = split
            return list(own.encode(text, add_special_tokens=add).ids)

        return cls(
            facts,
            encode,
            lambda ids, skip: str(own.decode(ids, skip_special_tokens=skip)),
            lambda: dict(own.get_vocab(with_added_tokens=True)),
            serialised,
        )

    def encode(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        """Token ids. add_special_tokens: those that the tokenizer puts around a text; split_special_tokens: one in
        the text is text like any other."""
        with self._lock:
            return list(self._encode(text, add_special_tokens, split_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._decode(list(token_ids), skip_special_tokens)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer saved in `folder`; None where there is none (token ids in, token ids out).

    Raises ModelError when it cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    read: list[PreTrainedTokenizerBase] = []

    def make() -> dict[str, Any]:
        read.append(load_pretrained(folder))
        return {"facts": asdict(_facts(read[0])), "library": _serialised(read[0])}

    kept = recall("tokenizers", lambda: _deciding(folder), make)
    if kept["library"] is None:
        return Tokenizer.of(read[0] if read else load_pretrained(folder))
    return Tokenizer._of_library(_Facts(**kept["facts"]), kept["library"])


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


def load_pretrained(folder: Path) -> PreTrainedTokenizerBase:
    """transformers' own tokenizer of a folder that has one. Raises ModelError when it cannot be read."""
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


def _deciding(folder: Path) -> Iterator[bytes | str]:
    """All that decides what transformers makes of a folder's tokenizer."""
    yield Path(__file__).read_bytes()
    yield from map(_version, _LIBRARIES)
    for file in sorted({file for pattern in _READ for file in folder.glob(pattern) if file.is_file()}):
        yield str(file.relative_to(folder))
        yield file.read_bytes()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _facts(tokenizer: PreTrainedTokenizerBase) -> _Facts:
    special = {
        token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return _Facts(
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [str(token) for token in tokenizer.all_special_tokens],
        special,
        [token.content for token in tokenizer.added_tokens_decoder.values()],
        _decoders(tokenizer),
        tokenizer.chat_template,
        max(map(len, tokenizer.get_vocab()), default=1),
    )


def _decoders(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder: dict[str, Any] = (backend and json.loads(backend.to_str()).get("decoder")) or {}
    return [str(step.get("type")) for step in [decoder, *decoder.get("decoders", [])]]


def _serialised(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The library's tokenizer, which does all that this one does; None where it does not."""
    from tokenizers import Tokenizer as Library
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend) or any(
        getattr(type(tokenizer), name) is not getattr(TokenizersBackend, name) for name in _METHODS
    ):
        return None
    own: Library = copy.deepcopy(tokenizer.backend_tokenizer)
    if tokenizer.clean_up_tokenization_spaces and (
        type(own.model).__name__ != "BPE"
        or tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    ):
        return None
    own.no_truncation()
    own.no_padding()
    return str(own.to_str())


_NOW = "strftime_now"
"""What chat templates call for the date."""


def tells_date(folder: Path) -> bool:
    """Whether a chat template in `folder` asks what day it is; loads no tokenizer."""
    files = [folder / "tokenizer_config.json", *folder.rglob("*.jinja")]
    return any(_NOW.encode() in file.read_bytes() for file in files if file.is_file())


_STRFTIME = (
    "{% macro strftime_now(format) %}{% for text in format.split('%%') %}{% set now = namespace(text=text) %}"
    "{% for code, value in CODES.items() %}{% set now.text = now.text.replace(code, value) %}{% endfor %}"
    "{{ now.text if loop.first else '%' + now.text }}{% endfor %}{% endmacro %}\n"
)
"""Python's strftime for one moment, CODES: a template gets no functions from outside, so it brings its own."""

_CODES = [f"%{flag}{letter}" for flag in ("-", "") for letter in ascii_letters]


def _on_day(template: str, day: date) -> str:
    """A chat template for which it is always midnight of `day`."""
    if _NOW not in template:
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
    return set()


class Encoder:
    """Text to token ids, keeping apart what a template wrote and what the data says (see `Marks`). Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int | None = None,
        templates: Templates | None = None,
        day: date | None = None,
    ) -> None:
        """max_model_len: positions of the context; a text that is too long for it in any case is not encoded. day:
        what chat templates tell as today's date; by default the day on which this is made."""
        self._tokenizer = tokenizer
        self._day = day or date.today()
        self._templates = templates or Templates()
        self._marks = Marks(tokenizer.special_tokens)
        self._most = math.inf if max_model_len is None else _most_characters(tokenizer, max_model_len)

    def data(self, text: str) -> list[int]:
        """Token ids of a plain prompt: the model's start token, if it has one, and no other special token."""
        self._check_length(text)
        return self._encode(text, plain=True, start=True)

    def continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another: no special token."""
        return self._encode(text, plain=True, start=False)

    def with_special_tokens(self, text: str) -> list[int]:
        """Token ids of a text whose special tokens are such, as of a chat that was rendered before; with the
        model's start token, if it has one, once."""
        self._check_length(text)
        bos = self._tokenizer.named_tokens.get("bos_token")
        return self._encode(text, plain=False, start=not (bos and text.startswith(bos)))

    def mark(self, template: str) -> str:
        """A template's source, ready to be rendered by `render`. Raises jinja2.TemplateSyntaxError."""
        return self._marks.mark(template)

    def render(self, template: str, values: dict[str, Any]) -> str:
        """What a job's template makes of a row's values. Raises RowError."""
        _check_text(values)
        return self._templates.plain(template, values, self._most)

    def written(self, rendered: str) -> list[int]:
        """Token ids of what a marked template rendered, with the model's start token, if it has one, once."""
        bos = self._tokenizer.named_tokens.get("bos_token")
        return self._marked(rendered, start=not (bos and self._marks.begins_with(rendered, bos)))

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
        template = self._tokenizer.chat_template
        if template is None:
            raise ModelError("the model has no chat template; give plain prompts, without input.chat")
        if isinstance(template, dict):
            if "default" not in template:
                names = ", ".join(sorted(template))
                raise ModelError(f"the model has several chat templates ({names}) and none is the default")
            template = template["default"]
        try:
            source = self.mark(_on_day(template, self._day))
        except (jinja2.TemplateSyntaxError, ValueError) as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error
        named = self._tokenizer.named_tokens
        return source, {name: self._marks.tokens(token) for name, token in named.items()}

    def _marked(self, rendered: str, start: bool) -> list[int]:
        ids: list[int] = []
        for place, (text, special) in enumerate(self._marks.runs(rendered)):
            ids += self._encode(text, plain=not special, start=start and place == 0)
        return ids

    def _check_length(self, text: str) -> None:
        if len(text) > self._most:
            raise too_long(len(text), self._most)

    def _encode(self, text: str, plain: bool, start: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=start, split_special_tokens=plain)


def _most_characters(tokenizer: Tokenizer, max_model_len: int) -> int:
    """Characters beyond which no text fits the context: as many of the longest token."""
    return max(_LEAST_MOST, max_model_len * tokenizer.longest)


def _check_text(values: Any) -> None:
    """Refuse what JSON or UTF-8 cannot hold, wherever it is nested. Raises RowError."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeError as error:
        raise RowError("invalid_utf8", f"the row's text is not valid UTF-8: {error}") from error
    except (RecursionError, TypeError, ValueError) as error:
        raise RowError("bad_prompt", f"the row's values cannot be read: {error}") from error
