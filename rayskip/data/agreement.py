"""How far a lossy generation agrees with the full-depth one of the same row. Knows no engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

from rayskip.data.records import Generation
from rayskip.stats import Stats

_WORD = re.compile(r"[a-z0-9]+")


def agreement(rows: Iterable[Generation], full_depth: Iterable[Generation]) -> Stats:
    """Quality audits of the rows that were decoded both ways, as counters that add.

    rows: all of a shard's. full_depth: those decoded again, a subset by (row_index, sample_index).
    """
    ours = {(row.row_index, row.sample_index): row for row in rows}
    stats = Stats()
    for full in full_depth:
        row = ours[full.row_index, full.sample_index]
        ids, expected = row.token_ids or [], full.token_ids or []
        stats.audits += 1
        stats.audit_exact += ids == expected
        stats.audit_edit_similarity += edit_similarity(ids, expected)
        stats.audit_rouge_l += rouge_l(row.text or "", full.text or "")
    return stats


def edit_similarity(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """1 - Levenshtein distance / longer length, over token ids; 1 for two empty ones."""
    return float(Levenshtein.normalized_similarity(tokens, expected))


def rouge_l(text: str, expected: str) -> float:
    """ROUGE-L F-measure over lower-cased words (Lin 2004), 0 to 1; 1 for two texts without words."""
    ours, theirs = _WORD.findall(text.lower()), _WORD.findall(expected.lower())
    if not ours and not theirs:
        return 1.0
    return 2 * float(LCSseq.similarity(ours, theirs)) / (len(ours) + len(theirs))
