"""One rollout batch into optimizer updates: minibatches, weights, losses, metrics.

The weight of every token is fixed over all rows of an update, all ranks, before the first forward pass, so dealing the rows
to ranks and cutting them into micro-batches changes memory and speed and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.backend import Backend, TrainedModel
from rlvr.micro_batches import MicroBatcher
from rlvr.types import Batch


@dataclass
class TokenMeans:
    """Means over tokens of many micro-batches, each token counted once."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(maths.where_mask(values.detach(), mask).double().sum())
        self.counts[name] = self.counts.get(name, 0) + int(mask.sum())

    def means(self, backend: Backend) -> dict[str, float]:
        """The means over the tokens of all ranks."""
        ranks = backend.gather((self.sums, self.counts))
        names = {name: None for sums, _ in ranks for name in sums}  # a dict keeps their order
        totals = {name: sum(sums.get(name, 0.0) for sums, _ in ranks) for name in names}
        return {name: total / max(sum(counts.get(name, 0) for _, counts in ranks), 1) for name, total in totals.items()}


def minibatches(groups: Tensor, prompts_per_minibatch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of each optimizer update, ``[b] int64``. In order for one epoch, prompts reshuffled each epoch for several."""
    labels = torch.unique(groups)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed((seed + epoch) % 2**63)
        order = torch.randperm(len(labels), generator=generator).to(labels.device) if epochs > 1 else torch.arange(len(labels))
        for chosen in labels[order].split(prompts_per_minibatch):
            yield torch.isin(groups, chosen).nonzero().squeeze(1)


def add_pretraining_loss(model: TrainedModel, batch: Batch, coefficient: float, batcher: MicroBatcher) -> float:
    """Add the gradient of ``coefficient`` x the mean negative log-prob per response token of a batch of pairs.

    Returns this rank's share of that mean, in nats. The denominator is the batch's own number of tokens, all ranks. It is
    supervised fine-tuning's loss, and the pretraining term of InstructGPT (arXiv 2203.02155), eq. 2.
    """
    weights = maths.token_weights(batch.response_mask, "token-mean")
    total = 0.0
    for rows, part in batcher.parts(batch):
        logprobs, _ = model.module(part.tokens, part.response_mask, 1.0)
        loss = -(logprobs * weights[rows, : logprobs.shape[1]]).sum()
        model.backward(coefficient * loss)
        total += float(loss.detach())
    return total


@dataclass(frozen=True)
class UpdatePlan:
    """How one rollout batch becomes updates."""

    prompts_per_minibatch: int
    epochs: int
    temperature: float
    loss_agg_const: float  # tokens, for loss_agg = seq-mean-token-sum-const
    shuffle_seed: int


def loss_mask(batch: Batch, algorithm: Algorithm) -> Tensor:
    """Tokens with a weight in the loss: the response mask, less cut rows where the plan filters them."""
    if algorithm.plan.overlong_filter:
        return batch.response_mask & ~batch.truncated[:, None]
    return batch.response_mask


def policy_update(
    policy: TrainedModel,
    algorithm: Algorithm,
    batch: Batch,
    advantages: Tensor,
    plan: UpdatePlan,
    batcher: MicroBatcher,
    ptx: Iterator[Batch] | None = None,
) -> tuple[dict[str, float], Tensor]:
    """All updates of the policy on one rollout batch; every rank takes its share of the rows of each.

    ``ptx`` gives one batch of pretraining pairs for each update. Returns the metrics and the log-probs ``[B, T]`` at the start
    of the step: the batch's, or, when it has none because the whole batch is one update, those of its forward pass.
    """
    means, norms, loss_share, ptx_share = TokenMeans(), [], 0.0, 0.0
    parts = list(minibatches(batch.groups, plan.prompts_per_minibatch, plan.epochs, plan.shuffle_seed))
    on_policy = len(parts) == 1
    start = torch.zeros_like(batch.rollout_logprobs) if batch.old_logprobs is None else None
    mask = loss_mask(batch, algorithm)
    for rows in parts:
        weights = maths.token_weights(mask[rows], algorithm.loss_agg, groups=batch.groups[rows], constant=plan.loss_agg_const)
        row_weights = torch.zeros_like(batch.rollout_logprobs).index_copy(0, rows, weights)  # [B, T]
        for micro, part in batcher.parts(batch, rows):
            width = part.tokens.shape[1]
            weight = maths.where_mask(row_weights[micro, :width], part.response_mask)
            advantage = advantages[micro, :width]
            logprobs, entropy = policy.module(part.tokens, part.response_mask, plan.temperature, algorithm.c_ent != 0)
            if on_policy:  # the ratio is then exactly 1: recomputed log-probs would differ by rounding
                part = replace(part, old_logprobs=logprobs.detach())
            if start is not None:
                start[micro, :width] += logprobs.detach()
            token_loss = algorithm.token_loss(part, logprobs, advantage)
            loss = (maths.where_mask(token_loss, weight > 0) * weight).sum()
            if algorithm.c_ent != 0:
                loss = loss - algorithm.c_ent * (entropy * weight).sum()
            policy.backward(loss)
            loss_share += float(loss.detach())
            means.add("policy/entropy_nats", entropy, part.response_mask)
            for name, values in algorithm.token_metrics(part, logprobs.detach(), advantage).items():
                means.add(name, values, part.response_mask)
        if ptx is not None:
            ptx_share += add_pretraining_loss(policy, next(ptx), algorithm.c_ptx, batcher)
        norms.append(policy.step())
    shares = batcher.backend.gather((loss_share, ptx_share))
    metrics = {
        **means.means(batcher.backend),
        "policy/loss": sum(loss for loss, _ in shares) / len(parts),
        "policy/grad_norm": sum(norms) / len(norms),
        "policy/lr": policy.lr,
        "policy/kl_coef": algorithm.kl_coef,
        "policy/rows": float(mask.any(1).sum()),
        "policy/tokens": float(mask.sum()),
        "policy/updates": float(len(parts)),
        "policy/skipped_updates": float(policy.skipped_updates),
    }
    if ptx is not None:
        metrics["policy/ptx_loss_nats"] = sum(loss for _, loss in shares) / len(parts)
    if start is not None:
        return metrics, batcher.backend.sum(start)
    assert batch.old_logprobs is not None
    return metrics, batch.old_logprobs


def critic_update(
    critic: TrainedModel, algorithm: Algorithm, batch: Batch, targets: Tensor, plan: UpdatePlan, batcher: MicroBatcher
) -> dict[str, float]:
    """All updates of the critic on one rollout batch, same minibatches as the policy; its own token mean."""
    means, norms, loss_share, count = TokenMeans(), [], 0.0, 0
    mask = loss_mask(batch, algorithm)
    for rows in minibatches(batch.groups, plan.prompts_per_minibatch, plan.epochs, plan.shuffle_seed):
        weights = torch.zeros_like(batch.rollout_logprobs)
        weights[rows] = maths.token_weights(mask[rows], "token-mean")
        for micro, part in batcher.parts(batch, rows):
            width = part.tokens.shape[1]
            values, _ = critic.module(part.tokens, part.response_mask)
            weight, target = maths.where_mask(weights[micro, :width], part.response_mask), targets[micro, :width]
            value_loss = algorithm.value_loss(part, values, target)
            loss = algorithm.c_v * (maths.where_mask(value_loss, weight > 0) * weight).sum()
            critic.backward(loss)
            loss_share += float(loss.detach())
            for name, entries in algorithm.value_metrics(part, values.detach(), target).items():
                means.add(name, entries, part.response_mask)
        norms.append(critic.step())
        count += 1
    assert batch.values is not None
    returns, residuals = targets[batch.response_mask], (targets - batch.values)[batch.response_mask]
    return {
        **means.means(batcher.backend),
        "critic/loss": sum(batcher.backend.gather(loss_share)) / count,
        "critic/grad_norm": sum(norms) / len(norms),
        "critic/lr": critic.lr,
        "critic/return_mean": float(returns.mean()),
        "critic/return_std": float(returns.std()),
        "critic/explained_variance": float(1 - residuals.var() / returns.var()) if float(returns.var()) > 0 else 0.0,
    }
