"""The real loop on a tiny random model: repeatability, resuming, declared needs, files of a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from parallel_worker import LengthReward
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr import checkpoint, maths
from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.algos.ppo import PPO
from rlvr.algos.reinforce_pp import ReinforcePP
from rlvr.backend import OptimizerSettings
from rlvr.build import build
from rlvr.compose import recipes_dir
from rlvr.config import CriticSettings, RunConfig, TrainerSettings, WandbSettings
from rlvr.log import METRICS, read_metrics
from rlvr.model import ModelSettings
from rlvr.rewards.random import RandomReward
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.trainer import Trainer
from rlvr.types import Batch, InputError, Prompt, Rollout, Sampling, SamplingPlan, Verdict

MakeConfig = Callable[..., RunConfig]
FREE_PREFIXES = ("time/", "perf/", "memory/")


def numbers(run_dir: str) -> list[dict[str, Any]]:
    """Metrics of a run without those that may differ between two runs."""
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(FREE_PREFIXES)} for row in rows]


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def trained(config: RunConfig) -> Path:
    trainer = Trainer(config)
    trainer.train()
    trainer.close()
    return Path(config.run_dir)


def test_same_seed_same_numbers_and_another_seed_others(run_config: MakeConfig, tmp_path: Path) -> None:
    first, again, other = (
        trained(run_config(run_dir=str(tmp_path / name), seed=seed, reward=LengthReward()))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert numbers(str(first)) == numbers(str(again))
    assert numbers(str(first)) != numbers(str(other))


def test_stop_and_resume_equals_straight_through(run_config: MakeConfig, tmp_path: Path) -> None:
    settings = TrainerSettings(steps=4, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=2)
    straight = trained(run_config(run_dir=str(tmp_path / "straight"), reward=LengthReward(), trainer=settings))
    broken = run_config(run_dir=str(tmp_path / "broken"), reward=LengthReward(), trainer=settings)
    killed = Trainer(broken)
    for _ in range(3):  # the third step is after the checkpoint and will be repeated
        killed.step()
    resumed = Trainer(run_config(run_dir=str(tmp_path / "broken"), reward=LengthReward(), trainer=settings))
    assert resumed.step_number == 2
    resumed.train()
    assert numbers(str(straight)) == numbers(str(tmp_path / "broken"))
    last = "checkpoints/step_000004"
    for name, tensor in weights(straight / last).items():
        assert torch.equal(tensor, weights(tmp_path / "broken" / last)[name]), name


def test_interrupt_saves_and_continues(run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(trainer=TrainerSettings(steps=50, prompts_per_step=2, responses_per_prompt=2, checkpoint_every=50))
    trainer = Trainer(config)
    original = trainer.collector.collect

    def collect_then_signal(*arguments: Any) -> Any:
        if trainer.step_number == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    trainer.collector.collect = collect_then_signal  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (Path(config.run_dir) / "checkpoints" / "latest").read_text().strip() == "step_000002"
    assert Trainer(config).step_number == 2


def test_files_of_a_run(run_config: MakeConfig) -> None:
    settings = TrainerSettings(steps=3, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=2, save_rollouts_every=2)
    config = run_config(trainer=settings)
    Trainer(config).run()
    folder = Path(config.run_dir)
    assert checkpoint.saved_steps(folder) == [2, 3]
    assert (folder / "checkpoints" / "latest").read_text() == "step_000003\n"
    assert AutoTokenizer.from_pretrained(folder / "checkpoints" / "step_000002")("1+2")["input_ids"]
    rows = [json.loads(line) for line in (folder / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {"prompt", "response", "score", "status", "finish_reason"} <= set(rows[0])
    environment = json.loads((folder / "environment.json").read_text())
    assert {"command", "git_commit", "versions", "hardware"} <= set(environment)
    boundary = json.loads((folder / "boundary" / "boundary.json").read_text())
    assert [model["name"] for model in boundary["models"]] == ["base", "step_000002", "step_000003"]
    assert "step_000003" in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.partial*"))


def test_every_metric_is_documented_and_every_response_has_a_status(run_config: MakeConfig) -> None:
    config = run_config(reward=LengthReward(), algo=GRPO(kl_coef=0.01))
    metrics = Trainer(config).step()
    prefixes = tuple(name.split("*")[0] for name in METRICS if "*" in name)
    assert not [name for name in metrics if name not in METRICS and not name.startswith(prefixes)]
    assert sum(value for name, value in metrics.items() if name.startswith("status/")) == 16
    assert metrics["status/graded"] == 16
    assert metrics["mismatch/abs_diff_max"] < 1e-4
    assert metrics["policy/ref_kl_k3_nats"] == pytest.approx(0.0, abs=1e-9)


@dataclass
class StaleEngine(TransformersEngine):
    """Takes no new weights."""

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _ in weights:
            pass


def test_a_run_whose_engine_is_stale_stops(run_config: MakeConfig, tmp_path: Path) -> None:
    settings = TrainerSettings(steps=3, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=1)
    parts = {"trainer": settings, "reward": LengthReward(), "optimizer": OptimizerSettings(lr=1e-3)}
    trainer = Trainer(run_config(engine=StaleEngine(), run_dir=str(tmp_path / "stale"), **parts))
    trainer.step()
    with pytest.raises(RuntimeError, match="in the responses of step 2, log-probs of engine and trainer differ by"):
        trainer.step()
    assert len(numbers(str(tmp_path / "stale"))) == 1
    generous = replace(settings, max_mismatch_nats=10.0)
    trainer = Trainer(run_config(engine=StaleEngine(), run_dir=str(tmp_path / "generous"), **{**parts, "trainer": generous}))
    trainer.train()  # the limit is the user's to move
    with pytest.raises(RuntimeError, match="in a first trial of the engine, log-probs of engine and trainer differ by"):
        config = run_config(engine=OtherWeights(), run_dir=str(tmp_path / "other"), **parts)
        Trainer(config)


@dataclass
class OtherWeights(TransformersEngine):
    """Loads something else than it is told."""

    def load(self, path: str, stop_token_ids: Sequence[int]) -> None:
        super().load(path, stop_token_ids)
        for parameter in self._model.parameters():
            parameter.data *= 1.5


def test_packing_changes_no_number(run_config: MakeConfig, tmp_path: Path) -> None:
    found = []
    for packing in (False, True):
        settings = TrainerSettings(
            steps=2, prompts_per_step=4, responses_per_prompt=4, minibatch_prompts=2, micro_batch_tokens=64, packing=packing
        )
        trainer = Trainer(run_config(run_dir=str(tmp_path / str(packing)), trainer=settings, algo=PPO(), reward=LengthReward()))
        assert trainer.learner.critic is not None
        assert trainer.learner.policy.module.packing is trainer.learner.critic.module.packing is packing
        trainer.train()
        found.append(numbers(str(tmp_path / str(packing)))[-1])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


def test_settings_of_the_output_layer_reach_policy_and_reference(run_config: MakeConfig, tiny_model: str) -> None:
    config = run_config(model=ModelSettings(path=tiny_model, float32_head=True), algo=GRPO(kl_coef=0.1))
    learner = Trainer(config).learner
    assert learner.reference is not None
    assert learner.policy.module.float32_head and learner.reference.float32_head


def test_micro_batches_change_no_number(run_config: MakeConfig, tmp_path: Path) -> None:
    runs = []
    for budget in (100_000, 60, 1):
        settings = TrainerSettings(
            steps=2, prompts_per_step=4, responses_per_prompt=4, micro_batch_tokens=budget, minibatch_prompts=2
        )
        config = run_config(
            run_dir=str(tmp_path / str(budget)), trainer=settings, reward=LengthReward(), algo=GRPO(kl_coef=0.1)
        )
        runs.append(numbers(str(trained(config))))
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize("base", [GRPO, ReinforcePP])
def test_advantages_see_the_whole_batch_whatever_the_minibatch(
    run_config: MakeConfig, tmp_path: Path, base: type[Algorithm]
) -> None:
    """Group statistics and whitening with one minibatch and with four: the same numbers, standard over the whole batch."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watching(base):  # type: ignore[misc, valid-type]
        def advantages(self, batch: Batch) -> Tensor:
            result = super().advantages(batch)
            seen.append((len(batch), result))
            return result

    for minibatch in (4, 1):
        settings = TrainerSettings(steps=1, prompts_per_step=4, responses_per_prompt=4, minibatch_prompts=minibatch)
        config = run_config(run_dir=str(tmp_path / str(minibatch)), trainer=settings, reward=LengthReward(), algo=Watching())
        metrics = Trainer(config).step()
        assert metrics["policy/updates"] == 4 / minibatch
    assert [rows for rows, _ in seen] == [16, 16]
    assert torch.equal(seen[0][1], seen[1][1])


def test_later_updates_of_a_step_see_the_ratio_to_the_start_of_the_step(run_config: MakeConfig, tmp_path: Path) -> None:
    """With one update the ratio is exactly 1; with four at a high rate it moves, and the clip acts."""
    found = {}
    for minibatch in (4, 1):
        settings = TrainerSettings(steps=1, prompts_per_step=4, responses_per_prompt=4, minibatch_prompts=minibatch)
        config = run_config(
            run_dir=str(tmp_path / str(minibatch)),
            trainer=settings,
            reward=LengthReward(),
            optimizer=OptimizerSettings(lr=1e-2),
        )
        found[minibatch] = Trainer(config).step()
    assert found[4]["policy/approx_kl_nats"] == found[4]["policy/clip_high_fraction"] == 0
    assert abs(found[1]["policy/approx_kl_nats"]) > 1e-3
    assert found[1]["policy/clip_high_fraction"] + found[1]["policy/clip_low_fraction"] > 0


def test_reward_rises_on_a_learnable_task(run_config: MakeConfig) -> None:
    """A random model learns to give responses of even length; the mean of the last steps clears the first by far."""
    settings = TrainerSettings(steps=30, prompts_per_step=8, responses_per_prompt=8, checkpoint_every=30)
    config = run_config(trainer=settings, reward=LengthReward(), optimizer=OptimizerSettings(lr=3e-3))
    correct = [row["reward/mean"] for row in numbers(str(trained(config)))]
    assert sum(correct[-5:]) / 5 > sum(correct[:5]) / 5 + 0.2


def test_random_reward_leaves_the_verifiers_word_alone(run_config: MakeConfig) -> None:
    metrics = Trainer(run_config(reward=RandomReward())).step()
    assert metrics["correct/mean"] == 0.0
    assert 0 < metrics["reward/mean"] < 1
    assert metrics["groups/all_wrong_fraction"] == 1.0


def test_dynamic_sampling_fills_the_step_with_mixed_groups(run_config: MakeConfig) -> None:
    plan = SamplingPlan(dynamic=True, gen_batch_prompts=3)
    trainer = Trainer(run_config(reward=LengthReward(), algo=GRPO(plan=plan)))
    data = trainer.collector.collect(trainer.learner.algorithm, 0)
    assert len(data.prompts) == 4
    for start in range(0, 16, 4):
        group = [row.verdict.correct for row in data.rollouts[start : start + 4] if row.verdict]
        assert 0 < sum(group) < 4
    positions = [trainer.stream.prompts.index(prompt) for prompt in data.prompts]
    taken = [prompt for _, prompt in type(trainer.stream)(trainer.stream.prompts, 0).take(trainer.stream.taken)]
    order = [taken.index(trainer.stream.prompts[position]) for position in positions]
    assert order == sorted(order)


def test_dynamic_sampling_that_cannot_fill_says_the_keep_rate(run_config: MakeConfig) -> None:
    plan = SamplingPlan(dynamic=True, max_gen_batches=2)
    with pytest.raises(InputError, match=r"0 of 8 prompts kept, keep rate 0\.000"):
        Trainer(run_config(algo=GRPO(plan=plan))).step()


def test_greedy_rows_are_scored_and_never_trained_on(run_config: MakeConfig) -> None:
    trainer = Trainer(run_config(reward=LengthReward(), algo=GRPO(plan=SamplingPlan(greedy=True))))
    data = trainer.collector.collect(trainer.learner.algorithm, 0)
    assert len(data.greedy) == 4
    assert len(data.rollouts) == len(data.sampled) == 16
    assert not any(row.greedy for row in data.rollouts)
    metrics = trainer.step()
    assert metrics["policy/rows"] == 16
    assert "rollout/greedy_score_mean" in metrics


def test_a_random_reward_tosses_a_coin_for_each_greedy_row_too(run_config: MakeConfig) -> None:
    """With one coin for all of them, the control of an algorithm with a greedy baseline would not be one."""
    settings = TrainerSettings(steps=1, prompts_per_step=32, responses_per_prompt=2)
    trainer = Trainer(run_config(reward=RandomReward(), trainer=settings, algo=GRPO(plan=SamplingPlan(greedy=True))))
    data = trainer.collector.collect(trainer.learner.algorithm, 0)
    assert len({row.seed for row in (*data.greedy, *data.rollouts)}) == 32 + 64
    scores = [row.verdict.score for row in data.greedy if row.verdict]
    assert 8 <= sum(scores) <= 24


def test_truncated_sampling_in_training_is_warned_of(run_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(run_config(sampling=Sampling(max_new_tokens=4, top_p=0.9)))
    assert "sampling.top_p" in capsys.readouterr().out


ALGORITHMS = ("ppo", "grpo", "dr_grpo", "gspo", "cispo", "reinforce_pp", "reinforce_pp_baseline", "rloo", "remax", "dapo")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_with_four_updates_per_rollout(run_config: MakeConfig, name: str) -> None:
    """Through the same trainer, with a KL term and off-policy updates: finite numbers, weights that move."""
    node = yaml.safe_load((recipes_dir() / "algo" / f"{name}.yaml").read_text()) | {"kl_coef": 0.01}
    problems: list[str] = []
    algo = build(Algorithm, node, "algo", problems)
    settings = TrainerSettings(steps=2, prompts_per_step=4, responses_per_prompt=4, minibatch_prompts=1)
    trainer = Trainer(run_config(algo=algo, trainer=settings, reward=LengthReward()))
    before = {name: tensor.clone() for name, tensor in trainer.learner.weights()}
    metrics = trainer.step() | trainer.step()
    assert problems == []
    assert all(value == value and abs(value) < 1e6 for value in metrics.values())
    assert metrics["policy/updates"] == 4
    assert metrics["policy/grad_norm"] > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.learner.weights())
    assert ("critic/explained_variance" in metrics) == algo.needs_critic
    assert ("rollout/greedy_score_mean" in metrics) == algo.needs_greedy


def test_every_algorithm_recipe_is_trained_above() -> None:
    assert {path.stem for path in (recipes_dir() / "algo").glob("*.yaml")} == {*ALGORITHMS, "custom"}


@dataclass(frozen=True, kw_only=True)
class ValueBaseline(Algorithm):
    """A = return - value, to exercise a declared critic."""

    needs_critic: ClassVar[bool] = True

    def advantages(self, batch: Batch) -> Tensor:
        assert batch.values is not None
        return maths.where_mask(self.value_targets(batch) - batch.values, batch.response_mask)

    def value_targets(self, batch: Batch) -> Tensor:
        return maths.where_mask(batch.rewards[:, None].expand(batch.tokens.shape), batch.response_mask)


def test_a_declared_critic_is_trained_saved_and_restored(run_config: MakeConfig) -> None:
    settings = TrainerSettings(steps=6, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=3)
    parts: dict[str, Any] = {
        "trainer": settings,
        "reward": LengthReward(),
        "algo": ValueBaseline(),
        "critic": CriticSettings(optimizer=OptimizerSettings(lr=1e-3), warmup_steps=1),
    }
    trainer = Trainer(run_config(**parts))
    before = {name: tensor.clone() for name, tensor in trainer.learner.weights()}
    assert trainer.step()["policy/updates"] == 0  # the warm-up trains the critic alone
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.learner.weights())
    losses = [trainer.step()["critic/loss"] for _ in range(2)]
    assert all(loss > 0 for loss in losses)
    resumed = Trainer(run_config(**parts))
    assert resumed.learner.critic is not None and trainer.learner.critic is not None
    for (name, ours), (_, theirs) in zip(
        trainer.learner.critic.model.named_parameters(), resumed.learner.critic.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_adaptive_kl_moves_and_survives_a_resume(run_config: MakeConfig) -> None:
    algo = GRPO(kl_coef=0.1, kl_controller="adaptive", kl_target=1.0, kl_horizon=100)
    settings = TrainerSettings(steps=4, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=1)
    parts: dict[str, Any] = {"algo": algo, "trainer": settings, "reward": LengthReward()}
    trainer = Trainer(run_config(**parts))
    trainer.step()
    assert trainer.learner.algorithm.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 16 / 100))
    assert Trainer(run_config(**parts)).learner.algorithm.kl_coef == trainer.learner.algorithm.kl_coef


def test_reference_is_reset_on_schedule(run_config: MakeConfig) -> None:
    settings = TrainerSettings(steps=4, prompts_per_step=4, responses_per_prompt=4, reset_reference_every=2)
    trainer = Trainer(run_config(algo=GRPO(kl_coef=0.1), trainer=settings, reward=LengthReward()))
    assert trainer.learner.reference is not None

    def distance() -> float:
        reference = dict(trainer.learner.reference.model.named_parameters()) if trainer.learner.reference else {}
        ours = dict(trainer.learner.weights())
        return sum((ours[name] - tensor).abs().sum().item() for name, tensor in reference.items())

    distances = []
    for _ in range(3):
        trainer.step()
        distances.append(distance())
    assert distances[0] > 0 and distances[1] == 0 and distances[2] > 0


def test_entropy_bonus_raises_entropy(run_config: MakeConfig, tmp_path: Path) -> None:
    last = {}
    for bonus in (-1.0, 1.0):
        settings = TrainerSettings(steps=20, prompts_per_step=4, responses_per_prompt=4, checkpoint_every=20)
        config = run_config(
            run_dir=str(tmp_path / str(bonus)),
            trainer=settings,
            algo=GRPO(c_ent=bonus),
            reward=LengthReward(),
            optimizer=OptimizerSettings(lr=1e-2),
        )
        last[bonus] = numbers(str(trained(config)))[-1]["policy/entropy_nats"]
    assert last[1.0] > last[-1.0] + 0.2


def test_other_settings_in_the_same_folder_are_refused(run_config: MakeConfig) -> None:
    config = run_config()
    Trainer(config).step()
    before = (Path(config.run_dir) / "config.yaml").read_text()
    with pytest.raises(InputError, match=r"algo\.clip_eps: was 0\.2, now 0\.3"):
        Trainer(run_config(algo=GRPO(clip_eps=0.3)))
    assert (Path(config.run_dir) / "config.yaml").read_text() == before


def test_crashing_verifier_stops_the_run(run_config: MakeConfig) -> None:
    @dataclass(frozen=True)
    class Broken:
        def judge(self, prompts: list[Prompt], rollouts: list[Rollout]) -> list[Verdict]:
            return [Verdict(0.0, False, "crashed", None, "the grader fell over")] * len(rollouts)

    with pytest.raises(RuntimeError, match=r"16 of 16 verdicts of step 1 crashed.*the grader fell over"):
        Trainer(run_config(reward=Broken())).step()


def test_wandb_offline(run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config(wandb=WandbSettings(mode="offline"))
    trained(config)
    assert list((Path(config.run_dir) / "wandb").glob("offline-run-*/*.wandb"))


def test_length_penalty_reaches_rewards_and_not_correctness(run_config: MakeConfig) -> None:
    plan = SamplingPlan(overlong_buffer_tokens=12, overlong_filter=True)
    trainer = Trainer(run_config(reward=LengthReward(), algo=GRPO(plan=plan)))
    metrics = trainer.step()
    assert metrics["rollout/overlong_penalty_mean"] < -0.5
    assert 0 <= metrics["correct/mean"] <= 1
    assert metrics["policy/tokens"] < metrics["rollout/tokens"]
    assert metrics["policy/rows"] < 16
