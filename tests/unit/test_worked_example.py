"""Every number of the specification's worked example that the code covers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from worked_example import (
    GRPO_ADVANTAGE,
    LENGTHS,
    OLD,
    VALUES,
    WEIGHTED_ATOL,
    aggregate,
    close,
    example_batch,
    example_logprobs,
    flat,
    mask,
    place,
    place_per_row,
    token_losses,
)

from rlvr import maths
from rlvr.algos.grpo import GRPO
from rlvr.rollout.batch import length_penalty
from rlvr.types import Sampling, SamplingPlan

CASES = pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])


CLIPS = {
    "0.2": GRPO(clip_eps=0.2),
    "0.2/0.28": GRPO(clip_eps_low=0.2, clip_eps_high=0.28),
    "dual": GRPO(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=3.0),
}
LOSS_CLIP_02 = [
    [-0.6380696219, -0.6928191230],
    [1.0983832261, 1.4826622719, 0.9237588307, 4.6825334746],
    [-0.6928191230, -0.4277108583, -0.5773492692],
    [0.4618794154],
    [-1.2139011984, -1.3856382461, -1.0448144441],
    [0.6380696219, 0.5224072220, 0.5890124981, 0.4618794154],
]
LOSS_CLIP_HIGHER = [
    [-0.6380696219, -0.7390070646],
    [1.0983832261, 1.4826622719, 0.9237588307, 4.6825334746],
    [-0.7194214898, -0.4277108583, -0.5773492692],
    [0.4618794154],
    [-1.2139011984, -1.4103519796, -1.0448144441],
    [0.6380696219, 0.5224072220, 0.5890124981, 0.4618794154],
]
LOSS_DUAL = [LOSS_CLIP_HIGHER[0], [1.0983832261, 1.4826622719, 0.9237588307, 3.4640956151], *LOSS_CLIP_HIGHER[2:]]
GRAD_DUAL = [
    [-0.6380696219, 0],
    [1.0983832261, 1.4826622719, 0, 0],
    [-0.7194214898, -0.4277108583, -0.5773492692],
    [0],
    [-1.2139011984, -1.4103519796, -1.0448144441],
    [0.6380696219, 0.5224072220, 0.5890124981, 0],
]
AGGREGATES = {  # aggregation -> clip 0.2, clip 0.2/0.28, dual 3
    "token-mean": (0.2463214172, 0.2405858853, 0.1689130700),
    "seq-mean-token-mean": (0.1025612172, 0.0958613276, 0.0450930835),
    "seq-mean-token-sum": (0.6979106820, 0.6816600084, 0.4785870318),
    "seq-mean-token-sum-const": (0.1744776705, 0.1704150021, 0.1196467579),
    "group-mean-token-mean": (0.2258931043, 0.2203045899, 0.1526135978),
}


# ---- 12.1 KL ----------------------------------------------------------------------------------------------------------

KL = {
    "k1": [[0.1, -0.05], [0.2, 0.0, -0.1, 0.3], [0.05, 0.15, -0.2], [0.4], [-0.1, 0.25, 0.1], [0.0, 0.1, -0.3, 0.2]],
    "k2": [
        [0.005, 0.00125],
        [0.02, 0, 0.005, 0.045],
        [0.00125, 0.01125, 0.02],
        [0.08],
        [0.005, 0.03125, 0.005],
        [0, 0.005, 0.045, 0.02],
    ],
    "k3": [
        [0.0048374180, 0.0012710964],
        [0.0187307531, 0, 0.0051709181, 0.0408182207],
        [0.0012294245, 0.0107079764, 0.0214027582],
        [0.0703200460],
        [0.0051709181, 0.0288007831, 0.0048374180],
        [0, 0.0048374180, 0.0498588076, 0.0187307531],
    ],
}


@CASES
@pytest.mark.parametrize("estimator, mean", [("k1", 0.0647058824), ("k2", 0.0176470588), ("k3", 0.0168661594)])
def test_kl_of_old_against_reference(estimator: str, mean: float, dtype: torch.dtype, atol: float) -> None:
    batch = example_batch(dtype)
    kl = maths.kl_per_token(batch.old_logprobs, batch.ref_logprobs, estimator)
    assert kl.dtype == dtype
    close(kl[mask()], flat(KL[estimator]), atol)
    close(maths.masked_mean(kl, mask()), mean, atol)


@pytest.mark.parametrize(
    "estimator, mode, wanted",
    [
        ("k2", "token-mean", 0.1114352941),
        ("k3", "token-mean", 0.0786945270),
        ("k3", "seq-mean-token-mean", 0.0612208752),
    ],
)
def test_kl_as_a_loss_on_the_current_logprobs(estimator: str, mode: str, wanted: float) -> None:
    losses = GRPO(kl_coef=1.0, kl_estimator=estimator).kl_loss(example_batch(), example_logprobs())
    close(aggregate(losses, mode), wanted, WEIGHTED_ATOL)
    mean = maths.masked_mean if mode == "token-mean" else lambda kl, where: maths.row_mean(kl, where).mean()
    close(mean(losses, mask()), wanted, 1e-9)


def test_adaptive_coefficient() -> None:
    assert maths.adapt_kl_coef(0.05, 9.0, 6.0, 1024, 10000.0) == pytest.approx(0.0510240000, abs=1e-12)
    assert maths.adapt_kl_coef(0.05, 6.6, 6.0, 1024, 10000.0) == pytest.approx(0.05 * (1 + 0.1 * 0.1024), abs=1e-12)
    assert maths.adapt_kl_coef(0.05, 0.0, 6.0, 1024, 10000.0) == pytest.approx(0.05 * (1 - 0.2 * 0.1024), abs=1e-12)


# ---- 12.2 value loss --------------------------------------------------------------------------------------------------


def test_value_loss_without_clip() -> None:
    returns = [
        [0.97975, 1.005],
        [-0.00768375, -0.002825, -0.0135, -0.03],
        [0.9643, 0.994, 1.02],
        [-0.04],
        [0.928225, 0.9455, 0.99],
        [0.02730875, 0.010325, 0.0135, -0.02],
    ]
    losses = GRPO().value_loss(example_batch(), place(VALUES), place(returns))
    close(maths.masked_mean(losses, mask()), 0.0986359028, 1e-9)


# ---- 12.3 scalar advantages -------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({}, GRPO_ADVANTAGE),
        ({"adv_scale": "none"}, [1 / 3, -2 / 3, 1 / 3, -1 / 3, 2 / 3, -1 / 3]),
        ({"adv_std_ddof": 0}, [0.7071052812, -1.4142105624, 0.7071052812, -0.7071052812, 1.4142105624, -0.7071052812]),
        ({"adv_eps": 1e-4}, [0.5772502865, -1.1545005730, 0.5772502865, -0.5772502865, 1.1545005730, -0.5772502865]),
    ],
    ids=["grpo", "dr_grpo", "ddof0", "eps1e-4"],
)
def test_group_relative_advantages(settings: dict, wanted: list[float], dtype: torch.dtype, atol: float) -> None:
    advantages = GRPO(**settings).advantages(example_batch(dtype))
    assert advantages.dtype == dtype and not advantages.requires_grad
    close(advantages[mask()], place_per_row(wanted)[mask()], atol)
    assert bool((advantages[~mask()] == 0).all())


def test_batch_scale_against_a_slow_loop() -> None:
    deviation = math.sqrt(6 * 0.25 / 5)  # six scores of 0 and 1, mean 1/2
    wanted = [a / (deviation + 1e-6) for a in [1 / 3, -2 / 3, 1 / 3, -1 / 3, 2 / 3, -1 / 3]]
    close(GRPO(adv_scale="batch").advantages(example_batch())[mask()], place_per_row(wanted)[mask()], 1e-9)


def test_kl_in_the_reward_against_a_slow_loop() -> None:
    charged = [1 - 0.1 * 0.05, 0 - 0.1 * 0.4, 1 - 0.1 * 0, 0 - 0.1 * 0.4, 1 - 0.1 * 0.25, 0 - 0.1 * 0]  # row sums of k1
    wanted = []
    for group in (charged[:3], charged[3:]):
        mean = sum(group) / 3
        deviation = math.sqrt(sum((score - mean) ** 2 for score in group) / 2)
        wanted += [(score - mean) / (deviation + 1e-6) for score in group]
    algorithm = GRPO(kl_coef=0.1, kl_placement="reward")
    close(algorithm.scores_less_kl(example_batch()), charged, 1e-9)
    close(algorithm.advantages(example_batch())[mask()], place_per_row(wanted)[mask()], 1e-9)


def test_dapo_rewards_and_advantages() -> None:
    penalties = [maths.overlong_penalty(length, 4, 2) for length in LENGTHS]
    assert penalties == [0, -1, -0.5, 0, -0.5, -1]
    plan = SamplingPlan(overlong_buffer_tokens=2)
    assert [length_penalty(length, plan, Sampling(max_new_tokens=4)) for length in LENGTHS] == penalties
    batch = example_batch()
    totals = batch.rewards * 2 - 1 + torch.tensor(penalties, dtype=torch.float64)
    assert totals.tolist() == [1, -2, 0.5, -1, 0.5, -2]
    wanted = [0.7258657347, -1.1406461545, 0.4147804198, -0.1324531304, 1.0596250435, -0.9271719131]
    close(GRPO().advantages(replace(batch, rewards=totals))[mask()], place_per_row(wanted)[mask()], 1e-9)


def test_only_mixed_groups_are_kept() -> None:
    kept = [GRPO().keep(torch.tensor(correct)) for correct in ([True, False, True], [True] * 3, [False] * 3)]
    assert kept == [True, False, False]


# ---- 12.5 policy loss -------------------------------------------------------------------------------------------------


@CASES
def test_ratio(dtype: torch.dtype, atol: float) -> None:
    wanted = [
        [1.1051709181, 1.3498588076],
        [0.9512294245, 1.2840254167, 0.6703200460, 4.0551999668],
        [1.2460767306, 0.7408182207, 1.0],
        [0.7788007831],
        [1.0512710964, 1.2214027582, 0.9048374180],
        [1.1051709181, 0.9048374180, 1.0202013400, 0.7408182207],
    ]
    ratio = maths.log_ratio(example_logprobs(dtype), example_batch(dtype).old_logprobs, mask()).exp()
    close(ratio[mask()], flat(wanted), atol)


@CASES
@pytest.mark.parametrize("clip, wanted", [("0.2", LOSS_CLIP_02), ("0.2/0.28", LOSS_CLIP_HIGHER), ("dual", LOSS_DUAL)])
def test_token_losses(clip: str, wanted: list[list[float]], dtype: torch.dtype, atol: float) -> None:
    losses = token_losses(CLIPS[clip], dtype)
    assert losses.dtype == dtype
    close(losses[mask()], flat(wanted), atol)
    assert bool((losses[~mask()] == 0).all())


@CASES
@pytest.mark.parametrize("clip", ["0.2/0.28", "dual"])
def test_token_gradients(clip: str, dtype: torch.dtype, atol: float) -> None:
    wanted = [GRAD_DUAL[0], [1.0983832261, 1.4826622719, 0, 0 if clip == "dual" else 4.6825334746], *GRAD_DUAL[2:]]
    current = example_logprobs(dtype)
    token_losses(CLIPS[clip], dtype, current).sum().backward()
    close(current.grad[mask()], flat(wanted), atol)
    assert bool((current.grad[mask()][flat(wanted) == 0] == 0).all())
    assert bool((current.grad[~mask()] == 0).all())


@pytest.mark.parametrize("column, clip", list(enumerate(CLIPS)))
@pytest.mark.parametrize("mode", AGGREGATES)
def test_aggregation(mode: str, clip: str, column: int) -> None:
    assert aggregate(token_losses(CLIPS[clip]), mode) == pytest.approx(AGGREGATES[mode][column], abs=WEIGHTED_ATOL)


@pytest.mark.parametrize(
    "clip, both, dual", [("0.2", 0.3529411765, 0), ("0.2/0.28", 0.2352941176, 0), ("dual", 0.2352941176, 0.0588235294)]
)
def test_clip_fractions_and_approximate_kl(clip: str, both: float, dual: float) -> None:
    found = CLIPS[clip].token_metrics(example_batch(), example_logprobs(), place_per_row(GRPO_ADVANTAGE))
    means = {name: float(maths.masked_mean(values, mask())) for name, values in found.items()}
    assert means["policy/clip_high_fraction"] + means["policy/clip_low_fraction"] == pytest.approx(both, abs=1e-9)
    assert means["policy/clip_dual_fraction"] == pytest.approx(dual, abs=1e-9)
    assert means["policy/approx_kl_nats"] == pytest.approx(-0.0670588235, abs=1e-9)


@pytest.mark.parametrize("clip", CLIPS)
def test_on_policy_loss(clip: str) -> None:
    losses = token_losses(CLIPS[clip], current=place(OLD).requires_grad_())
    close(maths.masked_mean(losses, mask()), 0.0679234434, 1e-9)


RLOO_ADVANTAGE = [0.5, -1.0, 0.5, -0.5, 1.0, -0.5]


@pytest.mark.parametrize(
    "settings, advantages, wanted",
    [
        ({"kl_coef": 0.04}, GRPO_ADVANTAGE, 0.1050100522),
        ({"ratio_level": "sequence_mean", "clip_eps": 0.05}, GRPO_ADVANTAGE, 0.0458061083),
        ({"ratio_level": "sequence"}, RLOO_ADVANTAGE, 0.3161207511),
    ],
    ids=["grpo-paper", "gspo", "rloo-sequence-ratio"],
)
def test_sequence_mean_objectives(settings: dict, advantages: list[float], wanted: float) -> None:
    algorithm = GRPO(loss_agg="seq-mean-token-mean", **settings)
    losses = algorithm.token_loss(example_batch(), example_logprobs(), place_per_row(advantages))
    assert aggregate(losses, "seq-mean-token-mean") == pytest.approx(wanted, abs=WEIGHTED_ATOL)
    close(maths.row_mean(losses, mask()).mean(), wanted, 1e-9)


def test_rloo_on_policy_objective() -> None:
    losses = -place_per_row(RLOO_ADVANTAGE) * place(OLD)
    assert aggregate(losses, "seq-mean-token-sum") == pytest.approx(-0.2291666667, abs=WEIGHTED_ATOL)
    close(maths.row_sum(losses, mask()).mean(), -0.2291666667, 1e-9)
