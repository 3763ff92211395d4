"""Random batches and every algorithm, for the property tests.

Batches are random in shape (ragged prompts and responses, observation tokens inside responses, uneven groups, labels and
rows in any order) and in value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.dapo import DAPO
from rlvr.algos.grpo import GRPO
from rlvr.algos.ppo import PPO
from rlvr.algos.reinforce_pp import ReinforcePP
from rlvr.algos.remax import ReMax
from rlvr.algos.rloo import RLOO
from rlvr.types import Batch

QUICK = settings(max_examples=25, deadline=None)
BRIEF = settings(max_examples=15, deadline=None)  # where every algorithm runs

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO(),
    "dr_grpo": GRPO(adv_scale="none"),
    "batch_scale": GRPO(adv_scale="batch"),
    "kl_reward": GRPO(kl_coef=0.1, kl_placement="reward"),
    "kl_k3": GRPO(kl_coef=0.1, kl_estimator="k3"),
    "kl_k2": GRPO(kl_coef=0.1, kl_estimator="k2"),
    "kl_straight_through": GRPO(kl_coef=0.1, kl_estimator="k3+k2grad"),
    "kl_correction": GRPO(kl_coef=0.1, kl_estimator="k1", kl_is_correction=True),
    "dual_clip": GRPO(clip_eps_high=0.28, dual_clip=1.5),
    "sequence": GRPO(ratio_level="sequence", loss_agg="seq-mean-token-mean"),
    "sequence_mean": GRPO(ratio_level="sequence_mean", loss_agg="seq-mean-token-mean"),
    "token_correction": GRPO(rollout_is="token"),
    "sequence_correction": GRPO(rollout_is="sequence", rollout_is_mode="mask", rollout_is_min=0.5),
    "cispo": GRPO(surrogate="cispo", clip_eps_low=1.0, clip_eps_high=0.28),
    "cispo_two_sided": GRPO(surrogate="cispo"),
    "dapo": DAPO(),
    "dapo_kl": DAPO(kl_coef=0.1),
    "rloo": RLOO(),
    "rloo_kl": RLOO(kl_coef=0.1),
    "rloo_kl_late": RLOO(kl_coef=0.1, kl_before_baseline=False),
    "remax": ReMax(),
    "remax_kl_full_step": ReMax(kl_coef=0.1),
    "remax_kl_one_step": ReMax(kl_coef=0.1, remax_kl="one_step"),
    "reinforce_pp": ReinforcePP(),
    "reinforce_pp_kl": ReinforcePP(kl_coef=0.1, gamma=0.9),
    "reinforce_pp_sequences": ReinforcePP(whiten_over="sequences"),
    "reinforce_pp_baseline": ReinforcePP(baseline="group", whiten_ddof=0),
    "reinforce_pp_baseline_kl": ReinforcePP(baseline="group", kl_coef=0.1, kl_placement="loss", kl_estimator="k2"),
    "ppo": PPO(),
    "ppo_kl": PPO(kl_coef=0.1, gamma=0.9, lam=0.8, value_clip=0.2),
    "ppo_bootstrap": PPO(truncation_bootstrap=True, value_clip=None),
}
GROUP_CENTRED = ("grpo", "dr_grpo", "kl_reward", "dapo", "rloo", "rloo_kl", "rloo_kl_late")
WHITENED = tuple(name for name in ALGORITHMS if name.startswith(("ppo", "reinforce_pp")))
CRITICS = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.needs_critic)


def algorithms(*names: str) -> pytest.MarkDecorator:
    """Run a test for each of these algorithms."""
    return pytest.mark.parametrize("algorithm", [ALGORITHMS[name] for name in names], ids=names)


def algorithms_where(condition: Callable[[Algorithm], bool]) -> pytest.MarkDecorator:
    return algorithms(*[name for name, algorithm in ALGORITHMS.items() if condition(algorithm)])


EVERY_ALGORITHM = algorithms(*ALGORITHMS)
EVERY_CRITIC = algorithms(*CRITICS)


@st.composite
def batches(draw: st.DrawFn, min_tokens: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Two to four prompts with two to four responses each, of ``min_tokens`` to five tokens, rows shuffled."""
    labels = draw(st.lists(st.integers(-50, 50), min_size=2, max_size=4, unique=True))
    groups = draw(st.permutations([label for label in labels for _ in range(draw(st.integers(2, 4)))]))
    count = len(groups)
    prompts = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    responses = draw(st.lists(st.integers(min_tokens, 5), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    width = max(p + r for p, r in zip(prompts, responses, strict=True)) + draw(st.integers(0, 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    columns, start = torch.arange(width), torch.tensor(prompts)[:, None]
    end = start + torch.tensor(responses)[:, None]
    mask = (columns >= start) & (columns < end)
    if draw(st.booleans()):  # observation tokens, which the policy did not sample; each row keeps its last token
        mask &= (normal(count, width) > -0.7) | (columns == end - 1)
    old = maths.where_mask(-normal(count, width).abs(), mask)
    scores = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.5]), min_size=count, max_size=count))
    return Batch(
        tokens=torch.randint(0, 9, (count, width), generator=generator),
        response_mask=mask,
        groups=torch.tensor(groups),
        rewards=torch.tensor(scores, dtype=dtype),
        correct=torch.tensor(scores) > 0.4,
        truncated=torch.tensor(responses) == 5,
        rollout_logprobs=maths.where_mask(old + 0.3 * normal(count, width), mask),
        old_logprobs=old,
        ref_logprobs=maths.where_mask(old + 0.5 * normal(count, width), mask),
        values=maths.where_mask(normal(count, width), mask),
        final_values=normal(count),
        greedy_rewards=normal(101)[torch.tensor(groups) + 50],  # one score per prompt
    )


def current_logprobs(batch: Batch, shift: float = 0.3, seed: int = 0) -> Tensor:
    """Log-probs a little away from the old ones, 0 outside the mask."""
    return maths.where_mask(batch.old_logprobs + shift * noise(batch, seed), batch.response_mask)


def noise(batch: Batch, seed: int = 0) -> Tensor:
    """Normal numbers ``[B, T]``, in the padding too."""
    return torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=batch.rewards.dtype)


def spoil(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, torch.nan)


def spoiled(batch: Batch) -> Batch:
    """The same batch with NaN wherever nobody may read: the padding, the value after a response that ended by itself."""
    wide = {f.name: getattr(batch, f.name) for f in fields(batch)}
    spoilt = {n: v for n, v in wide.items() if v is not None and v.ndim == 2 and v.is_floating_point()}
    padding = {name: spoil(value, batch.response_mask) for name, value in spoilt.items()}
    return replace(batch, **padding, final_values=spoil(batch.final_values, batch.truncated))


def loss_and_gradient(algorithm: Algorithm, batch: Batch, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logprobs.detach().clone().requires_grad_()
    losses = algorithm.token_loss(batch, leaf, advantages)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def value_loss_and_gradient(algorithm: Algorithm, batch: Batch, values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    leaf = values.detach().clone().requires_grad_()
    losses = algorithm.value_loss(batch, leaf, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient
