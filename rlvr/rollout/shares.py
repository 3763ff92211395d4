"""Which rank draws which prompts, and which of those it grades: ranks of one tensor-parallel engine draw together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rlvr.backend import Backend
from rlvr.rollout.engine import Engine

T = TypeVar("T")


class Shares:
    """Deals prompts to the engines of a run, and what an engine drew to its ranks for grading."""

    def __init__(self, engine: Engine, backend: Backend) -> None:
        self.backend = backend
        self.ranks = getattr(engine, "tensor_parallel_size", 1)  # consecutive ranks that are one engine
        self.engines = backend.world_size // self.ranks
        self.engine, self.place = divmod(backend.rank, self.ranks)

    def drawn(self, items: Sequence[T]) -> list[T]:
        """What this rank's engine draws; the same list on all of its ranks."""
        return list(items[self.engine :: self.engines])

    def graded(self, count: int) -> range:
        """Places, in a list of that many drawn items, that this rank grades."""
        return range(count)[self.place :: self.ranks]

    def gather(self, own: Sequence[T], count: int) -> list[T]:
        """What the ranks made of the items they grade, in the order of the ``count`` items that were dealt."""
        found = self.backend.gather(list(own))
        turns = [divmod(index, self.engines) for index in range(count)]  # (turn of the engine, engine)
        return [found[engine * self.ranks + turn % self.ranks][turn // self.ranks] for turn, engine in turns]
