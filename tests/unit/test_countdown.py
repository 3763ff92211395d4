"""Countdown: the verifier to the letter, every right answer listed, problem sets disjoint, traces true."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import islice, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.rewards.base import grade
from rlvr.rewards.countdown import CountdownReward, verify
from rlvr.tasks.countdown import (
    CountdownTask,
    CountdownTraces,
    correct_answers,
    draw_problem,
    problem_key,
    problem_sets,
    prompt_text,
    random_trace,
)
from rlvr.types import InputError, Prompt, Rollout

GOLD = {"numbers": [8, 3, 4], "target": 20}
NUMBERS = st.lists(st.integers(1, 9), min_size=3, max_size=4)


# ---- verifier ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, numbers, target",
    [
        ("8*3=24,24-4=20", [8, 3, 4], 20),
        ("3*8=24,24-4=20", [8, 3, 4], 20),
        ("3*8=24,24-4=20", [4, 3, 8], 20),
        ("5-5=0,0*7=0", [5, 5, 7], 0),
        ("5-5=0,0+7=7", [5, 5, 7], 7),
        ("2*3=6,6-6=0,0+9=9", [2, 3, 6, 9], 9),
        ("1+1=2", [1, 1], 2),
    ],
)
def test_right_answers(response: str, numbers: list[int], target: int) -> None:
    verdict = verify(response, {"numbers": numbers, "target": target})
    assert (verdict.score, verdict.correct, verdict.status) == (1.0, True, "graded")
    assert verdict.extracted == response.split(",")[-1]


@pytest.mark.parametrize(
    "response, detail",
    [
        pytest.param("8*3=25,25-4=21", "8*3=25 is false", id="wrong arithmetic"),
        pytest.param("8*3=24,24-4=21", "24-4=21 is false", id="wrong arithmetic in the last step"),
        pytest.param("8*3=24,24-4=20,20*1=20", "1 is not at hand", id="extra number"),
        pytest.param("5*4=20", "5 is not at hand", id="number not at hand"),
        pytest.param("8*3=24,8-4=4", "8 is not at hand", id="number used twice"),
        pytest.param("4+4=8,8+3=11", "4 is not at hand", id="one number as both operands"),
        pytest.param("8*3=24,24-24=0", "24 is not at hand", id="one result as both operands"),
        pytest.param("24-4=20,8*3=24", "24 is not at hand", id="result used before it is made"),
        pytest.param("8+4=12", "left with 3 12, wanted 20", id="unused number"),
        pytest.param("8*3=24,24+4=28", "left with 28, wanted 20", id="target missed"),
        pytest.param("3-8=5,5*4=20", "3-8=5 is false", id="negative intermediate written without its sign"),
    ],
)
def test_graded_and_wrong(response: str, detail: str) -> None:
    verdict = verify(response, GOLD)
    assert (verdict.score, verdict.correct, verdict.status) == (0.0, False, "graded")
    assert detail in verdict.detail
    assert verdict.extracted in response.split(",")


def test_an_unused_number_equal_to_the_target_does_not_help() -> None:
    assert not verify("8*3=24", {"numbers": [8, 3, 20], "target": 20}).correct
    assert not verify("3-3=0", {"numbers": [3, 3, 20], "target": 20}).correct


UNPARSED = ["", ",", "8", "20", "8*3", "8*3=", "=24", "8/3=2", "8*3=24,", ",8*3=24", "8*3=24,24-4", "8*3=24;24-4=20"]
UNPARSED += [
    "8*3=24,,24-4=20",
    "8*3=24, 24-4=20",
    " 8*3=24,24-4=20",
    "8 * 3 = 24,24-4=20",
    "8*3=24,24-4=20\n",
    "8*3=24,24-4=20.",
]
UNPARSED += ["8*3=24,24-4=20 the end", "8*3=24,24-4=20?", "8*3=24,24-4=20=20", "08*3=24,24-4=20", "8*3=024,24-4=20", "00+8=8"]
UNPARSED += ["3-8=-5,-5+4=-1", "+8*3=24,24-4=20", "8*3=24.0,24-4=20", "８*3=24,24-4=20", "٨*3=24,24-4=20", "8*3=24\n,24-4=20"]


@pytest.mark.parametrize("response", UNPARSED)
def test_unparsed(response: str) -> None:
    verdict = verify(response, GOLD)
    assert (verdict.score, verdict.correct, verdict.status, verdict.extracted) == (0.0, False, "unparsed", None)


def test_reward_judges_each_response_against_its_own_prompt() -> None:
    prompts = [Prompt(str(i), "", {"numbers": [8, 3, 4], "target": target}, "test") for i, target in enumerate((20, 28, 20))]
    texts = ["8*3=24,24-4=20", "8*3=24,24-4=20", "8*3=2"]
    rollouts = [Rollout(p.id, 0, 0, (1,), (2,), (0.0,), "length", t, 0) for p, t in zip(prompts, texts, strict=True)]
    rollouts.append(Rollout("0", 1, 0, (1,), (2,), (0.0,), "length", "8*3=", 0))
    verdicts = [row.verdict for row in grade(CountdownReward(), [*prompts, prompts[0]], rollouts)]
    assert [v.correct for v in verdicts] == [True, False, False, False]
    assert [v.status for v in verdicts] == ["graded", "graded", "graded", "truncated"]


# ---- traces and enumeration -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(numbers=NUMBERS, seed=st.integers(0, 10**9))
def test_random_trace_verifies_against_its_own_result(numbers: list[int], seed: int) -> None:
    steps, result = random_trace(numbers, random.Random(seed))
    assert verify(",".join(steps), {"numbers": numbers, "target": result}).correct
    assert ",".join(steps) in correct_answers(numbers, result)


@settings(max_examples=30, deadline=None)
@given(numbers=NUMBERS, seed=st.integers(0, 10**9), data=st.data())
def test_listed_answers_verify_and_edited_ones_only_when_listed(numbers: list[int], seed: int, data: st.DataObject) -> None:
    _, target = random_trace(numbers, random.Random(seed))
    gold, answers = {"numbers": numbers, "target": target}, correct_answers(numbers, target)
    assert answers == sorted(set(answers)) and len(answers) > 0
    assert all(verify(answer, gold).correct for answer in answers)
    answer = data.draw(st.sampled_from(answers))
    place = data.draw(st.integers(0, len(answer) - 1))
    for character in "0123456789+-*=,":
        for edited in (answer[:place] + character + answer[place + 1 :], answer[:place] + character + answer[place:]):
            assert verify(edited, gold).correct == (edited in answers)


@pytest.mark.parametrize("numbers", [(1, 2, 3), (2, 2, 3), (1, 1, 1), (3, 3, 3), (3, 1, 3)])
def test_enumeration_against_brute_force(numbers: tuple[int, ...]) -> None:
    """Every chain of two true steps with operands up to 9, the largest value two of these numbers can make."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    first, second = (
        [(f"{a}{s}{b}={f(a, b)}", f(a, b)) for a, b in product(range(top + 1), repeat=2) for s, f in operations.items()]
        for top in (3, 9)
    )
    found: dict[int, list[str]] = defaultdict(list)
    for (one, _), (two, result) in product(first, second):
        if verify(f"{one},{two}", {"numbers": list(numbers), "target": result}).correct:
            found[result].append(f"{one},{two}")
    assert found
    for target in range(30):
        assert correct_answers(numbers, target) == sorted(found[target]), target
        assert all(correct_answers(order, target) == sorted(found[target]) for order in permutations(numbers))


def test_large_numbers_are_listed_and_verified_alike() -> None:
    numbers = [40001, 39999, 40000, 40000]  # 40000 * 40000 - 40001 * 39999 = 1, by way of numbers of ten digits
    answers = correct_answers(numbers, 1)
    assert answers and all(verify(answer, {"numbers": numbers, "target": 1}).correct for answer in answers)


# ---- the task ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_train_and_test_are_disjoint_and_solvable(seed: int) -> None:
    task = CountdownTask(train_problems=400, test_problems=100, problem_seed=seed)
    sets = problem_sets(task)
    keys = {split: {problem_key(problem) for problem in problems} for split, problems in sets.items()}
    assert (len(keys["train"]), len(keys["test"])) == (400, 100)
    assert not keys["train"] & keys["test"]
    assert [sum(len(numbers) == 4 for numbers, _ in sets[split]) for split in ("train", "test")] == [200, 50]
    assert all(correct_answers(*problem) for problem in sets["test"])
    assert all(1 <= min(numbers) and max(numbers) <= 9 and 1 <= target <= 99 for numbers, target in sets["train"])


def test_test_set_depends_on_the_problem_seed_alone() -> None:
    small, large = (CountdownTask(train_problems=size, test_problems=50) for size in (10, 500))
    assert small.prompts("test") == large.prompts("test")
    assert problem_sets(large)["train"][:10] == problem_sets(small)["train"]
    assert small.prompts("test") != CountdownTask(train_problems=10, test_problems=50, problem_seed=1).prompts("test")


def test_prompts_of_the_default_task() -> None:
    task = CountdownTask()
    prompts = task.prompts("test")
    assert len(prompts) == 128 and len({prompt.id for prompt in prompts}) == 128
    for prompt in prompts:
        numbers, target = prompt.text.removesuffix("?").split(":")
        assert prompt.gold == {"numbers": [int(n) for n in numbers.split()], "target": int(target)}
        answers = task.correct_answers(prompt)
        assert answers and max(map(len, answers)) < 28
    with pytest.raises(InputError, match="train"):
        task.prompts("validation")


def test_too_many_problems_are_refused_with_the_number_found() -> None:
    with pytest.raises(InputError, match=r"task\.test_problems: got 500.*task\.max_number"):
        CountdownTask(test_problems=500, max_number=2, max_target=5).prompts("test")


@pytest.mark.parametrize("seed", range(3))
def test_drawn_problems_are_solvable(seed: int) -> None:
    rng = random.Random(seed)
    for size in (3, 4):
        assert all(correct_answers(*draw_problem(size, 9, 99, rng)) for _ in range(20))


# ---- pre-training traces ----------------------------------------------------------------------------------------------

TASK = CountdownTask(train_problems=100, test_problems=400)


def parse(text: str) -> tuple[tuple[int, ...], int]:
    numbers, target = text.removesuffix("?").split(":")
    return tuple(map(int, numbers.split())), int(target)


def test_traces_are_true_and_leave_out_the_test_problems() -> None:
    held_out = {problem_key(problem) for problem in problem_sets(TASK)["test"]}
    pairs = list(islice(CountdownTraces(TASK, unfinished_share=0.0), 3000))
    for text, response in pairs:
        numbers, target = parse(text)
        assert prompt_text((numbers, target)) == text
        assert problem_key((numbers, target)) not in held_out
        result = int(response.rpartition("=")[2])
        assert verify(response, {"numbers": numbers, "target": result}).correct


def test_share_of_four_number_traces_whatever_is_held_out() -> None:
    pairs = list(islice(CountdownTraces(TASK, four_number_share=0.5), 3000))
    assert 1390 < sum(len(parse(text)[0]) == 4 for text, _ in pairs) < 1610  # half of 3000, four standard deviations


@pytest.mark.parametrize("three, four", [(0.0, 0.5), (0.25, 0.25), (1.0, 0.0)])
def test_share_of_hits(three: float, four: float) -> None:
    """The stated share, and on top of it the misses that reach their target by chance (a tenth of them at most)."""
    hits: dict[int, list[bool]] = {3: [], 4: []}
    settings = {"hit_share_three": three, "hit_share_four": four, "unfinished_share": 0.0}
    for text, response in islice(CountdownTraces(TASK, **settings), 3000):
        numbers, target = parse(text)
        hits[len(numbers)].append(verify(response, {"numbers": numbers, "target": target}).correct)
    for size, share in ((3, three), (4, four)):
        found = sum(hits[size]) / len(hits[size])
        assert share - 0.05 < found < share + (1 - share) * 0.13 + 0.05, size


def test_traces_repeat_with_their_seed() -> None:
    traces = CountdownTraces(TASK, seed=3)
    first = list(islice(traces, 50))
    assert list(islice(traces, 50)) == first
    assert list(islice(CountdownTraces(TASK, seed=4), 50)) != first


def test_share_of_unfinished_traces() -> None:
    """They are true as far as they go, stop before every number is used, and are never right."""
    finished = 0
    for text, response in islice(CountdownTraces(TASK, unfinished_share=0.4), 3000):
        numbers, target = parse(text)
        verdict = verify(response, {"numbers": numbers, "target": target})
        steps = response.count(",") + 1
        finished += steps == len(numbers) - 1
        assert verdict.status == "graded" and (not verdict.correct or steps == len(numbers) - 1)
    assert 1690 < finished < 1910  # 60 % of 3000, four standard deviations


def test_most_traces_of_the_base_miss_their_target() -> None:
    pairs = list(islice(CountdownTraces(CountdownTask()), 3000))
    golds = [parse(text) for text, _ in pairs]
    hits = sum(verify(r, {"numbers": n, "target": t}).correct for (_, r), (n, t) in zip(pairs, golds, strict=True))
    assert hits < 1200
