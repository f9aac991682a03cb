"""What the peers' scripts share: arguments, and the protocol of JSON lines between them and `rayskip bench`.

A script is a program for an environment that has its library and perhaps no rayskip, so none of it is imported.
It prints {"load_s": seconds} once it is ready. Then it answers each line of its input, {"prompts": [token ids,
...]}, with {"token_ids": [token ids, ...]}, the completions in the same order, a prompt's samples one after the
other. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

TokenIds = list[list[int]]


@dataclass(frozen=True)
class Arguments:
    """model: folder of a checkpoint. dtype: torch's name of it. batch_rows: most rows at once. max_tokens: of a
    completion, and with ignore_eos the least, too. longest: most tokens of a prompt and its completion together.
    samples: completions of each prompt, which are sampled at `temperature` if that is not 0."""

    model: str
    dtype: str
    batch_rows: int
    max_tokens: int
    ignore_eos: bool
    longest: int
    samples: int
    temperature: float


def serve(load: Callable[[Arguments], Callable[[TokenIds], TokenIds]]) -> None:
    """Run the protocol. load: loads the model and returns what completes prompts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    began = time.perf_counter()
    arguments = Arguments(**json.loads(sys.argv[1]))
    generate = load(arguments)
    print(json.dumps({"load_s": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)["prompts"]
        token_ids = generate(prompts)
        wanted = len(prompts) * arguments.samples
        if len(token_ids) != wanted or not all(token_ids):  # a library may log its error and go on
            raise RuntimeError(f"{sum(map(bool, token_ids))} of {wanted} completions are there")
        print(json.dumps({"token_ids": token_ids}), file=answers, flush=True)
