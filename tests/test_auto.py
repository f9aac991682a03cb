"""What `auto` chooses for given prices and texts, by a clock that the tests wind. Without a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from itertools import product
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayskip.config import AutoDraft, SamplingParams
from rayskip.data.records import Prompt
from rayskip.decode.batch import Chunk
from rayskip.decode.draft import NEWEST, Draft
from rayskip.decode.drafters.auto import AutoDrafter
from rayskip.decode.drafters.copies import CopyChances
from rayskip.decode.drafters.costs import StepCosts
from rayskip.decode.drafters.drafter import Drafter
from rayskip.decode.drafters.kangaroo import KANGAROO, KangarooDrafter
from rayskip.decode.drafters.lookup import Continuation
from rayskip.decode.drafters.value import TRYING, Plan, Ratio, Savings, worth_verifying
from rayskip.decode.sampling import Choice
from rayskip.decode.sequence import Sequence
from rayskip.decode.verify import verify
from rayskip.model.cache.kv_cache import KVCache

COSTS = st.lists(st.floats(0.001, 10), min_size=4, max_size=4).map(
    lambda steps: StepCosts((1, 4, 16, 64), tuple(sum(steps[: at + 1]) for at in range(4)))
)
CHANCES = st.lists(
    st.lists(st.floats(0.01, 1), max_size=4).map(lambda own: sorted(own, reverse=True)),
    min_size=1,
    max_size=4,
)
FLAT = StepCosts((1, 256), (1.0, 1.01))
"""Tokens are free."""
STEEP = StepCosts((1, 256), (1.0, 256.0))
"""A token more takes as long as one alone."""


@given(CHANCES, COSTS, st.integers(0, 20))
def test_the_budget_beats_every_other(chances: list[list[float]], costs: StepCosts, prompt: int) -> None:
    rows = len(chances)
    plan = Plan.of_nothing(costs, rows, rows + prompt)

    def rate(lengths: Seq[int]) -> float:
        gained = sum(sum(own[:length]) for own, length in zip(chances, lengths, strict=True))
        besides_prompts = costs(rows + prompt + sum(lengths)) - costs(rows + prompt) + costs(rows)
        return (rows + gained) / besides_prompts

    chosen = worth_verifying(chances, plan)
    every = product(*(range(len(own) + 1) for own in chances))
    assert any(chosen) == any(chances)
    assert rate(chosen) == pytest.approx(max(map(rate, filter(any, every)), default=rate(chosen)))


@given(COSTS, st.integers(1, 20), st.integers(0, 20), st.floats(0, 5), st.integers(0, 20), st.floats(0, 5))
def test_a_loss_is_a_lower_rate(
    costs: StepCosts, rows: int, prompt: int, gained: float, tokens: int, seconds: float
) -> None:
    plan = Plan(costs, rows, rows + prompt)
    with_drafts = (rows + gained) / (costs(plan.tokens + tokens) + seconds)
    loss = plan.plus(gained, tokens, seconds).loss(plan)
    if abs(loss) > 1e-6:
        assert (loss > 0) == (with_drafts < rows / plan.seconds)


def test_costs_are_linear_in_between_and_beyond() -> None:
    costs = StepCosts((1, 2, 4), (1.0, 1.5, 2.5))
    assert [costs(tokens) for tokens in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.5]


def test_costs_follow_what_forwards_take_most_so_near_their_size() -> None:
    told = costs = StepCosts((1, 4, 16), (1.0, 2.0, 4.0))
    for _ in range(300):
        costs = costs.learn(4, 6.0)
    assert costs(4) == pytest.approx(6, rel=0.01)
    assert 2 < costs(1) / told(1) < 2.9
    assert costs(16) / told(16) == pytest.approx(costs(1) / told(1))
    for size in (1, 4, 16) * 300:
        costs = costs.learn(size, 3 * told(size))
    assert costs.seconds == pytest.approx((3, 6, 12), rel=0.03)
    assert costs.learn(4, 1e9)(4) < 7  # one hiccup moves little


def test_free_tokens_are_verified_and_of_dear_ones_the_likeliest_at_most() -> None:
    assert worth_verifying([[0.5, 0.2, 0.1]], Plan(FLAT, 1, 1)) == [3]
    assert worth_verifying([[0.5, 0.2, 0.1], [0.6]], Plan(STEEP, 1, 1)) == [0, 1]
    assert worth_verifying([[0.5, 0.2, 0.1]], Plan(StepCosts((1, 2, 4), (1.0, 1.1, 9.0)), 1, 1)) == [1]
    assert worth_verifying([[0.9, 0.8], [0.3]], Plan(StepCosts((1, 64), (1.0, 30.0)), 2, 2)) == [2, 0]


def test_a_prompt_beside_the_rows_makes_their_tokens_worth_no_more() -> None:
    """Though it makes the step so long that a token more is hardly felt."""
    for tokens in (4, 200):
        nothing = Plan.of_nothing(STEEP, 4, tokens)
        assert nothing.each == 1
        assert nothing.plus(0.9, 1).loss(nothing) == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.9])
def test_trials_come_as_often_as_what_is_set_aside_pays_for(loss: float) -> None:
    savings, done, steps = Savings(), 0, 4000
    for _ in range(steps):
        savings.save(1.0)
        done += savings.afford(loss)
    assert TRYING * steps - 1 < done * loss <= TRYING * steps + 1e-6
    assert savings.afford(-1, debt=9)  # what gains needs none
    for _ in range(steps):
        savings.save(1.0)
    assert not savings.afford(1.1)  # no more than a step is ever saved
    assert savings.afford(0.5, debt=3)
    for _ in range(steps // 4):
        savings.save(1.0)
    assert not savings.afford(0.1)


def test_counts_move_a_ratio_from_its_prior_and_fade() -> None:
    ratio = Ratio()
    assert ratio.given(0.3) == pytest.approx(0.3)
    for _ in range(400):
        ratio.count(1)
    assert ratio.given(0.3) > 0.9
    for _ in range(400):
        ratio.count(0)
    assert ratio.given(0.3) < 0.1


def _row(text: Seq[int]) -> Sequence:
    """A row whose prompt is the text's first token, and that has generated the next."""
    row = Sequence(0, Prompt(0, [text[0]], SamplingParams(), 0), 0, limit=9999, places=9999)
    row.generated = list(text[1:2])
    return row


def test_a_copy_is_as_likely_as_such_copies_were_and_as_the_rows_own() -> None:
    chances, lucky, unlucky = CopyChances(), _row([1]), _row([1])
    for _ in range(100):
        for row, token in ((lucky, 7), (unlucky, 8)):
            told = chances.of(row, [Continuation([7, 7], 2, 0), Continuation([9, 9], 1, 0)])
            row.generated.append(token)
    fresh = chances.of(
        _row([1]), [Continuation([7, 7], 2, 0), Continuation([9, 9], 1, 0), Continuation([7], 3, 0)]
    )
    assert fresh[0][0] == pytest.approx(0.5, abs=0.05)  # of either row half
    assert fresh[1][0] < 0.05
    assert 0.4 < fresh[2][0] < 0.5  # not seen: the prior
    assert chances.of(lucky, [Continuation([7, 7], 2, 0)])[0][0] > 0.8
    assert chances.of(unlucky, [Continuation([7, 7], 2, 0)])[0][0] < 0.2
    assert told[0][0] >= told[0][1]


class _Scripted(Drafter):
    """In Kangaroo's place: drafts three tokens a row, of which `right` come, in so many seconds."""

    share, agreement, most_tokens = 0.1, 0.5, 3

    def __init__(
        self, texts: Mapping[Sequence, Seq[int]], right: int, take: Callable[[float], None], seconds: float
    ):
        self.texts, self.right, self.take, self.seconds = texts, right, take, seconds
        self.asked: list[list[Sequence]] = []

    def draft(self, chunks: Seq[Chunk], rows: Seq[Sequence], cache: KVCache, least: float = 0.0) -> None:
        self.asked.append(list(rows))
        self.take(self.seconds)
        for row in rows:
            coming = self.texts[row][row.length : row.length + 3]
            row.draft.add_chain(
                [token if at < self.right else -1 for at, token in enumerate(coming)], KANGAROO
            )
            row.draft_cached = row.length


class _Machine:
    """Runs rows along texts that are given, as a worker does; its clock goes on by what a forward truly costs, and
    a look-up."""

    def __init__(
        self,
        texts: Seq[Seq[int]],
        told: StepCosts,
        true: StepCosts | None = None,
        look: float = 0.0,
        right: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        """told: prices at start-up. look: seconds of a look-up. right, seconds: of Kangaroo's, see _Scripted; None:
        there is none."""
        self.texts = {_row(text): text for text in texts}
        self.true, self.now = true or told, 0.0
        self.kangaroo = None if right is None else _Scripted(self.texts, right, self.take, seconds)
        config = AutoDraft(kind="auto")
        self.drafter = AutoDrafter(
            config, told, cast("KangarooDrafter | None", self.kangaroo), lambda: self.now
        )
        copies = self.drafter._copies._lookups.copies

        def timed(row: Sequence, count: int) -> list[Continuation]:
            self.take(look)
            return copies(row, count)

        self.drafter._copies._lookups.copies = timed  # type: ignore[method-assign]
        self.drafted: list[Draft] = []
        self.forwards = 0.0

    def take(self, seconds: float) -> None:
        self.now += seconds

    def run(self, steps: int) -> float:
        """Tokens a row and step."""
        before = sum(row.length for row in self.texts)
        for _ in range(steps):
            self.step()
        return (sum(row.length for row in self.texts) - before) / steps / len(self.texts)

    def step(self) -> None:
        rows = list(self.texts)
        chunks = [Chunk(row, row.length - 1, row.length) for row in rows]
        self.drafter.draft(chunks, rows, cast("KVCache", None))
        seconds = self.true(len(rows) + sum(len(row.draft) for row in rows))
        self.forwards += seconds
        self.take(seconds)
        places = [(row, node) for row in rows for node in range(NEWEST, len(row.draft))]
        depths = [0 if node == NEWEST else row.draft.depths[node] for row, node in places]
        coming = (self.texts[row][row.length + at] for (row, _), at in zip(places, depths, strict=True))
        verdicts = verify([Choice(token) for token in coming], places)
        self.drafter.observe(verdicts, torch.empty(0))
        for row, verdict in verdicts.items():
            self.drafted.append(row.draft)
            row.draft = Draft()
            row.generated += [cast("int", choice.token_id) for choice in verdict.choices]


def _copied(rows: int) -> list[list[int]]:
    """Texts that repeat themselves every 40 tokens, each with its own."""
    return [[100 * row + at % 40 for at in range(9000)] for row in range(rows)]


def _new(rows: int) -> list[list[int]]:
    """Texts of random tokens, of few enough that pairs and single ones return, and mislead."""
    chance = random.Random(0)
    return [[chance.randrange(60) for _ in range(3000)] for _ in range(rows)]


CPU = StepCosts((1, 2, 4, 8, 16, 32, 64, 256), (1.0, 1.0, 1.05, 1.1, 1.3, 2.0, 3.5, 14.0))
"""Up to eight tokens take about as long as one, and from sixteen on each as much as the one before."""


def test_a_text_that_repeats_itself_is_copied_and_a_new_one_is_not() -> None:
    copied, new = _Machine(_copied(1), CPU), _Machine(_new(1), StepCosts((1, 16, 256), (1.0, 2.0, 30.0)))
    assert copied.run(200) > 10
    assert new.run(300) < 1.1
    assert sum(map(len, new.drafted[100:])) < 20


def test_rows_of_a_batch_are_drafted_for_as_each_deserves() -> None:
    machine = _Machine([*_copied(1), *_new(7)], CPU)
    machine.run(150)
    machine.drafted.clear()
    machine.run(50)
    assert sum(map(bool, machine.drafted[::8])) > 40
    assert sum(len(draft) for at, draft in enumerate(machine.drafted) if at % 8) < 50


@pytest.mark.parametrize("text", [_new, _copied])
def test_where_a_token_costs_as_much_as_a_row_only_sure_ones_are_verified(
    text: Callable[[int], list[list[int]]],
) -> None:
    machine = _Machine(text(4), StepCosts((1, 256), (1.0, 205.0)))
    machine.run(150)
    machine.drafted.clear()
    machine.run(50)
    assert (sum(map(len, machine.drafted)) > 100) == (text is _copied)


@pytest.mark.parametrize("told", [(1.0, 1.01, 1.02, 1.03, 1.04), (1.0, 1.4, 2.2, 3.8, 7.0)])
def test_prices_that_were_wrong_at_start_up_do_not_stay_wrong(told: tuple[float, ...]) -> None:
    """Tokens were thought to be free and are dear, or the other way round: the clock tells."""
    sizes, dear = (1, 2, 4, 8, 16), told[1] < 2
    machine = _Machine(_new(2) if dear else _copied(2), StepCosts(sizes, told), true=STEEP if dear else FLAT)
    machine.run(400)
    machine.drafted.clear()
    gained = machine.run(100)
    assert sum(map(len, machine.drafted)) < 20 if dear else gained > 14


@pytest.mark.parametrize("right", [None, 3])
def test_drafts_come_again_after_the_process_was_stopped_in_the_middle_of_one(right: int | None) -> None:
    """Then a look-up and a round seem to take an hour."""
    machine = _Machine(_copied(1) if right is None else _new(1), CPU, right=right, seconds=0.1)
    before = machine.run(100)
    assert before > 2
    usual, stopped = machine.take, [3600.0]
    machine.take = lambda seconds: usual(seconds + (stopped.pop() if stopped else 0))  # type: ignore[method-assign]
    if machine.kangaroo:
        machine.kangaroo.take = machine.take
    machine.run(100)
    assert not stopped
    assert machine.run(100) > 0.9 * before


@pytest.mark.parametrize(("text", "least", "most"), [(_new, 0.001, 0.006), (_copied, 0.02, 0.2)])
def test_looking_up_in_vain_takes_no_more_than_is_set_aside(
    text: Callable[[int], list[list[int]]], least: float, most: float
) -> None:
    """Look-ups for all of the 32 rows would take 7% of a step."""
    machine = _Machine(text(32), CPU, look=0.005)
    machine.run(100)
    began, machine.forwards = machine.now, 0.0
    machine.run(50)
    assert least < 1 - machine.forwards / (machine.now - began) < most


@pytest.mark.parametrize(
    ("right", "seconds", "least", "most"),
    [(3, 0.1, 0.95, 1), (1, 0.1, 0.95, 1), (1, 1.5, 0.001, 0.05), (0, 0.1, 0.001, 0.05), (1, 3.0, 0, 0.005)],
)
def test_kangaroo_is_asked_where_its_rounds_pay_and_else_seldom(
    right: int, seconds: float, least: float, most: float
) -> None:
    """The less a round loses, the more often it is tried; seldom if at all where it loses more than a step."""
    machine = _Machine(_new(1), CPU, right=right, seconds=seconds)
    assert machine.kangaroo is not None
    machine.run(100)
    machine.kangaroo.asked.clear()
    machine.run(600)
    assert least <= len(machine.kangaroo.asked) / 600 <= most


def test_kangaroo_is_asked_for_the_rows_without_sure_copies() -> None:
    machine = _Machine([*_copied(1), *_new(1)], CPU, right=3, seconds=0.1)
    assert machine.kangaroo is not None
    copied, new = machine.texts
    machine.run(100)
    assert machine.kangaroo.asked[-1] == [new]
    machine.kangaroo.asked.clear()
    machine.texts = {copied: machine.texts[copied]}
    machine.run(30)
    assert len(machine.kangaroo.asked) < 3


def test_a_round_for_which_a_full_batch_would_wait_too_long_is_not_run() -> None:
    machine = _Machine(_new(64), CPU, right=3, seconds=2.0)
    assert machine.kangaroo is not None
    machine.run(30)
    assert not machine.kangaroo.asked


def test_what_a_row_has_missed_is_part_of_a_rounds_price() -> None:
    machine = _Machine(_new(1), CPU, right=3, seconds=0.1)
    assert machine.kangaroo is not None
    (row,) = machine.texts
    row.draft_cached, row.limit = -9000, 40
    machine.run(10)
    assert not machine.kangaroo.asked
    row.draft_cached, row.limit = row.length, 9999
    machine.run(10)
    assert machine.kangaroo.asked


def test_a_step_without_drafts_is_taken_now_and_then() -> None:
    """Or the price of one would not be known any more."""
    machine = _Machine(_copied(1), CPU)
    machine.run(50)
    machine.drafted.clear()
    machine.run(500)
    assert 0 < sum(not draft for draft in machine.drafted) < 10
