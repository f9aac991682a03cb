"""A row becomes a Prompt: its source column, its chat template, its own sampling parameters, its tokens.

Does not know files or models. Text from the data is data: it is never rendered as a template, and a special
token written in it is encoded as plain text. Only the job's own template and the model's chat template may
write special tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import repr as short_repr
from typing import Any

from pydantic import ValidationError

from rayskip.config import InputConfig, SamplingParams
from rayskip.data.records import BROKEN_ROW, Prompt
from rayskip.data.templates import Templates
from rayskip.data.tokenizer import Encoder, Tokenizer
from rayskip.errors import InputError, ModelError, RayskipError, RowError

Row = dict[str, Any]

OPENAI_PARAMS = "sampling_params"
"""Column that holds the sampling fields of an openai batch line."""

SOURCES = ("prompt", "messages", "prompt_token_ids")
"""Ways to give a prompt by column; also the columns looked for when the config names none, in this order."""


def row_key(seed: int, name: str, row_index: int) -> int:
    """Random key of a row: the first 64 bits, big-endian, of blake2b over "seed NUL name NUL row_index".

    name: the file's path below the input's root, empty for a prompt of no file. The same on every machine, in every
    Python; a job's name and the input's folder are not in it.
    """
    identity = f"{seed}\0{name}\0{row_index}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big")


def prompt_source(config: InputConfig, columns: Iterable[str]) -> tuple[str, str]:
    """Which of SOURCES or "template" gives the prompt, and the column (or template text) it is in.

    Raises InputError when no column of the data can be the prompt.
    """
    for kind in (*SOURCES, "template"):
        if (value := getattr(config, kind)) is not None:
            return kind, value
    present = list(columns)
    for kind in SOURCES:
        if kind in present:
            return kind, kind
    raise InputError(
        f"{config.path}: none of the columns {', '.join(SOURCES)} is in the data; name the prompt's column "
        f"with input.prompt, input.messages or input.prompt_token_ids (columns: {', '.join(present)})"
    )


def check_input(config: InputConfig, columns: Iterable[str]) -> None:
    """Refuse, before any row is read, a config that names a column the data lacks or a template with a fault.

    Raises InputError that names the nearest column.
    """
    present = [column for column in columns if column != BROKEN_ROW]
    kind, source = prompt_source(config, present)
    needed = [(f"input.{kind}", source)] if kind != "template" else []
    if kind == "template":
        needed = [("input.template", name) for name in Templates().variables(source)]
    if config.sampling_params is not None:
        needed.append(("input.sampling_params", config.sampling_params))
    for key, column in needed:
        if column not in present:
            close = get_close_matches(column, present, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"columns: {', '.join(present)}"
            raise InputError(f"{config.path}: {key} names {column!r}, which is no column of the data; {hint}")


def prepare_templates(config: InputConfig) -> Templates:
    """What renders the job's templates, and prepares to while the caller loads a model."""
    templates = Templates()
    if config.chat or not (config.prompt or config.prompt_token_ids or config.template):
        templates.prepare_chat()
    return templates


def prompt_columns(config: InputConfig, templates: Templates | None = None) -> set[str]:
    """The columns that `PromptBuilder.build` reads of a row, where they are there. templates: as there."""
    named = {value for kind in SOURCES if (value := getattr(config, kind)) is not None}
    if config.template is not None:
        named = set((templates or Templates()).variables(config.template))
    return {*(named or SOURCES), config.sampling_params or OPENAI_PARAMS, BROKEN_ROW}


class PromptBuilder:
    """Turns rows into prompts; made once per replica, may be called from several threads.

    tokenizer: None when the model has none; then only prompt_token_ids work. max_model_len: positions of the
    context. templates: what renders them. Raises InputError for a template with a fault.
    """

    def __init__(
        self,
        config: InputConfig,
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        templates: Templates | None = None,
    ) -> None:
        templates = templates or Templates()
        self._config = config
        self._params = sampling
        self._params_column = config.sampling_params or (OPENAI_PARAMS if config.format == "openai" else None)
        self._max_model_len = max_model_len
        self._encoder = (
            Encoder(tokenizer, max_model_len, templates, config.date) if tokenizer is not None else None
        )
        self._columns = templates.variables(config.template) if config.template is not None else []
        self._template = self._marked(config.template) if config.template is not None else None

    def build(self, row: Row, row_index: int, name: str) -> Prompt:
        """The prompt of row `row_index` of file `name`.

        Raises RowError when the row is bad; InputError or ModelError when no row of the job can be a prompt.
        """
        try:
            return self._build(row, row_index, name)
        except RayskipError:
            raise
        except Exception as error:  # what nobody foresaw costs the row that brought it, not the job
            raise RowError("row_fault", f"{type(error).__name__}: {error}") from error

    def _build(self, row: Row, row_index: int, name: str) -> Prompt:
        if (reason := row.get(BROKEN_ROW)) is not None:
            raise RowError("invalid_row", reason)
        params = self._row_params(row)
        token_ids = self._token_ids(row)
        if not token_ids:
            raise RowError("empty_prompt", "the prompt is empty")
        if len(token_ids) + 1 > self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens; with one to generate "
                f"the context holds {self._max_model_len - 1}",
            )
        return Prompt(row_index, token_ids, params, row_key(params.seed, name, row_index))

    def samples(self, row: Row) -> int:
        """How many output rows `row` has, also when it cannot run: the job's n where its own cannot be read."""
        try:
            return self._row_params(row).n
        except RowError:
            return self._params.n

    def _row_params(self, row: Row) -> SamplingParams:
        """The job's sampling parameters with the row's own over them."""
        column = self._params_column
        own = merge_params(self._params, row.get(column)) if column else self._params
        if own.stop and self._encoder is None:
            reason = "stop strings need a tokenizer, and the model has none; use stop_token_ids"
            raise ModelError(reason) if self._params.stop else RowError("invalid_sampling_params", reason)
        return own

    def _token_ids(self, row: Row) -> list[int]:
        kind, source = prompt_source(self._config, row)
        if self._template is not None:
            return self._from_template(row, self._template)
        value = row.get(source)
        if value is None:
            raise RowError("null_prompt", f"column {source!r} is null")
        if kind == "prompt_token_ids":
            return _token_list(_from_json(value, "bad_token_id", source), source)
        if kind == "messages":
            return self._chat(_messages(_from_json(value, "bad_messages", source), source))
        text = _text(value, f"column {source!r}")
        return self._chat(_user(text)) if self._config.chat else self._text_encoder.data(text)

    def _from_template(self, row: Row, template: str) -> list[int]:
        """With `chat` the result is the user's message, without it the template is the job's own text."""
        values = {column: row[column] for column in self._columns if column in row}
        text = self._text_encoder.render(template, values)
        if not text:
            raise RowError("empty_prompt", "what input.template renders is empty")
        return self._chat(_user(text)) if self._config.chat else self._text_encoder.written(text)

    def _marked(self, template: str) -> str:
        """Only without `chat` may a template write special tokens."""
        return template if self._config.chat else self._text_encoder.mark(template)

    def _chat(self, messages: list[Row]) -> list[int]:
        if self._config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system}, *messages]
        return self._text_encoder.chat(messages)

    @property
    def _text_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ModelError("the model's folder has no tokenizer; give the prompts as prompt_token_ids")
        return self._encoder


def merge_params(base: SamplingParams, own: Any) -> SamplingParams:
    """`base` with a row's own values over it: a dict, an Arrow map (pairs) or a JSON object as text.

    A null value is one not given. Raises RowError "invalid_sampling_params" that names the key.
    """
    if own is None:
        return base
    given = {key: value for key, value in _mapping(own).items() if value is not None}
    if not given:
        return base
    try:
        return SamplingParams.model_validate(base.model_dump() | given)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        wrong = f"{key}: {fault['msg'].removeprefix('Value error, ')}, got {short_repr(fault['input'])}"
        raise RowError("invalid_sampling_params", wrong) from error


def _mapping(own: Any) -> dict[Any, Any]:
    try:
        if isinstance(own, str):
            own = json.loads(own)
        if isinstance(own, list) and all(isinstance(pair, tuple) for pair in own):
            own = dict(own)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError("invalid_sampling_params", f"not JSON: {error}") from error
    if not isinstance(own, dict):
        raise RowError("invalid_sampling_params", f"an object is needed, got {type(own).__name__}")
    return own


def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def _text(value: Any, what: str) -> str:
    """`value` as text that UTF-8 can hold; bytes are taken as UTF-8."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise RowError("bad_prompt", f"{what} is not text but {type(value).__name__}")
        text.encode()
    except UnicodeError as error:
        raise RowError("invalid_utf8", f"{what} is not valid UTF-8: {error}") from error
    if not text:
        raise RowError("empty_prompt", f"{what} is empty")
    return text


def _from_json(value: Any, error_kind: str, column: str) -> Any:
    """A list may come as JSON text: all that CSV has, and JSONL when its rows differ in their types."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(error_kind, f"column {column!r} holds JSON that cannot be read: {error}") from error


def _token_list(value: Any, column: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise RowError(
            "bad_token_id", f"column {column!r} must hold a list of token ids, integers from 0 to {2**31 - 1}"
        )
    return value


def _messages(value: Any, column: str) -> list[Row]:
    """The messages without their null fields (Arrow gives every message every field)."""
    if not isinstance(value, list):
        raise RowError("bad_messages", f"column {column!r} must hold a list of {{role, content}}")
    if not value:
        raise RowError("empty_prompt", f"column {column!r} has no messages")
    return [_message(message, f"message {index} of column {column!r}") for index, message in enumerate(value)]


def _message(value: Any, what: str) -> Row:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowError("bad_messages", f"{what} must be an object with a role")
    message = {key: item for key, item in value.items() if item is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, what) for part in content)
    if not isinstance(content, str):
        raise RowError("bad_messages", f"{what} must have text as its content")
    # An empty turn is a legal one; what may not be empty is the conversation.
    return message | {"content": _text(content, what) if content else ""}


def _part(part: Any, what: str) -> str:
    """A piece of a message in OpenAI's form."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError("bad_messages", f"{what}: only parts of type text can be read")
