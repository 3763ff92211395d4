"""Rows into micro-batches and onto ranks: what is computed together changes memory and speed and no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlvr.backend import Backend
from rlvr.types import Batch


@dataclass(frozen=True)
class MicroBatcher:
    """Cuts rows into parts of at most ``budget_tokens`` tokens and deals them to the ranks of ``backend``."""

    backend: Backend
    budget_tokens: int
    packing: bool = False  # the scorer packs rows: a part's size is then the sum of its lengths, not rows x longest

    def parts(self, batch: Batch, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Batch]]:
        """This rank's parts of ``rows`` (int64 ``[b]``; all of them when not given): row numbers, and those rows trimmed.

        Rows are sorted by length and cut into rounds, in which every rank gets one part, all alike in length. A single row
        above the budget is a part of its own. All ranks yield the same number of parts, since a pass over sharded weights is
        a collective; where rows run out, a rank gets one with nothing in its mask: no weight, no gradient.
        """
        if rows is None:
            rows = torch.arange(len(batch), device=batch.tokens.device)
        columns = torch.arange(1, batch.response_mask.shape[1] + 1, device=batch.tokens.device)
        widths = (batch.response_mask[rows] * columns).amax(1)  # [b] position after the last response token
        order, ranks = torch.argsort(widths, stable=True), self.backend.world_size
        tiers = torch.arange(0, len(order), ranks)  # where each tier of the order begins: one row for each rank
        longest = widths[order[(tiers + ranks - 1).clamp(max=len(order) - 1)]].clamp(min=1).tolist()  # [tiers], ascending
        start, packed = 0, 0
        for place, width in enumerate(longest):
            size = packed + width if self.packing else (place - start + 1) * width
            if place > start and size > self.budget_tokens:
                yield self._share(batch, rows, order[start * ranks : place * ranks])
                start, packed = place, 0
            packed += width
        yield self._share(batch, rows, order[start * ranks :])

    def _share(self, batch: Batch, rows: Tensor, places: Tensor) -> tuple[Tensor, Batch]:
        own = places[self.backend.rank :: self.backend.world_size]
        numbers = rows[own] if len(own) else rows[:1]
        part = batch.select(numbers)
        if not len(own):
            part = replace(part, response_mask=torch.zeros_like(part.response_mask))
        return numbers, part.trim()

    @torch.no_grad()
    def score(self, batch: Batch, score: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Both results of ``score(part)``, each ``[b, t]`` or ``[b]``, over the whole batch: ``[B, T]`` or ``[B]``.

        Each rank scores its share. ``score`` gives 0 outside the mask, and for a row with an empty mask.
        """
        whole: list[Tensor] = []
        for rows, part in self.parts(batch):
            results = score(part)
            if not whole:
                whole = [torch.zeros(batch.tokens.shape[: r.ndim], dtype=r.dtype, device=r.device) for r in results]
            for total, result in zip(whole, results, strict=True):
                if result.ndim == 1:
                    total[rows] += result
                else:
                    total[rows, : result.shape[1]] += result
        return self.backend.sum(whole[0]), self.backend.sum(whole[1])
