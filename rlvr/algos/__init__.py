"""Algorithms, one per file. The dotted path of a class is its registration: ``algo._target_=rlvr.algos.grpo.GRPO``."""

from rlvr.algos.base import Algorithm

__all__ = ["Algorithm"]
