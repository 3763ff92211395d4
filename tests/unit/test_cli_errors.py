"""Bad input: one clear message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from rlvr.algos import Algorithm
from rlvr.algos.ppo import PPO
from rlvr.cli import main
from rlvr.config import RunConfig
from rlvr.errors import InputError


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command line that must be refused; returns its message."""
    assert main(list(words)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture
def quickstart(tiny_model: str, tmp_path: Path) -> list[str]:
    return ["train", "experiment=quickstart", f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stepz=5", ["trainer.stepz", "did you mean trainer.steps?"]),
        ("algo.clip_eps_hihg=0.3", ["algo.clip_eps_hihg", "did you mean algo.clip_eps_high?"]),
        ("algo.plan.dinamic=true", ["algo.plan.dinamic", "did you mean algo.plan.dynamic?"]),
        ("tranier.steps=5", ["tranier", "did you mean trainer?"]),
        ("trainer.steps=many", ["trainer.steps", "'many'", "expected int"]),
        ("trainer.steps=2.5", ["trainer.steps", "2.5", "expected int"]),
        ("trainer.steps=true", ["trainer.steps", "True", "expected int"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "expected float"]),
        ("algo.clip_eps_low=2.0", ["algo.clip_eps_low", "2.0", "(0, 1)"]),
        ("algo.dual_clip=1.1", ["algo.dual_clip", "1.1", "above 1 + clip_eps_high"]),
        ("algo.clip_eps=1.5", ["clip_eps", "1.5", "(0, 1)"]),
        ("algo.clip_eps_high=0", ["clip_eps_high", "above 0"]),
        ("algo.kl_placement=both", ["algo.kl_placement", "'both'", "charged twice"]),
        ("algo.c_ptx=0.5", ["data.ptx", "c_ptx=0.5", "data@data.ptx=pairs"]),
        ("data@data.ptx=countdown_traces", ["algo.c_ptx", "would not be read"]),
        ("algo.plan.carry_surplus=true", ["carry_surplus", "stale"]),
        ("algo.surrogate=sispo", ["algo.surrogate", "'sispo'", "cispo"]),
        ("algo=paper/dapo", ["algo.plan.overlong_buffer_tokens", "4096", "sampling.max_new_tokens = 28"]),
        ("backend=ddq", ["backend", "'ddq'", "ddp", "single"]),
        ("critic=null", ["critic", "None", "CriticSettings"]),
        ("algo.loss_agg=tokenmean", ["algo.loss_agg", "'tokenmean'", "token-mean"]),
        ("trainer.responses_per_prompt=1", ["trainer.responses_per_prompt", "got 1", "at least 2"]),
        ("boundary.k=[1,512]", ["boundary.k", "512", "n = 256"]),
        ("boundary.problems=1000", ["boundary.problems", "1000", "128"]),
        ("trainer.minibatch_prompts=5", ["trainer.minibatch_prompts", "got 5", "divisor"]),
        ("algo=ppp", ["algo", "'ppp'", "grpo"]),
        ("sampling.temperature=0", ["sampling.temperature", "above 0"]),
        ("model.path=/no/such/folder", ["model.path", "/no/such/folder", "hub id"]),
        ("trainer.max_prompt_tokens=3", ["trainer.max_prompt_tokens", "got 3", "long_prompts=drop"]),
        ("task.max_number=5", ["task.train_problems", "got 3000", "only 510 different problems"]),
        ("algo._target_=no_such_module.Algo", ["algo._target_", "no_such_module"]),
        ("algo._target_=rlvr.algos.grpo.GRPPO", ["algo._target_", "GRPO"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_setting_is_refused(
    override: str, expected: list[str], quickstart: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *quickstart, override)
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algo.kl_coef=0.1", "algo.kl_estimator=k1"], ["algo.kl_estimator", "k1", "gradient is zero", "kl_placement=reward"]),
        (["algo.kl_coef=0.1", "algo.kl_estimator=k2", "algo.kl_is_correction=true"], ["kl_estimator", "k2", "k1 or k3"]),
        (["algo=cispo", "algo.dual_clip=9"], ["surrogate", "dual_clip=null"]),
        (["algo=gspo", "algo.loss_agg=token-mean"], ["loss_agg", "seq-mean-token-mean"]),
        (["algo=dapo", "algo.plan.gen_batch_prompts=2"], ["max_gen_batches", "cannot fill", "prompts_per_step = 32"]),
        (["algo=rloo", "trainer.responses_per_prompt=1"], ["trainer.responses_per_prompt", "RLOO", "at least 2"]),
        (["algo=remax", "algo.plan.greedy=false"], ["plan.greedy", "baseline"]),
        (["algo=reinforce_pp", "algo.whiten_over=sequences", "algo.gamma=0.9"], ["whiten_over", "gamma=1"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    overrides: list[str], expected: list[str], quickstart: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *quickstart, *overrides)
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_an_algorithm_that_lacks_what_it_declares_is_refused(tiny_model: str, run_config: Callable[..., RunConfig]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(Algorithm):
        needs_critic: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Criticless(PPO):
        needs_critic: ClassVar[bool] = False

    with pytest.raises(InputError, match=r"Half does not define advantages.*\n.*Half does not define value_targets"):
        run_config(algo=Half())
    with pytest.raises(InputError, match="GAE needs values"):
        Criticless()


def test_several_mistakes_are_reported_together(quickstart: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *quickstart, "trainer.stepz=5", "optimizer.lr=fast", "algo.clip_eps=7")
    assert all(key in message for key in ("trainer.stepz", "optimizer.lr", "clip_eps"))


def test_unknown_experiment_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean experiment=quickstart?" in refused(capsys, "train", "experiment=quikstart")


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one of train" in refused(capsys, "trian")


def test_folder_without_a_model(quickstart: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "a folder without config.json" in refused(capsys, *quickstart, f"model.path={tmp_path / 'empty'}", "model.make=null")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"problem": "1+1", "answer": "#### 2"}], ["task.question_field", "'question'", "answer, problem"]),
        ([], ["no rows"]),
        ([{"question": "1+1", "answer": "two"}], ["task.gold_pattern", "row 0"]),
    ],
)
def test_dataset_is_refused(
    rows: list[dict[str, str]], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = f"run_dir={tmp_path / 'run'}"
    message = refused(capsys, "train", "experiment=gsm8k_tiny", f"task.train={file}", f"task.test={file}", run)
    assert all(part in message for part in expected), message


def test_missing_dataset_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    message = refused(capsys, "train", "experiment=gsm8k_tiny", "task.train=/no/rows.jsonl", run)
    assert "/no/rows.jsonl does not exist" in message


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_unwritable_output_folder(quickstart: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "run_dir: cannot create /proc/rlvr" in refused(capsys, *quickstart, "run_dir=/proc/rlvr")


def test_foreign_folder_is_left_alone(quickstart: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    assert "is not empty and holds no config.yaml" in refused(capsys, *quickstart)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_boundary_needs_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "models: not given" in refused(capsys, "boundary", f"out={tmp_path / 'out'}")


def test_boundary_refuses_k_above_n(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"models=[{tiny_model}]", "n=4", "k=[8]", f"out={tmp_path / 'out'}"]
    assert "k: got 8, expected whole numbers from 1 to n = 4" in refused(capsys, "boundary", *words)


def test_report_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one folder" in refused(capsys, "report", str(tmp_path / "absent"))
