"""The worked example, continued: sections 12.6 to 12.8 (accumulation and filtering, mismatch, entropy and temperature)."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from worked_example import (
    GRPO_ADVANTAGE,
    WEIGHTED_ATOL,
    aggregate,
    close,
    example_batch,
    example_logprobs,
    flat,
    mask,
    place_per_row,
    token_losses,
)

from rlvr import maths
from rlvr.algos.grpo import GRPO
from rlvr.scoring import PolicyScorer
from rlvr.types import SamplingPlan
from rlvr.update import loss_mask

MICRO_BATCHES = [[0], [1, 2], [3], [4, 5]]  # rank 0: A1 | A2, A3; rank 1: B1 | B2, B3


# ---- 12.6 accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, correct, wrong",
    [
        ("token-mean", 0.2463214172, 0.1296970972),
        ("seq-mean-token-mean", 0.1025612172, 0.0514752933),
        ("seq-mean-token-sum", 0.6979106820, 0.4148068453),
    ],
)
def test_accumulation(mode: str, correct: float, wrong: float) -> None:
    """Weights of the whole step give the global value from any split; weights of each micro-batch alone do not."""
    losses = token_losses(GRPO())
    weights = maths.token_weights(mask(), mode, dtype=losses.dtype)
    parts = [float((losses[rows] * weights[rows]).sum().detach()) for rows in MICRO_BATCHES]
    assert sum(parts) == pytest.approx(correct, abs=WEIGHTED_ATOL)
    assert sum(aggregate(losses, mode, rows) for rows in MICRO_BATCHES) / 4 == pytest.approx(wrong, abs=WEIGHTED_ATOL)


@pytest.mark.parametrize("mode, wanted", [("token-mean", -0.6901380521), ("seq-mean-token-mean", -0.4960773342)])
def test_overlong_filtering(mode: str, wanted: float) -> None:
    algorithm = GRPO(plan=SamplingPlan(overlong_filter=True))
    keep = loss_mask(example_batch(), algorithm)  # A2 and B3 were cut
    assert keep.any(1).tolist() == [True, False, True, True, True, False]
    assert int(keep.sum()) == 9
    assert bool((loss_mask(example_batch(), GRPO()) == mask()).all())
    assert aggregate(token_losses(algorithm), mode, keep=keep) == pytest.approx(wanted, abs=WEIGHTED_ATOL)


# ---- 12.7 mismatch ----------------------------------------------------------------------------------------------------

SEQUENCE_WEIGHTS = [1.0100501671, 2.0, 0.9900498337, 1.0512710964, 0.5066169924, 1.0202013400]
TOKEN_WEIGHTS = [
    [1.0202013400, 0.9900498337],
    [1.0, 2.0, 0.9512294245, 1.0304545340],
    [0.9801986733, 1.0100501671, 1.0],
    [1.0512710964],
    [0.4965853038, 1.0202013400, 1.0],
    [1.0100501671, 0.9704455335, 1.0408107742, 1.0],
]


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "level, wanted",
    [("token", flat(TOKEN_WEIGHTS)), ("sequence", place_per_row(SEQUENCE_WEIGHTS)[mask()])],
    ids=["token", "sequence"],
)
def test_rollout_weights(level: str, wanted: torch.Tensor, dtype: torch.dtype, atol: float) -> None:
    batch = example_batch(dtype)
    old = batch.old_logprobs.clone().requires_grad_()
    weights = maths.rollout_weights(old, batch.rollout_logprobs, mask(), level, "truncate", 0.0, 2.0)
    close(weights[mask()], wanted, atol)
    assert weights.dtype == dtype and not weights.requires_grad
    assert bool((weights[~mask()] == 0).all())


@pytest.mark.parametrize(
    "settings, wanted",
    [({"rollout_is_max": 2.0}, 0.3760528693), ({"rollout_is_mode": "mask", "rollout_is_min": 0.5}, 0.2370811606)],
    ids=["truncate", "mask"],
)
def test_corrected_loss(settings: dict, wanted: float) -> None:
    losses = token_losses(GRPO(rollout_is="token", **settings))
    close(maths.masked_mean(losses, mask()), wanted, 1e-9)
    assert aggregate(losses, "token-mean") == pytest.approx(wanted, abs=WEIGHTED_ATOL)


def test_mismatch_metrics() -> None:
    batch = example_batch()
    found = maths.mismatch_metrics(batch.old_logprobs, batch.rollout_logprobs, mask())
    wanted = {
        "kl": -0.0100000000,
        "k3_kl": 0.0368875951,
        "abs_diff_mean": 0.1052941176,
        "abs_diff_max": 0.8000000000,
        "prob_diff_mean": 0.0653663727,
        "prob_diff_max": 0.5563592820,
        "is_mean": 1.0468875951,
        "is_max": 2.2255409285,
        "is_min": 0.4965853038,
        "ess": 0.9151264449,
        "chi2_token": 0.1976198949,
        "chi2_seq": 0.5269772879,
        "training_log_ppl": 0.7715277778,
        "rollout_log_ppl": 0.7756944444,
        "log_ppl_diff": -0.0041666667,
        "ppl_ratio": 1.0036399328,
    }
    correlation = found.pop("mismatch/prob_correlation")
    assert found == {f"mismatch/{name}": pytest.approx(value, abs=1e-9) for name, value in wanted.items()}
    old, rollout = batch.old_logprobs[mask()].exp().tolist(), batch.rollout_logprobs[mask()].exp().tolist()
    mean_old, mean_rollout = sum(old) / 17, sum(rollout) / 17
    product = sum((a - mean_old) * (b - mean_rollout) for a, b in zip(old, rollout, strict=True))
    scale = sum((a - mean_old) ** 2 for a in old) * sum((b - mean_rollout) ** 2 for b in rollout)
    assert correlation == pytest.approx(product / math.sqrt(scale), abs=1e-9)


# ---- 12.8 entropy and temperature -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, entropy, logprob", [(1.0, 0.8323955818, -1.4076059644), (0.5, 0.4410574441, -2.1429316285)]
)
def test_entropy_and_temperature(temperature: float, entropy: float, logprob: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64) / temperature
    close(maths.entropy(logits), entropy, 1e-9)
    close(torch.log_softmax(logits, -1)[1], logprob, 1e-9)


def test_model_logprobs_and_entropies_use_the_temperature() -> None:
    """``PolicyScorer`` on a model whose logits are [2, 1, 0] everywhere."""

    config = Qwen2Config(vocab_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.model.norm = torch.nn.Identity()  # the last hidden state becomes e_0 below, which the output layer maps to the logits
    model.model.layers = torch.nn.ModuleList()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(8)[:1].expand(3, 8))
        model.lm_head.weight.copy_(torch.tensor([2.0, 1.0, 0.0])[:, None] * torch.eye(8)[:1])
    model.config.num_hidden_layers = 0
    batch = example_batch(torch.float32)
    batch.tokens.fill_(1)
    logprobs, entropies = PolicyScorer(model)(batch.tokens, batch.response_mask, 0.5)
    close(logprobs[mask()], [-2.1429316285] * 17, 1e-5)
    close(entropies[mask()], [0.4410574441] * 17, 1e-5)
    assert bool((logprobs[~mask()] == 0).all()) and bool((entropies[~mask()] == 0).all())


def test_entropy_with_an_impossible_token() -> None:
    """A logit of minus infinity (a padded or truncated vocabulary) changes neither the entropy nor spoils its gradient."""
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    without = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    for value in (logits, without):
        maths.entropy(value).backward()
    close(maths.entropy(logits), 0.8323955818, 1e-9)
    close(logits.grad, [*without.grad.tolist(), 0.0], 1e-12)


def test_weights_outside_their_bounds_are_counted() -> None:
    """One of 17 tokens has a weight above 2, and one more, 0.4966, is below 0.5."""
    for low, wanted in ((0.0, 1 / 17), (0.5, 2 / 17)):
        algorithm = GRPO(rollout_is="token", rollout_is_min=low)
        found = algorithm.token_metrics(example_batch(), example_logprobs(), place_per_row(GRPO_ADVANTAGE))
        close(maths.masked_mean(found["policy/rollout_weight_cut_fraction"], mask()), wanted, 1e-12)


def test_the_clamp_of_k3_is_counted_and_bends_no_metric() -> None:
    batch = example_batch()
    far = batch.old_logprobs.clone()
    far[0, 2] = batch.ref_logprobs[0, 2] - 4.0  # k3 = exp(4) - 5, far above 10
    found = GRPO(kl_coef=0.1).token_metrics(batch, far, place_per_row(GRPO_ADVANTAGE))
    close(found["policy/ref_kl_k3_nats"][0, 2], math.exp(4) - 5, 1e-9)
    close(found["policy/ref_kl_clamped_fraction"][mask()].sum(), 1.0, 0)
    assert "policy/ref_kl_clamped_fraction" not in GRPO(kl_coef=0.1, kl_estimator="k2").token_metrics(batch, far, far)
