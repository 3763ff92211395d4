"""Settings to objects: what is refused and how it is said, components by dotted path, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rlvr.algos import Algorithm
from rlvr.algos.grpo import GRPO
from rlvr.backend import OptimizerSettings, SingleBackend
from rlvr.build import build, from_mapping, to_mapping
from rlvr.config import BoundarySettings, RunConfig, SftConfig, TrainerSettings, WandbSettings
from rlvr.model import ModelSettings, TinyModel
from rlvr.rewards.random import RandomReward
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.tasks.countdown import CountdownTask, CountdownTraces
from rlvr.types import InputError, Prompt, Rollout, Sampling, SamplingPlan, Verdict

HERE = __name__
TINY = {"tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}}
GOOD: dict[str, Any] = {
    "run_dir": "runs/x",
    "algo": {"_target_": "rlvr.algos.grpo.GRPO"},
    "task": {"_target_": "rlvr.tasks.countdown.CountdownTask"},
    "model": TINY,
}


@dataclass(frozen=True)
class Plain:
    """Settings of every kind."""

    name: str
    count: int = 1
    share: float = 0.5
    on: bool = False
    limit: int | None = None
    items: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    extra: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"count: got {self.count}, expected 0 or more\nname: also wrong")


@dataclass(frozen=True)
class EchoReward:
    scale: float = 1.0

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Verdict]:
        return [Verdict(self.scale, False, "graded") for _ in rollouts]


@dataclass
class HalfEngine:
    """Draws, and can neither sleep nor take weights."""

    rows: int = 4

    def load(self, path: str, stop_token_ids: Sequence[int]) -> None: ...

    def generate(self, requests: Sequence[Any], sampling: Sampling) -> list: ...


@dataclass
class RanklessBackend:
    """All methods of a back end, but not its attributes ``rank`` and ``world_size``."""

    device: str = "cpu"

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def prepare(self, model: Any, optimizer: OptimizerSettings, total_updates: int) -> Any: ...

    def freeze(self, model: Any) -> Any: ...

    def gathered(self, parameters: Any, writer: Any = None) -> Any: ...

    def phase(self, name: str) -> None: ...

    def failed(self, error: BaseException) -> None: ...

    def sum(self, values: Any) -> Any: ...

    def gather(self, value: Any) -> list[Any]: ...

    def main_first(self) -> Any: ...


class NotADataclass: ...


class Undecorated(GRPO):
    """A dataclass by inheritance only: without the decorator its own setting is none."""

    scale: float = 0.5


def problems(cls: type, node: Any) -> list[str]:
    """Lines of the message with which a mapping is refused."""
    with pytest.raises(InputError) as caught:
        from_mapping(cls, node)
    return str(caught.value).splitlines()


def run_problems(**changes: Any) -> list[str]:
    return problems(RunConfig, {**GOOD, **changes})


# ---- plain settings ---------------------------------------------------------------------------------------------------


def test_values_and_defaults() -> None:
    node = {"name": "x", "count": 3, "share": 1, "limit": None, "items": [1, 2], "sampling": {"top_k": 4}, "extra": {"a": 1}}
    built = from_mapping(Plain, node)
    assert built == Plain("x", 3, 1.0, items=[1, 2], sampling=Sampling(top_k=4), extra={"a": 1})
    assert isinstance(built.share, float)
    assert from_mapping(Plain, {"name": "x", "limit": 7}).limit == 7


@pytest.mark.parametrize(
    "node, message",
    [
        ({"count": 1.5}, "count: got 1.5 (float), expected int"),
        ({"count": "3"}, "count: got '3' (str), expected int"),
        ({"count": True}, "count: got True (bool), expected int"),
        ({"count": None}, "count: got None (NoneType), expected int"),
        ({"share": "half"}, "share: got 'half' (str), expected float"),
        ({"share": False}, "share: got False (bool), expected float"),
        ({"on": 1}, "on: got 1 (int), expected bool"),
        ({"limit": "all"}, "limit: got 'all' (str), expected int or null"),
        ({"name": 5}, "name: got 5 (int), expected str"),
        ({"items": "1,2"}, "items: got '1,2' (str), expected list"),
        ({"name": "???"}, "name: not given, and there is no default for it"),
        ({"sampling": 5}, "sampling: got 5, expected settings of Sampling (max_new_tokens, temperature, top_p, top_k)"),
        ({"sampling": {"top_p": "x"}}, "sampling.top_p: got 'x' (str), expected float"),
        ({"sampling": {"top_p": 2.0}}, "sampling.top_p: got 2.0, expected a value in (0, 1]"),
        ({"sampling": {"topp": 1.0}}, "sampling.topp: rlvr.types.Sampling has no setting 'topp'; did you mean sampling.top_p?"),
        ({"coumt": 1}, f"coumt: {HERE}.Plain has no setting 'coumt'; did you mean count?"),
    ],
    ids=str,
)
def test_wrong_setting(node: dict[str, Any], message: str) -> None:
    (found,) = problems(Plain, {"name": "x", **node})
    assert found.startswith(message)


def test_unknown_key_with_nothing_near_lists_what_there_is() -> None:
    (found,) = problems(Plain, {"name": "x", "zzz": 1})
    assert found.endswith("it has name, count, share, on, limit, items, sampling, extra")


def test_missing_setting() -> None:
    assert problems(Plain, {}) == ["name: not given; Plain needs it"]


def test_all_problems_at_once_with_their_full_names() -> None:
    node = {"count": "x", "sampling": {"top_k": 1.5, "temprature": 1}, "wrong": 1, "limit": "???"}
    keys = [line.split(":")[0] for line in problems(Plain, node)]
    assert keys == ["count", "sampling.top_k", "sampling.temprature", "wrong", "limit", "name"]


def test_each_line_of_a_class_own_check_is_a_problem_with_a_prefix() -> None:
    with pytest.raises(InputError) as caught:
        from_mapping(Plain, {"name": "x", "count": -1}, key="outer")
    assert str(caught.value) == "outer.count: got -1, expected 0 or more\nouter.name: also wrong"


# ---- components -------------------------------------------------------------------------------------------------------


def test_run_from_a_mapping() -> None:
    config = from_mapping(RunConfig, {**GOOD, "algo": {**GOOD["algo"], "clip_eps_high": 0.28, "plan": {"dynamic": True}}})
    assert config.algo == GRPO(clip_eps_high=0.28, plan=SamplingPlan(dynamic=True))
    assert config == RunConfig(
        run_dir="runs/x",
        algo=GRPO(clip_eps_high=0.28, plan=SamplingPlan(dynamic=True)),
        task=CountdownTask(),
        model=ModelSettings(tiny=TinyModel(hidden_size=16, num_layers=1, num_heads=2)),
    )


def test_own_components() -> None:
    config = from_mapping(RunConfig, {**GOOD, "reward": {"_target_": f"{HERE}.EchoReward", "scale": 2}})
    assert config.reward == EchoReward(2.0)
    assert from_mapping(RunConfig, {**GOOD, "task": CountdownTask(test_problems=5)}).task == CountdownTask(test_problems=5)


@pytest.mark.parametrize(
    "algo, message",
    [
        ({"plan": {"dinamic": True}}, "algo.plan.dinamic: rlvr.types.SamplingPlan has no setting 'dinamic'; did you mean"),
        ({"plan": {"max_gen_batches": 0}}, "algo.plan.max_gen_batches: got 0, expected at least 1"),
        (
            {"clip_eps_hi": 0.3},
            "algo.clip_eps_hi: rlvr.algos.grpo.GRPO has no setting 'clip_eps_hi'; did you mean algo.clip_eps",
        ),
        ({"clip_eps": "wide"}, "algo.clip_eps: got 'wide' (str), expected float"),
        ({"loss_agg": "mean"}, "algo.loss_agg: got 'mean', expected one of token-mean, "),
    ],
    ids=str,
)
def test_settings_of_a_component(algo: dict[str, Any], message: str) -> None:
    (found,) = run_problems(algo={**GOOD["algo"], **algo})
    assert found.startswith(message)


@pytest.mark.parametrize(
    "name, target, message",
    [
        ("algo", "no_such_module.X", "'no_such_module.X', but there is no module 'no_such_module' on the import path"),
        ("algo", "rlvr.algos.nothing.X", "there is no module 'rlvr.algos.nothing'"),
        ("algo", "rlvr.algos.grpo.GRPPO", "rlvr.algos.grpo has no GRPPO; did you mean rlvr.algos.grpo.GRPO?"),
        ("algo", "rlvr.algos.grpo.Zebra", "but rlvr.algos.grpo has no Zebra"),
        ("algo", "GRPO", "got 'GRPO', expected the dotted path of a class (Algorithm)"),
        ("algo", None, "got None, expected the dotted path of a class (Algorithm)"),
        ("algo", "???", "got '???', expected the dotted path of a class (Algorithm)"),
        ("algo", ".GRPO", "got '.GRPO'"),
        ("algo", "rlvr.algos.grpo.", "got 'rlvr.algos.grpo.'"),
        ("algo", f"{HERE}.NotADataclass", "NotADataclass is not a dataclass; put @dataclass above it"),
        ("algo", f"{HERE}.Undecorated", "Undecorated is not a dataclass; put @dataclass above it"),
        ("algo", "rlvr.maths.group_mean", "rlvr.maths.group_mean is not a dataclass"),
        ("algo", "rlvr.tasks.countdown.CountdownTask", "is not a Algorithm (rlvr.algos.base); it lacks "),
        ("task", f"{HERE}.EchoReward", "EchoReward is not a Task (rlvr.tasks.base); it lacks name, prompts, reward"),
        ("engine", f"{HERE}.HalfEngine", "is not a Engine (rlvr.rollout.engine); it lacks update_weights, sleep, wake, close"),
        ("backend", f"{HERE}.RanklessBackend", "is not a Backend (rlvr.backend.base); it lacks rank, world_size"),
    ],
)
def test_target_is_refused(name: str, target: str | None, message: str) -> None:
    (found,) = run_problems(**{name: {"_target_": target}})
    assert found.startswith(f"{name}._target_: ")
    assert message in found


@pytest.mark.parametrize("algo", ["rlvr.algos.grpo.GRPO", 5, None, []])
def test_component_that_is_no_mapping(algo: Any) -> None:
    (found,) = run_problems(algo=algo)
    assert found.startswith("algo._target_: got None, expected the dotted path of a class (Algorithm)")


def test_problems_of_several_components_come_together() -> None:
    found = run_problems(
        algo={"_target_": "rlvr.algos.grpo.GRPO", "clip_eps": 2.0},
        task={"_target_": "???"},
        engine={"_target_": "rlvr.rollout.transformers_engine.TransformersEngine", "max_row": 3},
        sead=1,
        trainer={"steps": 0},
    )
    keys = ["algo.clip_eps_low (or clip_eps)", "task._target_", "engine.max_row", "sead", "trainer.steps"]
    assert [line.split(": ")[0] for line in found] == keys


def test_required_component_left_open() -> None:
    assert run_problems(task="???") == ["task: not given, and there is no default for it"]
    without = {name: value for name, value in GOOD.items() if name != "task"}
    assert problems(RunConfig, without) == ["task: not given; RunConfig needs it"]


def test_checks_between_settings_are_reported_together() -> None:
    found = run_problems(model={}, trainer={"responses_per_prompt": 1})
    assert [line.split(":")[0] for line in found] == ["trainer.responses_per_prompt", "model.path"]


# ---- and back ---------------------------------------------------------------------------------------------------------

RICH = RunConfig(
    run_dir="runs/rich",
    algo=GRPO(adv_scale="none", kl_coef=0.01, dual_clip=3.0, plan=SamplingPlan(dynamic=True, overlong_buffer_tokens=8)),
    task=CountdownTask(train_problems=50, test_problems=10),
    experiment="rich",
    seed=7,
    model=ModelSettings(tiny=TinyModel(hidden_size=16, num_layers=1, num_heads=2)),
    reward=RandomReward(probability=0.3, verifier=EchoReward(2.0)),
    engine=TransformersEngine(max_rows=3),
    backend=SingleBackend(use="cpu"),
    sampling=Sampling(max_new_tokens=32, temperature=0.7),
    optimizer=OptimizerSettings(lr=1e-3),
    trainer=TrainerSettings(steps=3, prompts_per_step=4, minibatch_prompts=2),
    boundary=BoundarySettings(n=16, k=[1, 4, 16]),
    wandb=WandbSettings(mode="offline"),
)


@pytest.mark.parametrize("config", [RICH, replace(RICH, reward=None, algo=GRPO())], ids=["rich", "plain"])
def test_round_trip(config: RunConfig) -> None:
    mapping = to_mapping(config)
    assert from_mapping(RunConfig, mapping) == config
    assert to_mapping(from_mapping(RunConfig, mapping)) == mapping


def test_mapping_is_plain_and_complete() -> None:
    mapping = to_mapping(RICH)
    assert mapping["algo"]["_target_"] == "rlvr.algos.grpo.GRPO"
    assert mapping["algo"]["adv_eps"] == 1e-6 and mapping["algo"]["plan"]["max_gen_batches"] == 10
    assert mapping["reward"] == {
        "_target_": "rlvr.rewards.random.RandomReward",
        "verifier": {"_target_": f"{HERE}.EchoReward", "scale": 2.0},
        "probability": 0.3,
    }
    assert mapping["engine"]["max_rows"] == 3 and "_model" not in mapping["engine"]
    assert mapping["boundary"]["k"] == [1, 4, 16]
    assert "_target_" not in mapping["trainer"]


@pytest.mark.parametrize(("algo", "field"), [("dapo.DAPO", "dynamic"), ("remax.ReMax", "greedy")])
def test_a_part_of_a_plan_leaves_the_rest_as_the_algorithm_has_it(algo: str, field: str) -> None:
    problems: list[str] = []
    node = {"_target_": f"rlvr.algos.{algo}", "plan": {"overlong_buffer_tokens": 4}}
    plan = build(Algorithm, node, "algo", problems).plan
    assert problems == []
    assert (getattr(plan, field), plan.overlong_buffer_tokens) == (True, 4)


def test_round_trip_of_a_fine_tuning_run() -> None:
    traces = CountdownTraces(CountdownTask(test_problems=9), hit_share_four=0.1)
    config = SftConfig(run_dir="runs/base", data=traces, model=ModelSettings(tiny=TinyModel()))
    assert from_mapping(SftConfig, to_mapping(config)) == config
