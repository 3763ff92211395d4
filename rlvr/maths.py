"""Pure tensor functions under every algorithm. No models, no ranks, no files.

Shapes and masks follow ``rlvr.types``: ``[B, T]``, nats, selection by ``where`` so that NaN outside the mask spreads
nowhere. Functions keep the dtype of what they are given; group statistics are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-const",
    "group-mean-token-mean",
)
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k3+k2grad")
LOG_RATIO_BOUND = 20.0  # exp() of more would overflow float32 sums; the gradient is zero beyond
K3_BOUND = 10.0


def where_mask(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask``, else exactly 0 in value and gradient, whatever stood there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions; 0 when there is none."""
    return where_mask(values, mask).sum() / mask.sum().clamp(min=1)


def row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each row's True positions: ``[B, T] -> [B]``."""
    return where_mask(values, mask).sum(-1)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's True positions, 0 for an empty row: ``[B, T] -> [B]``."""
    return row_sum(values, mask) / mask.sum(-1).clamp(min=1)


# ---- KL against a reference -------------------------------------------------------------------------------------------


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: bool = True) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled, in nats.

    With ``d = logprobs - ref_logprobs``: k1 ``d`` (unbiased), k2 ``d^2 / 2``, k3 ``exp(-d) - 1 + d`` (unbiased, >= 0),
    abs ``|d|``; ``k3+k2grad`` has the value of k3 and the gradient of k2. As a loss on the policy, k2 has the expected
    gradient of the reverse KL, k3 of the forward KL, k1 none.

    ``d`` is bounded to +-20 inside ``exp``; with ``clamp`` the k3 value is bounded to 10. A clamp cuts the gradient.
    logprobs, ref_logprobs: ``[B, T]``. Returns: ``[B, T]``. Source: Schulman, "Approximating KL divergence" (2020).
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference.abs()
    k2 = difference.square() / 2
    if estimator == "k2":
        return k2
    bounded = difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    k3 = torch.expm1(-bounded) + bounded  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0
    k3 = k3.clamp(max=K3_BOUND) if clamp else k3
    if estimator == "k3":
        return k3
    if estimator == "k3+k2grad":
        return k3.detach() + k2 - k2.detach()
    raise ValueError(f"kl_estimator: got {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")


def adapt_kl_coef(kl_coef: float, kl: float, target: float, num_responses: int, horizon: float) -> float:
    """Next coefficient of the adaptive controller: ``beta * (1 + clip(kl/target - 1, -0.2, 0.2) * num_responses / horizon)``.

    Source: Ziegler et al. (arXiv 1909.08593), section 2.2. ``kl`` and ``target`` share a unit: nats per response or token.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_responses / horizon)


# ---- groups -----------------------------------------------------------------------------------------------------------


def _group_index(groups: Tensor) -> tuple[Tensor, int]:
    labels, index = torch.unique(groups, return_inverse=True)
    return index, len(labels)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean of each row's group, copied to the rows: ``[B], [B] -> [B]``."""
    index, count = _group_index(groups)
    total = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, index, values.double())
    size = torch.zeros_like(total).index_add_(0, index, torch.ones_like(values, dtype=torch.float64))
    return (total / size)[index].to(values.dtype)


def group_size(groups: Tensor) -> Tensor:
    """Rows in each row's group: ``[B] int64``."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return counts[index]


def group_std(values: Tensor, groups: Tensor, ddof: int) -> Tensor:
    """Standard deviation of each row's group (``n - ddof`` in the denominator), copied to the rows: ``[B]``."""
    index, count = _group_index(groups)
    values64 = values.double()
    centred = values64 - group_mean(values64, groups)
    squares = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, index, centred.square())
    size = torch.zeros_like(squares).index_add_(0, index, torch.ones_like(values64))
    return (squares / (size - ddof)).sqrt()[index].to(values.dtype)


def group_median(values: Tensor, groups: Tensor) -> Tensor:
    """Median of each row's group (mean of the middle two when even), copied to the rows: ``[B]``."""
    result = torch.empty_like(values)
    for label in torch.unique(groups):
        member = groups == label
        result[member] = torch.quantile(values[member].double(), 0.5).to(values.dtype)
    return result


def flat_groups(values: Tensor, groups: Tensor) -> Tensor:
    """True on rows whose whole group has one value: ``[B] bool``. Compared, not derived from a rounded deviation."""
    index, count = _group_index(groups)
    empty = torch.zeros(count, dtype=values.dtype, device=values.device)
    largest = empty.scatter_reduce(0, index, values, "amax", include_self=False)
    smallest = empty.scatter_reduce(0, index, values, "amin", include_self=False)
    return (largest == smallest)[index]


# ---- rewards to advantages --------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Each row's score on its last response token, 0 elsewhere: ``[B], [B, T] -> [B, T]``."""
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return where_mask(scores[:, None].expand(mask.shape), is_last)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of each row's rewards from a token on, over its masked-in tokens only: ``[B, T]``.

    A token outside the mask neither resets nor discounts.
    """
    running = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in range(mask.shape[1] - 1, -1, -1):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        columns.append(running)
    return where_mask(torch.stack(columns[::-1], 1), mask)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, final_values: Tensor | None = None) -> Tensor:
    """Generalised advantage estimates over each row's masked-in tokens: ``[B, T]``.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``; after the last token V is
    ``final_values [B]``, or 0. Source: Schulman et al. (arXiv 1506.02438), eq. 16.
    """
    advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(advantage) if final_values is None else final_values
    columns = []
    for t in range(mask.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        columns.append(advantage)
    return where_mask(torch.stack(columns[::-1], 1), mask)


def whiten(values: Tensor, mask: Tensor, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over all True positions together, moments in float64; 0 elsewhere.

    Fewer than two positions have no variance: the result is then 0.
    """
    chosen = values[mask].double()
    if len(chosen) < 2:
        return torch.zeros_like(values)
    scale = (chosen.var(correction=ddof) + eps).rsqrt()
    return where_mask(((values.double() - chosen.mean()) * scale).to(values.dtype), mask)


# ---- policy loss ------------------------------------------------------------------------------------------------------


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Log importance ratio of each token, bounded to +-20: ``[B, T]``, 0 outside the mask.

    ``token``: its own; ``sequence``: the row's sum; ``sequence_mean``: the row's mean (GSPO, arXiv 2507.18071, eq. 7),
    the row levels copied to each token of the row.
    """
    difference = where_mask(logprobs - old_logprobs, mask)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True).expand_as(difference)
    elif level == "sequence_mean":
        difference = row_mean(difference, mask)[:, None].expand_as(difference)
    elif level != "token":
        raise ValueError(f"ratio_level: got {level!r}, expected token, sequence or sequence_mean")
    return where_mask(difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), mask)


def clipped_objective(
    ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float, dual_clip: float | None = None
) -> Tensor:
    """``min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)``, to be maximised: ``[B, T]``.

    With ``dual_clip`` c, ``max(that, c * A)`` where ``A < 0``. Sources: PPO (arXiv 1707.06347, eq. 7); asymmetric range,
    DAPO (arXiv 2503.14476, eq. 10); dual clip (arXiv 1912.09729, eq. 5).
    """
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return objective


def cispo_objective(logprobs: Tensor, ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """``clip(ratio, 1 - eps_low, 1 + eps_high) * A * logprobs`` with the clipped ratio held constant: ``[B, T]``.

    The clip bounds a token's weight and never cuts its gradient. Source: CISPO, MiniMax-M1 (arXiv 2506.13585), eq. 4 and 5.
    """
    return ratio.detach().clamp(1 - eps_low, 1 + eps_high) * advantages * logprobs


def clip_fractions(
    ratio: Tensor,
    advantages: Tensor,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
    both_signs: bool = False,
) -> dict[str, Tensor]:
    """Where a clip acts, as 0/1 per token: ``policy/clip_high_fraction``, ``.._low_..`` and ``.._dual_..``, each ``[B, T]``.

    The upper bound acts where ``A > 0`` and the lower where ``A < 0``, or wherever ``A != 0`` with ``both_signs`` (CISPO).
    """
    high = ((advantages > 0) | (both_signs & (advantages < 0))) & (ratio > 1 + eps_high)
    low = ((advantages < 0) | (both_signs & (advantages > 0))) & (ratio < 1 - eps_low)
    dual = (advantages < 0) & (ratio > (dual_clip if dual_clip is not None else float("inf")))
    parts = {"high": high, "low": low, "dual": dual}
    return {f"policy/clip_{name}_fraction": where.to(ratio.dtype) for name, where in parts.items()}


def rollout_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: str, mode: str, low: float, high: float
) -> Tensor:
    """Importance weights that correct for the engine's distribution, no gradient: ``[B, T]``, 0 outside the mask.

    ``w = exp(old - rollout)`` per token or, at level ``sequence``, the product over the row; ``truncate`` bounds it to
    ``[low, high]``, ``mask`` sets it to 0 outside. Source: truncated importance sampling (Yao et al., 2025).
    """
    with torch.no_grad():
        weights = log_ratio(old_logprobs, rollout_logprobs, mask, level).exp()
        if mode == "truncate":
            weights = weights.clamp(low, high)
        elif mode == "mask":
            weights = torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))
        else:
            raise ValueError(f"rollout_is_mode: got {mode!r}, expected truncate or mask")
        return where_mask(weights, mask)


def token_weights(
    response_mask: Tensor,
    mode: str,
    *,
    groups: Tensor | None = None,
    constant: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of each token in the loss of one optimizer step: ``[B, T]``, 0 outside the mask.

    ``loss = (token_loss * weights).sum()`` over the rows of the step, all ranks and micro-batches, so any split of the
    rows gives the same gradient. Rows without a token do not count. With N non-empty rows of ``len_b`` tokens:
    ``token-mean`` 1 / sum(len); ``seq-mean-token-mean`` 1 / (N len_b); ``seq-mean-token-sum`` 1 / N;
    ``seq-mean-token-sum-const`` 1 / (N constant); ``group-mean-token-mean`` 1 / (groups * tokens of the group).
    """
    mask = response_mask
    lengths = mask.sum(-1, keepdim=True)  # [B, 1]
    rows = (lengths > 0).sum().clamp(min=1)
    if mode == "token-mean":
        weight = 1.0 / lengths.sum().clamp(min=1).to(dtype).expand_as(lengths)
    elif mode == "seq-mean-token-mean":
        weight = 1.0 / (rows * lengths.clamp(min=1)).to(dtype)
    elif mode == "seq-mean-token-sum":
        weight = (1.0 / rows.to(dtype)).expand_as(lengths)
    elif mode == "seq-mean-token-sum-const":
        if constant is None or constant <= 0:
            raise ValueError(f"loss_agg_const: got {constant}, expected a positive number of tokens")
        weight = (1.0 / (rows.to(dtype) * constant)).expand_as(lengths)
    elif mode == "group-mean-token-mean":
        if groups is None:
            raise ValueError("group-mean-token-mean needs groups")
        index, count = _group_index(groups)
        tokens = torch.zeros(count, dtype=lengths.dtype, device=mask.device).index_add_(0, index, lengths[:, 0])
        filled = (tokens > 0).sum().clamp(min=1)
        weight = (1.0 / (filled * tokens.clamp(min=1)).to(dtype))[index][:, None]
    else:
        raise ValueError(f"loss_agg: got {mode!r}, expected one of {', '.join(LOSS_AGGREGATIONS)}")
    return where_mask(weight.expand(mask.shape), mask)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) over the last dimension, in nats: ``[..., V] -> [...]``."""
    logprobs = torch.log_softmax(logits, -1)
    finite = torch.where(logprobs > -torch.inf, logprobs, 0.0)  # 0 * -inf is NaN, in the gradient too
    return -(logprobs.exp() * finite).sum(-1)


# ---- length shaping ---------------------------------------------------------------------------------------------------


def overlong_penalty(length_tokens: int, limit_tokens: int, buffer_tokens: int) -> float:
    """Soft length punishment in [-1, 0]: 0 up to ``limit - buffer``, then linear down to -1 at the limit.

    Source: DAPO (arXiv 2503.14476), eq. 13.
    """
    return -min(max(length_tokens - (limit_tokens - buffer_tokens), 0) / buffer_tokens, 1.0)


# ---- engine against trainer -------------------------------------------------------------------------------------------


def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's for the same weights, over masked-in tokens.

    ``w = exp(old - rollout)``; kl is the mean of ``rollout - old``, k3_kl of ``w - 1 - log w``; ess is
    ``mean(w)^2 / mean(w^2)``; chi2 is ``mean(w^2) - 1`` per token and per sequence; log-perplexities are means over
    rows of the mean negative log-prob.
    """
    if not bool(mask.any()):
        return {}
    old, rollout = old_logprobs[mask].double(), rollout_logprobs[mask].double()
    log_weight = old - rollout
    weight = log_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    probability_gap = (old.exp() - rollout.exp()).abs()
    rows = mask.any(-1)
    row_weight = row_sum(old_logprobs.double() - rollout_logprobs.double(), mask)[rows]
    row_weight = row_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    training_ppl = -row_mean(old_logprobs.double(), mask)[rows].mean()
    rollout_ppl = -row_mean(rollout_logprobs.double(), mask)[rows].mean()
    values = {
        "kl": -log_weight.mean(),
        "k3_kl": (torch.expm1(log_weight.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)) - log_weight).mean(),
        "abs_diff_mean": log_weight.abs().mean(),
        "abs_diff_max": log_weight.abs().max(),
        "prob_diff_mean": probability_gap.mean(),
        "prob_diff_max": probability_gap.max(),
        "is_mean": weight.mean(),
        "is_max": weight.max(),
        "is_min": weight.min(),
        "ess": weight.mean().square() / weight.square().mean(),
        "chi2_token": weight.square().mean() - 1,
        "chi2_seq": row_weight.square().mean() - 1,
        "training_log_ppl": training_ppl,
        "rollout_log_ppl": rollout_ppl,
        "log_ppl_diff": training_ppl - rollout_ppl,
        "ppl_ratio": row_ppl_ratio(old_logprobs, rollout_logprobs, mask),
    }
    if len(old) > 1 and old.exp().std() > 0 and rollout.exp().std() > 0:
        values["prob_correlation"] = torch.corrcoef(torch.stack([old.exp(), rollout.exp()]))[0, 1]
    return {f"mismatch/{name}": float(value) for name, value in values.items()}


def row_ppl_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of ``exp(mean(rollout - old))``: the trainer's perplexity over the engine's."""
    difference = row_mean(rollout_logprobs.double() - old_logprobs.double(), mask)
    return difference[mask.any(-1)].exp().mean()
