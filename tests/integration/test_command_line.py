"""The commands as users type them: real processes, real data, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlvr.build import from_mapping
from rlvr.cli import main
from rlvr.compose import compose
from rlvr.config import RunConfig
from rlvr.log import read_metrics

ROOT = Path(__file__).parents[2]
RLVR = [sys.executable, "-m", "rlvr"]
SMALL = [
    "trainer.steps=2",
    "trainer.prompts_per_step=2",
    "trainer.responses_per_prompt=2",
    "boundary.n=2",
    "boundary.problems=4",
]


def python_block(page: Path) -> str:
    """The first Python block of a page."""
    found = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_gsm8k_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    """Real rows, real verifier, a random model: every response is counted with its status."""
    files = [f"task.{split}={shared_data / 'gsm8k' / f'{split}.jsonl'}" for split in ("train", "test")]
    run = tmp_path / "run"
    assert main(["train", "experiment=gsm8k_tiny", *files, f"run_dir={run}", "trainer.steps=2", "boundary.problems=2"]) == 0
    for row in read_metrics(run / "metrics.jsonl"):
        assert sum(value for name, value in row.items() if name.startswith("status/")) == 16
    boundary = json.loads((run / "boundary" / "boundary.json").read_text())
    assert all(sum(problem["status"].values()) == 4 for model in boundary["models"] for problem in model["problems"])


def test_gsm8k_golds_come_out_of_the_rows(shared_data: Path) -> None:
    from rlvr.tasks.dataset import DatasetTask

    file = str(shared_data / "gsm8k" / "test.jsonl")
    task = DatasetTask(name="gsm8k", train=file, test=file, gold_pattern=r"####\s*(.+?)\s*$")
    prompts = task.prompts("test")
    assert (len(prompts), prompts[0].gold, prompts[2].gold) == (1319, "18", "70000")
    assert "Janet" in prompts[0].text and prompts[0].text.endswith("Assistant:")


def test_finished_run_is_not_overwritten_and_can_be_extended(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "experiment=quickstart", f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", *SMALL]
    assert main(words) == 0
    assert "pass@1" in capsys.readouterr().out
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main(words) == 2
    assert "is finished (2 steps" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main([*words, "trainer.steps=3"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_base_is_made_when_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shortened pre-training, from an own recipe, called by the training run that needs it."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    short = {"defaults": ["countdown_base", "_self_"], "sft": {"steps": 2, "batch_size": 8}}
    (folder / "short_base.yaml").write_text("# @package _global_\n" + yaml.safe_dump(short))
    monkeypatch.chdir(tmp_path)
    words = ["train", "--config-dir", "mine", "experiment=quickstart", "model.make=short_base", "model.path=runs/base"]
    assert main([*words, *SMALL]) == 0
    assert (tmp_path / "runs/base/checkpoints/step_000002/model.safetensors").is_file()
    assert (tmp_path / "runs/quickstart/report.html").is_file()
    other = yaml.safe_dump({**short, "optimizer": {"lr": 0.5}})
    (folder / "short_base.yaml").write_text("# @package _global_\n" + other)
    capsys.readouterr()
    assert main([*words, *SMALL, "run_dir=runs/second"]) == 2  # the cached base is not what the recipe makes now
    assert "runs/base belongs to a run with other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tiny_model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*RLVR, "train", "experiment=quickstart", f"model.path={tiny_model}", f"run_dir={run}", "trainer.steps=100000"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not read_metrics(run / "metrics.jsonl"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Continue with: rlvr train" in errors and "Traceback" not in errors
    newest = (run / "checkpoints" / "latest").read_text().strip()
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == int(newest.removeprefix("step_"))


@pytest.mark.slow
def test_torchrun_one_process_works_and_two_are_refused(tiny_model: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run"]
    words = ["-m", "rlvr", "train", "experiment=quickstart", f"model.path={tiny_model}", *SMALL]
    one = [*launch, "--nproc-per-node=1", *words, f"run_dir={tmp_path / 'one'}"]
    subprocess.run(one, check=True, capture_output=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "one" / "report.html").is_file()
    two = [*launch, "--nproc-per-node=2", *words, f"run_dir={tmp_path / 'two'}"]
    done = subprocess.run(two, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    assert "got single under torchrun with 2 processes, expected 1" in done.stderr


def test_own_algorithm_reward_and_task_from_the_current_folder(tiny_model: str, tmp_path: Path) -> None:
    """Files beside the run, named by dotted paths: nothing of the package is edited. The algorithm is the README's."""
    (tmp_path / "my_algo.py").write_text(python_block(ROOT / "README.md"))
    (tmp_path / "mine.py").write_text(OWN_MODULE)
    own = [
        "algo=custom",
        "algo._target_=my_algo.MedianBaseline",
        "algo.scale=0.5",
        "reward=custom",
        "reward._target_=mine.Short",
    ]
    task = ["task=custom", "task._target_=mine.Digits"]
    words = [*RLVR, "train", "experiment=quickstart", f"model.path={tiny_model}", "run_dir=run", *SMALL, *own, *task]
    subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["algo"]["_target_"] == "my_algo.MedianBaseline" and record["algo"]["scale"] == 0.5
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


def test_the_two_pages_show_the_same_algorithm() -> None:
    assert python_block(ROOT / "README.md") == python_block(ROOT / "docs" / "extending.md").replace(
        "# my_algo.py\n", "# my_algo.py, in the folder you start from\n"
    )


def test_commands_of_the_readme_compose() -> None:
    """Every ``rlvr train`` line of the README names real settings."""
    lines = re.findall(r"^rlvr train (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        settings = compose("train", line.split())
        if "algo=custom" not in line:
            assert from_mapping(RunConfig, settings).run_dir.startswith("runs/")


def test_metrics_page_is_the_table() -> None:
    code = "import write_metrics_page as w; assert w.PAGE.read_text() == w.page(), 'run scripts/write_metrics_page.py'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "scripts", env={**os.environ, "PYTHONPATH": str(ROOT)})


OWN_MODULE = """
from dataclasses import dataclass
from rlvr.rewards.countdown import CountdownReward
from rlvr.types import Prompt, Verdict

@dataclass(frozen=True)
class Short:
    limit: int = 8

    def judge(self, prompts, rollouts):
        good = [len(rollout.text) < self.limit for rollout in rollouts]
        return [Verdict(float(value), value, "graded") for value in good]

@dataclass(frozen=True)
class Digits:
    name: str = "digits"

    def prompts(self, split):
        golds = [{"numbers": [i, i], "target": 2 * i} for i in range(1, 9)]
        return [Prompt(f"{split}-{g['target']}", f"{g['target']}?", g, "digits") for g in golds]

    def reward(self):
        return CountdownReward()
"""
