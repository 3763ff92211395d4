"""What the watchdog tests run on each rank: ``watchdog_worker.py CASE FOLDER``, under torchrun or with its variables set."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rlvr import watchdog
from rlvr.errors import InputError
from rlvr.interrupt import StopRequest

DEAD_AFTER_S, TIMEOUT_S = 2.0, 6.0
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
WRONG = "task.path: got x, expected a file; give one"


def together() -> None:
    dist.all_reduce(torch.ones(1))


def sleep_for_ever() -> None:
    time.sleep(1000)


def misbehave(case: str, folder: Path) -> None:
    """What happens in the second phase of step 2. The file ``moment`` keeps the time."""
    if RANK == 1 or case.startswith("first"):
        (folder / "moment").touch()
    match (case, RANK):
        case ("dies" | "dies elsewhere", 1) | ("first dies", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        case ("dies once", 1) if ATTEMPT == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        case ("first freezes", 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        case ("hangs", 1):
            sleep_for_ever()
        case ("raises", 1):
            raise KeyError("no such verifier")
        case ("raises everywhere", _):
            raise RuntimeError("the gradient norm is nan")
        case ("wrong input", 1):
            raise InputError(WRONG)
        case ("wrong input everywhere", _):
            time.sleep(0.2 * (WORLD_SIZE - RANK))  # rank 0 last
            raise InputError(WRONG)
        case ("slow", 1):  # longer than DEAD_AFTER_S twice: sleeping, then holding the interpreter's lock
            time.sleep(1.5 * DEAD_AFTER_S)
            watch.phase("step 2: update again")
            ctypes.PyDLL(None).sleep(round(1.5 * DEAD_AFTER_S))
        case ("slow", _):
            watch.phase("step 2: update again")


def steps(case: str, folder: Path) -> None:
    for number in (1, 2, 3):
        watch.phase(f"step {number}: generate")
        together()
        watch.phase(f"step {number}: update")
        if number == 2:
            misbehave(case, folder)
        watch.phase(f"step {number}: gather")
        together()
        (folder / f"attempt {ATTEMPT} rank {RANK} step {number}").touch()
    if RANK == 0 and case == "slow":
        watch.phase("evaluate")
        time.sleep(TIMEOUT_S + 1)  # the other is done by now


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun may keep one store for all attempts: under env:// a second one can read the addresses of the first.
        dist.init_process_group("gloo", store=watchdog.connect("processes"), rank=RANK, world_size=WORLD_SIZE)
    else:
        dist.init_process_group("gloo")
    case, folder = sys.argv[1], Path(sys.argv[2])
    if case == "dies elsewhere":  # stands in for a second host: no rank can check the other's process
        watchdog._machine = lambda: f"host {RANK}"
    try:
        with (
            watchdog.Watchdog(RANK, WORLD_SIZE, TIMEOUT_S, DEAD_AFTER_S) as watch,
            StopRequest() if case != "dies elsewhere" else contextlib.nullcontext(),  # with and without a SIGTERM handler
        ):
            steps(case, folder)
        dist.destroy_process_group()
    except InputError as error:  # as the command line does
        if RANK == 0:
            print(f"rlvr train: the input is wrong\n  {error}", file=sys.stderr)
        sys.exit(2)
