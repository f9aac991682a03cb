"""What bytes a token stands for. Knows no rows or models.

Text will not do: a token may hold a part of a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenBytes = Callable[[int], bytes]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""How SentencePiece writes a space."""


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The bytes of each token of a tokenizer."""
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    kinds = _decoders(tokenizer)
    of_byte = _of_bytes() if "ByteLevel" in kinds else {}

    def bytes_of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id].encode()
        token = tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # of a model that has more of them than its tokenizer
            return b""
        if of_byte and all(character in of_byte for character in token):
            return bytes(of_byte[character] for character in token)
        if "ByteFallback" in kinds and (found := _BYTE.fullmatch(token)):
            return bytes.fromhex(found[1])
        if kinds & {"ByteFallback", "Metaspace"}:
            return token.replace(_SPACE, " ").encode()
        return str(tokenizer.decode([token_id])).encode()

    return bytes_of


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Kinds of the steps by which a tokenizer makes text of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder: dict[str, Any] = (backend and json.loads(backend.to_str()).get("decoder")) or {}
    return {str(step.get("type")) for step in [decoder, *decoder.get("decoders", [])]}


def _of_bytes() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
