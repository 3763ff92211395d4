"""RLOO: REINFORCE with the mean of the other responses as baseline.

    A[i, t] = s[i] - mean(s over the other rows of i's group),   s[i] = score[i] - kl_coef * sum_t k1[i, t]
    loss    = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)

Source: Ahmadian et al. (arXiv 2402.14740), eq. 8. KL: k1 in the reward, taken off the score before the baseline.

What differs from the paper and from other code: token ratio, clip and token-mean as in verl (the paper has the whole
response as one action, no clip: ``loss_agg=seq-mean-token-sum`` with one update per rollout);
``kl_before_baseline=false`` leaves the baseline without KL and charges each token the KL to go, as in OpenRLHF.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr import maths
from rlvr.algos.base import Algorithm
from rlvr.types import Batch


@dataclass(frozen=True, kw_only=True)
class RLOO(Algorithm):
    """Advantage: the score less the mean of the group's other scores."""

    kl_before_baseline: bool = True
    kl_placement: str = "reward"

    min_responses_per_prompt: ClassVar[int] = 2

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        mask, groups = batch.response_mask, batch.groups
        scores = self.scores_less_kl(batch) if self.kl_before_baseline else batch.rewards  # [B]
        size = maths.group_size(groups).to(scores.dtype)
        leave_one_out = (scores - maths.group_mean(scores, groups)) * size / (size - 1)
        leave_one_out = leave_one_out.masked_fill(maths.flat_groups(scores, groups), 0.0)
        advantages = maths.where_mask(leave_one_out[:, None].expand(mask.shape), mask)
        if self.needs_old_logprobs and not self.kl_before_baseline:
            advantages = advantages - self.kl_coef * maths.reward_to_go(self.reward_kl(batch), mask)
        return advantages
