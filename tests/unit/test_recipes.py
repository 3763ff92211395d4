"""Every recipe composes and builds; the count says when one was added without a look here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlvr.build import from_mapping, to_mapping
from rlvr.compose import compose, recipes_dir
from rlvr.config import RunConfig, SftConfig
from rlvr.rewards.affine import AffineReward
from rlvr.types import InputError


def names(group: str) -> set[str]:
    """What can be chosen in a group: paths below it without the suffix; files with a leading underscore are only included."""
    folder = recipes_dir() / group
    paths = (path for path in folder.rglob("*.yaml") if not path.name.startswith("_"))
    return {path.relative_to(folder).with_suffix("").as_posix() for path in paths}


STUDY = ("ppo", "grpo", "reinforce_pp", "reinforce_pp_baseline", "rloo", "remax", "dapo")
EXPERIMENTS = {
    "quickstart": ("train", RunConfig),
    "gsm8k_tiny": ("train", RunConfig),
    "gsm8k_grpo": ("train", RunConfig),
    "countdown_base": ("sft", SftConfig),
    **{f"limit_of_rlvr/{algo}": ("train", RunConfig) for algo in STUDY},
}
FILES = ["task.train=train.jsonl", "task.test=test.jsonl"]  # named, not read


def composed(name: str, *overrides: str) -> Any:
    verb, schema = EXPERIMENTS[name]
    files = FILES if name.startswith("limit_of_rlvr/") else []
    return from_mapping(schema, compose(verb, [f"experiment={name}", *files, *overrides]))


def with_algo(name: str, *overrides: str) -> RunConfig:
    return from_mapping(RunConfig, compose("train", ["model.path=x", f"algo={name}", *overrides]))


def test_every_experiment_is_listed_here() -> None:
    assert names("experiment") == set(EXPERIMENTS)


def test_number_of_recipes() -> None:
    assert len(list(recipes_dir().rglob("*.yaml"))) == 52


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_builds_and_repeats_from_its_own_record(name: str) -> None:
    config = composed(name)
    assert (config.run_dir, config.experiment) == (f"runs/{name}", name)
    record = yaml.safe_load(yaml.safe_dump(to_mapping(config)))
    assert from_mapping(EXPERIMENTS[name][1], record) == config


# ---- algorithms -------------------------------------------------------------------------------------------------------

LOSS_AGG = {
    "ppo": "token-mean",
    "grpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-const",
    "reinforce_pp": "token-mean",
    "reinforce_pp_baseline": "token-mean",
    "rloo": "token-mean",
    "remax": "token-mean",
    "dapo": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
    "paper/ppo": "token-mean",
    "paper/grpo": "seq-mean-token-mean",
    "paper/dr_grpo": "seq-mean-token-sum-const",
    "paper/reinforce_pp": "token-mean",
    "paper/reinforce_pp_baseline": "seq-mean-token-mean",
    "paper/rloo": "seq-mean-token-sum",
    "paper/remax": "seq-mean-token-sum",
    "paper/dapo": "token-mean",
}


def test_every_algorithm_recipe_is_listed_here() -> None:
    assert names("algo") == {*LOSS_AGG, "custom"}


@pytest.mark.parametrize("name", LOSS_AGG)
def test_algorithm_recipe_builds_and_repeats_from_its_own_record(name: str) -> None:
    config = with_algo(name, "sampling.max_new_tokens=20480")
    assert config.algo.loss_agg == LOSS_AGG[name]
    assert from_mapping(RunConfig, yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config


@pytest.mark.parametrize("name", LOSS_AGG)
def test_numbers_of_an_algorithm_recipe_are_numbers_to_every_yaml_reader(name: str) -> None:
    """PyYAML reads 3e-4 as a string and 3.0e-4 as a number, Hydra reads both as a number."""
    node = yaml.safe_load((recipes_dir() / "algo" / f"{name}.yaml").read_text())
    words = [value for value in node.values() if isinstance(value, str)]
    assert not [word for word in words if word[0].isdigit()]


def test_gspo_and_cispo() -> None:
    gspo, cispo = with_algo("gspo").algo, with_algo("cispo").algo
    assert (gspo.ratio_level, gspo.clip_range) == ("sequence_mean", (3e-4, 4e-4))
    assert (cispo.surrogate, cispo.ratio_level, cispo.clip_range) == ("cispo", "token", (1.0, 4.0))  # weights in [0, 5]


PUBLISHED: dict[str, dict[str, Any]] = {  # decisive fields of algo=paper/..., besides loss_agg above
    "ppo": {"clip_range": (0.2, 0.2), "gamma": 1.0, "lam": 0.95, "kl_placement": "reward", "kl_coef": 0.02, "value_clip": 0.2},
    "grpo": {"kl_coef": 0.04, "kl_estimator": "k3", "kl_placement": "loss", "adv_scale": "group"},
    "dr_grpo": {"kl_coef": 0.0, "adv_scale": "none", "loss_agg_const": None},
    "reinforce_pp": {
        "baseline": "none",
        "whiten_over": "tokens",
        "kl_coef": 0.01,
        "kl_placement": "reward",
        "clip_range": (0.2, 0.2),
        "gamma": 1.0,
    },
    "reinforce_pp_baseline": {"baseline": "group", "kl_estimator": "k2", "kl_placement": "loss", "kl_coef": 1e-5},
    "rloo": {"kl_coef": 0.03, "kl_placement": "reward", "kl_before_baseline": True, "dual_clip": None},
    "remax": {"kl_coef": 0.1, "kl_placement": "reward", "remax_kl": "one_step", "needs_greedy": True, "dual_clip": None},
    "dapo": {"clip_range": (0.2, 0.28), "kl_coef": 0.0, "dual_clip": None, "adv_scale": "group"},
}


def test_every_published_preset_is_listed_here() -> None:
    assert {name for name in LOSS_AGG if name.startswith("paper/")} == {f"paper/{name}" for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    algo = with_algo(f"paper/{name}", "sampling.max_new_tokens=20480").algo
    assert {field: getattr(algo, field) for field in PUBLISHED[name]} == PUBLISHED[name]


def test_published_sampling_plan_of_dapo() -> None:
    plan = with_algo("paper/dapo", "sampling.max_new_tokens=20480").algo.plan
    assert (plan.dynamic, plan.overlong_filter) == (True, False)
    assert (plan.overlong_buffer_tokens, plan.overlong_penalty_factor) == (4096, 1.0)
    with pytest.raises(InputError, match="overlong_buffer_tokens"):  # the preset asks for its limit instead of cutting it
        with_algo("paper/dapo")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_of_a_published_preset_names_its_source(name: str) -> None:
    lines = (recipes_dir() / "algo" / "paper" / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if line.strip() and not line.startswith("#")]
    assert "arXiv" in lines[0] + lines[1] and len(values) > 4
    assert not [line for line in values if not line.partition(" #")[2].strip()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_overrides_in_the_header_of_a_published_preset_compose(name: str) -> None:
    """The indented comment lines are what a user would type for the settings that are not the algorithm's."""
    lines = (recipes_dir() / "algo" / "paper" / f"{name}.yaml").read_text().splitlines()
    header = [line.removeprefix("#").split("(")[0].split() for line in lines if line.startswith("#   ")]
    typed = [word for words in header for word in words]
    assert typed and all("=" in word for word in typed)
    config = with_algo(f"paper/{name}", *typed)
    assert config.trainer.updates_per_step >= 1
    if name in ("rloo", "remax"):  # published without a clip, which cannot act on one update
        assert config.trainer.updates_per_step == 1
    if name == "dapo":
        assert (config.trainer.updates_per_step, config.sampling.max_new_tokens) == (16, 20480)
        assert config.reward == AffineReward(scale=2.0, shift=-1.0)


# ---- the study of Yue et al. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", STUDY)
def test_the_study_differs_in_nothing_but_the_algorithm(algo: str) -> None:
    config = composed(f"limit_of_rlvr/{algo}")
    trainer, sampling, optimizer, boundary = config.trainer, config.sampling, config.optimizer, config.boundary
    assert (config.model.path, config.task.name, config.reward) == ("Qwen/Qwen2.5-7B", "omni_math", None)
    assert (trainer.prompts_per_step, trainer.responses_per_prompt, trainer.prompts_per_minibatch) == (128, 8, 128)
    assert (trainer.steps, trainer.checkpoint_every, trainer.updates_per_step) == (150, 150, 1)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (8192, 1.0, 1.0, 0)
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_updates) == (1e-6, "constant", 0)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.01, 1.0)
    assert (boundary.n, boundary.temperature, boundary.top_p, boundary.max_new_tokens) == (256, 0.6, 0.95, 16384)
    assert (config.algo.kl_coef, config.algo.c_ent, config.algo.loss_agg) == (0.0, 0.0, "token-mean")
    assert config.algo.clip_range == ((0.2, 0.28) if algo == "dapo" else (0.2, 0.2))
    assert type(config.algo) is type(with_algo(algo).algo)


def test_what_the_study_sets_for_single_algorithms() -> None:
    ppo, dapo = composed("limit_of_rlvr/ppo"), composed("limit_of_rlvr/dapo").algo
    assert (ppo.critic.optimizer.lr, ppo.algo.value_clip, ppo.algo.gamma, ppo.algo.lam) == (1e-5, 0.5, 1.0, 1.0)
    assert composed("limit_of_rlvr/reinforce_pp").algo.baseline == "none"
    assert composed("limit_of_rlvr/reinforce_pp_baseline").algo.baseline == "group"
    assert (dapo.dual_clip, dapo.plan.dynamic, dapo.plan.max_gen_batches) == (10.0, True, 10)
    assert (dapo.plan.gen_batch_prompts, dapo.plan.overlong_buffer_tokens) == (384, 4096)


def test_arms_of_the_study_are_one_override_away() -> None:
    assert composed("limit_of_rlvr/grpo", "trainer.minibatch_prompts=32").trainer.updates_per_step == 4
    assert composed("limit_of_rlvr/grpo", "trainer.prompts_per_step=256").trainer.updates_per_step == 1


def test_omni_math_asks_for_its_files() -> None:
    with pytest.raises(InputError) as caught:
        from_mapping(RunConfig, compose("train", ["experiment=limit_of_rlvr/grpo"]))
    missing = [f"task.{split}: not given, and there is no default for it" for split in ("train", "test")]
    assert str(caught.value).splitlines() == missing


def test_omni_math_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "Find $1+1$.", "answer": "2", "solution": "It is 2.", "difficulty": 1.0}\n')
    words = ["model.path=x", "task=omni_math", f"task.train={rows}", f"task.test={rows}"]
    (prompt,) = from_mapping(RunConfig, compose("train", words)).task.prompts("train")
    assert prompt.gold == "2"
    assert prompt.text.startswith("A conversation between User and Assistant.")
    assert prompt.text.endswith("User: Find $1+1$.\nAssistant:")


# ---- composition ------------------------------------------------------------------------------------------------------


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


def test_a_part_that_recipes_include_is_no_choice() -> None:
    with pytest.raises(InputError, match="expected one of") as refused:
        compose("train", ["experiment=limit_of_rlvr/_shared"])
    assert "limit_of_rlvr/grpo" in str(refused.value) and "_shared," not in str(refused.value)
