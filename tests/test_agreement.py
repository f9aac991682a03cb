"""Quality audits: how two decodings of a row are compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rayskip.data.agreement import agreement, edit_similarity, rouge_l
from rayskip.data.records import Generation

WORDS = st.lists(st.sampled_from(["a", "the", "Cat", "dog,", "runs", "42"]), max_size=8).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_rouge_scores(text: str, expected: str) -> None:
    if text or expected:  # of two empty texts rouge-score says 0
        score = RougeScorer(["rougeL"]).score(expected, text)["rougeL"].fmeasure
        assert rouge_l(text, expected) == pytest.approx(score)


def test_edit_similarity_by_hand() -> None:
    assert edit_similarity([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert edit_similarity([], [1, 2]) == 0
    assert edit_similarity([], []) == 1


def test_audits_pair_rows_by_identity_and_add() -> None:
    def row(index: int, tokens: list[int], text: str) -> Generation:
        return Generation(index, 0, "stop", text=text, token_ids=tokens)

    rows = [row(0, [1, 2], "a b"), row(1, [5], "c"), row(2, [7, 8], "x y")]
    stats = agreement(rows, [row(2, [7, 9], "x z"), row(0, [1, 2], "a b")])
    assert stats.audits == 2
    assert stats.agreement == {"exact_match": 0.5, "edit_similarity": 0.75, "rouge_l": 0.75}
