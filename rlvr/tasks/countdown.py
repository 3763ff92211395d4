"""Countdown: reach a target from three or four numbers with + - *. Small enough to know every right answer.

Prompt ``8 3 4:20?``, answer ``8*3=24,24-4=20`` (judged by ``rlvr.rewards.countdown``). Problems are drawn from a seed, the
test set first; the training set and the pre-training traces leave out every problem of the test set, whatever the order
of its numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlvr.rewards.countdown import OPERATIONS, CountdownReward
from rlvr.types import InputError, Prompt

Problem = tuple[tuple[int, ...], int]  # numbers in the order shown, target


def problem_key(problem: Problem) -> Problem:
    """The problem whatever the order of its numbers: what "the same problem" means for disjoint sets."""
    return tuple(sorted(problem[0])), problem[1]


def prompt_text(problem: Problem) -> str:
    return f"{' '.join(map(str, problem[0]))}:{problem[1]}?"


def random_trace(numbers: Sequence[int], rng: random.Random) -> tuple[list[str], int]:
    """A correct chain of steps over all numbers, uniform over the choices at each step, and its result."""
    bag, steps = list(numbers), []
    while len(bag) > 1:
        left = bag.pop(rng.randrange(len(bag)))
        right = bag.pop(rng.randrange(len(bag)))
        symbol = rng.choice([s for s in OPERATIONS if s != "-" or left >= right])
        result = OPERATIONS[symbol](left, right)
        steps.append(f"{left}{symbol}{right}={result}")
        bag.append(result)
    return steps, bag[0]


def correct_answers(numbers: Sequence[int], target: int) -> list[str]:
    """Every answer string that the verifier accepts, sorted. A few for three numbers, up to hundreds for four."""
    found: set[str] = set()

    def extend(bag: tuple[int, ...], steps: tuple[str, ...]) -> None:
        if len(bag) == 1:
            if bag[0] == target:
                found.add(",".join(steps))
            return
        for i, left in enumerate(bag):
            for j, right in enumerate(bag):
                if i == j:
                    continue
                rest = tuple(value for k, value in enumerate(bag) if k not in (i, j))
                for symbol, operation in OPERATIONS.items():
                    result = operation(left, right)
                    if result >= 0:
                        extend((*rest, result), (*steps, f"{left}{symbol}{right}={result}"))

    extend(tuple(numbers), ())
    return sorted(found)


def draw_problem(num_numbers: int, max_number: int, max_target: int, rng: random.Random) -> Problem:
    """A solvable problem: random numbers, and the result of a random trace over them as the target."""
    while True:
        numbers = tuple(rng.randint(1, max_number) for _ in range(num_numbers))
        _, target = random_trace(numbers, rng)
        if 1 <= target <= max_target:
            return numbers, target


@lru_cache(maxsize=8)
def problem_sets(task: CountdownTask) -> dict[str, tuple[Problem, ...]]:
    """The disjoint sets ``test`` and ``train`` of a task's settings."""
    rng = random.Random(f"countdown {task.problem_seed}")
    sizes = {"test": task.test_problems, "train": task.train_problems}
    seen: set[Problem] = set()
    sets: dict[str, tuple[Problem, ...]] = {}
    for split, size in sizes.items():
        chosen: list[Problem] = []
        for _ in range(60 * size):
            if len(chosen) == size:
                break
            # exactly the stated share of four-number problems, spread evenly over the order
            four = int((len(chosen) + 1) * task.four_number_share) > int(len(chosen) * task.four_number_share)
            problem = draw_problem(4 if four else 3, task.max_number, task.max_target, rng)
            if problem_key(problem) not in seen:
                seen.add(problem_key(problem))
                chosen.append(problem)
        if len(chosen) < size:
            raise InputError(
                f"task.{split}_problems: got {size}, but with numbers up to {task.max_number} and targets up to "
                f"{task.max_target} only {len(chosen)} different problems were found; ask for fewer or raise task.max_number"
            )
        sets[split] = tuple(chosen)
    return sets


@dataclass(frozen=True)
class CountdownTask:
    """Countdown problems from a seed."""

    train_problems: int = 3000
    test_problems: int = 128
    four_number_share: float = 0.5  # of both sets; the others have three numbers
    max_number: int = 9
    max_target: int = 99
    problem_seed: int = 0  # apart from the run's seed, so that runs of several seeds share their problems

    def __post_init__(self) -> None:
        if self.train_problems < 1 or self.test_problems < 1:
            raise InputError("train_problems and test_problems: expected at least 1 of each")
        if not 0 <= self.four_number_share <= 1:
            raise InputError(f"four_number_share: got {self.four_number_share}, expected a value in [0, 1]")
        if self.max_number < 2 or self.max_target < 1:
            raise InputError("max_number: expected at least 2; max_target: expected at least 1")

    @property
    def name(self) -> str:
        return "countdown"

    def prompts(self, split: str) -> list[Prompt]:
        sets = problem_sets(self)
        if split not in sets:
            raise InputError(f"split: got {split!r}, Countdown has {' and '.join(sets)}")
        return [
            Prompt(
                id=f"{split}-{index:05d}",
                text=prompt_text(problem),
                gold={"numbers": list(problem[0]), "target": problem[1]},
                source=f"countdown/{split}",
            )
            for index, problem in enumerate(sets[split])
        ]

    def reward(self) -> CountdownReward:
        return CountdownReward()

    def correct_answers(self, prompt: Prompt) -> list[str]:
        """Every right response to the prompt: what exact solve probabilities are summed over."""
        return correct_answers(prompt.gold["numbers"], prompt.gold["target"])


@dataclass(frozen=True)
class CountdownTraces:
    """Endless (prompt, response) pairs for pre-training: correct arithmetic, most of which misses the stated target.

    A pair hits its target with the stated probability; otherwise the trace is random, the target is the result of another
    random trace over the same numbers, and only chance makes the two meet (about one time in ten with three numbers).
    """

    task: CountdownTask
    four_number_share: float = 0.4
    hit_share_three: float = 0.8  # of the three-number pairs, response reaches the target
    hit_share_four: float = 0.0  # of the four-number pairs, beyond chance
    unfinished_share: float = 0.4  # of all pairs: the trace stops before every number is used, which is always wrong
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"countdown traces {self.seed}")
        held_out = {problem_key(problem) for problem in problem_sets(self.task)["test"]}
        while True:
            four = rng.random() < self.four_number_share
            hit = rng.random() < (self.hit_share_four if four else self.hit_share_three)
            numbers, target = self._free_problem(4 if four else 3, held_out, rng)
            steps, result = random_trace(numbers, rng)
            while hit and result != target:
                steps, result = random_trace(numbers, rng)
            if rng.random() < self.unfinished_share:
                steps = steps[: rng.randrange(1, len(steps))]
            yield prompt_text((numbers, target)), ",".join(steps)

    def _free_problem(self, num_numbers: int, held_out: set[Problem], rng: random.Random) -> Problem:
        while True:  # redrawn at the same size, so that the shares stay as stated
            problem = draw_problem(num_numbers, self.task.max_number, self.task.max_target, rng)
            if problem_key(problem) not in held_out:
                return problem
