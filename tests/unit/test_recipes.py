"""Every recipe composes and builds; the count says when one was added without a look here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlvr.build import from_mapping, to_mapping
from rlvr.compose import compose, recipes_dir
from rlvr.config import RunConfig, SftConfig

EXPERIMENTS = {
    "quickstart": ("train", RunConfig),
    "gsm8k_tiny": ("train", RunConfig),
    "gsm8k_grpo": ("train", RunConfig),
    "countdown_base": ("sft", SftConfig),
}


def test_every_experiment_is_listed_here() -> None:
    assert {path.stem for path in (recipes_dir() / "experiment").glob("*.yaml")} == set(EXPERIMENTS)


def test_number_of_recipes() -> None:
    assert len(list(recipes_dir().rglob("*.yaml"))) == 29


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds_and_repeats_from_its_own_record(name: str) -> None:
    verb, schema = EXPERIMENTS[name]
    config = from_mapping(schema, compose(verb, [f"experiment={name}"]))
    assert config.run_dir == f"runs/{name}"
    record = yaml.safe_load(yaml.safe_dump(to_mapping(config)))
    assert from_mapping(schema, record) == config


@pytest.mark.parametrize("algo", ["grpo", "dr_grpo"])
def test_algorithm_recipe_builds(algo: str) -> None:
    config = from_mapping(RunConfig, compose("train", ["model.path=x", f"algo={algo}"]))
    assert config.algo.loss_agg == ("token-mean" if algo == "grpo" else "seq-mean-token-sum-const")


def test_the_command_line_wins_over_the_experiment() -> None:
    config = from_mapping(RunConfig, compose("train", ["experiment=quickstart", "algo.clip_eps_high=0.28", "trainer.steps=5"]))
    assert (config.algo.clip_range, config.trainer.steps) == ((0.2, 0.28), 5)


def test_plus_sign_is_accepted_and_not_needed() -> None:
    for override in ("algo.adv_eps=0.1", "+algo.adv_eps=0.1"):
        assert compose("train", ["experiment=quickstart", override])["algo"]["adv_eps"] == 0.1


def test_own_config_folder(tmp_path: Path) -> None:
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text("_target_: rlvr.algos.grpo.GRPO\nadv_eps: 0.5\n")
    config = from_mapping(RunConfig, compose("train", ["experiment=quickstart", "algo=mine"], [str(tmp_path)]))
    assert config.algo.adv_eps == 0.5


@pytest.mark.slow
def test_recipes_travel_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True)
    code = "from rlvr.compose import compose, recipes_dir; print(recipes_dir()); compose('train', ['experiment=quickstart'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "site" / "rlvr" / "recipes"
    assert (tmp_path / "site" / "rlvr" / "boundary" / "report_template.html.j2").is_file()
