"""Boundary evaluation: n answers per problem from every model, verified, turned into pass@k with intervals."""

from rlvr.boundary.estimators import pass_at_k

__all__ = ["pass_at_k"]
