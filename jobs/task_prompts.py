"""Prompts of four kinds of task that the instruction data lacks, for a drafter's training data: translation,
summarization, questions, and questions over passages. Their texts are what packages of Debian and PyPI bring:

    mkdir texts && cd texts
    apt-get download dict-foldoc manpages-de fortunes-de && for each in *.deb; do dpkg -x $each .; done
    pip download gensim --no-deps && unzip -q gensim*.whl 'gensim/test/test_data/lee*'
    cd .. && python jobs/task_prompts.py texts task_prompts.jsonl

A prompt's text is its task's plain words, as the evaluation sets of the field have them; no such set is read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

COUNTS = {"translation": 1500, "summarization": 700, "qa": 1500, "rag": 700}
"""Prompts of each kind, drawn at random."""


def definitions(texts: Path) -> list[tuple[str, str]]:
    """(headword, its entry as one paragraph) of the Free On-line Dictionary of Computing."""
    whole = gzip.decompress((texts / "usr/share/dictd/foldoc.dict.dz").read_bytes()).decode(errors="ignore")
    entries = re.findall(r"^(\S[^\n]*)\n(?:\S[^\n]*\n)*\n((?:(?:   [^\n]*)?\n)+)", whole, re.MULTILINE)
    plain = ((word, re.sub(r"<[^>]*>|[{}]", "", " ".join(body.split())).strip()) for word, body in entries)
    return [(word, body) for word, body in plain if len(body) > 120]


def german(texts: Path) -> Iterator[str]:
    """Sentences of manual pages, and sayings."""
    for page in sorted((texts / "usr/share/man/de").rglob("*.gz")):
        lines = gzip.decompress(page.read_bytes()).decode(errors="ignore").splitlines()
        prose = re.sub(r"\\f.|\\", "", " ".join(line if line[:1] not in ".'" else "\n" for line in lines))
        yield from (
            sentence.strip() for part in prose.split("\n") for sentence in re.split(r"(?<=[.!?]) ", part)
        )
    for book in sorted((texts / "usr/share/games/fortunes/de").glob("*.u8")):
        yield from (" ".join(saying.split()) for saying in book.read_text().split("\n%\n"))


def prompts(texts: Path) -> Iterator[tuple[str, str]]:
    """(kind, prompt), more than are wanted."""
    chance = random.Random(0)
    entries = definitions(texts)
    news = (texts / "gensim/test/test_data/lee_background.cor").read_text().splitlines()
    for sentence in german(texts):
        if 60 < len(sentence) < 220 and sentence[0].isupper():
            yield "translation", f"Translate German to English: {sentence}"
    for number, article in enumerate(news):
        yield "summarization", f"Summarize: {article}"
        yield "summarization", f"Summarize: {article} {news[(number + 1) % len(news)]}"
        long = " ".join(body for _, body in chance.sample(entries, 6))
        yield "summarization", f"Summarize: {long}"
    asked = (
        "What is {}?",
        "What does {} mean?",
        "Who invented {}?",
        "When was {} first used?",
        "Where is {} used?",
    )
    for word, _ in entries:
        yield "qa", chance.choice(asked).format(word)
        passages = chance.sample(entries, 4)
        word = chance.choice(passages)[0]
        text = "\n".join(body[:900] for _, body in passages)
        yield "rag", f"{text}\n{chance.choice(asked).format(word)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="folder the packages were unpacked in")
    parser.add_argument("output", type=Path, help="JSON Lines to write: id, source, prompt")
    arguments = parser.parse_args()
    found = list(prompts(arguments.texts))
    random.Random(0).shuffle(found)
    left = dict(COUNTS)
    with arguments.output.open("w") as file:
        for kind, prompt in found:
            if left[kind]:
                left[kind] -= 1
                row = {"id": f"{kind}-{left[kind]:05}", "source": kind, "prompt": prompt}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
