"""GRPO: group relative policy optimization.

    A[i, t] = (r[i] - mean(r over i's group)) / (std(r over i's group) + adv_eps)       the same for every token t of row i
    loss    = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A) + kl_coef * k3(policy || reference)

Source: DeepSeekMath (arXiv 2402.03300), section 4.1, eq. 3 and 4. KL: in the loss, estimator k3 of the current log-probs
(whose expected gradient is that of the *forward* KL; ``kl_estimator=k2`` for the reverse one). With
``kl_placement=reward`` the row's sum of k1 is taken off its score before the group is normalised.

What differs from the paper and from other code:

* no KL by default (``kl_coef`` 0; the paper has 0.04);
* ``loss_agg`` is token-mean as in verl, OpenRLHF and TRL; the paper's equation is seq-mean-token-mean;
* standard deviation with n - 1 and ``adv_eps`` 1e-6, as in verl; the paper gives neither (TRL 1e-4, OpenRLHF 1e-9);
* a group whose scores are all equal gets advantages of exactly 0, not rounding noise over ``adv_eps``.

``adv_scale=none`` with ``loss_agg=seq-mean-token-sum-const`` is Dr.GRPO (arXiv 2503.20783); ``adv_scale=batch`` divides
by the deviation of all scores of the step. ``ratio_level=sequence_mean`` with ``loss_agg=seq-mean-token-mean`` is GSPO (arXiv
2507.18071), ``surrogate=cispo`` CISPO (arXiv 2506.13585).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr import maths
from rlvr.algos.base import Algorithm, check_choice, check_range
from rlvr.types import Batch


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Advantage: the score standardised within its prompt's group."""

    adv_scale: str = "group"  # divide the centred score by the std of its group | of the batch | none
    adv_std_ddof: int = 1  # 1: n - 1 in the denominator of the variance
    adv_eps: float = 1e-6  # added to the standard deviation

    min_responses_per_prompt: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adv_scale", self.adv_scale, ("group", "batch", "none"))
        check_range("adv_std_ddof", self.adv_std_ddof, "0 or 1", self.adv_std_ddof in (0, 1))
        check_range("adv_eps", self.adv_eps, "0 or more", self.adv_eps >= 0)

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        scores = self.scores_less_kl(batch)  # [B]
        advantage = scores - maths.group_mean(scores, batch.groups)
        if self.adv_scale == "group":
            advantage = advantage / (maths.group_std(scores, batch.groups, self.adv_std_ddof) + self.adv_eps)
        elif self.adv_scale == "batch":
            advantage = advantage / (scores.std(correction=self.adv_std_ddof) + self.adv_eps)
        advantage = advantage.masked_fill(maths.flat_groups(scores, batch.groups), 0.0)
        return maths.where_mask(advantage[:, None].expand(batch.tokens.shape), batch.response_mask)
