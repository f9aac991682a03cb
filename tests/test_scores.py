"""Scores of candidates: one forward beside the prompt's end gives what transformers gives text by text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rayskip import Engine
from rayskip.decode.candidates import tree
from rayskip.decode.draft import NEWEST

PROMPTS = [[1 + row, *range(20, 20 + 9 * row % 70), 7] for row in range(13)]
CANDIDATES = [[5], [6, 8], [6, 8, 9], [6, 9], [11, 12, 13, 14, 15], [6]]


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("scored", 5, vocab_size=300, initializer_range=0.3)


def _scores(folder: Path, engine: dict[str, Any] | None = None, **decode: Any) -> list[list[float] | None]:
    loaded = Engine.load({"path": str(folder), "dtype": "float32"}, engine, decode)
    return [generation.scores for generation in loaded.score(PROMPTS, CANDIDATES)]


def _reference(folder: Path, kept: list[int] | None = None) -> list[list[float]]:
    """Each text by itself, in a forward of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        sums = []
        for candidate in CANDIDATES:
            with torch.inference_mode():
                logprobs = model(torch.tensor([prompt + candidate])).logits[0].log_softmax(-1)
            first = len(prompt) - 1
            sums.append(sum(float(logprobs[first + at, token]) for at, token in enumerate(candidate)))
        found.append(sums)
    return found


def test_scores_are_those_of_transformers(folder: Path) -> None:
    torch.testing.assert_close(
        torch.tensor(_scores(folder)), torch.tensor(_reference(folder)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "engine",
    [{"max_batch_rows": 1}, {"max_batch_rows": 13, "max_batch_tokens": 16}, {"kv_cache_gb": 1e-4}],
    ids=["alone", "prompts in pieces", "few pages"],
)
def test_scores_do_not_depend_on_the_batch(folder: Path, engine: dict[str, Any]) -> None:
    assert _scores(folder, engine) == _scores(folder)


def test_drafters_change_no_score_and_generations_run_beside(folder: Path) -> None:
    assert _scores(folder, draft={"kind": "auto"}) == _scores(folder)
    engine = Engine.load({"path": str(folder), "dtype": "float32"})
    alone = engine.generate(PROMPTS[:4], {"max_tokens": 12})
    for prompt in PROMPTS[:4]:
        engine.add(prompt, {"max_tokens": 12})
    scored = [generation.scores for generation in engine.score(PROMPTS, CANDIDATES)]
    assert scored == _scores(folder)
    beside = {done.request_id: done.generations for done in engine.run()}
    assert [beside[key][0].token_ids for key in sorted(beside)] == [samples[0].token_ids for samples in alone]


def test_what_cannot_be_scored(folder: Path) -> None:
    engine = Engine.load(str(folder), {"max_model_len": 40})
    long, empty, good = engine.score([[3] * 38, [], [3]], [[1, 2, 3]])
    assert (long.error_type, empty.error_type, good.finish_reason) == (
        "prompt_too_long",
        "empty_prompt",
        "score",
    )
    for wrong in ([], [[]], [[1], [1]]):
        with pytest.raises(ValueError, match="different texts"):
            engine.score([[3]], wrong)
    with pytest.raises(TypeError, match="a list of candidates"):
        engine.score([[3]], "yes")


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=8, unique=True
    )
)
def test_a_tree_asks_each_token_after_those_before_it(candidates: list[tuple[int, ...]]) -> None:
    """Log-probabilities that spell their place: the sum over a candidate is as if it were alone."""
    found = tree(tuple(candidates))
    draft = found.draft
    assert len(draft) == len({own[:stop] for own in candidates for stop in range(1, len(own))})
    paths = {NEWEST: ()} | {
        node: tuple(draft.tokens[on] for on in draft.path(node)) for node in range(len(draft))
    }

    def logprob(before: tuple[int, ...], token: int) -> float:
        return float(hash((before, token)) % 1000)

    said = {
        node: {token: logprob(paths[node], token) for token in tokens} for node, tokens in found.asked.items()
    }
    expected = [sum(logprob(own[:at], token) for at, token in enumerate(own)) for own in candidates]
    assert found.scores(said) == expected
