"""Rollouts: the Engine protocol, the engines, and ``collect``, which carries out an algorithm's sampling plan."""

from rlvr.rollout.engine import Engine

__all__ = ["Engine"]
