"""Labels: how a text is put to the model, what its scores say, and how far they are right.

Probabilities are a softmax over the labels' log-probabilities. A temperature divides those, so that a label of
probability p is right in a share p of the rows: fitted to labelled rows by the likelihood of their labels
(temperature scaling, arXiv 1706.04599, section 4.2), and told as `calibrated`.

Does not know files or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from rayskip.config.label import LabelTask
from rayskip.data.records import Generation, Labelled
from rayskip.stats import Stats

BINS = 10
"""Of equal width, in which confidence and accuracy are compared (arXiv 1706.04599, section 2)."""

COLDEST, HOTTEST = exp(-4), exp(4)
"""Temperatures that are looked at."""

Floats = NDArray[np.float64]


def asked(task: LabelTask, text: str) -> str:
    """The question about a text. What all rows share comes first."""
    labels = "\n".join(f"- {label}: {said}" if said else f"- {label}" for label, said in task.labels.items())
    return f"{task.instruction}\n\nLabels:\n{labels}\n\nText:\n{text}"


def softmax(evidence: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(evidence - evidence.max(axis=-1, keepdims=True))
    found: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return found


def fitted_temperature(evidence: Floats, right: NDArray[np.int64]) -> float:
    """The temperature under which the right labels [N] are most likely, of evidence [N, labels].

    A golden-section search: the likelihood has one maximum in 1 / temperature.
    """

    def loss(coldness: float) -> float:
        chances = softmax(evidence * exp(coldness))[np.arange(len(right)), right]
        return -float(np.log(np.maximum(chances, 1e-300)).sum())

    low, high, golden = log(1 / HOTTEST), log(1 / COLDEST), (5**0.5 - 1) / 2
    while high - low > 1e-6:
        left, after = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, after) if loss(left) <= loss(after) else (left, high)
    return exp(-(low + high) / 2)


def rightness(gold: str, found: Labelled) -> Stats:
    """Of one row, as counters that add: its pair of labels, and its place in the bins of `expected_error`."""
    bins: dict[str, float] = {}
    for kind, sure in (("probability", found.probability), ("calibrated", found.calibrated)):
        if sure is not None:
            at = f"{kind} {min(int(sure * BINS), BINS - 1)}"
            bins |= {f"{at} rows": 1.0, f"{at} sure": sure, f"{at} right": float(found.best == gold)}
    return Stats(labels={f"{gold}\t{found.label or ''}": 1}, label_bins=bins)


def expected_error(bins: dict[str, float], kind: str) -> float | None:
    """Expected calibration error: how far confidence is from accuracy, over rows; None where none were counted."""
    rows = sum(bins.get(f"{kind} {at} rows", 0.0) for at in range(BINS))
    if not rows:
        return None
    return (
        sum(
            abs(bins.get(f"{kind} {at} sure", 0.0) - bins.get(f"{kind} {at} right", 0.0))
            for at in range(BINS)
        )
        / rows
    )


Pairs = dict[str, dict[str, int]]
"""Rows by right label and label found, "" where there is none."""


def label_pairs(counted: dict[str, int]) -> Pairs:
    """Of counters as `rightness` has them."""
    found: Pairs = {}
    for pair, rows in sorted(counted.items()):
        gold, _, label = pair.partition("\t")
        found.setdefault(gold, {})[label] = rows
    return found


def accuracy(pairs: Pairs) -> float:
    """Share of the rows with a right label that got it."""
    right = sum(found.get(gold, 0) for gold, found in pairs.items())
    return right / sum(sum(found.values()) for found in pairs.values())


def by_label(pairs: Pairs) -> dict[str, dict[str, int | float | None]]:
    """Of each label: rows that have it, precision and recall; None where they are of no rows."""
    names = dict.fromkeys([*pairs, *(label for found in pairs.values() for label in found if label)])
    report: dict[str, dict[str, int | float | None]] = {}
    for name in names:
        own = pairs.get(name, {})
        right, rows = own.get(name, 0), sum(own.values())
        predicted = sum(found.get(name, 0) for found in pairs.values())
        report[name] = {
            "rows": rows,
            "precision": right / predicted if predicted else None,
            "recall": right / rows if rows else None,
        }
    return report


class Labeller:
    """Labels of a task's rows. tokens: how many each label has. temperature: as it was fitted, if it was."""

    def __init__(self, task: LabelTask, tokens: Sequence[int], temperature: float | None = None) -> None:
        self._task, self._tokens, self._temperature = task, tokens, temperature

    def fit(self, scores: Sequence[Sequence[float]], right: Sequence[str]) -> Labeller:
        """The same with a temperature fitted to rows whose label is known."""
        evidence = self._evidence(np.array(scores))
        at = np.array([self._task.names.index(label) for label in right])
        return Labeller(self._task, self._tokens, fitted_temperature(evidence, at))

    def label(self, row: Generation) -> Generation:
        """The row with its label, which is its text too."""
        if row.scores is not None:
            found = self._read(np.array(row.scores))
            return replace(row, labelled=found, text=found.label)
        if row.text is None or (label := row.text.strip()) not in self._task.labels:
            return row
        return replace(row, labelled=Labelled(label), text=label)

    def _evidence(self, scores: Floats) -> Floats:
        return scores / np.array(self._tokens) if self._task.by_token else scores

    def _read(self, scores: Floats) -> Labelled:
        evidence = self._evidence(scores)
        probabilities = softmax(evidence)
        first, second = (int(at) for at in np.argsort(-probabilities, kind="stable")[:2])
        best, calibrated = float(probabilities[first]), None
        if self._temperature is not None:
            calibrated = float(softmax(evidence / self._temperature)[first])
        sure = best if calibrated is None else calibrated
        return Labelled(
            self._task.names[first] if sure >= (self._task.abstain_below or 0) else None,
            self._task.names[first],
            best,
            best - float(probabilities[second]),
            dict(zip(self._task.names, probabilities.tolist(), strict=True)),
            calibrated,
        )
