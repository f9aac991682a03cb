"""The program of the process that renders templates: requests on its standard input, answers on its output.

Started by its path (see `templates.py`): imports neither rayskip nor torch, and the renderer of chat templates only
once one is asked for. A request is a pickle: the kind, then what its function below takes. An answer is a line of
JSON: [what went wrong or null, text or message]. Its input's end ends it.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment


class NullWritten(Exception):
    """A template writes a null."""


def variables(source: str) -> str:
    """The names that a template reads, by comma."""
    return ",".join(sorted(jinja2.meta.find_undeclared_variables(_environment().parse(source))))


def plain(source: str, values: dict[str, Any]) -> str:
    """A job's template."""
    return _compiled(source).render(values)


def chat(source: str, messages: list[dict[str, Any]], values: dict[str, Any], goes_on: bool) -> str:
    """A model's chat template over a conversation, up to where the answer begins; goes_on: up to its end."""
    render = _chat_renderer()
    how = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    (text,), _ = render([messages], chat_template=source, **how, **values)
    return str(text)


@lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_refuse_null)


def _refuse_null(value: object) -> object:
    """Written out, a null would be the word None."""
    if value is None:
        raise NullWritten
    return value


@cache
def _chat_renderer() -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()  # anew: what was imported is none of a template's doing
    return render_jinja_template


def _limit_memory() -> None:
    """Let the process have so much more than it has now. Where the system does not tell, there is no limit."""
    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _answer(kind: str, most: float, arguments: list[Any]) -> tuple[str | None, str]:
    """most: characters that the text may have."""
    try:
        text = _KINDS[kind](*arguments)
    except NullWritten:
        return "null", ""
    except MemoryError:
        return "fault", f"takes more than {MEMORY >> 20:,} MB of memory"
    except jinja2.TemplateSyntaxError as error:
        return "fault", f"line {error.lineno}: {error.message}"
    except Exception as error:  # whatever an expression may raise over a row's values
        return "fault", f"{type(error).__name__}: {error}"[:1000]
    return ("long", str(len(text))) if len(text) > most else (None, text)


_KINDS: dict[str, Callable[..., str]] = {"variables": variables, "plain": plain, "chat": chat}


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else that is printed may be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, in the middle of an operation too
    _limit_memory()
    while True:
        try:
            kind, most, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if kind == "prepare":
            _chat_renderer()
            continue
        if kind == "chat":
            _chat_renderer()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        answer = _answer(kind, most, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    CPU_S, MEMORY = float(sys.argv[1]), int(sys.argv[2])
    _serve()
