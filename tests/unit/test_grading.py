"""Grading beside generation: what overlaps, what comes together, what an exception does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from rlvr.data import PromptStream
from rlvr.rollout.collect import Collector
from rlvr.rollout.grading import Grader
from rlvr.types import Completion, Prompt, Request, Rollout, Sampling, SamplingPlan, Verdict

PROMPTS = [Prompt(id=f"p{i}", text=f"{i} 1 2:3?", gold=None, source="test") for i in range(4)]
PATIENCE_S = 60.0  # never reached where grading and generation overlap


@dataclass
class Judge:
    """Right when the response has an even number of tokens; remembers the prompts of each call."""

    called: threading.Event = field(default_factory=threading.Event)
    calls: list[list[str]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        self.calls.append([prompt.id for prompt in prompts])
        self.threads.add(threading.get_ident())
        self.called.set()
        even = [len(rollout.tokens) % 2 == 0 for rollout in rollouts]
        return [Verdict(float(right), right, "graded") for right in even]


def answer(index: int) -> Completion:
    return Completion((2,) * (index + 1), (0.0,) * (index + 1), "stop")


@dataclass
class WaitingEngine:
    """Streams the first prompt and draws no further until that one has been graded."""

    judge: Judge

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for index in reversed(range(len(requests))):  # as they finish: not in the order of the requests
            yield index, [answer(index) for _ in requests[index].seeds]
            if index == len(requests) // 2 - 1:  # a prompt's responses and its greedy one are out
                assert self.judge.called.wait(PATIENCE_S), "generation went on for a minute and nothing was graded"


class AtOnce:
    """An engine with ``generate`` alone."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return [
            [Completion((2,) * (index + 1), (0.0,) * (index + 1), "stop") for _ in r.seeds] for index, r in enumerate(requests)
        ]


class OneProcess:
    rank, world_size = 0, 1

    def gather(self, value: object) -> list[object]:
        return [value]

    def phase(self, name: str) -> None: ...


class Tokenizer:
    """Knows one token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


class Plain:
    plan = SamplingPlan(greedy=True)


def collector(engine: object, judge: object) -> Collector:
    stream = PromptStream(PROMPTS, seed=0)
    parts = (engine, Tokenizer(), judge, stream, Sampling(max_new_tokens=8), 4, 3, 0, OneProcess())
    return Collector(*parts)  # type: ignore[arg-type]


def test_finished_prompts_are_graded_while_the_engine_draws_on() -> None:
    judge = Judge()
    data = collector(WaitingEngine(judge), judge).collect(Plain(), 0)  # type: ignore[arg-type]
    assert len(judge.calls) > 1 and threading.get_ident() not in judge.threads and len(judge.threads) == 1
    assert sorted(prompt for call in judge.calls for prompt in call) == sorted(p.id for p in PROMPTS for _ in range(4))
    assert [row.prompt_id for row in data.rollouts] == [prompt.id for prompt in data.prompts for _ in range(3)]
    for row in (*data.rollouts, *data.greedy):
        assert row.verdict is not None and row.verdict.correct == (len(row.tokens) % 2 == 0)
    assert [row.prompt_id for row in data.greedy] == [prompt.id for prompt in data.prompts]
    assert data.timings_s.keys() == {f"time/{name}_s" for name in ("generate", "verify", "verify_work", "gather")}


def test_streaming_changes_no_rollout() -> None:
    judge = Judge()
    streamed = collector(WaitingEngine(judge), judge).collect(Plain(), 0)  # type: ignore[arg-type]
    at_once = collector(AtOnce(), Judge()).collect(Plain(), 0)  # type: ignore[arg-type]
    assert streamed.rollouts == at_once.rollouts and streamed.greedy == at_once.greedy


def test_groups_that_wait_are_graded_in_one_call() -> None:
    """The first call blocks until all others are submitted: they come together in the second."""
    all_there = threading.Event()

    class Slow(Judge):
        def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
            assert all_there.wait(PATIENCE_S)
            return super().judge(prompts, rollouts)

    judge = Slow()
    with Grader(judge) as grader:
        for key, prompt in enumerate(PROMPTS):
            grader.submit(key, prompt, [rollout(prompt)] * (key + 1))
        all_there.set()
    assert len(judge.calls) <= 2 and {key: len(rows) for key, rows in grader.graded.items()} == {0: 1, 1: 2, 2: 3, 3: 4}


def rollout(prompt: Prompt) -> Rollout:
    return Rollout(prompt.id, 0, 0, (1,), (2,), (0.0,), "stop", "", 0)


def test_an_error_of_the_reward_leaves_the_block() -> None:
    class Broken:
        def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
            raise ZeroDivisionError("in the reward")

    with pytest.raises(ZeroDivisionError, match="in the reward"):
        collector(AtOnce(), Broken()).collect(Plain(), 0)  # type: ignore[arg-type]


def test_an_error_of_the_engine_is_not_hidden_by_the_grader() -> None:
    class Dying(WaitingEngine):
        def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
            yield 0, [answer(0) for _ in requests[0].seeds]
            raise ZeroDivisionError("in the engine")

    with pytest.raises(ZeroDivisionError, match="in the engine"):
        collector(Dying(Judge()), Judge()).collect(Plain(), 0)  # type: ignore[arg-type]
