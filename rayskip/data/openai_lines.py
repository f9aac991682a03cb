"""Lines of the OpenAI batch output format: what a row's samples become, and what a line says of them.

Does not know Arrow or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from rayskip.data.formats.openai import COMPLETIONS
from rayskip.data.token_bytes import TokenBytes

CUSTOM_ID, URL = "custom_id", "url"
"""The input columns that a line needs: the one it carries, and the one that tells a text completion from a chat."""

_Named = Callable[[int], dict[str, Any]]
"""A token's text and bytes, of its id."""


def response_line(
    samples: list[dict[str, Any]], told: dict[str, Any], token_bytes: TokenBytes | None
) -> dict[str, Any]:
    """The line of one row. samples: its output rows. told: what else a response's body says, created and model.
    token_bytes: None where there is no tokenizer; then a token of the log-probabilities is named "token_id:ID"."""
    first, named = samples[0], _namer(token_bytes)
    identity = f"{first['row_file']}:{first['row_index']}"
    request = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    failed = next((row for row in samples if row["error_type"] is not None), None)
    head = {
        "id": f"batch_req_{request}",
        "custom_id": first.get(CUSTOM_ID) or identity,
        "row_file": first["row_file"],
        "row_index": first["row_index"],
        "samples": len(samples),
    }
    if failed:
        error = {"code": failed["error_type"], "message": failed["error_message"]}
        return head | {"response": None, "error": error}
    chat = first.get(URL) != COMPLETIONS
    kind = (
        {"id": f"chatcmpl-{request}", "object": "chat.completion"}
        if chat
        else {"id": f"cmpl-{request}", "object": "text_completion"}
    )
    choice = _chat_choice if chat else _text_choice
    body = kind | told | {"choices": [choice(row, named) for row in samples], "usage": _usage(samples)}
    response = {"status_code": 200, "request_id": request, "body": body}
    skipped = {"skip_policy": first["skip_policy"]} if "skip_policy" in first else {}
    return head | {"response": response, "error": None} | skipped


def answers(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each sample of a line: sample_index, finish_reason, text, error_type and error_message."""
    names = ("sample_index", "finish_reason", "text", "error_type", "error_message")
    if error := line["error"]:
        for sample in range(line["samples"]):
            yield dict(zip(names, (sample, "error", None, error["code"], error["message"]), strict=True))
        return
    for choice in line["response"]["body"]["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        yield dict(zip(names, (choice["index"], choice["finish_reason"], text, None, None), strict=True))


def _namer(token_bytes: TokenBytes | None) -> _Named:
    def named(token_id: int) -> dict[str, Any]:
        if token_bytes is None:
            return {"token": f"token_id:{token_id}", "bytes": None}
        data = token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "bytes": list(data)}

    return named


def _chat_choice(row: dict[str, Any], named: _Named) -> dict[str, Any]:
    logprobs = row.get("logprobs")

    def entry(token: dict[str, Any]) -> dict[str, Any]:
        return named(token["token_id"]) | {"logprob": token["logprob"]}

    return {
        "index": row["sample_index"],
        "message": {"role": "assistant", "content": row["text"]},
        "finish_reason": row["finish_reason"],
        "logprobs": None
        if logprobs is None
        else {
            "content": [entry(token) | {"top_logprobs": [*map(entry, token["top"])]} for token in logprobs]
        },
    }


def _text_choice(row: dict[str, Any], named: _Named) -> dict[str, Any]:
    """Of a completion without chat."""
    logprobs = row.get("logprobs")
    return {
        "index": row["sample_index"],
        "text": row["text"],
        "finish_reason": row["finish_reason"],
        "logprobs": None if logprobs is None else _text_logprobs(logprobs, named),
    }


def _text_logprobs(logprobs: list[dict[str, Any]], named: _Named) -> dict[str, Any]:
    """text_offset: of each token in the completion, in characters."""
    texts = [named(token["token_id"])["token"] for token in logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in logprobs],
        "top_logprobs": [
            {named(top["token_id"])["token"]: top["logprob"] for top in token["top"]} for token in logprobs
        ],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0))[: len(texts)],
    }


def _usage(samples: list[dict[str, Any]]) -> dict[str, int]:
    prompt = samples[0]["prompt_tokens"]
    completion = sum(row["completion_tokens"] for row in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
