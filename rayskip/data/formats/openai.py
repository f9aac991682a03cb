"""OpenAI batch input lines: {"custom_id", "method", "url", "body"}, body a request for a (chat) completion.

They read as columns custom_id, method, url, messages and sampling_params; the last two are JSON text. A completion
without chat has its prompt, a text or token ids, in the place of messages.
Does not know whether the messages or parameters are right: that is seen when a row becomes a prompt.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rayskip.config import SamplingParams
from rayskip.data.formats import jsonl
from rayskip.data.formats.base import Format, Reading, Scan, table_of
from rayskip.data.formats.text import MARK_ROWS, Line
from rayskip.data.records import TEMPLATE_KWARGS
from rayskip.errors import shown

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_PROMPT = {CHAT: "messages", COMPLETIONS: "prompt"}

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("custom_id", "method", "url", "messages", "sampling_params")]
)

# Requests of one batch may differ in these only; the job decides the model.
_SAMPLING = frozenset(SamplingParams.model_fields) - {"logprobs"}
_EFFORT = "reasoning_effort"
"""For the chat template, which may read it."""

_ELSEWHERE = {
    "messages",
    "prompt",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "response_format",
    TEMPLATE_KWARGS,
    _EFFORT,
}
_NO_EFFECT = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "verbosity",
    "stream_options",
}
"""Who asks, what it costs, and how models are to behave that have such a switch."""

_NO_OP: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
"""What clients write for what is so anyway; null, 0, false and what is empty says that of any field."""


_CUSTOM_ID = re.compile(rb'"custom_id"\s*+:\s*+("(?:[^"\\]|\\.)*+")')


def scan(url: str, reading: Reading) -> Scan:
    rows, marks, ids = 0, list[int](), array("q")  # a hash each: eight bytes a row
    for rows, (offset, line) in enumerate(jsonl.lines_of(url, reading)(0), 1):
        if rows % MARK_ROWS == 1:
            marks.append(offset)
        if custom_id := _custom_id(line):
            ids.append(hash(custom_id))
    return Scan(rows, SCHEMA, tuple(marks), warnings=_repeated(url, reading, ids))


def _custom_id(line: Line) -> bytes | None:
    """As the line has it, which is not parsed for that."""
    found = _CUSTOM_ID.search(line) if isinstance(line, bytes) else None
    return found and found[1]


def _repeated(url: str, reading: Reading, ids: Sequence[int]) -> tuple[str, ...]:
    """A warning of a custom_id that several lines have. ids: hashes of all."""
    ordered = np.sort(np.asarray(ids, np.int64))
    again = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[bytes, int] = {}
    for row, (_, line) in enumerate(jsonl.lines_of(url, reading)(0) if again else ()):
        custom_id = _custom_id(line)
        if custom_id and hash(custom_id) in again and seen.setdefault(custom_id, row) != row:
            return (
                f"rows {seen[custom_id]} and {row} have the same custom_id, {custom_id.decode(errors='replace')}",
            )
    return ()


def read(
    url: str, reading: Reading, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema
) -> pa.Table:
    rows, reasons = [], list[str | None]()
    for line in jsonl.rows_between(jsonl.lines_of(url, reading), marks, start, stop):
        request, reason = jsonl.parse(line)
        body = request.get("body")
        if reason is None:
            reason = _fault(request.get("url"), body)
        columns = {name: jsonl.as_text(request.get(name)) for name in ("custom_id", "method", "url")}
        if reason is None and isinstance(body, dict):
            columns |= {
                "messages": json.dumps(_prompt(body[_PROMPT[request["url"]]])),
                "sampling_params": json.dumps(_params(body)),
            }
        rows.append(columns)
        reasons.append(reason)
    return table_of(rows, schema, reasons)


def _fault(url: Any, body: Any) -> str | None:
    """Why a request cannot be run as it is meant."""
    if url not in (CHAT, COMPLETIONS):
        return f"url must be {CHAT} or {COMPLETIONS}, got {url!r}"
    if not isinstance(body, dict) or _PROMPT[url] not in body:
        return f"body must be an object with {_PROMPT[url]}"
    given = body[_PROMPT[url]]
    if url == CHAT and not (isinstance(given, list) and all(isinstance(message, dict) for message in given)):
        return "messages must be a list of objects"
    prompt = _prompt(given)
    if url == COMPLETIONS and not (isinstance(prompt, str) or _are_ids(prompt)):
        return "prompt must be a text or a list of token ids, one prompt a line"
    unknown = body.keys() - _SAMPLING - _ELSEWHERE - _NO_EFFECT
    asked = sorted(name for name in unknown if body[name] and body[name] not in _NO_OP.get(name, ()))
    if not asked and _constraint(body.get("response_format")) is None:
        given = shown(body["response_format"])
        return f"response_format must have the type text, json_object or json_schema, got {given}"
    return f"body asks for {', '.join(asked)}, which rayskip does not do" if asked else None


def _prompt(given: Any) -> Any:
    """Messages, a text or token ids; of a list of one prompt that one."""
    one = isinstance(given, list) and len(given) == 1 and isinstance(given[0], (str, list))
    return given[0] if one else given


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(type(token) is int for token in given)


def _params(body: dict[str, Any]) -> dict[str, Any]:
    """The body's sampling fields under rayskip's names."""
    kept = _SAMPLING | {TEMPLATE_KWARGS}
    params = {name: value for name, value in body.items() if name in kept and value is not None}
    given = params.get(TEMPLATE_KWARGS, {})
    if body.get(_EFFORT) is not None and isinstance(given, dict):
        params[TEMPLATE_KWARGS] = {_EFFORT: body[_EFFORT]} | given
    if body.get("max_completion_tokens") is not None:
        params["max_tokens"] = body["max_completion_tokens"]
    if constraint := _constraint(body.get("response_format")):
        params["constraint"] = constraint
    asked = body.get("logprobs")
    if asked is True:
        params["logprobs"] = body.get("top_logprobs") or 0
    elif asked is not None and asked is not False:  # of a completion: how many
        params["logprobs"] = asked
    return params


def _constraint(given: Any) -> dict[str, Any] | None:
    """The constraint that a response_format asks for, empty for any text; None where it is not understood."""
    match given:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
        case _:
            return None


FORMAT = Format(scan, read, text=True)
