"""MaxRL: the centred reward is divided by the group's mean reward, so that rare successes weigh as in maximum likelihood.

    A[i] = (r[i] - mean) / mean       mean over i's group of N responses, the same for every token of row i
    A[i] = 0                          in a group without a success

With rewards of 0 and 1 and K successes: (N - K) / K for a success, -1 for a failure.

Source: Tajwar et al. (arXiv 2602.02710), algorithm 1 (section 4.3), which is eq. 10 with both of its terms dropped in a
group without a success. Let J(T) = sum over k = 1 ... T of pass@k / k, the truncated log-likelihood of a success (eq. 6, up
to a constant; T = 1 is plain RL, T to infinity maximum likelihood). What the N responses estimate without bias:

    sum r[i] S[i] / K, no baseline (eq. 9)                                 the gradient of J(N)      theorem 2
    the same less the mean of S[i], in every group (eq. 10)                the gradient of J(N)
    the same, dropped in a group without a success: this algorithm         the gradient of J(N - 1)  version 3, theorem 5

(S[i]: gradient of the log-prob of response i.) Dropping the baseline where K = 0 costs one order and no more.

This holds for rewards of 0 and 1, one update per rollout batch and ``loss_agg=seq-mean-token-sum``; the default here is
token-mean, as everywhere in this package. What differs from the authors' code: no 1e-6 under the fraction.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.types import Batch, InputError


@dataclass(frozen=True, kw_only=True)
class MaxRL(Algorithm):
    """Advantage: the score relative to the mean of its group, less 1."""

    min_responses_per_prompt: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_old_logprobs:
            raise InputError("kl_placement: got reward, which would make scores negative; use kl_placement=loss")

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        rewards, groups = batch.rewards, batch.groups  # [B]
        if bool((rewards < 0).any()):  # a mean at or below 0 would blow the update up or turn its sign
            raise InputError(
                f"reward: got a score of {float(rewards.min()):g}, expected 0 or more, because MaxRL divides by their mean; "
                "use a reward from 0 to 1 and algo.plan.overlong_buffer_tokens=0"
            )
        relative = rewards / maths.group_mean(rewards, groups) - 1
        relative = relative.masked_fill(maths.flat_groups(rewards, groups), 0.0)  # without a success: 0 / 0 until here
        return maths.where_mask(relative[:, None].expand(batch.tokens.shape), batch.response_mask)
