"""A row becomes a Prompt: its source column, its chat template, its own sampling parameters, its tokens.

Does not know files or models. Text from the data is data: it is never rendered as a template, and a special
token written in it is encoded as plain text. Only the job's own template and the model's chat template may
write special tokens, unless the job says that its prompts do (`input.special_tokens`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cached_property
from reprlib import repr as short_repr
from typing import Any

from pydantic import ValidationError

from rayskip.config import InputConfig, SamplingParams
from rayskip.config.constraint import Constraint
from rayskip.config.job import check_template_kwargs
from rayskip.config.label import LabelTask
from rayskip.data.labels import asked
from rayskip.data.records import BROKEN_ROW, TEMPLATE_KWARGS, Prompt
from rayskip.data.templates import Templates
from rayskip.data.tokenizer import Encoder, Tokenizer, ends_with_assistant
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


def said_columns(config: InputConfig) -> set[str]:
    """Of `prompt_columns` those that hold what is said to the model."""
    return prompt_columns(config) - {BROKEN_ROW, config.sampling_params or OPENAI_PARAMS}


class PromptBuilder:
    """Turns rows into prompts; made once per replica, may be called from several threads.

    tokenizer: None when the model has none; then only prompt_token_ids work. max_model_len: positions of the
    context. templates: what renders them. continued: conversations so far that end with the assistant's message,
    which is continued. task: what is asked about each text; messages and token ids are taken as they are.
    candidates: the task's labels as tokens. Raises InputError for a template with a fault.
    """

    def __init__(
        self,
        config: InputConfig,
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        templates: Templates | None = None,
        task: LabelTask | None = None,
    ) -> None:
        templates = templates or Templates()
        self._task = task
        self._config = config
        self._params = sampling
        self._params_column = config.sampling_params or (OPENAI_PARAMS if config.format == "openai" else None)
        self._max_model_len = max_model_len
        self.continued = 0
        self._encoder = (
            Encoder(tokenizer, max_model_len, templates, config.date) if tokenizer is not None else None
        )
        self._chats = config.chat or (
            task is not None and tokenizer is not None and tokenizer.chat_template is not None
        )
        self.candidates = self._candidates() if task is not None else ()
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
        params, kwargs = self._row_params(row)
        token_ids = self._token_ids(row, kwargs)
        if not token_ids:
            raise RowError("empty_prompt", "the prompt is empty")
        if len(token_ids) + 1 > self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens; with one to generate "
                f"the context holds {self._max_model_len - 1}",
            )
        candidates = self.candidates if self._task is not None and self._task.method == "score" else ()
        return Prompt(row_index, token_ids, params, row_key(params.seed, name, row_index), candidates)

    @property
    def _names(self) -> list[str]:
        return [] if self._task is None else self._task.names

    @property
    def _space(self) -> str:
        """What a label begins with: a space after a plain prompt's "Label:"."""
        return "" if self._chats or self._config.messages or self._config.special_tokens else " "

    def _candidates(self) -> tuple[tuple[int, ...], ...]:
        """The labels' tokens as they follow a prompt."""
        found = tuple(tuple(self._text_encoder.continuation(self._space + name)) for name in self._names)
        if not all(found) or len(set(found)) < len(found):
            raise ModelError(
                "task.labels: the model's tokenizer makes the same tokens of two labels, or none of one"
            )
        return found

    @cached_property
    def _asked_params(self) -> dict[str, Any]:
        """What a label that is generated has of its own: no text but a label's, one, greedily."""
        longest = max(map(len, self.candidates))
        choice = Constraint(choice=tuple(self._space + name for name in self._names))
        own = {"constraint": choice, "n": 1, "temperature": 0.0, "max_tokens": 2 * longest + 8}
        return own | {"ignore_eos": False, "stop": ()}

    def samples(self, row: Row) -> int:
        """How many output rows `row` has, also when it cannot run: the job's n where its own cannot be read."""
        try:
            return self._row_params(row)[0].n
        except RowError:
            return self._params.n

    def _row_params(self, row: Row) -> tuple[SamplingParams, Row]:
        """The job's sampling parameters with the row's own over them, and what the chat template gets likewise."""
        given = _mapping(row.get(self._params_column)) if self._params_column else {}
        kwargs = self._config.chat_template_kwargs | _mapping(given.pop(TEMPLATE_KWARGS, None))
        try:
            check_template_kwargs(kwargs)
        except ValueError as error:
            raise RowError("invalid_sampling_params", str(error)) from error
        own = merge_params(self._params, given)
        if self._task is not None:
            own = own.model_copy(update=self._asked_params)
        if own.stop and self._encoder is None:
            reason = "stop strings need a tokenizer, and the model has none; use stop_token_ids"
            raise ModelError(reason) if self._params.stop else RowError("invalid_sampling_params", reason)
        return own, kwargs

    def _token_ids(self, row: Row, kwargs: Row) -> list[int]:
        kind, source = prompt_source(self._config, row)
        if self._template is not None:
            return self._from_template(row, self._template, kwargs)
        value = row.get(source)
        if value is None:
            raise RowError("null_prompt", f"column {source!r} is null")
        if kind == "prompt_token_ids":
            return _token_list(_from_json(value, "bad_token_id", source), source)
        if kind == "messages" and self._config.format == "openai":
            value = _from_json(value, "bad_messages", source)
            if isinstance(value, str):
                return self._plain(read_text(value, "prompt"))
            if isinstance(value, list) and value and isinstance(value[0], int):
                return _token_list(value, "prompt")
        if kind == "messages":
            messages = read_messages(_from_json(value, "bad_messages", source), f"column {source!r}")
            return self._chat(messages, kwargs)
        text = read_text(value, f"column {source!r}")
        if self._task is not None and not text.strip():
            raise RowError("empty_prompt", f"column {source!r} is blank")
        return self._ask(text, kwargs) if self._chats else self._plain(text)

    def _ask(self, text: str, kwargs: Row) -> list[int]:
        return self._chat(_user(text if self._task is None else asked(self._task, text)), kwargs)

    def _plain(self, text: str) -> list[int]:
        if self._config.special_tokens:
            return self._text_encoder.with_special_tokens(text)
        return self._text_encoder.data(text if self._task is None else f"{asked(self._task, text)}\n\nLabel:")

    def _from_template(self, row: Row, template: str, kwargs: Row) -> list[int]:
        """With `chat` the result is the user's message, without it the template is the job's own text."""
        values = {column: row[column] for column in self._columns if column in row}
        text = self._text_encoder.render(template, values)
        if not text:
            raise RowError("empty_prompt", "what input.template renders is empty")
        if self._config.special_tokens:
            return self._text_encoder.with_special_tokens(text)
        if self._chats:
            return self._ask(text, kwargs)
        return self._text_encoder.written(text) if self._task is None else self._plain(text)

    def _marked(self, template: str) -> str:
        """Only without `chat` may a template write special tokens; with `special_tokens` the data may too."""
        own_text = self._chats or self._config.special_tokens or self._task is not None
        return template if own_text else self._text_encoder.mark(template)

    def _chat(self, messages: list[Row], kwargs: Row) -> list[int]:
        if self._config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system}, *messages]
        continues = self._config.continue_final_message
        self.continued += continues and ends_with_assistant(messages)
        return self._text_encoder.chat(messages, kwargs, continues)

    @property
    def _text_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ModelError("the model's folder has no tokenizer; give the prompts as prompt_token_ids")
        return self._encoder


def merge_params(base: SamplingParams, own: Any) -> SamplingParams:
    """`base` with a row's own values over it: a dict, an Arrow map (pairs) or a JSON object as text.

    A null value is one not given. Raises RowError "invalid_sampling_params" that names the key.
    """
    if not (given := _mapping(own)):
        return base
    try:
        return SamplingParams.model_validate(base.model_dump() | given)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        wrong = f"{key}: {fault['msg'].removeprefix('Value error, ')}, got {short_repr(fault['input'])}"
        raise RowError("invalid_sampling_params", wrong) from error


def _mapping(own: Any) -> dict[Any, Any]:
    """What a row gives by name, without what is null."""
    if own is None:
        return {}
    try:
        if isinstance(own, str):
            own = json.loads(own)
        if isinstance(own, list) and all(isinstance(pair, tuple) for pair in own):
            own = dict(own)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError("invalid_sampling_params", f"not JSON: {error}") from error
    if not isinstance(own, dict):
        raise RowError("invalid_sampling_params", f"an object is needed, got {type(own).__name__}")
    return {key: value for key, value in own.items() if value is not None}


def _user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def read_text(value: Any, what: str) -> str:
    """`value` as text that UTF-8 can hold; bytes are taken as UTF-8. Raises RowError, which calls it `what`."""
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


def read_messages(value: Any, what: str) -> list[Row]:
    """The messages without their null fields (Arrow gives every message every field), their parts joined.

    Raises RowError, which calls them `what`.
    """
    if not isinstance(value, list):
        raise RowError("bad_messages", f"{what} must hold a list of {{role, content}}")
    if not value:
        raise RowError("empty_prompt", f"{what} has no messages")
    return [_message(message, f"message {index} of {what}") for index, message in enumerate(value)]


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
    return message | {"content": read_text(content, what) if content else ""}


def _part(part: Any, what: str) -> str:
    """A piece of a message in OpenAI's form."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError("bad_messages", f"{what}: only parts of type text can be read")
