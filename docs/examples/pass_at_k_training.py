"""Pass@k training: the reward of a set of k responses is whether one of them is right.

W of the N responses to a prompt are wrong. Over all C(N, k) sets of k of them, with sigma = sqrt(R (1 - R)) for their rewards:

    fail   = C(W, k) / C(N, k)                    sets without a right response; their mean reward is R = 1 - fail
    others = C(W - 1, k - 1) / C(N - 1, k - 1)    the same, among the sets that hold one given wrong response
    A[i]   = (1 - R) / sigma when i is right (every set that holds it passes), (1 - R - others) / sigma when it is wrong

A[i] is the mean of (reward - R) / sigma over the sets that hold response i, the same for every token of row i.

Source: Chen et al. (arXiv 2508.10751), section 2.4; the authors' code: github.com/RUCAIBox/Passk_Training. Before the division
by sigma the expected update is (1 / k - 1 / N) times the gradient of pass@k: nothing at k = N, so k < N is required; k = 1 is
GRPO with ``adv_std_ddof=0``. Unlike in the authors' code, sigma 0 (all sets pass, or none) gives exactly 0, no 1e-6 is added.

``batch.correct`` is read, not ``batch.rewards``: the counts need right or wrong, and shaped or partial scores are neither. So
``reward=random`` is no control here (it leaves ``correct`` alone), and settings that only shape rewards are refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.types import Batch, InputError


@dataclass(frozen=True, kw_only=True)
class PassAtKTraining(Algorithm):
    """Advantage: how much better the sets of k that hold the response do than all sets of k."""

    k: int = 4  # responses in a set

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise InputError(f"k: got {self.k}, expected at least 1")
        if self.needs_old_logprobs or self.plan.overlong_buffer_tokens:
            raise InputError("kl_placement=reward, plan.overlong_buffer_tokens: shape the reward, which is not read; unset")

    @property
    def min_responses_per_prompt(self) -> int:
        return self.k + 1

    def advantages(self, batch: Batch) -> Tensor:  # [B, T]
        wrong, size = (~batch.correct).double(), maths.group_size(batch.groups)  # [B]
        if int(size.min()) <= self.k:
            what = f"a prompt has {int(size.min())} responses, expected more than k"
            raise InputError(f"algo.k: got {self.k}, but {what}; lower algo.k or raise trainer.responses_per_prompt")
        num_wrong = (maths.group_mean(wrong, batch.groups) * size).round()
        share, *rest = [(num_wrong - j) / (size - j) for j in range(self.k)]  # share = W / N; W < k brings a 0
        others = torch.stack([torch.ones_like(share), *rest]).prod(0)
        fail = share * others
        advantage = (fail - wrong * others) / (fail * (1 - fail)).sqrt()
        advantage = advantage.masked_fill((fail == 0) | (fail == 1), 0.0).to(batch.rewards.dtype)
        return maths.where_mask(advantage[:, None].expand(batch.tokens.shape), batch.response_mask)

    def keep(self, correct: Tensor) -> bool:  # with plan.dynamic: some sets pass and some do not
        return bool(correct.any()) and int((~correct).sum()) >= self.k
