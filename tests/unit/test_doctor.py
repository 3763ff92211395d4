"""``rlvr doctor``: probes that fail in every way are lines of the answer; the state of real runs, sound and damaged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from rlvr import doctor
from rlvr.cli import main
from rlvr.config import RunConfig
from rlvr.trainer import Trainer

ROOT = Path(__file__).parents[2]
ABSENT = doctor.Probe("engine absent", ("no-such-package",), "vllm", "")
WRONG = doctor.Probe("back end wrong", ("torch",), "", "backend=sinlge")


def python(code: str, tmp_path: Path, limit_s: float = 60) -> doctor.Done:
    return doctor.run_limited([sys.executable, "-c", code], tmp_path, limit_s)


def ended(pid: int) -> bool:
    """Whether no process of this id runs (one that nobody has collected does not run)."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] in ("", "Z")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "import os, signal; print('loading', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            "killed by SIGSEGV; .*: loading",
        ),
        ("import no_such_module_of_anyone", "ModuleNotFoundError: No module named 'no_such_module_of_anyone'"),
        ("print('half way'); raise SystemExit(3)", "exit code 3; its last line: half way"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("print('fine')", "^$"),
    ],
)
def test_a_failing_probe_says_why(code: str, why: str, tmp_path: Path) -> None:
    done = python(code, tmp_path)
    assert re.search(why, done.why), done


def test_a_hanging_probe_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)"
    )
    done = python(code, tmp_path, limit_s=2)
    pid = int(done.output)
    assert done.why == f"no answer within 2 s, stopped; its last line: {pid}"
    deadline = time.monotonic() + 20
    while not ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_cause_is_found_in_the_report_of_torchrun() -> None:
    worker = "[rank1]: Traceback (most recent call last):\n[rank1]: ValueError: no shards\n"
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert doctor.why_failed(1, worker + launcher) == "ValueError: no shards"
    segfault = "[0]:\n  exitcode  : -11 (pid: 7)\n  traceback : Signal 11 (SIGSEGV) received by PID 7\n===\n"
    assert doctor.why_failed(1, launcher + segfault).startswith("killed by SIGSEGV")


def test_probes_are_real_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The default path works here; one lacks a package, one has a wrong setting: its own message, and how to see it whole."""
    assert doctor.try_all((doctor.PROBES[0], ABSENT, WRONG), processes=1) == [True, False, False]
    said = capsys.readouterr().out
    assert "engine transformers, back end single  works (" in said
    assert 'no: no-such-package is not installed: pip install "rlvr[vllm]"' in said
    assert "no: backend: got 'sinlge', expected one of " in said and "seen whole by:" in said
    assert max(map(len, said.splitlines())) <= 100


def test_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in said.partition("machine")[0].splitlines() if line.strip()}
    tested = dict(line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if "==" in line)
    assert rows["torch"][2] == tested["torch"]
    assert rows["transformers"] == ["transformers", version("transformers"), tested["transformers"]]
    assert "cores to use" in said and "process groups: " in said and "gloo" in said
    assert max(map(len, said.splitlines())) <= 100


def test_exit_code_is_that_of_the_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", (ABSENT,))
    assert main(["doctor", "--quick"]) == 1
    monkeypatch.setattr(doctor, "SURVEY", "import no_such_torch")
    assert main(["doctor"]) == 1


def test_doctor_itself_loads_nothing_heavy() -> None:
    code = "import sys, rlvr.doctor; print(*(m for m in ('torch', 'transformers', 'numpy', 'vllm') if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []


@pytest.mark.parametrize("words", [["nowhere"], ["."], ["a", "b"], ["--fast"]])
def test_what_is_no_run_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *words]) == 2
    assert f"rlvr doctor: got {words[0]}" in capsys.readouterr().err


def test_state_of_a_run(run_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config()
    run, trainer = Path(config.run_dir), Trainer(config)
    lines, sound = doctor.run_state(run)
    assert sound and "0 of 3 saved" in lines[1] and "none yet" in lines[2]
    trainer.step(), trainer.step()  # the second one saves
    lines, sound = doctor.run_state(run)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert sound and "2 of 3 saved" in lines[1] and "step_000002: complete" in lines[2]
    assert lines[3].endswith(
        f"step 2, correct/mean {last['correct/mean']:.4g}, mismatch/abs_diff_max {last['mismatch/abs_diff_max']:.4g}"
    )
    assert json.loads((run / "environment.json").read_text())["command"] in lines[-1]
    trainer.run()
    lines, sound = doctor.run_state(run)
    assert sound and "3 of 3" in lines[1] and lines[4].endswith("there") and lines[-1].endswith("finished")

    newest = run / "checkpoints" / "step_000003"
    for name, word in (
        ("model.safetensors", "SafetensorError"),
        ("trainer_state/state.pt", "BadZipFile"),
        ("config.json", "JSONDecodeError"),
    ):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        assert main(["doctor", str(run)]) == 1
        said = capsys.readouterr().out
        assert f"{name}: {word}" in said and "write step_000002 into checkpoints/latest" in said
        (newest / name).write_bytes(whole)
    assert main(["doctor", str(run)]) == 0
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (newest / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("model-00001-of-00002.safetensors: FileNotFoundError" in line for line in doctor.damages(newest))
