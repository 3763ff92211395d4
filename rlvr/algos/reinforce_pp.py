"""REINFORCE++: no critic, no group needed, advantages whitened over the whole step.

    plain (baseline=none)      A[t] = whiten(sum_{u >= t} gamma^(u-t) r[u]),  r[t] = -kl_coef k1[t] + 1{t last} score
    baseline (baseline=group)  A[t] = whiten(score - mean(score over the group)), the same for every token of the row
    loss                       -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)   (+ kl_coef * k2 for the baseline form)

Source: Hu (arXiv 2501.03262), eq. 5 to 8. KL: in the reward (k1) for the plain form, as a k2 loss for the baseline form
(the recipe ``reinforce_pp_baseline`` sets both).

What differs from the paper and from other code: whitening is over tokens, as in verl and OpenRLHF, so long responses weigh
more (``whiten_over=sequences``: one value per response, as in TRL); the variance has n - 1 (``whiten_ddof=0``: OpenRLHF).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos.base import Algorithm, check_choice, check_range
from rlvr.types import Batch, InputError


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Algorithm):
    """Advantage: reward-to-go, or the score centred in its group, whitened over the step."""

    baseline: str = "none"  # none | group
    gamma: float = 1.0
    whiten_over: str = "tokens"  # tokens | sequences
    whiten_ddof: int = 1  # 1: n - 1 in the denominator of the variance
    kl_placement: str = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("baseline", self.baseline, ("none", "group"))
        check_choice("whiten_over", self.whiten_over, ("tokens", "sequences"))
        check_choice("whiten_ddof", self.whiten_ddof, (0, 1))
        check_range("gamma", self.gamma, "a value in [0, 1]", 0 <= self.gamma <= 1)
        token_level = self.needs_old_logprobs or self.gamma != 1
        if self.baseline == "group" and token_level:
            raise InputError("baseline: got group, which has one advantage per row; set kl_placement=loss and gamma=1")
        if self.whiten_over == "sequences" and token_level:
            raise InputError(
                "whiten_over: got sequences, which has one value per row; set kl_coef=0 (or kl_placement=loss) and gamma=1"
            )

    @property
    def min_responses_per_prompt(self) -> int:  # type: ignore[override]
        return 2 if self.baseline == "group" else 1

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        mask = batch.response_mask
        if self.baseline == "none" and self.whiten_over == "tokens":
            returns = maths.reward_to_go(self.shaped_rewards(batch), mask, self.gamma)
            return maths.whiten(returns, mask, self.whiten_ddof)
        scores = batch.rewards  # [B]
        if self.baseline == "group":
            scores = scores - maths.group_mean(scores, batch.groups)
        if self.whiten_over == "sequences":
            scores = maths.whiten(scores, torch.ones_like(scores, dtype=torch.bool), self.whiten_ddof)
            return maths.where_mask(scores[:, None].expand(mask.shape), mask)
        return maths.whiten(scores[:, None].expand(mask.shape), mask, self.whiten_ddof)
