"""What `auto` decides by: costs, chances and the clock. Pure functions and counts, without a model."""

from __future__ import annotations

import random
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayskip.decode.drafters.auto import DRAFTING, Fortune, Rate, Rounds, round_pays
from rayskip.decode.drafters.costs import StepCosts, marginal_chance, worth_verifying
from rayskip.decode.drafters.trial import Trial, Trials

COSTS = st.lists(st.floats(0.001, 10), min_size=4, max_size=4).map(
    lambda steps: StepCosts((1, 4, 16, 64), tuple(sum(steps[: at + 1]) for at in range(4)))
)
CHANCES = st.lists(
    st.lists(st.floats(0.01, 1), max_size=4).map(lambda own: sorted(own, reverse=True)),
    min_size=1,
    max_size=4,
)


@given(CHANCES, COSTS, st.integers(0, 20))
def test_the_budget_beats_every_other(chances: list[list[float]], costs: StepCosts, prompt: int) -> None:
    base = len(chances) + prompt

    def rate(lengths: list[int]) -> float:
        gained = sum(sum(own[:length]) for own, length in zip(chances, lengths, strict=True))
        return (len(chances) + gained) / costs(base + sum(lengths))

    chosen = worth_verifying(chances, len(chances), costs, base)
    best = max(rate(list(lengths)) for lengths in product(*(range(len(own) + 1) for own in chances)))
    assert rate(chosen) == pytest.approx(best)


def test_costs_are_linear_in_between_and_beyond() -> None:
    costs = StepCosts((1, 2, 4), (1.0, 1.5, 2.5))
    assert [costs(tokens) for tokens in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.5]


def test_costs_follow_what_forwards_take() -> None:
    costs = StepCosts((1, 4, 16), (1.0, 2.0, 4.0))
    for _ in range(300):
        costs = costs.learn(4, 6.0)
    assert costs.seconds == pytest.approx((3, 6, 12), rel=0.01)
    assert costs.learn(4, 1e9)(4) < 7  # one hiccup moves little


@pytest.mark.parametrize("drafting_gains", [1.3, 0.7])
def test_the_faster_way_is_taken_and_the_other_tried_now_and_then(drafting_gains: float) -> None:
    trial = Trial(8)

    def take(steps: int, gains: float) -> list[bool]:
        taken = []
        for _ in range(steps):
            taken.append(trial.choose())
            trial.count(taken[-1], 10, 1 / gains if taken[-1] else 1.0)
        return taken

    faster = drafting_gains > 1
    assert 950 < take(1000, drafting_gains).count(faster) < 990
    assert take(3000, 1 / drafting_gains).count(faster) < 1200  # the machine has changed


def test_the_slower_way_is_tried_less_often_each_time_that_it_is_slower_again() -> None:
    trial, taken = Trial(8), []
    for _ in range(4000):
        taken.append(trial.choose())
        trial.count(taken[-1], 10, 2.0 if taken[-1] else 1.0)
    began = [step for step in range(1, 4000) if taken[step] and not taken[step - 1]]
    pauses = [later - earlier for earlier, later in pairwise(began)]
    assert began[0] < 0.6 * pauses[0] < 0.4 * pauses[1]
    assert pauses[2] == pytest.approx(pauses[1], rel=0.02)  # but not ever more seldom


def test_many_rows_are_drafted_for_later_and_if_it_pays() -> None:
    for seconds, least, most in ((0.5, 2900, 3000), (1.5, 10, 60)):
        trial, taken = Trial(64), []
        for _ in range(4000):
            taken.append(trial.choose())
            trial.count(taken[-1], 10, seconds if taken[-1] else 1.0)
        assert taken.index(True) > 1000
        assert least < sum(taken) < most


@pytest.mark.parametrize(("spread", "least", "most"), [(0.01, 1800, 2000), (3.0, 20, 1000)])
def test_what_noise_may_have_done_does_not_begin_drafting(spread: float, least: int, most: int) -> None:
    """Drafting gains a tenth; steps take between none and `spread` more."""
    chance, drafted = random.Random(0), 0
    for _ in range(10):
        trial = Trial(8)
        for _ in range(200):
            drafting = trial.choose()
            trial.count(drafting, 10, (1 if drafting else 1.1) * (1 + spread * chance.random()))
            drafted += drafting
    assert least < drafted < most


def test_steps_that_do_not_count_go_on_as_before_and_begin_without_drafts() -> None:
    trial = Trial(8)
    assert not trial.choose(counts=False)
    assert trial.choose()
    trial.count(True, 10, 1.0)
    assert trial.choose(counts=False)


def test_a_worker_that_no_longer_counts_does_not_stay_in_the_slower_way() -> None:
    trial = Trial(8)
    assert trial.choose(0)
    for _ in range(500):
        drafting = trial.choose(1)
        trial.count(drafting, 10, 2.0 if drafting else 1.0, 1)
    assert not trial.choose(0, counts=False)


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_what_a_change_costs_at_first_does_not_count_against_a_way(workers: int) -> None:
    """Drafting gains 1.25 times as fast once a worker has caught up, and its first step takes as long again."""
    trials = Trials()
    own = [trials.join() for _ in range(workers)]
    before = dict.fromkeys(own, False)
    drafted = steps = 0
    for _ in range(1500):
        for worker in own:
            drafting = trials.choose(4, worker, True)
            catching_up = drafting and not before[worker]
            seconds = (1.2 if drafting else 1.0) + catching_up
            trials.count(4, drafting, 3 if drafting else 2, seconds, worker)
            before[worker] = drafting
            drafted, steps = drafted + drafting, steps + 1
    assert drafted > 0.9 * steps


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_whose_copies_come_in_bursts_are_drafted_for(rows: int) -> None:
    """A draft costs a tenth; for 50 steps on end none holds, then for 50 each row gains three tokens a step."""
    trials = Trials()
    worker = trials.join()
    drafted = 0
    for step in range(4000):
        drafting = trials.choose(rows, worker, True)
        gained = 3 if drafting and step // 50 % 2 else 1
        trials.count(rows, drafting, gained * rows, 1.1 if drafting else 1.0, worker)
        drafted += drafting
    assert drafted > 0.85 * 4000


def _drafted_in_vain(steps: int, rows: int, workers: int = 1) -> int:
    """Steps of one of the workers that draft, where that takes a tenth longer and gains nothing."""
    trials = Trials()
    worker = [trials.join() for _ in range(workers)][-1]
    drafted = 0
    for _ in range(steps):
        drafting = trials.choose(rows, worker, True)
        trials.count(rows, drafting, rows, 1.1 if drafting else 1.0, worker)
        drafted += drafting
    return drafted


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_workers_that_have_no_rows_are_not_waited_for(workers: int) -> None:
    assert _drafted_in_vain(6000, 1, workers) < 0.2 * 6000


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_few_rows_for_which_drafting_is_slower_are_seldom_drafted_for(rows: int) -> None:
    assert 0 < _drafted_in_vain(8000, rows) < 0.13 * 8000


def test_free_tokens_are_drafted_and_dear_ones_are_not() -> None:
    free, dear = StepCosts((1, 64), (1.0, 1.01)), StepCosts((1, 64), (1.0, 64.0))
    assert worth_verifying([[0.5, 0.2, 0.1]], 1, free, 1) == [3]
    assert worth_verifying([[0.5, 0.2, 0.1]], 1, dear, 1) == [0]
    assert worth_verifying([[0.9, 0.8], [0.3]], 2, StepCosts((1, 64), (1.0, 30.0)), 2) == [2, 0]


def test_a_round_pays_when_it_gains_more_than_it_costs() -> None:
    costs = StepCosts((1, 64), (1.0, 1.5))
    assert round_pays(1, 0, 1, accepted=0.8, drafted=2, seconds=0.3, costs=costs)
    assert not round_pays(1, 0, 1, accepted=0.2, drafted=2, seconds=0.3, costs=costs)
    assert not round_pays(1, 63, 64, accepted=0.8, drafted=2, seconds=0.3, costs=costs)  # others wait for it


def test_what_does_not_pay_is_tried_again_now_and_then() -> None:
    rounds, costs = Rounds.expected(1, agreement=0.5, least=0.1, seconds=0.1), StepCosts((1, 64), (1.0, 1.5))
    tried = []
    for _ in range(400):
        tried.append(rounds.worth_trying(1, 0, 1, 0.0, costs))
        if tried[-1]:
            rounds.count(1, drafted=3, seconds=5.0)
    assert tried[0]
    assert 5 <= sum(tried) <= 12


@pytest.mark.parametrize(
    ("rows", "agreement", "late", "pays"),
    [
        (1, 0.5, 0.0, True),
        (1, 0.05, 0.0, False),
        (1, 0.5, 1.0, False),
        (64, 0.5, 0.0, False),
        (64, 0.9, 0.0, True),
    ],
)
def test_the_first_round_is_expected_to_go_as_the_adapters_label_says(
    rows: int, agreement: float, late: float, pays: bool
) -> None:
    """A token more costs nearly nothing beside one row, and beside 64 half of what a row does."""
    costs = StepCosts((1, 32, 64, 128), (1.0, 1.1, 2.0, 3.0))
    least = marginal_chance(rows, rows, costs)
    rounds = Rounds.expected(rows, agreement, least, seconds=DRAFTING * costs(rows))
    assert rounds.worth_trying(rows, 0, rows, late, costs) == pays


def test_a_rows_fortune_bends_what_is_expected_of_it() -> None:
    lucky, unlucky = Fortune(), Fortune()
    assert lucky.factor == 1
    for _ in range(50):
        lucky.count(True, 0.5)
        unlucky.count(False, 0.5)
    assert lucky.factor > 1.5
    assert unlucky.factor < 0.4


def test_counts_move_a_rate_from_its_prior() -> None:
    rate = Rate()
    assert rate.given(0.3) == pytest.approx(0.3)
    for _ in range(200):
        rate.count(True)
    assert rate.given(0.3) > 0.9
