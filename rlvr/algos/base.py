"""What an algorithm is: a frozen dataclass whose fields are its settings and whose methods are its maths.

The trainer reads the declarations and calls the methods; it never looks at the class or its name. A subclass must give
``advantages``; everything else has the default of the clipped policy gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rlvr import maths
from rlvr.types import Batch, InputError, SamplingPlan


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}")


def check_range(name: str, value: float | None, expected: str, good: bool) -> None:
    if value is not None and not good:
        raise InputError(f"{name}: got {value}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Base of every algorithm: shared settings, the default token loss, and what the trainer may ask.

    The batch given to ``advantages`` and ``value_targets`` is the whole rollout batch of the step, all ranks.
    ``token_loss`` and ``value_loss`` get whole rows of it in any selection, so each row must be treated alone there.
    """

    plan: SamplingPlan = field(default_factory=SamplingPlan)
    loss_agg: str = "token-mean"  # weight of a token in the loss, maths.token_weights
    loss_agg_const: float | None = None  # tokens; None: sampling.max_new_tokens
    c_ent: float = 0.0  # entropy bonus
    c_v: float = 0.5  # value loss
    c_ptx: float = 0.0  # pretraining loss on the pairs of data.ptx
    clip_eps: float = 0.2  # both sides of the clip range, unless a side is given
    clip_eps_low: float | None = None
    clip_eps_high: float | None = None
    dual_clip: float | None = None  # bound on ratio * A for A < 0
    surrogate: str = "clip"  # clip: min(ratio A, clip(ratio) A) | cispo: clip(ratio) A log-prob, no gradient through the ratio
    ratio_level: str = "token"  # token | sequence | sequence_mean
    kl_coef: float = 0.0  # weight of the KL against the reference; 0: no reference is loaded
    kl_estimator: str = "k3"  # as a loss; the KL in the reward is always k1
    kl_placement: str = "loss"  # loss | reward
    kl_is_correction: bool = False  # importance ratio as a differentiable factor of the KL loss
    kl_clamp: bool = True  # bound the k3 loss of a token to 10
    kl_controller: str = "fixed"  # fixed | adaptive
    kl_target: float = 6.0  # adaptive: nats per kl_target_unit
    kl_target_unit: str = "sequence"  # sequence | token
    kl_horizon: float = 10000.0  # adaptive: responses
    rollout_is: str = "none"  # importance correction for the engine's log-probs: none | token | sequence
    rollout_is_mode: str = "truncate"  # truncate | mask
    rollout_is_min: float = 0.0
    rollout_is_max: float = 2.0

    needs_critic: ClassVar[bool] = False
    min_responses_per_prompt: ClassVar[int] = 1

    def __post_init__(self) -> None:
        low, high = self.clip_range
        check_choice("loss_agg", self.loss_agg, maths.LOSS_AGGREGATIONS)
        check_choice("surrogate", self.surrogate, ("clip", "cispo"))
        check_choice("ratio_level", self.ratio_level, ("token", "sequence", "sequence_mean"))
        check_choice("kl_estimator", self.kl_estimator, maths.KL_ESTIMATORS)
        if self.kl_placement not in ("loss", "reward"):
            raise InputError(
                f"kl_placement: got {self.kl_placement!r}, expected loss or reward; in both the KL would be charged twice"
            )
        check_choice("kl_controller", self.kl_controller, ("fixed", "adaptive"))
        check_choice("kl_target_unit", self.kl_target_unit, ("sequence", "token"))
        check_choice("rollout_is", self.rollout_is, ("none", "token", "sequence"))
        check_choice("rollout_is_mode", self.rollout_is_mode, ("truncate", "mask"))
        no_lower_bound = self.surrogate == "cispo" and low == 1
        check_range("clip_eps_low (or clip_eps)", low, "a value in (0, 1)", 0 < low < 1 or no_lower_bound)
        check_range("clip_eps_high (or clip_eps)", high, "above 0", high > 0)
        check_range("dual_clip", self.dual_clip, f"above 1 + clip_eps_high = {1 + high}", (self.dual_clip or 0) > 1 + high)
        check_range("c_v", self.c_v, "above 0", self.c_v > 0)
        check_range("c_ptx", self.c_ptx, "0 or more", self.c_ptx >= 0)
        check_range("kl_coef", self.kl_coef, "0 or more", self.kl_coef >= 0)
        check_range("kl_target", self.kl_target, "above 0", self.kl_target > 0)
        check_range("kl_horizon", self.kl_horizon, "above 0", self.kl_horizon > 0)
        check_range("loss_agg_const", self.loss_agg_const, "above 0", (self.loss_agg_const or 0) > 0)
        check_range("rollout_is_max", self.rollout_is_max, "above rollout_is_min", self.rollout_is_max > self.rollout_is_min)
        if self.ratio_level != "token" and self.loss_agg != "seq-mean-token-mean":
            raise InputError(
                f"loss_agg: got {self.loss_agg!r} with ratio_level={self.ratio_level}, which copies one loss per row to "
                "its tokens; set loss_agg=seq-mean-token-mean"
            )
        if self.surrogate == "cispo" and (self.dual_clip is not None or self.ratio_level != "token"):
            raise InputError("surrogate: got cispo, which weights single tokens; set dual_clip=null and ratio_level=token")
        if self.kl_coef > 0 and self.kl_placement == "loss":
            self._check_kl_loss()

    def _check_kl_loss(self) -> None:
        if self.kl_estimator == "k1" and not self.kl_is_correction:
            raise InputError(
                "kl_estimator: got k1 with kl_placement=loss, whose expected gradient is zero; use k2 or k3, "
                "or kl_placement=reward"
            )
        if self.kl_is_correction and self.kl_estimator not in ("k1", "k3"):
            raise InputError(
                f"kl_estimator: got {self.kl_estimator} with kl_is_correction, whose gradient is that of no divergence; "
                "use k1 or k3 (both then give the reverse KL)"
            )

    # ---- declarations the trainer reads ----

    @property
    def clip_range(self) -> tuple[float, float]:
        """(eps_low, eps_high): the ratio is clipped to [1 - eps_low, 1 + eps_high]."""
        low = self.clip_eps if self.clip_eps_low is None else self.clip_eps_low
        high = self.clip_eps if self.clip_eps_high is None else self.clip_eps_high
        return low, high

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_greedy(self) -> bool:
        return self.plan.greedy

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether ``advantages`` reads ``old_logprobs``."""
        return self.kl_coef > 0 and self.kl_placement == "reward"

    # ---- maths ----

    def advantages(self, batch: Batch) -> Tensor:
        """Advantage of every token: ``[B, T]``, detached, 0 outside the mask."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages(batch) -> [B, T]")

    def token_loss(self, batch: Batch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Everything made of the current log-probs, before weighting: ``[B, T]``, value and gradient 0 outside the mask.

        ``-objective * w + kl_coef * KL``: the surrogate objective (``min(ratio A, clip(ratio) A)`` unless ``surrogate`` says
        otherwise), rollout correction w, KL loss.
        """
        mask = batch.response_mask
        assert batch.old_logprobs is not None
        ratio = maths.log_ratio(logprobs, batch.old_logprobs, mask, self.ratio_level).exp()
        advantages = maths.where_mask(advantages, mask)
        if self.surrogate == "cispo":
            loss = -maths.cispo_objective(maths.where_mask(logprobs, mask), ratio, advantages, *self.clip_range)
        else:
            loss = -maths.clipped_objective(ratio, advantages, *self.clip_range, self.dual_clip)
        if self.rollout_is != "none":
            bounds = (self.rollout_is_mode, self.rollout_is_min, self.rollout_is_max)
            loss = loss * maths.rollout_weights(batch.old_logprobs, batch.rollout_logprobs, mask, self.rollout_is, *bounds)
        if self.kl_coef > 0 and self.kl_placement == "loss":
            loss = loss + self.kl_coef * self.kl_loss(batch, logprobs)
        return maths.where_mask(loss, mask)

    def kl_loss(self, batch: Batch, logprobs: Tensor) -> Tensor:
        """KL of the current policy against the reference per token, differentiable: ``[B, T]``."""
        mask = batch.response_mask
        assert batch.ref_logprobs is not None and batch.old_logprobs is not None
        current, reference = maths.where_mask(logprobs, mask), maths.where_mask(batch.ref_logprobs, mask)
        kl = maths.kl_per_token(current, reference, self.kl_estimator, self.kl_clamp)
        if self.kl_is_correction:
            kl = kl * maths.log_ratio(logprobs, batch.old_logprobs, mask).exp()
        return kl

    def reward_kl(self, batch: Batch) -> Tensor:
        """k1 of the log-probs at the start of the step against the reference, as charged to rewards: ``[B, T]``."""
        assert batch.old_logprobs is not None and batch.ref_logprobs is not None
        return maths.where_mask(maths.kl_per_token(batch.old_logprobs, batch.ref_logprobs, "k1"), batch.response_mask)

    def scores_less_kl(self, batch: Batch) -> Tensor:
        """Rewards, less the row's summed KL where it is charged to the reward: ``[B]``."""
        if not self.needs_old_logprobs:
            return batch.rewards
        return batch.rewards - self.kl_coef * self.reward_kl(batch).sum(-1)

    def shaped_rewards(self, batch: Batch) -> Tensor:
        """The score on the last token, less each token's KL where it is charged to the reward: ``[B, T]``."""
        rewards = maths.token_rewards(batch.rewards, batch.response_mask)
        return rewards - self.kl_coef * self.reward_kl(batch) if self.needs_old_logprobs else rewards

    def value_targets(self, batch: Batch) -> Tensor:
        """Returns the critic is fitted to: ``[B, T]``, detached. With a critic only."""
        raise NotImplementedError(f"{type(self).__name__} needs a critic and must define value_targets(batch) -> [B, T]")

    def value_loss(self, batch: Batch, values: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the critic per token, no factor 1/2: ``[B, T]``. With a critic only."""
        mask = batch.response_mask
        return (maths.where_mask(values, mask) - maths.where_mask(targets, mask)).square()

    def value_metrics(self, batch: Batch, values: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Quantities of the critic logged as means over tokens: name -> ``[B, T]``, detached."""
        return {}

    @torch.no_grad()
    def token_metrics(self, batch: Batch, logprobs: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Quantities logged as means over tokens: name -> ``[B, T]``, detached."""
        mask = batch.response_mask
        assert batch.old_logprobs is not None
        ratio = maths.log_ratio(logprobs, batch.old_logprobs, mask, self.ratio_level).exp()
        both_signs = self.surrogate == "cispo"
        metrics = maths.clip_fractions(
            ratio, maths.where_mask(advantages, mask), *self.clip_range, self.dual_clip, both_signs=both_signs
        )
        metrics["policy/approx_kl_nats"] = maths.where_mask(batch.old_logprobs - logprobs, mask)
        if self.rollout_is != "none":
            weights = maths.log_ratio(batch.old_logprobs, batch.rollout_logprobs, mask, self.rollout_is).exp()
            cut = maths.where_mask((weights < self.rollout_is_min) | (weights > self.rollout_is_max), mask)
            metrics["policy/rollout_weight_cut_fraction"] = cut.to(logprobs.dtype)
        if batch.ref_logprobs is not None:
            current, reference = maths.where_mask(logprobs, mask), maths.where_mask(batch.ref_logprobs, mask)
            for estimator in ("k1", "k3"):
                metrics[f"policy/ref_kl_{estimator}_nats"] = maths.kl_per_token(current, reference, estimator, clamp=False)
            if self.kl_placement == "loss" and self.kl_clamp and "k3" in self.kl_estimator:
                clamped = metrics["policy/ref_kl_k3_nats"] >= maths.K3_BOUND
                metrics["policy/ref_kl_clamped_fraction"] = clamped.to(logprobs.dtype)
        return metrics

    def keep(self, correct: Tensor) -> bool:
        """Whether a group trains, asked when ``plan.dynamic``: neither all right nor all wrong. ``correct [G]``."""
        return bool(0 < int(correct.sum()) < correct.numel())
