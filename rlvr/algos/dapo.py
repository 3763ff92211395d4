"""DAPO: GRPO's advantage with clip-higher, token-mean, dynamic sampling and length punishment.

    A[i, t] = (s[i] - mean(s over i's group)) / (std(s over i's group) + adv_eps),   s = score + length punishment
    loss    = -min(ratio A, clip(ratio, 1 - 0.2, 1 + 0.28) A), mean over all tokens of the update
    groups  kept only when 0 < number correct < n; more prompts are drawn until the step is full

Source: Yu et al. (arXiv 2503.14476), eq. 8 to 13. No KL.

What differs from the paper and from other code: the filter counts correct responses, before any punishment (verl tests the
deviation of the scores); the token mean is over the update, as in the authors' code, not inside each prompt's expectation
(``loss_agg=group-mean-token-mean``); punishment and overlong filter are off until ``plan.overlong_buffer_tokens`` and
``plan.overlong_filter`` turn them on; no dual clip (the authors' recipe has ``dual_clip=10``). With one update per rollout
the ratio is 1 and clip-higher does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlvr.algos.grpo import GRPO
from rlvr.types import SamplingPlan


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO with DAPO's sampling plan and clip range."""

    plan: SamplingPlan = field(default_factory=lambda: SamplingPlan(dynamic=True))
    clip_eps_high: float | None = 0.28
