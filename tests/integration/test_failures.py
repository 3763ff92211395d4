"""Real training runs that a rank leaves: killed, hanging, raising, refused, stopped. One message each, and the run goes on.

A chain is one run folder in which the same command is launched again and again; something else happens each time.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlvr.checkpoint import latest, load_state
from rlvr.log import read_metrics

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
OURS = re.compile(r"^rlvr train: .*\n.*|^rlvr stops: .*|^rank \d+: .*|^interrupted; .*|^stopping .*", re.MULTILINE)
SETTINGS = """model=tiny task=countdown algo=grpo backend=ddp backend.use=cpu trainer.steps=6 trainer.prompts_per_step=4
trainer.responses_per_prompt=4 trainer.checkpoint_every=1 sampling.max_new_tokens=8 optimizer.lr=1e-3 boundary.every=0
reward=custom reward._target_=failing_parts.Grudge""".split()
DEEDS = "reward.deeds=[nothing,hang,raise,stop,kill]"  # in the first step, the second, ...
HANG_S = 12  # backend.timeout_s of the launch that hangs; the start takes about three seconds


@dataclass
class Outcome:
    code: int  # of torchrun
    output: str
    newest: Path | None  # checkpoint at the end of the launch
    after_s: float  # from the deed to the end of the last process

    @property
    def message(self) -> str:
        found = OURS.findall(self.output)
        assert len(found) == 1, self.output
        return found[0]


class Launcher:
    """Starts torchrun with the settings of all runs here, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.launches = folder, 0
        paths = f"{HERE.parents[1]}{os.pathsep}{HERE}"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CHAIN": str(folder)}

    def __call__(
        self, *settings: str, flags: str = "--standalone --nproc-per-node=2", deed: str = "", stop: bool = False
    ) -> Outcome:
        self.launches += 1
        with (self.folder / f"output{self.launches}").open("w+") as out:
            command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), "-m", "rlvr", "train", *SETTINGS]
            command += [f"reward.folder={self.folder}", f"run_dir={self.folder / 'run'}", *settings]
            torchrun = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, cwd=self.folder)
            try:
                if stop:
                    self._stop_as_slurm_does(torchrun)
                code = torchrun.wait(120)
            finally:
                torchrun.kill()
            moment = self.folder / deed
            after_s = time.time() - moment.stat().st_mtime if deed and moment.exists() else 0.0
            assert not self.processes(), "processes outlive the launch"
            out.seek(0)
            return Outcome(code, out.read(), latest(self.folder / "run"), after_s)

    def processes(self) -> list[int]:
        """All that a launch started: they have CHAIN in their environment."""
        mark, found = f"CHAIN={self.folder}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                found += [int(path.name)] * (mark in (path / "environ").read_bytes())
            except OSError:  # another user's, or gone meanwhile
                continue
        return found

    def _stop_as_slurm_does(self, torchrun: subprocess.Popen[bytes]) -> None:
        """SIGTERM to every process of the job; torchrun then passes its own on, so a rank gets two."""
        deadline = time.monotonic() + 60
        while not (self.folder / "stop").exists():
            assert time.monotonic() < deadline and torchrun.poll() is None
            time.sleep(0.05)
        for process in self.processes():
            if process != torchrun.pid:
                os.kill(process, signal.SIGTERM)
        time.sleep(0.5)
        torchrun.send_signal(signal.SIGTERM)


def undisturbed(launch: Launcher) -> dict[str, Outcome]:
    return {"end": launch()}


def copies(launch: Launcher) -> dict[str, Outcome]:
    return {
        "hang": launch(DEEDS, f"backend.timeout_s={HANG_S}", deed="hang"),
        "raise": launch(DEEDS, deed="raise"),
        "stop": launch(DEEDS, stop=True, deed="stop"),
        "kill": launch(DEEDS, flags="--standalone --nproc-per-node=2 --max-restarts=1"),
    }


def shards(launch: Launcher) -> dict[str, Outcome]:
    engine = ("engine=custom", "engine._target_=failing_parts.DyingEngine", f"engine.folder={launch.folder}")
    sharded = ("backend=deepspeed", "backend.zero_stage=3")
    return {"kill": launch(*sharded, *engine, flags="--standalone --nproc-per-node=2 --max-restarts=1")}


def wrong_input(launch: Launcher) -> dict[str, Outcome]:
    task = ("task=custom", "task._target_=failing_parts.HalfTask", f"task.folder={launch.folder}")
    return {
        "settings": launch(*task, "task.missing_in=settings", deed="settings"),
        "prompts": launch(*task, "task.missing_in=prompts", deed="prompts"),
        "all": launch("trainer.prompts_per_step=1"),
        "all settings": launch("trainer.prompts_per_step=0"),
    }


def machines(launch: Launcher) -> dict[str, Outcome]:
    """Two torchruns, the first with the store, one rank each; the second starts later and so gets rank 1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    found = {}
    for name in ("kill", "end"):
        launches = [Launcher(launch.folder / f"{name}{node}") for node in range(2)]
        flags = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id={name}"
        settings = (
            "reward.deeds=[nothing,kill]",
            "trainer.steps=2",
            f"reward.folder={launch.folder}",
            f"run_dir={launch.folder}/run",
        )
        with ThreadPoolExecutor(2) as pool:
            ends = []
            for node, start in enumerate(launches):
                ends.append(pool.submit(start, *settings, flags=f"{flags} --rdzv-conf=is_host={int(not node)}"))
                time.sleep(1)
        first, second = (end.result() for end in ends)
        moment = (launch.folder / "kill").stat().st_mtime
        found[name] = Outcome(
            max(first.code, second.code), first.output + second.output, latest(launch.folder / "run"), time.time() - moment
        )
    return found


CHAINS: list[Callable[[Launcher], dict[str, Outcome]]] = [copies, machines, shards, wrong_input, undisturbed]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, Outcome]]]]:
    """All chains, two at a time."""
    folder = tmp_path_factory.mktemp("failures")
    with ThreadPoolExecutor(2) as pool:
        yield {chain.__name__: pool.submit(chain, Launcher(folder / chain.__name__)) for chain in CHAINS}


@pytest.fixture
def outcome(request: pytest.FixtureRequest, chains: dict[str, Future[dict[str, Outcome]]]) -> Outcome:
    chain, launch = request.param
    return chains[chain].result()[launch]


def of(chain: str, launch: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("outcome", [(chain, launch)], indirect=True, ids=[f"{chain} {launch}"])


def assert_finished(outcome: Outcome, reference: Outcome, tolerance: float) -> None:
    """Every step counted once, and the weights of a run that nothing disturbed."""
    assert outcome.code == 0 and outcome.newest is not None and reference.newest is not None, outcome.output
    assert [row["step"] for row in read_metrics(outcome.newest.parents[1] / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(run.newest).state_dict() for run in (outcome, reference))
    base = AutoModelForCausalLM.from_pretrained(reference.newest.parents[1] / "base").state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)
    assert max((value - base[name]).abs().max().item() for name, value in theirs.items()) > 1e-3


def assert_stopped_after(step: int, outcome: Outcome) -> None:
    """The newest checkpoint is of this step and can be loaded."""
    assert outcome.code != 0 and outcome.newest is not None and outcome.newest.name == f"step_{step:06d}"
    assert load_state(outcome.newest)["step"] == step
    AutoModelForCausalLM.from_pretrained(outcome.newest)


@of("copies", "hang")
def test_a_rank_that_hangs_in_its_reward_is_named(outcome: Outcome) -> None:
    place = "rank 1 hangs in phase 'step 2: verify' while rank 0 waits in 'step 2: gather': no new phase for "
    assert outcome.message.startswith(f"rlvr stops: {place}")
    assert re.findall(r"rank (\d) is at \(most recent call last\)", outcome.output) == ["1"]
    assert "in _generation_batch" in outcome.output and HANG_S < outcome.after_s < HANG_S + 15
    assert_stopped_after(1, outcome)


@of("copies", "raise")
def test_a_rank_that_raises_is_named_with_one_traceback(outcome: Outcome) -> None:
    assert outcome.message == "rlvr stops: rank 1 failed in phase 'step 3: verify': RuntimeError: no verifier answers"
    assert set(re.findall(r"^\[rank(\d)\]:", outcome.output, re.MULTILINE)) == {"1"}
    assert outcome.output.count("]: RuntimeError: no verifier answers") == 1 and outcome.after_s < 15
    assert_stopped_after(2, outcome)


@of("copies", "stop")
def test_sigterm_finishes_the_step_and_saves(outcome: Outcome) -> None:
    """torchrun itself ends with a traceback of its own."""
    assert outcome.message == "interrupted; what is done is saved. Continue with: the same torchrun command"
    assert "rank0" not in outcome.output and outcome.after_s < 15
    assert_stopped_after(4, outcome)


@of("copies", "kill")
def test_a_killed_rank_and_the_restart(outcome: Outcome, chains: dict[str, Future[dict[str, Outcome]]]) -> None:
    """The fourth launch of this run and its restart: together they do what one undisturbed launch does."""
    assert re.match(
        r"rlvr stops: rank 1 \(host \S+, pid \d+\) died in phase 'step 5: (generate|verify)'; last seen at ", outcome.message
    )
    assert_finished(outcome, chains["undisturbed"].result()["end"], tolerance=0.0)


@of("shards", "kill")
def test_a_rank_killed_while_shards_are_gathered(outcome: Outcome, chains: dict[str, Future[dict[str, Outcome]]]) -> None:
    """ZeRO stage 3; the run without shards is the reference."""
    assert re.match(r"rlvr stops: rank 1 \(host \S+, pid \d+\) died in phase 'step 2: sync'; last seen at ", outcome.message)
    assert_finished(outcome, chains["undisturbed"].result()["end"], tolerance=1e-4)


@of("wrong_input", "settings")
def test_settings_that_one_rank_refuses(outcome: Outcome) -> None:
    """Before the ranks know each other."""
    assert outcome.message.startswith("rlvr train: the input is wrong on rank 1\n  ")
    assert outcome.message.endswith("no train.jsonl here; copy it to every machine")
    assert "exitcode  : 2 " in outcome.output and outcome.after_s < 15


@of("wrong_input", "prompts")
def test_prompts_that_one_rank_cannot_read(outcome: Outcome) -> None:
    assert outcome.message == "rank 1: no train.jsonl here; copy it to every machine"
    assert set(re.findall(r"exitcode  : (\S+) ", outcome.output)) == {"2"} and outcome.after_s < 15


@of("wrong_input", "all")
def test_settings_that_all_ranks_refuse_together(outcome: Outcome) -> None:
    assert "\n  trainer.prompts_per_step: got 1 under 2 processes, expected at least one" in outcome.message
    assert set(re.findall(r"exitcode  : (\S+) ", outcome.output)) == {"2"}


@of("wrong_input", "all settings")
def test_settings_that_each_rank_refuses(outcome: Outcome) -> None:
    assert outcome.message.startswith("rlvr train: the input is wrong\n  trainer.prompts_per_step: got 0, expected ")
    assert "exitcode  : 2 " in outcome.output


@of("machines", "kill")
def test_a_rank_killed_on_another_machine(outcome: Outcome) -> None:
    """Nobody can look at its process: it is the silence that tells, DEAD_AFTER_S = 10 seconds."""
    assert re.match(
        r"rlvr stops: rank 1 .* died in phase 'step 2: (generate|verify)', no sign of life for 1\d s; ", outcome.message
    )
    assert 10 < outcome.after_s < 30
    assert_stopped_after(1, outcome)


@of("machines", "end")
def test_the_same_command_on_two_machines_goes_on(outcome: Outcome) -> None:
    assert outcome.code == 0 and outcome.newest is not None and outcome.newest.name == "step_000002", outcome.output
    assert not OURS.findall(outcome.output)
