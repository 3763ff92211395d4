"""PPO: proximal policy optimization with a critic.

    r[t]   = -kl_coef * k1(policy || reference)[t] + 1{t last} * score
    A[t]   = GAE(r, V; gamma, lam),   R = A + V,   then A is whitened over all tokens of the step
    policy = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A)
    critic = max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)

Source: Schulman et al. (arXiv 1707.06347), eq. 7; GAE (arXiv 1506.02438), eq. 16; KL in the reward as in InstructGPT
(arXiv 2203.02155), eq. 2: k1 of the log-probs at the start of the step, whose sum is the reverse KL.

What differs from the paper and from other code:

* ``gamma = lam = 1`` as in verl and OpenRLHF (TRL has lam 0.95), so that A = G - V;
* whitening over the whole step's tokens, all ranks, variance with n - 1 (TRL whitens per rank, OpenRLHF divides by n);
* the value after a response cut by the length limit is 0 (``truncation_bootstrap`` uses the critic's): the limit is part
  of the task;
* no factor 1/2 in the value loss; ``c_v`` 0.5 makes the product that of verl and OpenRLHF (TRL's 1/2 x 0.1: ``c_v`` 0.05).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos.base import Algorithm, check_choice, check_range
from rlvr.types import Batch, InputError


@dataclass(frozen=True, kw_only=True)
class PPO(Algorithm):
    """Advantage: GAE against a critic, whitened over the step."""

    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float | None = 0.5  # None: off
    truncation_bootstrap: bool = False
    whiten_ddof: int = 1  # 1: n - 1 in the denominator of the variance
    kl_placement: str = "reward"

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.needs_critic:
            raise InputError(
                "needs_critic: got False, but GAE needs values; leave it True, or use an algorithm without a critic"
            )
        check_range("gamma", self.gamma, "a value in [0, 1]", 0 <= self.gamma <= 1)
        check_range("lam", self.lam, "a value in [0, 1]", 0 <= self.lam <= 1)
        check_range("value_clip", self.value_clip, "above 0, or null", (self.value_clip or 0) > 0)
        check_choice("whiten_ddof", self.whiten_ddof, (0, 1))

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        return maths.whiten(self.raw_advantages(batch), batch.response_mask, self.whiten_ddof)

    def raw_advantages(self, batch: Batch) -> Tensor:  # [B, T]
        assert batch.values is not None
        final = None
        if self.truncation_bootstrap:
            assert batch.final_values is not None
            final = torch.where(batch.truncated, batch.final_values, torch.zeros_like(batch.final_values))
        rewards = self.shaped_rewards(batch)
        return maths.gae(rewards, batch.values, batch.response_mask, self.gamma, self.lam, final)

    def value_targets(self, batch: Batch) -> Tensor:  # [B, T]
        assert batch.values is not None
        return maths.where_mask(self.raw_advantages(batch) + batch.values, batch.response_mask)

    def value_loss(self, batch: Batch, values: Tensor, targets: Tensor) -> Tensor:  # [B, T]
        assert batch.values is not None
        mask = batch.response_mask
        values, targets, old = (maths.where_mask(x, mask) for x in (values, targets, batch.values))
        loss = (values - targets).square()
        if self.value_clip is not None:
            clipped = old + (values - old).clamp(-self.value_clip, self.value_clip)
            loss = torch.maximum(loss, (clipped - targets).square())
        return loss

    def value_metrics(self, batch: Batch, values: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Where the value clip decides the loss: it acts, and its error is the larger one. The gradient there is 0."""
        if self.value_clip is None:
            return {}
        assert batch.values is not None
        acts = (values - batch.values).abs() > self.value_clip
        decides = acts & (self.value_loss(batch, values, targets) > (values - targets).square())
        return {"critic/clip_fraction": maths.where_mask(decides, batch.response_mask).to(values.dtype)}
