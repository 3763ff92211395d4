"""Built-in verifiers, one per file: ``countdown`` (exact arithmetic traces), ``math`` (mathematical answers)."""

from rlvr.rewards.base import Reward, bind_verifier, grade

__all__ = ["Reward", "bind_verifier", "grade"]
