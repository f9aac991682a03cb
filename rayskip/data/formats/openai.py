"""OpenAI batch input lines: {"custom_id", "method", "url", "body"}, body a chat completion request.

They read as columns custom_id, method, url, messages and sampling_params; the last two are JSON text.
Does not know whether the messages or parameters are right: that is seen when a row becomes a prompt.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from rayskip.config import SamplingParams
from rayskip.data.formats import jsonl
from rayskip.data.formats.base import Format, Reading, Scan, table_of
from rayskip.data.formats.text import MARK_ROWS

CHAT = "/v1/chat/completions"
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("custom_id", "method", "url", "messages", "sampling_params")]
)

# Requests of one batch may differ in these only; the job decides the model.
_SAMPLING = frozenset(SamplingParams.model_fields) - {"logprobs"}
_ELSEWHERE = {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
_NO_EFFECT = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


def scan(url: str, reading: Reading) -> Scan:
    rows, marks = 0, list[int]()
    for rows, (offset, _) in enumerate(jsonl.lines_of(url, reading)(0), 1):
        if rows % MARK_ROWS == 1:
            marks.append(offset)
    return Scan(rows, SCHEMA, tuple(marks))


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
                "messages": json.dumps(body["messages"]),
                "sampling_params": json.dumps(_params(body)),
            }
        rows.append(columns)
        reasons.append(reason)
    return table_of(rows, schema, reasons)


def _fault(url: Any, body: Any) -> str | None:
    """Why a request cannot be run as it is meant."""
    if url != CHAT:
        return f"url must be {CHAT!r}, got {url!r}"
    if not isinstance(body, dict) or "messages" not in body:
        return "body must be an object with messages"
    unknown = body.keys() - _SAMPLING - _ELSEWHERE - _NO_EFFECT
    # Null, 0, false and empty are how clients write "not used".
    asked = sorted(name for name in unknown if body[name])
    return f"body asks for {', '.join(asked)}, which rayskip does not do" if asked else None


def _params(body: dict[str, Any]) -> dict[str, Any]:
    """The body's sampling fields under rayskip's names."""
    params = {name: value for name, value in body.items() if name in _SAMPLING and value is not None}
    if body.get("max_completion_tokens") is not None:
        params["max_tokens"] = body["max_completion_tokens"]
    if body.get("logprobs"):
        params["logprobs"] = body.get("top_logprobs") or 0
    return params


FORMAT = Format(scan, read, text=True)
