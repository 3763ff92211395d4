"""The numbers of a report in words: values with their intervals, and what the paired differences establish."""

from __future__ import annotations

import math
from typing import Any

from rlvr.boundary.report_sources import Json


def number(value: Any, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if isinstance(value, int | float) and math.isfinite(value) else "n/a"


def with_interval(value: Any, interval: Any, sign: str = "") -> str:
    if not interval or len(interval) != 2:
        return number(value, sign)
    return f"{number(value, sign)} [{number(interval[0], sign)}, {number(interval[1], sign)}]"


def pass_words(model: Json, k: int) -> str:
    return with_interval(model.get("pass_at_k", {}).get(str(k)), model.get("ci95", {}).get(str(k)))


def difference_words(comparison: Json, k: int) -> str:
    """Model minus base at ``k``, with signs."""
    value, *interval = comparison["difference"].get(str(k)) or [None]
    return with_interval(value, interval, "+")


def ends(boundary: Json) -> tuple[Json, Json, Json]:
    """The base model, the last model, and the comparison of the two (each may be empty)."""
    models, comparisons = boundary.get("models") or [], boundary.get("comparisons") or []
    if not models:
        return {}, {}, {}
    base_name = comparisons[0]["base"] if comparisons else models[0]["name"]
    base = next((m for m in models if m["name"] == base_name), models[0])
    others = [m for m in models if m is not base]
    if not others:
        return base, {}, {}
    steps = [m for m in others if m.get("step") is not None]
    last = max(steps, key=lambda m: m["step"]) if len(steps) == len(others) else others[-1]
    pair = (c for c in comparisons if c["base"] == base["name"] and c["model"] == last["name"])
    return base, last, next(pair, {})


def summary(boundary: Json) -> list[str]:
    """The result in words: levels of both models, then what the paired differences establish."""
    base, last, comparison = ends(boundary)
    if not base:
        return []
    ks = sorted({1, max(boundary["k"])} & set(boundary["k"]))
    estimand = boundary.get("estimand", "population")
    over = f"over {'the population of problems like ' if estimand == 'population' else ''}these {len(base['problems'])}"
    over += "" if estimand == "population" else f" problems only, estimand: {estimand}"
    if not last:
        levels = " and ".join(f"pass@{k} is {pass_words(base, k)}" for k in ks)
        return [f"For {base['name']}, {levels} ({over}; 95 % intervals in brackets); no other model was measured."]
    levels = " and ".join(f"pass@{k} goes from {pass_words(base, k)} to {pass_words(last, k)}" for k in ks)
    words = [f"From {base['name']} to {last['name']}, {levels} ({over}; 95 % intervals in brackets)."]
    if not comparison:
        return [*words, "boundary.json holds no paired comparison of these two models, so no direction is established."]
    parts = []
    for k in (k for k in ks if str(k) in comparison["difference"]):
        _, lower, upper = comparison["difference"][str(k)]
        where = f"at k = {k} it is {difference_words(comparison, k)}"
        if lower > 0 or upper < 0:
            direction = "above" if lower > 0 else "below"
            parts.append(f"{where}, so {last['name']} is {direction} {base['name']} (the interval excludes 0)")
        else:
            parts.append(f"{where}, so the direction is not established (the interval includes 0)")
    return [*words, f"The paired difference, {last['name']} minus {base['name']}: {'; '.join(parts)}."]


def crossover_words(comparison: Json) -> str:
    """Which curve is above at which k, as far as the paired intervals tell."""
    crossover, parts = comparison.get("crossover") or {}, []
    if (upto := crossover.get("model_above_to")) is not None:
        parts.append(f"model above to k = {upto}")
    if spans := crossover.get("undecided_k"):
        named = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in spans)
        parts.append(f"undecided at k = {named}{' and possibly beyond' if crossover.get('open_above') else ''}")
    if (start := crossover.get("base_above_from")) is not None:
        parts.append(f"base above from k = {start}")
    return "; ".join(parts) or "n/a"
