"""pass@k and its intervals, from counts of right answers per problem. Plain numbers in, plain numbers out.

The estimand is named: *population* treats the problems as a sample of problems like them (the usual claim).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k answers is right, from ``correct`` of ``n``: exact.

    ``1 - C(n - c, k) / C(n, k)``. Source: Chen et al. (arXiv 2107.03374), eq. 1. Raises ValueError for k > n, which n
    answers say nothing about, and for counts out of range.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k: got k = {k} with n = {n} answers per problem, expected 1 <= k <= n; sample more or lower k")
    if not 0 <= correct <= n:
        raise ValueError(f"pass@k: got {correct} correct of n = {n}, expected 0 <= correct <= n")
    ways = math.comb(n, k)
    return (ways - math.comb(n - correct, k)) / ways  # whole numbers up to the one division: correctly rounded


def problem_curve(n: int, correct: Sequence[int], k: int) -> NDArray[np.float64]:
    """pass@k of every problem: ``[problems]``."""
    table = {count: pass_at_k(n, count, k) for count in set(correct)}
    return np.array([table[count] for count in correct], dtype=np.float64)


def mean_interval(values: NDArray[np.float64], whole: bool, level: float = 0.95) -> Interval:
    """Interval of the population mean of per-problem values in [0, 1].

    ``whole``: every value is 0 or 1 (k = n), and Wilson's interval holds. Otherwise a t-interval after adding two
    pseudo-problems of 0 and 1, which covers where bootstrap and plain t collapse near 0 and 1; clipped to [0, 1].
    """
    if whole:
        return wilson_interval(round(float(values.sum())), len(values), level)
    padded = np.concatenate([values, [0.0, 1.0]])
    half = stats.t.ppf((1 + level) / 2, len(padded) - 1) * padded.std(ddof=1) / math.sqrt(len(padded))
    return max(0.0, float(padded.mean() - half)), min(1.0, float(padded.mean() + half))


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion. Source: Wilson (1927)."""
    interval = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(base: NDArray[np.float64], model: NDArray[np.float64], level: float = 0.95) -> tuple[float, float, float]:
    """model - base over the same problems, with a paired t-interval: (difference, lower, upper).

    All differences equal gives an interval of width zero at that value only when it comes from more than one problem.
    """
    gap = model - base
    if len(gap) < 2:
        return float(gap.mean()), -1.0, 1.0
    half = stats.t.ppf((1 + level) / 2, len(gap) - 1) * gap.std(ddof=1) / math.sqrt(len(gap))
    return float(gap.mean()), max(-1.0, float(gap.mean() - half)), min(1.0, float(gap.mean() + half))


def crossover(ks: Sequence[int], differences: dict[int, tuple[float, float, float]]) -> dict[str, object]:
    """Where the curves cannot be told apart: the k at which the paired interval holds 0, as runs of neighbouring k.

    ``base_above_from``: the smallest k from which on the base is above at every k; ``model_above_to``: the largest k up to
    which the model is above at every k; None when there is none. ``open_above``: the largest k is undecided.
    """
    sign = [0 if low <= 0 <= high else (1 if low > 0 else -1) for _, low, high in (differences[k] for k in ks)]
    runs: list[list[int]] = []
    for index, k in enumerate(ks):
        if sign[index] == 0:
            if index and sign[index - 1] == 0:
                runs[-1][1] = k
            else:
                runs.append([k, k])
    base_from = _tail(sign, -1)
    model_to = _tail(sign[::-1], 1)
    return {
        "undecided_k": runs,
        "open_above": bool(sign) and sign[-1] == 0,
        "base_above_from": None if base_from is None else ks[base_from],
        "model_above_to": None if model_to is None else ks[len(ks) - 1 - model_to],
    }


def _tail(sign: Sequence[int], wanted: int) -> int | None:
    """Index from which on every entry is ``wanted``; None when the last is not."""
    start = len(sign)
    while start and sign[start - 1] == wanted:
        start -= 1
    return start if start < len(sign) else None


def solvable_sets(n: int, base: Sequence[int], model: Sequence[int], false_discovery_rate: float = 0.10) -> dict[str, int]:
    """Problems solved by both, by one only, by neither, from counts of right answers; ``undecided`` when luck explains it.

    A problem with a right answer from one model only counts as that model's when Fisher's exact test on the two counts is
    significant at the given false-discovery rate (Benjamini-Hochberg over all such problems).
    """
    one_sided = [i for i in range(len(base)) if (base[i] > 0) != (model[i] > 0)]
    sets = {
        "both": sum(b > 0 and m > 0 for b, m in zip(base, model, strict=True)),
        "base_only": 0,
        "model_only": 0,
        "undecided": len(one_sided),
        "neither": sum(b == 0 and m == 0 for b, m in zip(base, model, strict=True)),
    }
    if one_sided:
        tables = [[[base[i], n - base[i]], [model[i], n - model[i]]] for i in one_sided]
        adjusted = stats.false_discovery_control([stats.fisher_exact(table).pvalue for table in tables])
        for i, p_value in zip(one_sided, adjusted, strict=True):
            if p_value <= false_discovery_rate:
                sets["undecided"] -= 1
                sets["base_only" if base[i] else "model_only"] += 1
    return sets
