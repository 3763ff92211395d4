"""Verdicts on a thread of their own, while the engine draws the next responses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from rlvr.rewards import Reward, grade
from rlvr.types import Prompt, Rollout


class Grader:
    """Grades groups of responses in the background; a call to the reward takes all groups that wait for it.

    ``with Grader(reward) as grader: grader.submit(...)``; the block ends when all are graded, or with the reward's exception.
    ``graded[key]`` is the group with its verdicts, ``busy_s`` the seconds that the reward worked.
    """

    def __init__(self, reward: Reward) -> None:
        self.graded: dict[int, list[Rollout]] = {}
        self.busy_s = 0.0
        self._reward, self._lock = reward, Lock()
        self._waiting: list[tuple[int, Prompt, Sequence[Rollout]]] = []
        self._calls: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grader")

    def __enter__(self) -> Grader:
        return self

    def submit(self, key: int, prompt: Prompt, rows: Sequence[Rollout]) -> None:
        with self._lock:
            self._waiting.append((key, prompt, rows))
        self._calls.append(self._thread.submit(self._grade_waiting))

    def _grade_waiting(self) -> None:
        with self._lock:
            groups, self._waiting = self._waiting, []
        if not groups:  # an earlier call took them
            return
        start = time.perf_counter()
        prompts = [prompt for _, prompt, rows in groups for _ in rows]
        verdicts = iter(grade(self._reward, prompts, [row for _, _, rows in groups for row in rows]))
        self.graded |= {key: [next(verdicts) for _ in rows] for key, _, rows in groups}
        self.busy_s += time.perf_counter() - start

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for call in self._calls:
                call.result()
