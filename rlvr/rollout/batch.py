"""From ragged rows to the padded Batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from rlvr import maths
from rlvr.types import Batch, InputError, Rollout, Sampling, SamplingPlan, StepData


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> Batch:
    """A Batch of (prompt tokens, response tokens) rows; rewards, groups and log-probs are zero."""
    count, width = len(rows), max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((count, width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((count, width), dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[index, :end] = torch.tensor([*prompt, *response])
        mask[index, len(prompt) : end] = True
    nothing = torch.zeros(count, dtype=torch.bool)
    return Batch(
        tokens=tokens,
        response_mask=mask,
        groups=torch.zeros(count, dtype=torch.int64),
        rewards=torch.zeros(count),
        correct=nothing,
        truncated=nothing,
        rollout_logprobs=torch.zeros((count, width)),
    )


def pairs_batch(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]]) -> Batch:
    """A Batch of (prompt text, response text) pairs, each response ended by the end-of-sequence token.

    With an empty prompt, as in plain pretraining text, the first token has nothing before it and is only context.
    """
    rows = []
    for prompt, response in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((before, after) if before else (after[:1], after[1:]))
    return pad_rows(rows, tokenizer.pad_token_id)


def pair_batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[str, str]], rows: int, skip: int = 0
) -> Iterator[Batch]:
    """Batches of ``rows`` pairs each, after the first ``skip`` batches. Raises InputError when the pairs end."""
    stream = islice(iter(pairs), skip * rows, None)
    while len(chunk := list(islice(stream, rows))) == rows:
        yield pairs_batch(tokenizer, chunk)
    raise InputError(f"data: {type(pairs).__name__} ran out of pairs; expected an endless stream that starts over at its end")


def rollout_batch(rows: Sequence[Rollout], pad_token_id: int) -> Batch:
    """A Batch of responses with the engine's log-probs; rewards and groups are zero."""
    padded = pad_rows([(row.prompt_tokens, row.tokens) for row in rows], pad_token_id)
    logprobs = torch.zeros(padded.tokens.shape)
    logprobs[padded.response_mask] = torch.tensor([value for row in rows for value in row.logprobs])
    return replace(padded, rollout_logprobs=logprobs)


def make_batch(data: StepData, plan: SamplingPlan, sampling: Sampling, pad_token_id: int) -> Batch:
    """The Batch of a step: rewards are scores plus the plan's length penalty; row i belongs to prompt i // G."""
    rows = data.rollouts
    per_prompt = len(rows) // len(data.prompts)
    padded = rollout_batch(rows, pad_token_id)
    penalties = torch.tensor([length_penalty(len(row.tokens), plan, sampling) for row in rows])
    verdicts = [row.verdict for row in rows if row.verdict is not None]
    assert len(verdicts) == len(rows), "rollouts must be graded before they become a batch"
    greedy = torch.tensor([r.verdict.score for r in data.greedy if r.verdict is not None]) if data.greedy else None
    return replace(
        padded,
        groups=torch.arange(len(rows)) // per_prompt,
        rewards=torch.tensor([verdict.score for verdict in verdicts]) + penalties,
        correct=torch.tensor([verdict.correct for verdict in verdicts]),
        truncated=torch.tensor([row.truncated for row in rows]),
        greedy_rewards=None if greedy is None else greedy.repeat_interleave(per_prompt),
    )


def length_penalty(length_tokens: int, plan: SamplingPlan, sampling: Sampling) -> float:
    """The plan's soft length punishment of one response, 0 or negative."""
    if plan.overlong_buffer_tokens == 0:
        return 0.0
    penalty = maths.overlong_penalty(length_tokens, sampling.max_new_tokens, plan.overlong_buffer_tokens)
    return plan.overlong_penalty_factor * penalty
