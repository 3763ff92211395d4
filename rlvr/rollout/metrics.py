"""What one step's rollouts say: rates, lengths, verdict counts, advantages. Names and units are in ``rlvr.log``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlvr.types import VERDICT_STATUSES, Batch, Prompt, Rollout, StepData


def rollout_metrics(data: StepData, batch: Batch, advantages: Tensor, responses_per_prompt: int) -> dict[str, float]:
    """Metrics of a step's generation and of the batch made from it."""
    verdicts = [row.verdict for row in data.sampled if row.verdict is not None]
    statuses = Counter(verdict.status for verdict in verdicts)
    lengths = [len(row.tokens) for row in data.sampled]
    num_sampled, rewards = len(data.sampled), batch.rewards.double()
    masked = advantages[batch.response_mask].double()
    metrics = {
        "correct/mean": sum(verdict.correct for verdict in verdicts) / num_sampled,
        "score/mean": sum(verdict.score for verdict in verdicts) / num_sampled,
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "rollout/length_mean_tokens": sum(lengths) / num_sampled,
        "rollout/length_max_tokens": float(max(lengths)),
        "rollout/truncated_fraction": sum(row.truncated for row in data.sampled) / num_sampled,
        "rollout/generation_batches": float(data.generation_batches),
        "rollout/sampled_per_trained": num_sampled / len(data.rollouts),
        "rollout/tokens": float(sum(lengths)),
        "rollout/overlong_penalty_mean": float(rewards.mean()) - _mean_score(data.rollouts),
        "rollout/duplicate_fraction": duplicate_fraction(data.sampled, responses_per_prompt),
        "groups/kept_fraction": len(data.prompts) * responses_per_prompt / num_sampled,
        "advantage/mean": float(masked.mean()),
        "advantage/std": float(masked.std(correction=0)),
        "advantage/min": float(masked.min()),
        "advantage/max": float(masked.max()),
        "advantage/zero_fraction": float((masked == 0).double().mean()),
        **{f"status/{status}": float(statuses[status]) for status in VERDICT_STATUSES},
        **group_fractions([verdict.correct for verdict in verdicts], responses_per_prompt),
    }
    if data.greedy:
        metrics["rollout/greedy_score_mean"] = _mean_score(data.greedy)
    return metrics


def group_fractions(correct: Sequence[bool], size: int) -> dict[str, float]:
    """Share of groups (consecutive runs of ``size``) that are all right, all wrong, mixed."""
    right = torch.tensor(correct).view(-1, size).sum(1)
    all_right, all_wrong = float((right == size).double().mean()), float((right == 0).double().mean())
    return {
        "groups/all_right_fraction": all_right,
        "groups/all_wrong_fraction": all_wrong,
        "groups/mixed_fraction": 1 - all_right - all_wrong,
    }


def duplicate_fraction(rows: Sequence[Rollout], size: int) -> float:
    """Share of responses that repeat an earlier one of their group token for token."""
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return 1 - sum(len({row.tokens for row in group}) for group in groups) / len(rows)


def rollout_rows(data: StepData) -> list[dict[str, Any]]:
    """The trained rollouts as plain rows for inspection."""
    prompts: dict[str, Prompt] = {prompt.id: prompt for prompt in data.prompts}
    return [
        {
            "prompt_id": row.prompt_id,
            "prompt": prompts[row.prompt_id].text,
            "response": row.text,
            **verdict_fields(row),
            "num_tokens": len(row.tokens),
        }
        for row in data.rollouts
    ]


def verdict_fields(row: Rollout) -> dict[str, Any]:
    assert row.verdict is not None
    verdict = row.verdict
    return {
        "score": verdict.score,
        "correct": verdict.correct,
        "status": verdict.status,
        "finish_reason": row.finish_reason,
        "extracted": verdict.extracted,
        "detail": verdict.detail,
    }


def _mean_score(rows: Iterable[Rollout]) -> float:
    scores = [row.verdict.score for row in rows if row.verdict is not None]
    return sum(scores) / len(scores)
