"""Exact verifier of Countdown: the whole trace is checked, not only its last number.

A problem is a bag of positive integers and a target; an answer is a chain of steps ``8*3=24,24-4=20`` in which each step
takes two numbers from the bag, puts their exact result back, and the last result, alone in the bag, is the target. Every
number is used exactly once; intermediate results may not be negative. The task is that of TinyZero (Pan et al., 2025),
with the working shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlvr.types import Prompt, Rollout, Verdict

NUMBER = "(0|[1-9][0-9]{0,17})"  # no leading zeros: one spelling per number, so that every correct string can be enumerated
STEP = re.compile(rf"{NUMBER}([-+*]){NUMBER}={NUMBER}")
TRACE = re.compile(rf"{STEP.pattern}(?:,{STEP.pattern})*")

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def verify(response: str, gold: Mapping) -> Verdict:
    """Judge a trace. ``gold`` is ``{"numbers": [8, 3, 4], "target": 20}``; ``unparsed`` when it is not a chain of steps."""
    if not TRACE.fullmatch(response):
        return Verdict(0.0, False, "unparsed", None, "not a chain of steps a+b=c,...")
    bag = Counter(gold["numbers"])
    steps = response.split(",")
    for number, step in enumerate(steps, start=1):
        match = STEP.fullmatch(step)
        assert match is not None
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        used = Counter((left, right))
        if used - bag:
            missing = ", ".join(str(value) for value in (used - bag))
            return _wrong(step, f"step {number}: {missing} is not at hand")
        if OPERATIONS[match[2]](left, right) != result:
            return _wrong(step, f"step {number}: {step} is false")
        bag = bag - used + Counter((result,))
    left_over = sorted(bag.elements())
    if left_over != [gold["target"]]:
        return _wrong(steps[-1], f"left with {' '.join(map(str, left_over))}, wanted {gold['target']} alone")
    return Verdict(1.0, True, "graded", steps[-1], "every step holds and the target is reached")


def _wrong(extracted: str, detail: str) -> Verdict:
    return Verdict(0.0, False, "graded", extracted, detail)


@dataclass(frozen=True)
class CountdownReward:
    """1 for a trace that reaches the target, else 0."""

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [verify(rollout.text, prompt.gold) for prompt, rollout in zip(prompts, rollouts, strict=True)]
