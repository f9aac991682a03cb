"""What bytes a token stands for. Knows no rows or models.

Text will not do: a token may hold a part of a character.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayskip.data.tokenizer import Tokenizer

TokenBytes = Callable[[int], bytes]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""How SentencePiece writes a space."""


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of each token of a tokenizer. Its tables are made for the first: few jobs ask for any."""

    @cache
    def tables() -> tuple[dict[int, str], dict[str, int]]:
        texts = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        return texts, _of_bytes() if "ByteLevel" in tokenizer.decoders else {}

    def bytes_of(token_id: int) -> bytes:
        texts, of_byte = tables()
        token = texts.get(token_id)
        if token is None:  # of a model that has more of them than its tokenizer
            return b""
        if token in tokenizer.added_tokens:
            return token.encode()
        if of_byte and all(character in of_byte for character in token):
            return bytes(of_byte[character] for character in token)
        if "ByteFallback" in tokenizer.decoders and (found := _BYTE.fullmatch(token)):
            return bytes.fromhex(found[1])
        if tokenizer.decoders & {"ByteFallback", "Metaspace"}:
            return token.replace(_SPACE, " ").encode()
        return tokenizer.decode([token_id]).encode()

    return bytes_of


def _of_bytes() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
