"""What travels along the arrows of a step: Prompt -> Rollout -> Batch. Frozen; add data with ``dataclasses.replace``.

Conventions, stated once and true everywhere:

* Letters: P prompts per step, G rollouts per prompt, B = P * G rows, T padded positions (prompt + response), V vocabulary.
* Right padding. ``response_mask [B, T]`` is True on tokens the policy sampled, the end-of-sequence token included.
* A ``[B, T]`` quantity at ``[b, t]`` belongs to ``tokens[b, t]``; log-probs are in nats. Producers write 0.0 outside the
  mask, consumers select with ``where`` and never multiply, so NaN in the padding changes nothing.
* ``groups [B]`` says which prompt a row came from. Nothing relies on the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlvr.errors import InputError

VERDICT_STATUSES = ("graded", "unparsed", "truncated", "timeout", "crashed", "unsupported")
FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem as it is put to the model."""

    id: str  # unique within its task
    text: str  # what the model reads; with ``chat`` the user's turn
    gold: Any  # answer key, whatever the task's verifier reads (JSON-serialisable)
    source: str  # task and split it came from
    chat: bool = False  # render with the tokenizer's chat template
    system: str | None = None  # system turn, with ``chat`` only


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's word on one response.

    ``status``: ``graded`` (judged right or wrong), ``unparsed`` (no answer found), ``truncated`` (no answer found and the
    response was cut by the length limit), ``timeout`` (judging ran out of time), ``crashed`` (the grader failed: *not* a
    wrong answer), ``unsupported`` (this verifier cannot judge the problem). Only ``graded`` can be correct.
    """

    score: float
    correct: bool
    status: str
    extracted: str | None = None  # the answer the verifier read out of the response
    detail: str = ""  # why, in words

    def __post_init__(self) -> None:
        if self.status not in VERDICT_STATUSES:
            raise ValueError(f"Verdict.status: got {self.status!r}, expected one of {', '.join(VERDICT_STATUSES)}")
        if self.correct and self.status != "graded":
            raise ValueError(f"Verdict: only a graded response can be correct, got status {self.status!r}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine draws tokens.

    Training keeps ``top_p`` 1 and ``top_k`` 0: truncated sampling makes the engine's and the trainer's log-probs
    different quantities.
    """

    max_new_tokens: int = 1024  # length limit of a response, in tokens, end-of-sequence included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1")
        if not self.temperature > 0:
            raise InputError(f"temperature: got {self.temperature}, expected above 0 (greedy rows are asked for by the plan)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, expected a value in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"top_k: got {self.top_k}, expected 0 (off) or more")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for an engine: ``len(seeds)`` responses, each drawn from its own seed."""

    prompt_tokens: tuple[int, ...]
    seeds: tuple[int, ...]  # each in [0, 2**63)
    greedy: bool = False  # take the most likely token each time; the seeds are then unused


@dataclass(frozen=True, slots=True)
class Completion:
    """One response as an engine returns it."""

    tokens: tuple[int, ...]  # sampled tokens, the stop token included when there is one
    logprobs: tuple[float, ...]  # of each token under the distribution it was drawn from, in nats
    finish_reason: str  # "stop": a stop token was drawn; "length": the limit cut it


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response of the policy to one prompt, and what became of it."""

    prompt_id: str
    sample_index: int
    seed: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    text: str  # decoded response, without special tokens
    policy_step: int  # finished steps (as in metrics.jsonl) behind the weights that drew it
    greedy: bool = False
    verdict: Verdict | None = None  # None until graded

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What an algorithm asks to be generated, and which rows train. Every part is off by default.

    Sources: greedy baseline, ReMax (arXiv 2310.10505); dynamic sampling, overlong punishment and filter, DAPO
    (arXiv 2503.14476).
    """

    greedy: bool = False  # one greedy response per prompt; it is scored (Batch.greedy_rewards) and never trained on
    dynamic: bool = False  # draw prompts until prompts_per_step groups pass Algorithm.keep
    gen_batch_prompts: int | None = None  # prompts per generation batch when dynamic; None: prompts_per_step
    max_gen_batches: int = 10  # generation batches per step when dynamic
    on_exhausted: str = "error"  # error | train_partial, when max_gen_batches did not fill the step
    carry_surplus: bool = False  # keep surplus groups for the next step (not available: needs stale log-probs)
    overlong_buffer_tokens: int = 0  # the penalty grows from 0 to 1 over the last so many tokens of the limit; 0: off
    overlong_penalty_factor: float = 1.0
    overlong_filter: bool = False  # rows cut by the limit get no loss weight

    def __post_init__(self) -> None:
        if self.on_exhausted not in ("error", "train_partial"):
            raise InputError(f"on_exhausted: got {self.on_exhausted!r}, expected error or train_partial")
        if self.gen_batch_prompts is not None and self.gen_batch_prompts < 1:
            raise InputError(f"gen_batch_prompts: got {self.gen_batch_prompts}, expected at least 1")
        if self.max_gen_batches < 1:
            raise InputError(f"max_gen_batches: got {self.max_gen_batches}, expected at least 1")
        if self.overlong_buffer_tokens < 0 or self.overlong_penalty_factor < 0:
            raise InputError("overlong_buffer_tokens and overlong_penalty_factor: expected 0 or more")
        if self.carry_surplus:
            raise InputError(
                "carry_surplus: got true, but surplus groups would be one update stale and their log-probs do not "
                "travel with them yet; leave it false"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded tensors of one whole rollout batch (all ranks), or any selection of its rows; all on one device."""

    tokens: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool
    groups: Tensor  # [B] int64, any labels
    rewards: Tensor  # [B] float, after shaping
    correct: Tensor  # [B] bool, the verifier's word, before shaping
    truncated: Tensor  # [B] bool, finish reason was length
    rollout_logprobs: Tensor  # [B, T] the engine's
    old_logprobs: Tensor | None = None  # [B, T] the trainer's at the start of the step
    ref_logprobs: Tensor | None = None  # [B, T] the frozen reference's
    values: Tensor | None = None  # [B, T] critic, of the state before tokens[b, t]
    final_values: Tensor | None = None  # [B] critic, after the last token
    greedy_rewards: Tensor | None = None  # [B] score of the greedy response to the row's prompt

    def __post_init__(self) -> None:
        rows, width = self.tokens.shape
        assert self.response_mask.dtype == torch.bool, "response_mask must be bool"
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            expected = {1: (rows,), 2: (rows, width)}[value.ndim]
            assert tuple(value.shape) == expected, f"Batch.{item.name}: {tuple(value.shape)}, expected {expected}"

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, rows: Tensor) -> Batch:
        """The rows of these indices (int64 ``[b]``), in this order, at full width."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[rows] for name, value in picked.items() if value is not None})

    def trim(self) -> Batch:
        """Drop the columns at the right in which no row has a response token (two columns stay: a prompt and a next token)."""
        used = self.response_mask.any(0).nonzero()
        width = max(int(used[-1]) + 1, 2) if len(used) else 2
        wide = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[:, :width] for name, v in wide.items() if v is not None and v.ndim == 2})

    def to(self, device: torch.device | str) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})


@dataclass(frozen=True, slots=True)
class StepData:
    """What one step's generation produced: the rollouts to train on and the counts that must not be lost."""

    prompts: tuple[Prompt, ...]  # one per trained group, in dataset order
    rollouts: tuple[Rollout, ...]  # graded rows to train on, G per prompt
    greedy: tuple[Rollout, ...] = ()  # one per prompt when the plan asks for it
    sampled: tuple[Rollout, ...] = ()  # every graded row, before dynamic sampling dropped groups
    generation_batches: int = 1
    timings_s: dict[str, float] = field(default_factory=dict)
