"""The launch examples: the torchrun flags they make, the settings they compose, and what happens at a time limit.

There is no Slurm, no second machine and no container engine here. ``scontrol``, ``scancel`` and ``srun`` are small stand-ins
on the PATH that run on this machine; torchrun, rlvr and the signals between them are real.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from rlvr.cli import main
from rlvr.compose import compose
from rlvr.config import RunConfig
from rlvr.log import read_metrics

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / "scripts" / "gpu_check.sh"]
WORDS = ["experiment=quickstart", "engine=vllm", "backend=deepspeed", "backend.zero_stage=3", "model.path=/a b/c"]
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """This interpreter first on the PATH, after the stand-ins of ``tmp_path/bin``."""
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def stand_in(tmp_path: Path, name: str, body: str) -> None:
    file = tmp_path / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def dry_run(tmp_path: Path, script: str, **variables: str) -> tuple[Any, dict[str, Any], str]:
    """What torchrun's own parser makes of the printed command, the printed settings, and the line on the shares."""
    variables = {"DRY_RUN": "1", "RLVR_CLONE": str(ROOT), **variables}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *WORDS],
        env=environment(tmp_path, **variables),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[0].removeprefix("# "))
    assert words[0] == "torchrun"
    parsed = parse_args(words[1:])
    assert parsed.module and parsed.training_script == "rlvr" and parsed.training_script_args == ["train", *WORDS]
    return parsed, yaml.safe_load(done.stdout), done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_quote_what_they_hand_on(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not re.findall(r'(?<!")\$@|\$@(?!")|\t', code)
    assert script.name == "common.sh" or ("set -euo pipefail" in code and text.startswith("#!/usr/bin/env bash\n# "))
    read = set(re.findall(r"\$\{(\w+):", code)) - {"SLURM_SUBMIT_DIR", "SLURM_GPUS_ON_NODE", "BASH_SOURCE"}
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    shared = (LAUNCH / "one_node.sh").read_text() if script.name == "common.sh" else ""
    assert all(re.search(rf"\b{name}\b", comments + shared) for name in read), read  # every variable is explained


def test_one_node(tmp_path: Path) -> None:
    parsed, settings, shares = dry_run(tmp_path, "one_node.sh", NPROC="8")
    assert parsed.standalone and parsed.nproc_per_node == "8"
    assert settings["backend"]["_target_"].endswith(".DeepSpeedBackend") and settings["backend"]["zero_stage"] == 3
    assert settings["engine"]["_target_"].endswith(".VllmEngine") and settings["model"]["path"] == "/a b/c"
    assert shares == "# processes: 8, prompts per process and step: 4 (x 16 responses), updates per step: 1"
    assert list(tmp_path.iterdir()) == []


def test_nodes(tmp_path: Path) -> None:
    parsed, settings, shares = dry_run(
        tmp_path, "nodes.sh", NNODES="2", NPROC="4", HEAD="node1:4000", RESTARTS="7", NODE_RANK="1"
    )
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "4", 7)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_conf) == ("c10d", "node1:4000", "is_host=false")
    assert settings["backend"]["zero_stage"] == 3 and shares.startswith("# processes: 8,")


def test_nodes_need_to_know_how_many_and_where(tmp_path: Path) -> None:
    for variables in ({"HEAD": "node1"}, {"NNODES": "2"}):
        done = subprocess.run(
            ["bash", str(LAUNCH / "nodes.sh")],
            env=environment(tmp_path, **variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "set " in done.stderr


def test_slurm(tmp_path: Path) -> None:
    stand_in(tmp_path, "scontrol", '[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"')
    parsed, settings, shares = dry_run(tmp_path, "slurm.sbatch", **SLURM)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_id) == ("2", "8", "rlvr-4711")
    assert parsed.rdzv_endpoint == "gpu3:24711"
    assert settings["engine"]["_target_"].endswith(".VllmEngine") and shares.startswith("# processes: 16,")


def test_wrong_settings_of_a_dry_run_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"DRY_RUN": "1", "NPROC": "64"}
    words = ["bash", str(LAUNCH / "one_node.sh"), "experiment=quickstart", "backend=ddp"]
    done = subprocess.run(words, env=environment(tmp_path, **variables), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "got 32 under 64 processes" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "experiment=quickstart", "--dry-run"]) == 2
    assert "got single under torchrun with 2 processes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_limit_and_is_queued_again(tiny_model: str, tmp_path: Path) -> None:
    """TERM to the batch shell alone, as ``--signal=B:TERM@120`` sends it, ends in a checkpoint of the last step."""
    stand_in(tmp_path, "scontrol", 'echo "$*" >> scontrol.log; [ "$1" != show ] || echo localhost')
    stand_in(tmp_path, "srun", 'while [[ "$1" == --* ]]; do shift; done; echo $$ > step.pid; exec "$@"')
    stand_in(tmp_path, "scancel", '[ "$*" = "--signal=TERM 4711" ] && kill -TERM "$(cat step.pid)"')
    one = {**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "RLVR_CLONE": str(ROOT), "NPROC": "1"}
    words = ["experiment=quickstart", f"model.path={tiny_model}", "model.make=null", "backend=ddp", "backend.use=cpu"]
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), *words, "run_dir=run", "trainer.steps=100000"],
        env=environment(tmp_path, **one),
        cwd=tmp_path,
        stdout=(tmp_path / "job.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert time.monotonic() < deadline and job.poll() is None, (tmp_path / "job.log").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=120)
    newest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == int(newest.removeprefix("step_"))
    assert job.returncode != 0 and (tmp_path / "scontrol.log").read_text().endswith("requeue 4711\n")


def test_slurm_asks_for_the_signal_that_it_handles() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    target, seconds = options["signal"].split("@")
    assert target == "B:TERM" and int(seconds) > 100  # STOP_S, the time torchrun gives its processes


def test_containerfile_names_what_exists() -> None:
    """Not built here: instructions, sources, extras and scripts are checked."""
    text = (LAUNCH / "Containerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    instructions = [line.split(None, 1) for line in lines if line.strip()]
    assert {word for word, _ in instructions} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    assert [word for word, _ in instructions[:2]] == ["ARG", "FROM"]
    for source in [name for word, rest in instructions if word == "COPY" for name in rest.split()[:-1]]:
        assert (ROOT / source).exists(), source
    project = (ROOT / "pyproject.toml").read_text()
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    assert all(
        (ROOT / name).is_file() for name in re.findall(r"scripts/[\w./]+", text) if name != "scripts/launch/Containerfile"
    )
    assert re.search(r"ARG TORCH=(\S+)", text)[1] in (ROOT / "scripts/constraints.txt").read_text().split()  # type: ignore[index]


def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh")],
        env=environment(tmp_path, CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr


def test_settings_of_the_gpu_check_compose() -> None:
    from rlvr.build import from_mapping

    text = re.sub(r"\\\n", " ", (ROOT / "scripts/gpu_check.sh").read_text())
    (words,) = re.findall(r"-m rlvr train (.*) \"\$@\"", text)
    config = from_mapping(RunConfig, compose("train", shlex.split(words)))
    assert (config.trainer.steps, config.backend.zero_stage, config.backend.precision) == (10, 2, "bf16")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "experiment=quickstart", "trainer.steps=7"], "trainer"),
        (["sft", "experiment=countdown_base"], "sft"),
        (["boundary", "models=[a,b]", "task=countdown", "out=x"], "n"),
    ],
)
def test_dry_run_prints_all_settings_and_writes_nothing(
    words: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    settings = yaml.safe_load(said)
    assert key in settings and settings["task" if "task" in settings else "data"]["_target_"].startswith("rlvr.tasks.")
    assert key != "trainer" or (settings["trainer"]["steps"] == 7 and said.endswith("updates per step: 1\n"))
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--dry-run", "seeed=1"]) == 2
    assert "did you mean seed?" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
