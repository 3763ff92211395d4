"""Ctrl-C that loses nothing: the first one asks the loop to stop after its step, the second stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While active, the first SIGINT or SIGTERM sets ``requested``; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # signal handlers can be set nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGTERM:
                return  # Slurm and torchrun both pass it on: one request that comes twice
            raise KeyboardInterrupt
        self.requested = True
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # SIGTERM also comes when another rank has died
            print("\nstopping after this step and saving; once more to stop at once", file=sys.stderr, flush=True)
