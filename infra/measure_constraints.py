"""What constraints cost, and what scoring labels saves: one engine, ways in turns, medians.

python infra/measure_constraints.py [--rows 64] [--rounds 3]

JSON: rows whose answer a nested schema describes, with the constraint and without it, in tokens per second, and
the time that masks take of a step. Labels: one of five for each row, by `Engine.score` and by generating under a
choice, in rows per second.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

from rayskip import Engine
from rayskip.config.label import LabelTask
from rayskip.data.labels import asked

SCHEMA = {
    "type": "object",
    "properties": {
        "summary": {"type": "string", "maxLength": 80},
        "kind": {"enum": ["bug", "question", "praise"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 16}, "maxItems": 4},
        "score": {"type": "number", "minimum": 0, "maximum": 10},
        "where": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 24}, "zip": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["summary", "kind", "tags", "score"],
    "additionalProperties": False,
}
LABELS = {
    "billing": "money, invoices and refunds",
    "account": "signing in, passwords and profiles",
    "delivery": "parcels and addresses",
    "defect": "something is broken",
    "other": None,
}
NOUNS = ("invoice", "password", "parcel", "charger", "newsletter", "refund", "address", "screen")


TOKENS = ("free", "json")
"""Ways that are measured in tokens per second."""


def ways(engine: Engine, rows: int, turn: int) -> dict[str, Callable[[], object]]:
    """Prompts begin anew in each turn: none finds another one's pages."""
    task = LabelTask.model_validate({"labels": LABELS, "instruction": f"Turn {turn}. Which label fits best?"})
    texts = [
        f"Ticket {row}: my {NOUNS[row % 8]} is late, and I wrote {row % 5} times." for row in range(rows)
    ]
    chats = [[{"role": "user", "content": asked(task, text)}] for text in texts]
    again = [[{"role": "user", "content": asked(task, f"Again. {text}")}] for text in texts]
    forms = [[{"role": "user", "content": f"Turn {turn}. This ticket as JSON: {text}"}] for text in texts]
    json = {"max_tokens": 128, "constraint": {"json_schema": SCHEMA}}
    return {
        "free": lambda: engine.generate(forms, {"max_tokens": 128, "ignore_eos": True}),
        "json": lambda: engine.generate(forms, json),
        "score": lambda: engine.score(chats, list(LABELS)),
        "choice": lambda: engine.generate(again, {"max_tokens": 16, "constraint": {"choice": list(LABELS)}}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", default="none")
    arguments = parser.parse_args()
    engine = Engine.load(
        "smollm2-135m-instruct", {"max_batch_rows": 64}, {"draft": {"kind": arguments.draft}}
    )
    rates, masks = defaultdict[str, list[float]](list), list[float]()
    for turn in range(arguments.rounds + 1):
        for name, way in ways(engine, arguments.rows, turn).items():
            engine.take_stats()
            began = time.perf_counter()
            way()
            seconds, stats = time.perf_counter() - began, engine.take_stats()
            if not turn:  # kernels, grammars and tables are made
                continue
            rates[name].append((stats.completion_tokens if name in TOKENS else arguments.rows) / seconds)
            if name == "json":
                masks.append(1000 * stats.seconds["constrain"] / stats.steps)
    for name, found in rates.items():
        unit = "tok/s" if name in TOKENS else "rows/s"
        print(f"{name}: {median(found):.1f} {unit} ({', '.join(f'{rate:.1f}' for rate in found)})")
    print(f"masks: {median(masks):.2f} ms a step of up to {arguments.rows} rows")


if __name__ == "__main__":
    main()
