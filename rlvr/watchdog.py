"""No hang without a message: the ranks watch each other, and when one dies, fails or hangs they all stop.

Every rank has a thread that writes a beat to the key-value store at MASTER_ADDR:MASTER_PORT and reads the others'. Under
torchrun that store lives in the launcher and outlives every worker; without it (srun, env://) it lives in rank 0. Whoever
is first to put a verdict there prints it; all others leave silently with its exit code.

* Died: the process is gone (seen by the ranks of its host within two beats), or no rank of its host has beaten for
  ``dead_after_s``. A rank that is merely silent, for example while it reads a file under the interpreter's lock, is alive.
* Hangs: two or more ranks run and none has entered a new phase for ``timeout_s``. The ranks in the earliest phase are named,
  or when all are in the same, those that do not wait in torch.distributed; one rank of each of their places prints its stack.
* Failed: an exception left the ``with`` block. Errors of a collective that a peer's end caused are not reported.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from rlvr.errors import InputError

NO_VERDICT = "none"
FULL_READERS = 64  # up to so many ranks, each reads all records at every beat; beyond, the ranks but 0 take turns
_watches = itertools.count()  # of this process; every rank starts as many, and each needs keys of its own
CONTINUE = "The same command continues from the last checkpoint."


def connect(name: str) -> Store:
    """A client of the run's store, with keys of its own for each name and for each attempt of ``torchrun --max-restarts``.

    The store may outlive an attempt, and a new one must not read the records of the last. Needs a server at MASTER_ADDR and
    MASTER_PORT: torchrun's, or rank 0's once it has started a process group.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"watchdog: got no {' and '.join(missing)} in the environment; launch with torchrun, or export them")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
    run, attempt = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return PrefixStore(f"rlvr/{name}/{run}/{attempt}", store)


@dataclass
class Peer:
    """What this rank knows of another, or of itself. Clocks differ between hosts: ages count from when a change was seen."""

    host: str
    machine: str  # host and process namespace: within one, a process id can be checked
    pid: int
    seen: float = 0.0  # monotonic clock at the last new beat
    beats: int = 0
    phases: int = 0  # entered so far
    place: str = ""
    waits: bool = False  # inside a call of torch.distributed
    finished: bool = False


class Watchdog:
    """Watches the processes of a run: names the rank and the phase when one dies or hangs, and stops the others.

    Every rank enters the same phases in the same order. Once a single rank is left running, nobody waits for it and no time
    limit holds. Outside a handler of the program's own, SIGTERM raises SystemExit(143) between ``start`` and ``stop``.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, dead_after_s: float = 10.0) -> None:
        if not 0 < dead_after_s <= timeout_s:
            raise InputError(f"watchdog: got dead_after_s {dead_after_s}, expected above 0 and at most timeout_s {timeout_s}")
        self.rank, self.world_size, self.timeout_s, self.dead_after_s = rank, world_size, timeout_s, dead_after_s
        self._beat_s = min(1.0, dead_after_s / 5)
        self._read_every = 1 if rank == 0 else -(-world_size // FULL_READERS)  # beats
        self._phases, self._beats = 0, 0
        self._peers: dict[int, Peer] = {}  # empty until all ranks have started
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._previous: Any = None

    def start(self) -> None:
        """Join the watch; call it once the processes know each other. Does nothing in a single process."""
        if self.world_size == 1:
            return
        self._in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        name = f"watchdog{next(_watches)}"
        self._main_store, self._store = connect(name), connect(name)  # one for each thread: neither waits
        self._main_store.set(f"who{self.rank}", json.dumps([socket.gethostname(), _machine(), os.getpid()]))
        self._main_store.compare_set("verdict", "", NO_VERDICT)
        self.phase("start")
        self._write_beat(self._main_store)
        self._main_store.add("started", 1)
        self._started = self._moved = time.monotonic()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # torchrun's answer to the death of a peer
            self._previous = signal.signal(signal.SIGTERM, _on_sigterm)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._guard_store)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._at_exit)

    def phase(self, name: str) -> None:
        """Say what the main thread does from now on, for example ``step 12: generate``."""
        if self.world_size == 1:
            return
        self._phases += 1
        try:  # published at once: a death must be told with the phase it happened in
            self._main_store.set(f"phase{self.rank}", json.dumps([self._phases, name]))
        except RuntimeError:
            return  # the store is lost: the watching thread meets the same error and ends the run

    def stop(self) -> None:
        """Leave the watch; the others do not take the end of this process for a death."""
        if not self._threads or self._over.is_set():
            return
        self._over.set()
        self._threads[0].join(2 * self._beat_s)
        try:
            self._write_beat(self._main_store, finished=True)
            self._main_store.get(f"beat{self.rank}")  # comes back only after the store has taken the last beat
            if self.rank == 0 and not self._in_launcher:
                self._outlast_the_others()
        except RuntimeError:
            pass  # without a store there is nobody left to tell
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _at_exit(self) -> None:
        """A script that ended without ``stop`` ended in order, unless an exception ended it."""
        if not hasattr(sys, "last_value"):
            self.stop()
        elif not self._over.is_set():
            self._over.set()
            self._threads[0].join(2 * self._beat_s)  # the interpreter must not end while it is in the store: SIGABRT

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._threads or self._over.is_set() or error is None or isinstance(error, KeyboardInterrupt):
            self.stop()  # after Ctrl-C too: every rank gets it, and rank 0 may still be saving
            return
        if self._previous is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending; the message comes first
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            self._wait_for_signs_of_life()
            self.stop()
        elif isinstance(error, InputError):
            if self.rank != 0:  # when rank 0 meets the same error, it speaks
                self._over.wait(3 * self._beat_s)
            self._fail(None if self.rank == 0 else f"rank {self.rank}: {error}", code=2)
            error.told = self.rank != 0
        else:
            if isinstance(error, RuntimeError):  # as collectives raise when a peer is gone
                self._wait_for_signs_of_life()
            name = json.loads(self._main_store.get(f"phase{self.rank}"))[1]
            self._fail(f"rlvr stops: rank {self.rank} failed in phase {name!r}: {type(error).__name__}: {error}", code=1)

    # The store.

    def _write_beat(self, store: Store, finished: bool = False) -> None:
        self._beats += 1
        store.set(f"beat{self.rank}", json.dumps([self._beats, self._phases, *_place(), finished]))

    def _read(self, ranks: Iterable[int]) -> dict[str, Any] | None:
        """Bring the records of these ranks up to date; returns the verdict, if there is one."""
        ranks = list(ranks)
        word, *records = self._store.multi_get(["verdict", *(f"beat{rank}" for rank in ranks)])
        now = time.monotonic()
        for rank, record in zip(ranks, records, strict=True):
            peer, (beats, phases, *where, finished) = self._peers[rank], json.loads(record)
            if phases > peer.phases:
                self._moved, peer.phases = now, phases
            if beats != peer.beats:
                peer.seen = now
            peer.beats, (peer.place, peer.waits), peer.finished = beats, where, finished
        return None if word.decode() == NO_VERDICT else json.loads(word)

    def _outlast_the_others(self) -> None:
        """Keep the store of this process up while the others end."""
        deadline = time.monotonic() + self.dead_after_s
        keys = [f"beat{rank}" for rank in range(self.world_size)]
        while self._peers and time.monotonic() < deadline:
            if all(json.loads(record)[-1] for record in self._main_store.multi_get(keys)):
                return
            time.sleep(self._beat_s / 4)

    # The watching threads.

    def _watch(self) -> None:
        try:
            while not self._over.wait(self._beat_s):
                self._write_beat(self._store)
                if not self._peers and not self._meet():
                    continue
                gone = self._gone()  # before the reading: who ends in order says so first
                all_ranks = bool(gone) or not (self._beats + self.rank) % self._read_every
                verdict = self._read(range(self.world_size) if all_ranks else ())
                if verdict is not None:
                    self._obey(verdict)
                elif all_ranks:
                    self._judge([rank for rank in gone if not self._peers[rank].finished])
        except RuntimeError as error:  # every error of a store is one
            self._lost(str(error).splitlines()[0])

    def _guard_store(self) -> None:
        """A store whose host fell silent blocks the watching thread for minutes; this one counts its own wakings instead."""
        beats, idle = 0, 0
        while not self._over.wait(self._beat_s):
            idle = idle + 1 if self._beats == beats else 0
            beats = self._beats
            if idle * self._beat_s > 3 * self.dead_after_s:
                self._lost(f"no answer for {3 * self.dead_after_s:g} s")

    def _meet(self) -> bool:
        """Whether all ranks have started; then their processes are known."""
        if self._store.add("started", 0) == self.world_size:
            records, now = self._store.multi_get([f"who{rank}" for rank in range(self.world_size)]), time.monotonic()
            self._peers = {
                rank: Peer(host, machine, pid, now) for rank, (host, machine, pid) in enumerate(map(json.loads, records))
            }
            return True
        word = self._store.get("verdict").decode()
        if word != NO_VERDICT:
            self._obey(json.loads(word))
        elif time.monotonic() - self._started > self.timeout_s:
            missing = [rank for rank in range(self.world_size) if not self._store.check([f"who{rank}"])]
            self._condemn(f"rlvr stops: {_ranks(missing)} did not start within {self.timeout_s:g} s")
        return False

    def _gone(self) -> list[int]:
        """The ranks of this machine that were running and whose process has ended."""
        here = self._peers[self.rank].machine
        return [rank for rank, peer in self._peers.items() if peer.machine == here and not peer.finished and _ended(peer.pid)]

    def _judge(self, gone: list[int]) -> None:
        now, me = time.monotonic(), self._peers[self.rank]
        me.seen = now
        running = {rank: peer for rank, peer in self._peers.items() if not peer.finished}
        awake = {peer.machine for peer in running.values() if now - peer.seen <= self.dead_after_s}
        lost = [rank for rank, peer in running.items() if peer.machine not in awake]
        if gone or lost:
            dead = sorted({*gone, *lost})
            _, phase = self._read_phases(dead)[0]
            first = running[dead[0]]
            silence = "" if dead[0] in gone else f", no sign of life for {now - first.seen:.0f} s"
            self._condemn(
                f"rlvr stops: {_ranks(dead)} (host {first.host}, pid {first.pid}) died in phase {phase!r}{silence}; "
                f"last seen at {first.place}. {CONTINUE}",
                [rank for rank in running if rank not in dead],
            )
        elif len(running) > 1 and now - self._moved > self.timeout_s:
            self._report_hang(running, now)

    def _report_hang(self, running: dict[int, Peer], now: float) -> None:
        phases = {}
        for rank, (count, name) in zip(running, self._read_phases(running), strict=True):
            phases[rank] = name
            if count > running[rank].phases:  # entered by a rank that could not beat since
                self._moved, running[rank].phases = now, count
        if self._moved == now:
            return
        earliest = min(peer.phases for peer in running.values())
        slow = [rank for rank, peer in running.items() if peer.phases == earliest]
        if len(slow) == len(running):
            slow = [rank for rank in slow if not running[rank].waits] or slow
        waiting = [rank for rank in running if rank not in slow]
        if waiting:
            verb = "hangs" if len(slow) == 1 else "hang"
            others = f"{_ranks(waiting)} {'wait' if len(waiting) > 1 else 'waits'} in {phases[waiting[0]]!r}"
            head = f"{_ranks(slow)} {verb} in phase {phases[slow[0]]!r} while {others}"
        else:
            head = f"all ranks are stuck in phase {phases[slow[0]]!r}"
        groups: dict[str, list[int]] = {}
        for rank, peer in running.items():
            silence = now - peer.seen
            silent = f" (no sign of life for {silence:.0f} s)" if silence > self.dead_after_s else ""
            groups.setdefault(f"{peer.place}{silent}", []).append(rank)
        places = "".join(f"\n  {_ranks(ranks)} at {place}" for place, ranks in groups.items())
        stacks = [own[0] for own in ([r for r in ranks if r in slow] for ranks in groups.values()) if own]
        message = f"rlvr stops: {head}: no new phase for {now - self._moved:.0f} s. {CONTINUE}{places}"
        self._condemn(message, list(running), stacks)

    def _read_phases(self, ranks: Iterable[int]) -> list[tuple[int, str]]:
        """Number and name of the phase that each of these ranks is in, as of now."""
        return [tuple(json.loads(record)) for record in self._store.multi_get([f"phase{rank}" for rank in ranks])]

    # Ends.

    def _condemn(self, message: str, alive: Iterable[int] = (), stacks: Iterable[int] = ()) -> None:
        """End the run from the watching thread. The lowest rank alive has the first word, for the sake of its log."""
        time.sleep(2 * self._beat_s * (self.rank != min(alive, default=self.rank)))
        verdict = self._publish(self._store, f"watch {self.rank}", 1, stacks)
        if verdict["author"] == f"watch {self.rank}":
            _say(message)
        self._obey(verdict)

    def _publish(self, store: Store, author: str, code: int, stacks: Iterable[int] = ()) -> dict[str, Any]:
        """The verdict that holds: this one, or the one that was there first. Its author alone prints a message."""
        word = json.dumps({"author": author, "code": code, "stacks": list(stacks)})
        return json.loads(store.compare_set("verdict", NO_VERDICT, word))

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Leave with the verdict's exit code, unless the main thread of this rank wrote it and ends by itself."""
        if verdict["author"] == f"main {self.rank}":
            self._over.set()
            return
        if self.rank in verdict["stacks"]:
            stack = "".join(traceback.format_stack(_main_frame()))
            _say(f"rank {self.rank} is at (most recent call last):\n{stack}")
        self._leave(verdict["code"])

    def _leave(self, code: int) -> None:
        time.sleep(3 * self._beat_s)  # the speaker's traceback, the stacks and a store in rank 0 need a moment
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may wait in a collective for ever

    def _fail(self, message: str | None, code: int) -> None:
        """Tell the others from the main thread and let the exception pass; silent when somebody spoke before."""
        verdict = self._publish(self._main_store, f"main {self.rank}", code)
        if verdict["author"] != f"main {self.rank}":
            self._leave(verdict["code"])
        if message:
            _say(message)
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 if self._in_launcher else self.rank == 0:
            time.sleep(3 * self._beat_s)  # the others read the verdict here, or in a torchrun of a host that ends now
        self._over.set()
        self._threads[0].join(2 * self._beat_s)  # the interpreter must not end while it is in the store: SIGABRT

    def _wait_for_signs_of_life(self) -> None:
        """Return once every running peer has beaten again; if one does not, the watching thread ends the process."""
        fresh = time.monotonic() + self._beat_s * (self._read_every + 1)
        deadline = fresh + self.dead_after_s + 3 * self._beat_s
        while time.monotonic() < deadline:
            others = [peer for rank, peer in self._peers.items() if rank != self.rank]
            if others and all(peer.finished or peer.seen > fresh for peer in others):
                return
            time.sleep(self._beat_s / 4)

    def _lost(self, detail: str) -> None:
        if self._over.is_set():
            return
        if not self._in_launcher and self._peers and self._peers[0].finished:
            self._over.set()  # rank 0 ended in order and took the store with it
            return
        holder = "torchrun on the first node" if self._in_launcher else "rank 0"
        local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if local_rank == 0 or (self.rank == 1 and not self._in_launcher):  # without a store: one message for each host
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            message = f"rlvr stops: {holder} died or cannot be reached: lost the store at {where} ({detail}). {CONTINUE}"
            _say(message)
        self._leave(1)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _say(message: str) -> None:
    print(f"\n{message}", file=sys.stderr, flush=True)  # a progress bar may stand in the line


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _place() -> tuple[str, bool]:
    """Where the main thread is: its innermost line outside torch and this file, and whether that waits in torch.distributed."""
    frame, waits = _main_frame(), False
    while frame and frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        waits = waits or "/torch/distributed/" in frame.f_code.co_filename
        frame = frame.f_back
    if frame is None:
        return "its end", False
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}", waits


def _machine() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _ended(pid: int) -> bool:
    """Whether no process of this id runs; one that its parent has not collected yet does not run."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # another user's process, or no /proc: it is there
        return False


def _ranks(ranks: list[int]) -> str:
    """``rank 1``; ``ranks 0, 2-7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
