"""pass@k against exact fractions, its intervals, and the comparison of two models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlvr.boundary.estimators import (
    crossover,
    mean_interval,
    paired_difference,
    pass_at_k,
    problem_curve,
    solvable_sets,
    wilson_interval,
)


def fractions(largest_n: int) -> Iterator[tuple[tuple[int, int, int], Fraction]]:
    """Every (n, correct, k) up to ``largest_n`` with its exact pass@k."""
    for n in range(1, largest_n + 1):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                yield (n, correct, k), 1 - Fraction(math.comb(n - correct, k), math.comb(n, k))


def test_pass_at_k_against_fractions() -> None:
    for case, exact in fractions(30):
        assert abs(Fraction(pass_at_k(*case)) - exact) < Fraction(1, 10**15), case


def test_pass_at_k_is_exact_to_the_last_bit() -> None:
    """The float nearest to the fraction, as the contract promises: 3 of 10 is 0.3, not 1 - 0.7."""
    assert [case for case, exact in fractions(30) if pass_at_k(*case) != float(exact)] == []


def test_pass_at_k_by_counting_subsets() -> None:
    """Three right of five: of the ten pairs, one holds no right answer."""
    assert pass_at_k(5, 3, 2) == 0.9
    assert pass_at_k(5, 3, 3) == 1.0
    assert pass_at_k(1024, 1, 1) == 1 / 1024
    assert pass_at_k(1024, 1, 512) == 0.5


@pytest.mark.parametrize("n, correct, k", [(4, 1, 5), (4, 1, 0), (4, 1, -1), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@k: got"):
        pass_at_k(n, correct, k)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 300), data=st.data())
def test_pass_at_k_grows_with_k_and_with_correct(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n - 1))
    value = pass_at_k(n, correct, k)
    assert 0.0 <= value <= 1.0
    assert value <= pass_at_k(n, correct, k + 1)
    assert value <= pass_at_k(n, correct + 1, k)
    assert pass_at_k(n, correct, n) == (correct > 0)
    assert pass_at_k(n, correct, 1) == pytest.approx(correct / n, abs=1e-15)


def test_problem_curve() -> None:
    assert problem_curve(4, [0, 1, 4, 2, 1], 2).tolist() == pytest.approx([0, 0.5, 1, 5 / 6, 0.5], abs=1e-15)
    assert problem_curve(4, [0, 1, 4], 4).tolist() == [0, 1, 1]
    assert problem_curve(4, [2, 3], 1).mean() == pytest.approx(5 / 8, abs=1e-15)


# ---- intervals --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_interval_lies_in_the_unit_range_around_the_mean(values: list[float]) -> None:
    array = np.array(values)
    low, high = mean_interval(array, whole=False)
    padded_mean = (sum(values) + 1) / (len(values) + 2)
    assert 0 <= low < padded_mean < high <= 1
    assert low - 1e-12 <= array.mean() <= high + 1e-12


def test_interval_of_the_population_mean_by_hand() -> None:
    """Values 0.25 and 0.75 with pseudo-problems 0 and 1: mean 1/2, variance (2/16 + 2/4) / 3, t with 3 degrees."""
    half = stats.t.ppf(0.975, 3) * math.sqrt((2 / 16 + 2 / 4) / 3 / 4)
    wanted = (max(0.0, 0.5 - half), min(1.0, 0.5 + half))
    assert mean_interval(np.array([0.25, 0.75]), whole=False) == pytest.approx(wanted, abs=1e-12)
    half = stats.t.ppf(0.975, 101) * math.sqrt((100 * 0 + 2 / 4) / 101 / 102)
    assert mean_interval(np.full(100, 0.5), whole=False) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def test_interval_narrows_with_problems_and_widens_with_level() -> None:
    few, many = np.tile([0.2, 0.6], 10), np.tile([0.2, 0.6], 100)
    width = {name: np.ptp(mean_interval(v, False, level)) for name, v, level in [("few", few, 0.95), ("many", many, 0.95)]}
    assert width["many"] < width["few"] / 2.5
    assert np.ptp(mean_interval(few, False, 0.99)) > width["few"]


@pytest.mark.parametrize("successes, trials", [(0, 10), (3, 10), (10, 10), (1, 1), (0, 1), (57, 128)])
def test_wilson_against_its_formula_and_scipy(successes: int, trials: int) -> None:
    z, share = stats.norm.ppf(0.975), successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    solved = np.array([1.0] * successes + [0.0] * (trials - successes))
    for low, high in (wilson_interval(successes, trials), mean_interval(solved, whole=True)):
        assert (low, high) == pytest.approx((max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)
        ci = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((ci.low, ci.high), abs=1e-12)


# ---- two models -------------------------------------------------------------------------------------------------------


def test_paired_difference_is_model_minus_base() -> None:
    base, model = np.array([0.1, 0.5, 0.3, 0.2]), np.array([0.3, 0.6, 0.6, 0.4])
    gain, low, high = paired_difference(base, model)
    assert gain == pytest.approx(0.2, abs=1e-12)
    result = stats.ttest_rel(model, base).confidence_interval(0.95)
    assert (low, high) == pytest.approx((result.low, result.high), abs=1e-12)
    assert low > 0
    loss, lower, upper = paired_difference(model, base)
    assert (loss, lower, upper) == pytest.approx((-gain, -high, -low), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_paired_interval_holds_its_difference(pairs: list[tuple[float, float]]) -> None:
    base, model = np.array(pairs).T
    difference, low, high = paired_difference(base, model)
    assert -1 <= low <= difference + 1e-12 and difference - 1e-12 <= high <= 1


def test_one_problem_says_nothing_about_the_population() -> None:
    assert paired_difference(np.array([0.2]), np.array([0.7])) == (pytest.approx(0.5), -1.0, 1.0)


ABOVE, BELOW, OPEN = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, -0.1, 0.1)  # of the model, against the base


@pytest.mark.parametrize(
    "signs, undecided, open_above, base_from, model_to",
    [
        ([ABOVE] * 6, [], False, None, 32),
        ([BELOW] * 6, [], False, 1, None),
        ([ABOVE, ABOVE, ABOVE, BELOW, BELOW, BELOW], [], False, 8, 4),
        ([ABOVE, ABOVE, OPEN, OPEN, BELOW, BELOW], [[4, 8]], False, 16, 2),
        ([ABOVE, OPEN, BELOW, OPEN, OPEN, BELOW], [[2, 2], [8, 16]], False, 32, 1),
        ([ABOVE, OPEN, ABOVE, BELOW, OPEN, OPEN], [[2, 2], [16, 32]], True, None, 1),
        ([OPEN] * 6, [[1, 32]], True, None, None),
        ([OPEN, ABOVE, ABOVE, ABOVE, ABOVE, OPEN], [[1, 1], [32, 32]], True, None, None),
        ([BELOW, BELOW, OPEN, ABOVE, ABOVE, ABOVE], [[4, 4]], False, None, None),
    ],
)
def test_crossover(signs: list, undecided: list, open_above: bool, base_from: int | None, model_to: int | None) -> None:
    ks = [1, 2, 4, 8, 16, 32]
    assert crossover(ks, dict(zip(ks, signs, strict=True))) == {
        "undecided_k": undecided,
        "open_above": open_above,
        "base_above_from": base_from,
        "model_above_to": model_to,
    }


def test_an_interval_that_touches_zero_is_undecided() -> None:
    assert crossover([1, 2], {1: (0.1, 0.0, 0.2), 2: (0.0, 0.0, 0.0)})["undecided_k"] == [[1, 2]]


def sets(both: int, base_only: int, model_only: int, undecided: int, neither: int) -> dict[str, int]:
    return {"both": both, "base_only": base_only, "model_only": model_only, "undecided": undecided, "neither": neither}


def test_solvable_sets_by_hand() -> None:
    """Fisher's p of c against 0 of 1024 is 2 C(1024, c) / C(2048, c): 5 gives 0.062, 6 gives 0.031.

    Counts 6, 6 and 5 against 0 give p 0.031, 0.031, 0.062 and, adjusted for three tests, 0.046, 0.046, 0.062.
    """
    p_values = {c: float(Fraction(2 * math.comb(1024, c), math.comb(2048, c))) for c in (4, 5, 6)}
    assert (round(p_values[5], 3), round(p_values[6], 3)) == (0.062, 0.031)
    base = [6, 0, 5, 9, 0, 0]
    model = [0, 6, 0, 1, 0, 0]
    assert solvable_sets(1024, base, model, 0.10) == sets(1, 2, 1, 0, 2)
    assert solvable_sets(1024, base, model, 0.05) == sets(1, 1, 1, 1, 2)
    assert solvable_sets(1024, base, model, 0.04) == sets(1, 0, 0, 3, 2)


@pytest.mark.parametrize("count, decided_at", [(4, 0.13), (5, 0.07), (6, 0.04)])
def test_one_sided_problem_is_decided_by_its_p_value(count: int, decided_at: float) -> None:
    p_value = float(Fraction(2 * math.comb(1024, count), math.comb(2048, count)))
    assert stats.fisher_exact([[count, 1024 - count], [0, 1024]]).pvalue == pytest.approx(p_value, rel=1e-9)
    assert solvable_sets(1024, [count], [0], decided_at)["base_only"] == 1
    assert solvable_sets(1024, [0], [count], decided_at)["model_only"] == 1
    assert solvable_sets(1024, [count], [0], p_value * 0.999)["undecided"] == 1


def test_more_problems_need_more_evidence() -> None:
    """One problem of 6 against 0 is decided alone and undecided beside nineteen of 1 against 0."""
    assert solvable_sets(1024, [6], [0])["base_only"] == 1
    crowd = solvable_sets(1024, [6] + [1] * 19, [0] * 20)
    assert crowd == sets(0, 0, 0, 20, 0)


def test_solvable_sets_of_nothing_one_sided() -> None:
    assert solvable_sets(8, [0, 3], [0, 1]) == sets(1, 0, 0, 0, 1)
