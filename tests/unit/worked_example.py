"""The batch of the specification's worked example: two prompts, three responses each.

Numbers are typed from the table. Prompts have different lengths, so that the mask is ragged on both sides, and every
position outside the mask holds NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.types import Batch

Rows = list[list[float]]

PROMPT_LENGTHS = [2, 1, 3, 2, 1, 2]
LENGTHS = [2, 4, 3, 1, 3, 4]
GROUPS = [0, 0, 0, 1, 1, 1]
SCORES = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
GREEDY = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
WIDTH = max(p + n for p, n in zip(PROMPT_LENGTHS, LENGTHS, strict=True))

OLD: Rows = [[-0.5, -1.2], [-0.8, -0.3, -1.5, -0.4], [-0.2, -0.9, -0.7], [-1.1], [-0.6, -0.25, -1], [-0.45, -1.3, -0.15, -0.95]]
NEW_MINUS_OLD: Rows = [
    [0.1, 0.3],
    [-0.05, 0.25, -0.4, 1.4],
    [0.22, -0.3, 0],
    [-0.25],
    [0.05, 0.2, -0.1],
    [0.1, -0.1, 0.02, -0.3],
]
OLD_MINUS_REF: Rows = [[0.1, -0.05], [0.2, 0, -0.1, 0.3], [0.05, 0.15, -0.2], [0.4], [-0.1, 0.25, 0.1], [0, 0.1, -0.3, 0.2]]
OLD_MINUS_ROLLOUT: Rows = [
    [0.02, -0.01],
    [0, 0.8, -0.05, 0.03],
    [-0.02, 0.01, 0],
    [0.05],
    [-0.7, 0.02, 0],
    [0.01, -0.03, 0.04, 0],
]
VALUES_OLD: Rows = [[0.5, 0.7], [0.4, 0.3, 0.2, 0.1], [0.6, 0.5, 0.8], [0.2], [0.3, 0.4, 0.6], [0.25, 0.35, 0.15, 0.05]]
VALUES: Rows = [[0.6, 1.3], [0.1, 0.2, 0.3, -0.5], [0.7, 0.6, 0.9], [0.1], [0.35, 0.5, 0.65], [0.3, 0.3, 0.1, 0]]
GRPO_ADVANTAGE = [0.5773492692, -1.1546985384, 0.5773492692, -0.5773492692, 1.1546985384, -0.5773492692]
WEIGHTED_ATOL = 1e-9


def mask() -> Tensor:
    """``[6, T]``: True under the responses."""
    columns = torch.arange(WIDTH)
    start = torch.tensor(PROMPT_LENGTHS)[:, None]
    return (columns >= start) & (columns < start + torch.tensor(LENGTHS)[:, None])


def place(rows: Rows, dtype: torch.dtype = torch.float64, fill: float = torch.nan) -> Tensor:
    """Per-token numbers of the six rows at their positions: ``[6, T]``, ``fill`` outside the mask."""
    result = torch.full((len(rows), WIDTH), fill, dtype=dtype)
    result[mask()] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return result


def place_per_row(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """One number a row, copied to the row's tokens: ``[6, T]``."""
    return place([[value] * length for value, length in zip(values, LENGTHS, strict=True)], dtype)


def flat(rows: Rows) -> Tensor:
    """The 17 numbers in the order in which ``tensor[mask()]`` gives them."""
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def example_batch(dtype: torch.dtype = torch.float64) -> Batch:
    old = place(OLD, dtype)
    return Batch(
        tokens=torch.zeros((6, WIDTH), dtype=torch.int64),
        response_mask=mask(),
        groups=torch.tensor(GROUPS),
        rewards=torch.tensor(SCORES, dtype=dtype),
        correct=torch.tensor(SCORES) > 0,
        truncated=torch.tensor([length == 4 for length in LENGTHS]),
        rollout_logprobs=old - place(OLD_MINUS_ROLLOUT, dtype),
        old_logprobs=old,
        ref_logprobs=old - place(OLD_MINUS_REF, dtype),
        values=place(VALUES_OLD, dtype),
        greedy_rewards=torch.tensor(GREEDY, dtype=dtype),
    )


def example_logprobs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-probs of the policy in training: a leaf that collects gradients, NaN outside the mask."""
    return (place(OLD, dtype) + place(NEW_MINUS_OLD, dtype)).requires_grad_()


def close(got: Tensor | float, wanted: Tensor | list[float] | float, atol: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64).detach(), torch.as_tensor(wanted, dtype=torch.float64), rtol=0, atol=atol
    )


def token_losses(algorithm: Algorithm, dtype: torch.dtype = torch.float64, current: Tensor | None = None) -> Tensor:
    """Token losses of the example with the ``grpo`` advantage."""
    current = example_logprobs(dtype) if current is None else current
    return algorithm.token_loss(example_batch(dtype), current, place_per_row(GRPO_ADVANTAGE, dtype))


def aggregate(losses: Tensor, mode: str, rows: list[int] | None = None, keep: Tensor | None = None) -> float:
    """The scalar loss of some rows taken as one optimizer step."""
    picked = torch.arange(6) if rows is None else torch.tensor(rows)
    counted = (mask() if keep is None else keep)[picked]
    weights = maths.token_weights(counted, mode, groups=example_batch().groups[picked], constant=4, dtype=losses.dtype)
    return float((maths.where_mask(losses[picked], counted) * weights).sum().detach())
