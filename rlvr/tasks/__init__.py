"""Tasks: ``countdown`` makes its problems, ``dataset`` reads them from rows (local jsonl or a hub id)."""

from rlvr.tasks.base import Task

__all__ = ["Task"]
