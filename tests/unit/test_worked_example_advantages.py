"""The worked example: advantages, returns and value losses of every algorithm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worked_example import LENGTHS, VALUES, Rows, close, example_batch, flat, mask, place

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.algos.dapo import DAPO
from rlvr.algos.grpo import GRPO
from rlvr.algos.ppo import PPO
from rlvr.algos.reinforce_pp import ReinforcePP
from rlvr.algos.remax import ReMax
from rlvr.algos.rloo import RLOO
from rlvr.types import InputError, SamplingPlan

SHAPED: Rows = [
    [-0.01, 1.005],
    [-0.02, 0, 0.01, -0.03],
    [-0.005, -0.015, 1.02],
    [-0.04],
    [0.01, -0.025, 0.99],
    [0, -0.01, 0.03, -0.02],
]
GAE_RAW: Rows = [
    [0.47975, 0.305],
    [-0.40768375, -0.302825, -0.2135, -0.13],
    [0.3643, 0.494, 0.22],
    [-0.24],
    [0.628225, 0.5455, 0.39],
    [-0.22269125, -0.339675, -0.1365, -0.07],
]
GAE_RETURNS: Rows = [
    [0.97975, 1.005],
    [-0.00768375, -0.002825, -0.0135, -0.03],
    [0.9643, 0.994, 1.02],
    [-0.04],
    [0.928225, 0.9455, 0.99],
    [0.02730875, 0.010325, 0.0135, -0.02],
]
GAE_WHITENED: Rows = [
    [1.1162194443, 0.6279859123],
    [-1.3631792060, -1.0702146403, -0.8206497748, -0.5873593604],
    [0.7936640150, 1.1560324791, 0.3905046521],
    [-0.8946880500],
    [1.5310433278, 1.2999181837, 0.8654671725],
    [-0.8463291822, -1.1731697513, -0.6055196920, -0.4197255297],
]
RPP_KL_ADVANTAGE: Rows = [
    [1.0296309204, 1.0488236020],
    [-0.9568116283, -0.9184262651, -0.9184262651, -0.9376189467],
    [1.0392272612, 1.0488236020, 1.0776126245],
    [-0.9568116283],
    [0.9912455571, 0.9720528755, 1.0200345796],
    [-0.8800409018, -0.8800409018, -0.8608482202, -0.9184262651],
]
REMAX_FULL: Rows = [
    [0.995, 1.005],
    [-0.04, -0.02, -0.02, -0.03],
    [1, 1.005, 1.02],
    [-1.04],
    [-0.025, -0.035, -0.01],
    [-1, -1, -0.99, -1.02],
]
REMAX_ONE: Rows = [
    [0.99, 1.005],
    [-0.02, 0, 0.01, -0.03],
    [0.995, 0.985, 1.02],
    [-1.04],
    [0.01, -0.025, -0.01],
    [-1, -1.01, -0.97, -1.02],
]

PER_ROW: list[tuple[Algorithm, list[float]]] = [
    (RLOO(), [0.5, -1, 0.5, -0.5, 1, -0.5]),
    (RLOO(kl_coef=0.1), [0.515, -1.0375, 0.5225, -0.5275, 0.995, -0.4675]),
    (ReMax(), [1, 0, 1, -1, 0, -1]),
    (ReinforcePP(), [1.0289914914, -0.9146591035, 1.0289914914, -0.9146591035, 1.0289914914, -0.9146591035]),
    (ReinforcePP(whiten_ddof=0), [1.0606601505, -0.9428090227, 1.0606601505, -0.9428090227, 1.0606601505, -0.9428090227]),
    (
        ReinforcePP(whiten_over="sequences"),
        [0.9128709140, -0.9128709140, 0.9128709140, -0.9128709140, 0.9128709140, -0.9128709140],
    ),
    (ReinforcePP(baseline="group"), [0.7274809232, -1.2252310286, 0.7274809232, -0.5743270447, 1.3783849072, -0.5743270447]),
    (
        ReinforcePP(baseline="group", whiten_over="sequences"),
        [0.6454972123, -1.2909944245, 0.6454972123, -0.6454972123, 1.2909944245, -0.6454972123],
    ),
]
PER_TOKEN: list[tuple[Algorithm, Rows]] = [
    (PPO(kl_coef=0.1, lam=0.95), GAE_WHITENED),
    (ReinforcePP(kl_coef=0.1), RPP_KL_ADVANTAGE),
    (ReMax(kl_coef=0.1), REMAX_FULL),
    (ReMax(kl_coef=0.1, remax_kl="one_step"), REMAX_ONE),
]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("algorithm", "wanted"), PER_ROW, ids=lambda value: str(value)[:40])
def test_one_advantage_per_row(algorithm: Algorithm, wanted: list[float], dtype: torch.dtype, atol: float) -> None:
    expected = [[value] * length for value, length in zip(wanted, LENGTHS, strict=True)]
    close(algorithm.advantages(example_batch(dtype))[mask()], flat(expected), atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("algorithm", "wanted"), PER_TOKEN, ids=lambda value: str(value)[:40])
def test_one_advantage_per_token(algorithm: Algorithm, wanted: Rows, dtype: torch.dtype, atol: float) -> None:
    advantages = algorithm.advantages(example_batch(dtype))
    close(advantages[mask()], flat(wanted), atol)
    assert bool((advantages[~mask()] == 0).all())


def test_ppo_returns_are_raw() -> None:
    algorithm, batch = PPO(kl_coef=0.1, lam=0.95), example_batch()
    close(algorithm.shaped_rewards(batch)[mask()], flat(SHAPED), 1e-9)
    raw = algorithm.raw_advantages(batch)[mask()]
    close(raw, flat(GAE_RAW), 1e-9)
    close(raw.mean(), 0.0802294118, 1e-9)
    close(raw.var(), 0.1281088486, 1e-9)
    close(algorithm.value_targets(batch)[mask()], flat(GAE_RETURNS), 1e-9)


def test_ppo_whitens_with_the_biased_variance_on_request() -> None:
    advantages = PPO(kl_coef=0.1, lam=0.95, whiten_ddof=0).advantages(example_batch())
    close(advantages[mask()][0], 1.1505726647, 1e-9)


def test_returns_with_the_kl_in_the_reward() -> None:
    algorithm, batch = ReinforcePP(kl_coef=0.1), example_batch()
    wanted = [
        [0.995, 1.005],
        [-0.04, -0.02, -0.02, -0.03],
        [1.0, 1.005, 1.02],
        [-0.04],
        [0.975, 0.965, 0.99],
        [0.0, 0.0, 0.01, -0.02],
    ]
    close(maths.reward_to_go(algorithm.shaped_rewards(batch), mask())[mask()], flat(wanted), 1e-9)


def test_whitening_each_rank_alone_is_another_algorithm() -> None:
    """The numbers that a split by prompt gives: those of the whole batch differ, so a rank must never whiten its share."""
    batch, algorithm = example_batch(), ReinforcePP()
    shares = [algorithm.advantages(batch.select(rows)) for rows in torch.arange(6).split(3)]
    first_tokens = [share[row][mask()[rank * 3 + row]][0] for rank, share in enumerate(shares) for row in range(3)]
    alone = [0.8432740275, -1.0540925344, 0.8432740275, -0.7245688238, 1.2076147063, -0.7245688238]
    close(torch.stack(first_tokens), alone, 1e-9)
    whole = algorithm.advantages(batch)
    assert all(float((whole[row][mask()[row]][0] - alone[row]).abs()) > 0.1 for row in range(6))


@pytest.mark.parametrize(("clip", "wanted"), [(None, 0.0986359028), (0.5, 0.0986359028), (0.2, 0.1004910057)])
def test_value_loss(clip: float | None, wanted: float) -> None:
    algorithm, batch = PPO(kl_coef=0.1, lam=0.95, value_clip=clip), example_batch()
    loss = algorithm.value_loss(batch, place(VALUES), algorithm.value_targets(batch))
    close(maths.masked_mean(loss, mask()), wanted, 1e-9)
    assert bool((loss[~mask()] == 0).all())


def test_gae_with_gamma_and_lam_one_is_return_less_value() -> None:
    algorithm, batch = PPO(kl_coef=0.1), example_batch()
    close(algorithm.value_targets(batch)[mask()], maths.reward_to_go(algorithm.shaped_rewards(batch), mask())[mask()], 1e-12)


def test_gae_with_lam_zero_is_one_step() -> None:
    batch = example_batch()
    rewards = PPO(kl_coef=0.1).shaped_rewards(batch)
    advantage = maths.gae(rewards, batch.values, mask(), gamma=0.9, lam=0.0)
    row, start = 1, 1  # row A2: four tokens from column 1
    values = batch.values[row, start : start + 4]
    following = torch.cat([values[1:], torch.zeros(1, dtype=values.dtype)])
    close(advantage[row, start : start + 4], rewards[row, start : start + 4] + 0.9 * following - values, 1e-12)


def test_truncation_bootstrap_uses_the_value_after_a_cut_response() -> None:
    batch = replace(example_batch(), final_values=torch.full((6,), 10.0, dtype=torch.float64))
    with_value, without = PPO(truncation_bootstrap=True), PPO()
    gap = (with_value.raw_advantages(batch) - without.raw_advantages(batch))[mask()]
    expected = [[10.0 if length == 4 else 0.0] * length for length in LENGTHS]
    close(gap, flat(expected), 1e-9)


def test_rloo_is_dr_grpo_times_n_over_n_minus_one() -> None:
    batch = example_batch()
    close(RLOO().advantages(batch)[mask()], GRPO(adv_scale="none").advantages(batch)[mask()] * 1.5, 1e-12)


def test_rloo_kl_after_the_baseline_is_charged_to_go() -> None:
    batch = example_batch()
    late = RLOO(kl_coef=0.1, kl_before_baseline=False).advantages(batch)
    close((late - RLOO().advantages(batch))[mask()], flat(REMAX_FULL) - expand([1, 0, 1, -1, 0, -1]), 1e-9)


def expand(values: list[float]) -> Tensor:
    return flat([[value] * length for value, length in zip(values, LENGTHS, strict=True)])


def test_dapo_with_equal_clips_is_grpo() -> None:
    batch = example_batch()
    ours, theirs = DAPO(clip_eps_high=0.2), GRPO()
    assert ours.plan.dynamic and ours.clip_range == theirs.clip_range
    assert torch.equal(ours.advantages(batch), theirs.advantages(batch))


def test_the_clip_range_of_dapo_is_the_published_one() -> None:
    assert (DAPO().clip_range, GRPO().clip_range) == ((0.2, 0.28), (0.2, 0.2))


def test_whitening_is_standard_over_all_tokens_and_zero_for_one() -> None:
    white = maths.whiten(place(VALUES), mask())[mask()]
    close(white.mean(), 0.0, 1e-9)
    close(white.var(), 1.0, 1e-6)
    assert maths.whiten(torch.tensor([[5.0, torch.nan]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (PPO, {"lam": 1.5}, "lam"),
        (PPO, {"value_clip": 0.0}, "value_clip"),
        (ReinforcePP, {"baseline": "group", "kl_coef": 0.1}, "kl_placement=loss"),
        (ReinforcePP, {"whiten_over": "sequences", "gamma": 0.9}, "gamma=1"),
        (ReMax, {"plan": SamplingPlan()}, r"plan\.greedy"),
        (DAPO, {"dual_clip": 1.2}, "dual_clip"),
    ],
)
def test_settings_out_of_order_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)
