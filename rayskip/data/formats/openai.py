"""OpenAI batch input lines: {"custom_id", "method", "url", "body"}, body a chat completion request.

They read as columns custom_id, method, url, messages and sampling_params (JSON text of rayskip's names).
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from rayskip.data.formats import jsonl
from rayskip.data.formats.base import Format, Scan, columns_of

CHAT = "/v1/chat/completions"
SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("method", pa.string()),
        ("url", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("sampling_params", pa.string()),
    ]
)
_LINE = pa.schema([("custom_id", pa.string()), ("method", pa.string()), ("url", pa.string()), ("body", pa.string())])
_SAME = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed", "n")


def scan(url: str) -> Scan:
    found = jsonl.scan(url)
    return Scan(found.rows, SCHEMA, found.marks)


def read(url: str, marks: tuple[int, ...], start: int, stop: int, schema: pa.Schema) -> pa.Table:
    lines = jsonl.parsed(jsonl.read_range(url, marks, start, stop), _LINE).to_pylist()
    rows, reasons = [], []
    for line in lines:
        *_, reason = line.values()
        body, fault = _body(line) if reason is None else ({}, reason)
        reasons.append(fault)
        rows.append({name: line[name] for name in ("custom_id", "method", "url")} | body)
    return columns_of(rows, schema, reasons)


def _body(line: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Messages and sampling parameters of a request, or why it cannot be run."""
    if line["url"] != CHAT:
        return {}, f"url must be {CHAT}, got {line['url']!r}"
    try:
        body = json.loads(line["body"] or "null")
        messages = [{"role": entry["role"], "content": _text(entry["content"])} for entry in body["messages"]]
    except (KeyError, TypeError, ValueError) as error:
        return {}, f"body has no chat messages ({type(error).__name__}: {error})"
    return {"messages": messages, "sampling_params": json.dumps(_params(body))}, None


def _params(body: dict[str, Any]) -> dict[str, Any]:
    params = {name: body[name] for name in _SAME if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        params["max_tokens"] = body["max_completion_tokens"]
    if body.get("logprobs"):
        params["logprobs"] = body.get("top_logprobs") or 0
    return params


def _text(content: Any) -> str:
    """A message's content: text, or parts that are all text."""
    if isinstance(content, str):
        return content
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError("only text content is supported")


FORMAT = Format(scan, read)
