"""Rows of three workloads for `rayskip bench`, from instruction and school-mathematics prompts:

    python jobs/bench_workloads.py ../shared/data out/workloads

label.jsonl: 400 short texts behind one preamble of 1,250 tokens. mixed.jsonl: 200 prompts in random order, 168 of
up to 200 tokens, 24 of 1,000, 8 of 4,000 to 7,000. samples.jsonl: 32 prompts, to be sampled several times each.
Tokens are the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LABELS = ("code", "mathematics", "writing", "knowledge", "conversation")
PREAMBLE_TOKENS = 1250
SHORT_TOKENS, MIDDLE_TOKENS, LONG_TOKENS = 200, 1000, (4000, 7000)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def up_to(tokenizer: Any, parts: Iterable[str], tokens: int) -> str:
    """Parts, one after the other, cut to so many tokens."""
    ids: list[int] = []
    for part in parts:
        ids += tokenizer.encode(part + "\n\n", add_special_tokens=False)
        if len(ids) >= tokens:
            break
    return str(tokenizer.decode(ids[:tokens]))


def chat(content: str, system: str | None = None) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": content}]


def label_rows(tokenizer: Any, prompts: list[str], chance: random.Random) -> Iterator[list[dict[str, str]]]:
    rules = f"Say which of these a request asks for: {', '.join(LABELS)}. Answer with the word alone."
    examples = (f"Request: {prompt}\nAnswer: {chance.choice(LABELS)}" for prompt in prompts[400:])
    preamble = up_to(tokenizer, [rules, *examples], PREAMBLE_TOKENS)
    for prompt in prompts[:400]:
        yield chat(f"Request: {up_to(tokenizer, [prompt], 60)}\nAnswer:", preamble)


def mixed_rows(
    tokenizer: Any, prompts: list[str], texts: list[str], chance: random.Random
) -> Iterator[list[dict[str, str]]]:
    for prompt in prompts[:168]:
        yield chat(up_to(tokenizer, [prompt], SHORT_TOKENS - 40))
    sizes = [MIDDLE_TOKENS] * 24 + [
        round(LONG_TOKENS[0] + part * (LONG_TOKENS[1] - LONG_TOKENS[0]) / 7) for part in range(8)
    ]
    for size in sizes:
        text = up_to(tokenizer, chance.sample(texts, 200), size - 60)
        yield chat(f"{text}\n\nWhich of these problems is the hardest, and why?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with instruct/prompts.jsonl and gsm8k/train.jsonl")
    parser.add_argument("output", type=Path, help="folder for the three files")
    arguments = parser.parse_args()
    from rayskip.data.tokenizer import load_tokenizer
    from rayskip.model.checkpoint import resolve

    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    chance = random.Random(0)
    prompts = [row["prompt"] for row in read(arguments.data / "instruct/prompts.jsonl")]
    texts = [f"{row['question']}\n{row['answer']}" for row in read(arguments.data / "gsm8k/train.jsonl")]
    chance.shuffle(prompts)
    mixed = list(mixed_rows(tokenizer, prompts[1000:], texts, chance))
    chance.shuffle(mixed)
    rows = {
        "label": list(label_rows(tokenizer, prompts, chance)),
        "mixed": mixed,
        "samples": [chat(prompt) for prompt in prompts[2000:2032]],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, every in rows.items():
        lines = (
            json.dumps({"id": f"{name}-{at:03}", "messages": own}, ensure_ascii=False)
            for at, own in enumerate(every)
        )
        (arguments.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
