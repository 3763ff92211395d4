"""Processes that die, fail, hang or are merely slow: one message with the rank and the phase, in time, or none at all."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlvr.errors import InputError
from rlvr.watchdog import Watchdog, _ranks

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("watchdog_worker.py"))
MESSAGE = re.compile(r"rlvr stops: .*|^rank \d+: .*|^rlvr train: the input is wrong\n.*", re.MULTILINE)
CASES = {  # processes under torchrun; 0: two processes without a launcher
    "hangs": 3,
    "slow": 2,
    "first freezes": 0,
    "dies elsewhere": 2,
    "first dies": 0,
    "dies": 2,
    "raises": 2,
    "raises everywhere": 2,
    "wrong input": 2,
    "wrong input everywhere": 2,
    "dies once": 2,
}


@dataclass
class Outcome:
    output: str  # of all ranks and the launcher
    codes: list[int]  # of the launcher, or of each rank
    after_s: float  # from the misbehaviour to the end of the last process
    markers: set[str]

    @property
    def message(self) -> str:
        found = MESSAGE.findall(self.output)
        assert len(found) == 1, self.output[-4000:]
        return found[0]


def launch(case: str, processes: int, folder: Path) -> Outcome:
    """Run the worker in every rank to its end."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    torchrun += ["--max-restarts=1"] if case == "dies once" else []
    commands: list[tuple[list[str], dict[str, str]]] = [(torchrun, {})]
    if not processes:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
        commands = [([], {**master, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    with (folder / "output").open("w") as out:
        running = [
            subprocess.Popen(
                [sys.executable, *words, WORKER, case, str(folder)], env=environment | more, stdout=out, stderr=out
            )
            for words, more in commands
        ]
        try:
            if case == "first freezes":
                running[1].wait(60)
                running[0].send_signal(signal.SIGKILL)
            codes = [process.wait(60) for process in running]
        finally:
            for process in running:
                process.kill()
    moment = folder / "moment"
    after_s = time.time() - moment.stat().st_mtime if moment.exists() else 0.0
    return Outcome((folder / "output").read_text(), codes, after_s, {path.name for path in folder.glob("attempt *")})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    """All launches, three at a time: most of their time is waiting."""
    folder = tmp_path_factory.mktemp("watchdog")
    with ThreadPoolExecutor(3) as pool:
        yield {case: pool.submit(launch, case, count, folder / case.replace(" ", "_")) for case, count in CASES.items()}


@pytest.fixture
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Future[Outcome]]) -> Outcome:
    return outcomes[request.param].result()


def of(case: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outcome", [case], indirect=True)


@of("dies")
def test_a_killed_rank_is_named_with_its_phase(outcome: Outcome) -> None:
    assert re.match(r"rlvr stops: rank 1 \(host \S+, pid \d+\) died in phase 'step 2: update'; last seen at ", outcome.message)
    assert outcome.codes == [1] and outcome.after_s < 20
    assert "Connection" not in outcome.output and "[rank0]" not in outcome.output  # the error that the death caused in rank 0


@of("dies elsewhere")
def test_a_silent_host_is_taken_for_dead(outcome: Outcome) -> None:
    """No rank beside the dead one can check its process. torchrun's SIGTERM comes before the message."""
    assert re.search(r"rank 1 .* died in phase 'step 2: update', no sign of life for \d s; ", outcome.message)
    assert outcome.codes == [1] and 2 < outcome.after_s < 20


@of("hangs")
def test_a_hanging_rank_is_named_and_shows_its_stack(outcome: Outcome) -> None:
    head = "rlvr stops: rank 1 hangs in phase 'step 2: update' while ranks 0, 2 wait in 'step 2: gather': no new phase for "
    assert outcome.message.startswith(head)
    assert re.search(r"\n  rank 1 at integration/watchdog_worker.py:\d+ in sleep_for_ever\n", outcome.output)
    assert re.search(r"\n  ranks 0, 2 at integration/watchdog_worker.py:\d+ in together\n", outcome.output)
    assert re.findall(r"rank (\d) is at \(most recent call last\)", outcome.output) == ["1"]
    assert "time.sleep(1000)" in outcome.output
    assert outcome.codes == [1] and 6 < outcome.after_s < 20


@of("raises")
def test_an_exception_is_told_once_with_one_traceback(outcome: Outcome) -> None:
    assert outcome.message == "rlvr stops: rank 1 failed in phase 'step 2: update': KeyError: 'no such verifier'"
    assert set(re.findall(r"\[rank(\d)\]:", outcome.output)) == {"1"}
    assert outcome.codes == [1] and outcome.after_s < 20


@of("raises everywhere")
def test_the_same_exception_on_all_ranks_is_told_once(outcome: Outcome) -> None:
    said = re.match(
        r"rlvr stops: rank (\d) failed in phase 'step 2: update': RuntimeError: the gradient norm is nan", outcome.message
    )
    assert said and set(re.findall(r"\[rank(\d)\]:", outcome.output)) == {said[1]}
    assert outcome.codes == [1] and outcome.after_s < 20


@of("wrong input")
def test_wrong_input_on_one_rank_is_printed_by_it(outcome: Outcome) -> None:
    assert outcome.message == "rank 1: task.path: got x, expected a file; give one"
    assert outcome.after_s < 20
    assert set(re.findall(r"exitcode  : (\S+) ", outcome.output)) == {"2"}


@of("wrong input everywhere")
def test_wrong_input_on_all_ranks_is_left_to_rank_0(outcome: Outcome) -> None:
    assert outcome.message == "rlvr train: the input is wrong\n  task.path: got x, expected a file; give one"
    assert outcome.after_s < 20
    assert set(re.findall(r"exitcode  : (\S+) ", outcome.output)) == {"2"}


@of("slow")
def test_slow_silent_and_lone_ranks_raise_no_alarm(outcome: Outcome) -> None:
    """A phase longer than ``dead_after_s``, a rank that cannot beat for as long, and rank 0 at work when the other is done."""
    assert outcome.codes == [0] and not MESSAGE.findall(outcome.output), outcome.output
    assert len(outcome.markers) == 6


@of("dies once")
def test_torchrun_starts_again_after_a_death(outcome: Outcome) -> None:
    assert "rank 1 " in outcome.message and "died in phase 'step 2: update'" in outcome.message
    assert outcome.codes == [0], outcome.output
    first = {f"attempt 0 rank {rank} step 1" for rank in (0, 1)}
    assert outcome.markers == first | {f"attempt 1 rank {rank} step {step}" for rank in (0, 1) for step in (1, 2, 3)}


@of("first dies")
def test_the_death_of_rank_0_without_a_launcher(outcome: Outcome) -> None:
    assert outcome.message.startswith("rlvr stops: rank 0 died or cannot be reached: lost the store at 127.0.0.1:")
    assert outcome.codes == [-signal.SIGKILL, 1] and outcome.after_s < 20


@of("first freezes")
def test_a_store_that_does_not_answer(outcome: Outcome) -> None:
    assert "rank 0 died or cannot be reached: lost the store at 127.0.0.1:" in outcome.message
    assert "(no answer for 6 s)" in outcome.message and outcome.codes[1] == 1 and 6 < outcome.after_s < 20


def test_one_process_has_nobody_to_watch() -> None:
    with pytest.raises(KeyError, match="passes"), Watchdog(0, 1, timeout_s=10) as watchdog:
        watchdog.phase("step 1: generate")
        raise KeyError("passes")


def test_limits_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(InputError, match=r"dead_after_s 10\.0, expected above 0 and at most timeout_s 5"):
        Watchdog(0, 2, timeout_s=5)


def test_ranks_in_words() -> None:
    assert [_ranks(ranks) for ranks in ([1], [0, 2], [0, 2, 3, 4, 9])] == ["rank 1", "ranks 0, 2", "ranks 0, 2-4, 9"]
