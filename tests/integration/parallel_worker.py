"""What the tests of several processes run on each rank: ``torchrun ... parallel_worker.py gradients|runs MODEL OUT``.

Imported by the tests too, so that one process and many compute from the same batch, algorithms and settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rlvr import maths
from rlvr.algos import Algorithm
from rlvr.backend import Backend, DataParallelBackend, DeepSpeedBackend, OptimizerSettings, TrainedModel
from rlvr.boundary.evaluate import EvaluatedModel, evaluate
from rlvr.build import build
from rlvr.compose import recipes_dir
from rlvr.config import (
    BoundarySettings,
    CriticSettings,
    DataSettings,
    RunConfig,
    SftConfig,
    SftSettings,
    TrainerSettings,
)
from rlvr.micro_batches import MicroBatcher
from rlvr.model import ModelSettings, load_critic, load_policy
from rlvr.rollout.batch import pad_rows
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.scoring import CriticScorer, PolicyScorer
from rlvr.sft import run_sft
from rlvr.tasks.countdown import CountdownTask, CountdownTraces
from rlvr.trainer import Trainer
from rlvr.types import Batch, Prompt, Rollout, Sampling, Verdict
from rlvr.update import UpdatePlan, critic_update, policy_update
from rlvr.weights import trained_weights

LENGTHS = [(3, 5), (2, 0), (4, 2), (3, 7), (5, 1), (2, 6), (3, 4), (4, 4), (2, 9), (3, 3), (6, 2)]  # prompt, response tokens
GROUPS = [7, 7, 7, -1, -1, -1, 4, 4, 4, 4, 4]
WIDE = 100_000  # a budget of padded tokens that holds every row


def ragged_batch() -> Batch:
    """Eleven rows in three groups, one of them without a response token; every float tensor NaN outside the mask."""
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randint(2, 16, (n,), generator=generator).tolist() for n in pair] for pair in LENGTHS]
    batch = pad_rows([(prompt, response) for prompt, response in draw], 0)
    mask, count = batch.response_mask, len(LENGTHS)

    def normal(scale: float, base: Tensor | float = 0.0) -> Tensor:
        return (base + scale * torch.randn(mask.shape, generator=generator)).masked_fill(~mask, torch.nan)

    old = normal(0.3, -2.8)  # near the log-probs of a random model with 17 tokens, so that few ratios are clipped
    scores = torch.rand(count, generator=generator).round(decimals=1)
    return replace(
        batch,
        groups=torch.tensor(GROUPS),
        rewards=scores,
        correct=scores > 0.5,
        truncated=torch.tensor([response >= 7 for _, response in LENGTHS]),
        rollout_logprobs=normal(0.2, old),
        old_logprobs=old,
        ref_logprobs=normal(0.3, old),
        values=normal(0.4),
        final_values=torch.randn(count, generator=generator),
        greedy_rewards=torch.tensor(GROUPS).gt(0).float(),
    )


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((recipes_dir() / "algo" / f"{name}.yaml").read_text())


def make(name: str, **settings: Any) -> Algorithm:
    problems: list[str] = []
    algorithm = build(Algorithm, {**recipe(name), **settings}, "algo", problems)
    assert not problems, problems
    return algorithm


def algorithms() -> dict[str, Algorithm]:
    """Every recipe with every aggregation it allows, a KL and an entropy term; and the switches that no recipe turns on."""
    cases = {}
    names = sorted(path.stem for path in (recipes_dir() / "algo").glob("*.yaml") if path.stem != "custom")
    for name in names:
        by_row = recipe(name).get("ratio_level", "token") != "token"
        for mode in ["seq-mean-token-mean"] if by_row else maths.LOSS_AGGREGATIONS:
            cases[f"{name} {mode}"] = make(name, loss_agg=mode, kl_coef=0.05, c_ent=0.01)
    cases["rollout correction"] = make("grpo", rollout_is="token")
    cases["sequence correction"] = make("rloo", rollout_is="sequence", rollout_is_mode="mask", rollout_is_min=0.2)
    cases["dual clip"] = make("grpo", dual_clip=1.3)
    cases["importance factor on the KL"] = make("grpo", kl_coef=0.05, kl_estimator="k1", kl_is_correction=True)
    cases["overlong filter"] = make("dapo", plan={"dynamic": True, "overlong_filter": True})
    cases["pretraining term"] = make("grpo", c_ptx=0.5)
    return cases


def captured(model: TrainedModel) -> list[Tensor]:
    """The gradient of each update as one vector, from now on; the weights stay as they are."""
    gradients: list[Tensor] = []

    def capture() -> None:
        gradients.append(torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None]).clone())

    model.optimizer.step = capture  # type: ignore[attr-defined]
    model.schedule.step = lambda: None  # type: ignore[attr-defined]
    return gradients


# Prompts per update and tokens per pass that are tried with so many processes; four share two cores, so one cut is enough.
CUTS = {2: ((3, WIDE), (1, 40)), 4: ((1, 40),)}


def pairs() -> Batch:
    return pad_rows([([3, 4], [5, 6, 7]), ([8], [9, 2, 3, 4, 5]), ([2, 2, 2], [4])], 0)


def gradients(
    algorithm: Algorithm,
    model_path: str,
    backend: Backend,
    batch: Batch,
    budget: int = WIDE,
    minibatch: int = 3,
    advantages: Tensor | None = None,
    packing: bool = False,
) -> dict[str, list[Tensor]]:
    """Gradients of the updates on the batch, off-policy: of the policy, and of the critic where there is one."""
    still = OptimizerSettings(lr=0.0, max_grad_norm=1e9)
    plan, batcher = UpdatePlan(minibatch, 2, 0.7, 9.0, 0), MicroBatcher(backend, budget, packing)
    advantages = algorithm.advantages(batch).detach() if advantages is None else advantages
    policy = backend.prepare(PolicyScorer(load_policy(model_path), packing=packing), still, 10)
    found = {"policy": captured(policy)}
    ptx = repeat(pairs()) if algorithm.c_ptx else None
    policy_update(policy, algorithm, batch, advantages, plan, batcher, ptx)
    if algorithm.needs_critic:
        module = load_critic(model_path)
        torch.nn.init.constant_(module.score.weight, 0.1)  # type: ignore[union-attr, arg-type]
        critic = backend.prepare(CriticScorer(module, packing), still, 10)
        found["critic"] = captured(critic)
        critic_update(critic, algorithm, batch, algorithm.value_targets(batch).detach(), plan, batcher)
    return found


def updated(algorithm: Algorithm, model_path: str, backend: Backend, updates: int = 3) -> dict[str, list[Tensor]]:
    """Gradients of SGD updates on the fixed batch, one prompt each, and the parameters afterwards, whole on every rank."""
    batch, sgd = ragged_batch(), OptimizerSettings(name="sgd", lr=0.05, weight_decay=0.0, max_grad_norm=1e9)
    plan, batcher = UpdatePlan(1, 1, 0.7, 9.0, 0), MicroBatcher(backend, 40)
    policy = backend.prepare(PolicyScorer(load_policy(model_path)), sgd, updates)
    found = {"policy": recorded(policy)}
    policy_update(policy, algorithm, batch, algorithm.advantages(batch).detach(), plan, batcher)
    found["policy weights"] = whole(policy, backend)
    if algorithm.needs_critic:
        module = load_critic(model_path)
        torch.nn.init.constant_(module.score.weight, 0.1)  # type: ignore[union-attr, arg-type]
        critic = backend.prepare(CriticScorer(module), sgd, updates)
        found["critic"] = recorded(critic)
        critic_update(critic, algorithm, batch, algorithm.value_targets(batch).detach(), plan, batcher)
        found["critic weights"] = whole(critic, backend)
    assert len(found["policy"]) == updates
    return found


def recorded(model: TrainedModel) -> list[Tensor]:
    """The whole gradient of each update as one vector, from now on, as the optimizer gets it."""
    gradients: list[Tensor] = []
    owner = model.module if hasattr(model.module, "optimizer") else model  # a DeepSpeed engine holds its optimizer
    step = owner.optimizer.step

    def record(*args: Any, **settings: Any) -> Any:
        from deepspeed.utils import safe_get_full_grad

        gradients.append(torch.cat([safe_get_full_grad(p).flatten().clone() for p in model.model.parameters()]))
        return step(*args, **settings)

    owner.optimizer.step = record
    return gradients


def whole(model: TrainedModel, backend: Backend) -> list[Tensor]:
    return [torch.cat([tensor.flatten().clone() for _, tensor in trained_weights(model.model, backend)])]


def widened(batch: Batch, columns: int) -> Batch:
    """The same rows with more padding at the right, NaN in every float tensor."""
    wide = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if value is not None and value.ndim == 2:
            filler = torch.nan if value.is_floating_point() else 0
            wide[item.name] = torch.cat([value, torch.full((len(batch), columns), filler, dtype=value.dtype)], 1)
    return replace(batch, **wide)


# ---- whole runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthReward:
    """Correct when the response has an even number of characters: a random model gets mixed groups."""

    def judge(self, prompts: list[Prompt], rollouts: list[Rollout]) -> list[Verdict]:
        even = [len(rollout.text) % 2 == 0 for rollout in rollouts]
        return [Verdict(float(good), good, "graded", rollout.text) for good, rollout in zip(even, rollouts, strict=True)]


@dataclass(frozen=True)
class SomePairs:
    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(islice(repeat(("1 2:3?", "1+2=3")), 10_000))


def run_settings(name: str, model_path: str, folder: Path, backend: Backend | None = None) -> RunConfig:
    algo = make(name, kl_coef=0.05, c_ptx=0.1)
    return RunConfig(
        run_dir=str(folder / name),
        algo=algo,
        task=CountdownTask(train_problems=64, test_problems=8),
        model=ModelSettings(path=model_path),
        reward=LengthReward(),
        backend=backend or DataParallelBackend(use="cpu"),
        sampling=Sampling(max_new_tokens=12),
        optimizer=OptimizerSettings(lr=1e-3),
        critic=CriticSettings(OptimizerSettings(lr=1e-2), warmup_steps=1),
        data=DataSettings(ptx=SomePairs(), ptx_rows=3),
        trainer=TrainerSettings(
            steps=3, prompts_per_step=5, responses_per_prompt=3, minibatch_prompts=1, checkpoint_every=2, micro_batch_tokens=60
        ),
        boundary=BoundarySettings(every=0),
    )


def sft_settings(model_path: str, folder: Path) -> SftConfig:
    return SftConfig(
        run_dir=str(folder / "sft"),
        data=CountdownTraces(CountdownTask(train_problems=64, test_problems=8)),
        model=ModelSettings(path=model_path),
        backend=DataParallelBackend(use="cpu"),
        optimizer=OptimizerSettings(lr=1e-3),
        sft=SftSettings(steps=3, batch_size=7, micro_batch_tokens=60, log_every=1),
    )


RUNS = ("ppo", "remax", "dapo", "sft")


def train(name: str, model_path: str, folder: Path) -> None:
    if name == "sft":
        run_sft(sft_settings(model_path, folder))
        return
    train_once(run_settings(name, model_path, folder))


def measure(model_path: str, out: Path) -> None:
    """A boundary evaluation whose samples the processes share; seven problems do not divide by two."""
    backend = DataParallelBackend(use="cpu")
    backend.start()
    task, models = CountdownTask(train_problems=64, test_problems=8), [EvaluatedModel("base", model_path)]
    settings, engine = BoundarySettings(n=5, problems=7, temperature=1.0), TransformersEngine(device="cpu")
    evaluate(out / "boundary", models, task, engine, settings, settings.sampling(Sampling(max_new_tokens=12)), backend)


def train_once(config: RunConfig) -> None:
    trainer = Trainer(config)
    trainer.train()
    trainer.close()


def stages(model_path: str, out: Path) -> None:
    """The updates of GRPO and PPO with every back end, in one set of processes."""
    found = {}
    for name in ("ddp", "zero 0", "zero 1", "zero 2", "zero 3"):
        kind, _, stage = name.partition(" ")
        backend = DataParallelBackend(use="cpu") if kind == "ddp" else DeepSpeedBackend(use="cpu", zero_stage=int(stage))
        backend.start()
        for algorithm in ("grpo", "ppo"):
            found[f"{name} {algorithm}"] = updated(make(algorithm), model_path, backend)
        rank = backend.rank
    if rank == 0:
        torch.save(found, out)
    backend.stop()


SHARDED = {
    "zero_3": {"zero_stage": 3},
    "zero_3_bf16": {"zero_stage": 3, "precision": "bf16"},
    "zero_1_bf16": {"zero_stage": 1, "precision": "bf16"},
    "zero_2": {"zero_stage": 2},
}


def resumes(model_path: str, out: Path) -> None:
    """PPO with a reference that is reset, under ZeRO: three steps at once, and the same in two sittings."""
    for name, settings in SHARDED.items():
        for sitting, steps in (("once", 3), ("twice", 2), ("twice", 3)):
            config = run_settings("ppo", model_path, out / name / sitting, DeepSpeedBackend(use="cpu", **settings))
            trainer = replace(config.trainer, steps=steps, reset_reference_every=2, max_mismatch_nats=1.0)
            train_once(replace(config, trainer=trainer))


def main(what: str, model_path: str, out: Path) -> None:
    if what == "runs":
        for name in RUNS:
            train(name, model_path, out)
        measure(model_path, out)
        torch.distributed.destroy_process_group()  # an exit with the group open may abort: "terminate called ..."
        return
    if what == "resumes":
        resumes(model_path, out)
        torch.distributed.destroy_process_group()
        return
    if what == "stages":
        stages(model_path, out)
        return
    backend = DataParallelBackend(use="cpu")
    backend.start()
    found = {
        f"{name}, {minibatch} prompts": gradients(algorithm, model_path, backend, ragged_batch(), budget, minibatch)
        for name, algorithm in algorithms().items()
        for minibatch, budget in CUTS[backend.world_size]
    }
    if backend.rank == 0:
        torch.save(found, out)
    backend.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
