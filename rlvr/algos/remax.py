"""ReMax: REINFORCE with the score of the prompt's greedy response as baseline.

    A[i, t] = score[i] - score(greedy response to i's prompt) - kl_coef * sum_{u >= t} k1[i, u]
    loss    = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)

Source: Li et al. (arXiv 2310.10505), algorithm 1. KL: k1 in the reward, to go (``remax_kl=one_step``: each token its own
only, the paper's other form); the greedy baseline carries none. The greedy response is drawn from the same weights in the
same engine call, scored, and never trained on.

What differs from the paper and from other code: token ratio, clip and token-mean as in verl (the paper: one response per
prompt, no clip, ``loss_agg=seq-mean-token-sum``). Advantages are not normalised: binary scores give -1, 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rlvr import maths
from rlvr.algos.base import Algorithm, check_choice
from rlvr.types import Batch, InputError, SamplingPlan


@dataclass(frozen=True, kw_only=True)
class ReMax(Algorithm):
    """Advantage: the score less the greedy response's score."""

    plan: SamplingPlan = field(default_factory=lambda: SamplingPlan(greedy=True))
    remax_kl: str = "full_step"  # full_step | one_step
    kl_placement: str = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("remax_kl", self.remax_kl, ("full_step", "one_step"))
        if not self.plan.greedy:
            raise InputError("plan.greedy: got false, but the greedy response is the baseline; set plan.greedy=true")

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        assert batch.greedy_rewards is not None
        mask = batch.response_mask
        difference = batch.rewards - batch.greedy_rewards  # [B]
        advantages = maths.where_mask(difference[:, None].expand(mask.shape), mask)
        if self.needs_old_logprobs:
            kl = self.reward_kl(batch)
            advantages = advantages - self.kl_coef * (maths.reward_to_go(kl, mask) if self.remax_kl == "full_step" else kl)
        return advantages
