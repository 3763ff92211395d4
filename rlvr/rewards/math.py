r"""Mathematical answers: extract, clean, compare exactly, and only then ask the symbolic workers.

Layers: ``extract_answer`` here, text and exact numbers in ``math_compare``, sympy in killable processes in
``rlvr.math_worker``. A false positive costs more here than a false negative (pass@k takes the maximum over k answers),
so what is not understood completely is wrong, and nothing is compared with a tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from pebble import ProcessExpired

from rlvr import math_worker
from rlvr.rewards.math_compare import MAX_CHARS, Pair, Word, clean, last_box, same
from rlvr.types import InputError, Prompt, Rollout, Verdict

TIMEOUT_S = 5.0
WORKERS = 2
PATIENCE_S = 600.0  # on top of every task's own limit, before the pool itself is taken for stuck


@dataclass(frozen=True)
class MathReward:
    """Score 1 for a response whose answer equals the gold answer, else 0. ``Prompt.gold`` is the answer as a string."""

    timeout_s: float = TIMEOUT_S  # limit on one symbolic comparison, in seconds
    workers: int = WORKERS  # processes for symbolic comparisons, shared by the whole process

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise InputError(f"timeout_s: got {self.timeout_s}, expected above 0")
        if self.workers < 1:
            raise InputError(f"workers: got {self.workers}, expected at least 1")

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict per rollout, in order; all symbolic comparisons are in flight together."""
        for prompt in prompts:
            if not isinstance(prompt.gold, str):
                raise InputError(f"prompt {prompt.id}: got gold {prompt.gold!r}, expected the answer as a string")
        pairs = [(extract_answer(r.text), p.gold) for p, r in zip(prompts, rollouts, strict=True)]
        return _judge(pairs, self.timeout_s, self.workers)


def verify(response: str, gold: str) -> Verdict:
    """Judge a whole response against an already extracted gold answer such as ``72`` or ``\\frac{1}{2}``."""
    return _judge([(extract_answer(response), gold)], TIMEOUT_S, WORKERS)[0]


def equivalent(answer: str, gold: str) -> Verdict:
    """Judge an already extracted answer."""
    return _judge([(answer, gold)], TIMEOUT_S, WORKERS)[0]


_PHRASE = re.compile(r"\banswer\b[\s*]*(?:is\b[\s*]*:?|:)[\s*]*", re.IGNORECASE)


def extract_answer(response: str) -> str | None:
    """The final answer as written, or None. Every search is linear in the length of the response."""
    text = response[response.rfind("</think>") + len("</think>") :] if "</think>" in response else response
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    tagged = start >= 0
    if tagged:
        text = text[start + len("<answer>") : end]
    found, after = last_box(text), -1
    if found is None and "####" in text:
        found = text[text.rfind("####") + 4 :].strip().split("\n")[0]
    if found is None:
        for match in _PHRASE.finditer(text):
            after = match.end()
        found = re.split(r"\.\s|\n", text[after:], maxsplit=1)[0] if after >= 0 else None
    if found is None and tagged:
        found = text
    return (found.strip().rstrip("*.").lstrip("*").strip() or None) if found is not None else None


def _judge(pairs: Sequence[tuple[str | None, str]], timeout_s: float, workers: int) -> list[Verdict]:
    """Verdicts on (answer or None, gold), in order. Equal questions are put to the workers once."""
    words: list[tuple[Word, tuple[Pair, ...]]] = []
    for answer, gold in pairs:
        ask: list[Pair] = []
        words.append((_compare(answer, gold, {}, ask), tuple(dict.fromkeys(ask))))
    tasks = {asked for word, asked in words if word[0] is None}
    replies = _ask(tasks, timeout_s, workers) if tasks else {}
    verdicts = []
    for (answer, gold), (word, asked) in zip(pairs, words, strict=True):
        if answer is None:
            verdicts.append(Verdict(0.0, False, "unparsed", None, "no answer found"))
            continue
        if word[0] is None:
            reply = replies[asked]
            if isinstance(reply, Verdict):
                verdicts.append(Verdict(reply.score, reply.correct, reply.status, answer, reply.detail))
                continue
            word = _compare(answer, gold, dict(zip(asked, reply, strict=True)), [])
        equal, why = word
        assert equal is not None, f"undecided after asking: {answer!r} against {gold!r}"
        verdicts.append(Verdict(float(equal), equal, "graded", answer, why))
    return verdicts


def _compare(answer: str | None, gold: str, known: dict[Pair, tuple[bool, str]], ask: list[Pair]) -> Word:
    if answer is None:
        return False, "no answer found"
    if max(len(answer), len(gold)) > MAX_CHARS:
        equal = answer.strip() == gold.strip()
        return equal, f"{'equal' if equal else 'different'} as strings, over {MAX_CHARS} characters"
    return same(clean(answer), clean(gold), known, ask)


def _ask(
    tasks: set[tuple[Pair, ...]], timeout_s: float, workers: int
) -> dict[tuple[Pair, ...], list[tuple[bool, str]] | Verdict]:
    """What the workers say to each task, or a failed verdict. Raises when the pool cannot start or stops answering."""
    pool = math_worker.pool(workers)
    futures: dict[tuple[Pair, ...], Future[Any] | str] = {}
    for task in sorted(tasks):
        try:
            futures[task] = pool.schedule(math_worker.compare, args=(list(task),), timeout=timeout_s)
        except RuntimeError as broken:  # the pool broke after the first tasks went in
            futures[task] = f"RuntimeError: {broken}"
    patience = PATIENCE_S + len(tasks) * (timeout_s + 5.0)
    replies: dict[tuple[Pair, ...], list[tuple[bool, str]] | Verdict] = {}
    for task, future in futures.items():
        if isinstance(future, str):
            replies[task] = Verdict(0.0, False, "crashed", None, future)
            continue
        error = future.exception(timeout=patience)
        if error is None:
            replies[task] = future.result()
        elif isinstance(error, FutureTimeout):
            replies[task] = Verdict(0.0, False, "timeout", None, f"timed out after {timeout_s:g} s")
        else:
            code = f", exit code {error.exitcode}" if isinstance(error, ProcessExpired) else ""
            replies[task] = Verdict(0.0, False, "crashed", None, f"{type(error).__name__}: {error}{code}"[:300])
    return replies
