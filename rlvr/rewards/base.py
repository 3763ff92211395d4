"""The Reward protocol, and the one place where a verdict meets a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Protocol, runtime_checkable

from rlvr.types import Prompt, Rollout, Verdict


@runtime_checkable
class Reward(Protocol):
    """What users plug in with ``reward._target_=my_module.MyReward``.

    A class whose constructor takes its settings (a dataclass gets them type-checked), with one method:

    ``judge(prompts, rollouts) -> list[Verdict]``
        ``prompts`` and ``rollouts`` have the same length; ``rollouts[i]`` answers ``prompts[i]``. Returns one ``Verdict``
        per rollout in the same order. ``Verdict.score`` is the reward before length shaping, ``Verdict.correct`` the
        verifier's word. A call holds all responses of one or more prompts, those that finished since the last call, so an
        implementation may work in parallel and must not rely on which prompts come together. It is called from a thread of
        its own while the engine draws on, one call at a time. A response it cannot judge gets a status (``crashed``,
        ``timeout``, ``unsupported``), not a made-up score; an exception that leaves ``judge`` stops the run.

    A reward with a field ``verifier`` left at None gets the task's own there, to build on its verdicts.
    """

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Sequence[Verdict]: ...


def bind_verifier(reward: Reward | None, task_reward: Reward) -> Reward:
    """The reward a run trains on: the task's own, or the configured one with the task's as its ``verifier``."""
    if reward is None:
        return task_reward
    if getattr(reward, "verifier", task_reward) is None:
        assert is_dataclass(reward)
        return replace(reward, verifier=task_reward)
    return reward


def grade(reward: Reward, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts with their verdicts. ``prompts[i]`` belongs to ``rollouts[i]``.

    A response without an answer that was cut by the length limit becomes ``truncated``: only here are the verifier's word
    and the finish reason known together.
    """
    verdicts = list(reward.judge(prompts, rollouts))
    if len(verdicts) != len(rollouts):
        raise RuntimeError(f"{type(reward).__name__}.judge returned {len(verdicts)} verdicts for {len(rollouts)} rollouts")
    graded = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if rollout.truncated and verdict.status == "unparsed":
            verdict = replace(verdict, status="truncated")
        graded.append(replace(rollout, verdict=verdict))
    return graded
