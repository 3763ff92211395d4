"""What each verb is configured by: the schemas, their defaults, and the checks between settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from rlvr.algos import Algorithm
from rlvr.backend import Backend, OptimizerSettings, SingleBackend
from rlvr.data import Pairs
from rlvr.model import ModelSettings
from rlvr.rewards import Reward
from rlvr.rollout import Engine
from rlvr.rollout.transformers_engine import TransformersEngine
from rlvr.tasks import Task
from rlvr.types import InputError, Sampling


@dataclass(frozen=True)
class TrainerSettings:
    """Sizes of the loop. A step is one rollout batch and all its optimizer updates."""

    steps: int = 100
    prompts_per_step: int = 32
    responses_per_prompt: int = 16
    minibatch_prompts: int | None = None  # prompts per optimizer update; None: prompts_per_step
    epochs_per_rollout: int = 1
    checkpoint_every: int = 50  # steps; the last step is always saved
    micro_batch_tokens: int = 16384  # padded tokens per forward pass and rank; a memory setting that changes no number
    packing: bool = False  # rows of a micro-batch one after another instead of padded side by side; no number changes
    max_prompt_tokens: int = 1024
    long_prompts: str = "error"  # error | drop (counted), for prompts above max_prompt_tokens
    max_crashed_fraction: float = 0.05  # of a step's verdicts; more stops the run
    max_mismatch_nats: float | None = None  # mean |engine - trainer log-prob|; more stops the run. None: by precision
    save_rollouts_every: int = 10  # steps; 0: never
    reset_reference_every: int = 0  # steps; 0: the reference stays the starting model

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "responses_per_prompt", "epochs_per_rollout", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("micro_batch_tokens", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.minibatch_prompts is not None and not 1 <= self.minibatch_prompts <= self.prompts_per_step:
            raise InputError(
                f"minibatch_prompts: got {self.minibatch_prompts}, expected 1 to prompts_per_step = {self.prompts_per_step}"
            )
        if self.prompts_per_step % self.prompts_per_minibatch:
            raise InputError(
                f"minibatch_prompts: got {self.minibatch_prompts}, expected a divisor of prompts_per_step = "
                f"{self.prompts_per_step}"
            )
        if self.max_mismatch_nats is not None and not self.max_mismatch_nats > 0:
            raise InputError(f"max_mismatch_nats: got {self.max_mismatch_nats}, expected above 0, or null")
        if self.long_prompts not in ("error", "drop"):
            raise InputError(f"long_prompts: got {self.long_prompts!r}, expected error or drop")

    @property
    def prompts_per_minibatch(self) -> int:
        return self.minibatch_prompts or self.prompts_per_step

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // self.prompts_per_minibatch * self.epochs_per_rollout


@dataclass(frozen=True)
class CriticSettings:
    """The critic, when the algorithm needs one: a copy of the starting model with a scalar head."""

    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5))
    warmup_steps: int = 0  # steps in which only the critic is trained


@dataclass(frozen=True)
class DataSettings:
    """Training data beside the task's prompts."""

    ptx: Pairs | None = None  # endless pairs of the pretraining term; its weight is algo.c_ptx
    ptx_rows: int = 32  # pairs per optimizer update, all ranks

    def __post_init__(self) -> None:
        if self.ptx_rows < 1:
            raise InputError(f"ptx_rows: got {self.ptx_rows}, expected at least 1")


@dataclass(frozen=True)
class BoundarySettings:
    """Boundary evaluation of the base and the checkpoints on the task's test problems."""

    n: int = 256  # answers per problem
    k: list[int] | None = None  # None: powers of two up to n, and n
    every: int | None = None  # evaluate the checkpoints at multiples of this; None: all of them; 0: no evaluation
    problems: int | None = None  # the first so many test problems; None: all
    temperature: float = 0.6  # the paper's evaluation setting, with top_p
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int | None = None  # None: sampling.max_new_tokens
    seed: int = 0  # of the sample store; apart from the run's seed

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n: got {self.n}, expected at least 1")
        if self.problems is not None and self.problems < 1:
            raise InputError(f"problems: got {self.problems}, expected at least 1")
        if self.every is not None and self.every < 0:
            raise InputError(f"every: got {self.every}, expected 0 (off) or more")
        for k in self.k or ():
            if not isinstance(k, int) or not 1 <= k <= self.n:
                raise InputError(f"k: got {k}, expected whole numbers from 1 to n = {self.n}; raise n or lower k")

    def ks(self) -> list[int]:
        """The k of the curve, ascending."""
        return sorted(set(self.k or [*(2**i for i in range(self.n.bit_length())), self.n]))

    def sampling(self, training: Sampling) -> Sampling:
        limit = self.max_new_tokens or training.max_new_tokens
        return Sampling(limit, self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class WandbSettings:
    mode: str = "disabled"  # online | offline | disabled
    project: str = "rlvr"
    name: str | None = None  # None: the run folder's name

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline", "disabled"):
            raise InputError(f"mode: got {self.mode!r}, expected online, offline or disabled")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run is made of. From Python: ``RunConfig(run_dir=..., algo=GRPO(), task=MyTask(), ...)``."""

    run_dir: str
    algo: Algorithm
    task: Task
    experiment: str | None = None
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    reward: Reward | None = None  # None: the task's own
    engine: Engine = field(default_factory=TransformersEngine)
    backend: Backend = field(default_factory=SingleBackend)
    sampling: Sampling = field(default_factory=Sampling)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    data: DataSettings = field(default_factory=DataSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    boundary: BoundarySettings = field(default_factory=BoundarySettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)

    def __post_init__(self) -> None:
        problems = list(cross_field_problems(self))
        if problems:
            raise InputError("\n".join(problems))


def cross_field_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong between settings that are each in order, one line a problem."""
    trainer, algo = config.trainer, config.algo
    needed_methods = ["advantages"] + ["value_targets"] * algo.needs_critic
    for method in needed_methods:
        if getattr(type(algo), method) is getattr(Algorithm, method):
            yield f"algo: {type(algo).__name__} does not define {method}(batch) -> [B, T], which the trainer will ask for"
    most = (algo.plan.gen_batch_prompts or trainer.prompts_per_step) * algo.plan.max_gen_batches
    if algo.plan.dynamic and most < trainer.prompts_per_step:
        yield (
            f"algo.plan.max_gen_batches: {algo.plan.max_gen_batches} generation batches of {algo.plan.gen_batch_prompts} "
            f"prompts cannot fill trainer.prompts_per_step = {trainer.prompts_per_step}; raise one of the two"
        )
    needed = algo.min_responses_per_prompt
    if trainer.responses_per_prompt < needed:
        yield (
            f"trainer.responses_per_prompt: got {trainer.responses_per_prompt}, but {type(algo).__name__} with these settings "
            f"compares the responses of a prompt with each other; expected at least {needed}"
        )
    if config.model.path is None and config.model.tiny is None:
        yield "model.path: not given; expected a Hugging Face folder, a run folder or a hub id (or model=tiny)"
    if config.model.path is not None and config.model.tiny is not None:
        yield f"model.path: got {config.model.path!r} together with model.tiny; set model.path=null or model.tiny=null"
    if algo.plan.overlong_buffer_tokens > config.sampling.max_new_tokens:
        yield (
            f"algo.plan.overlong_buffer_tokens: got {algo.plan.overlong_buffer_tokens}, expected at most "
            f"sampling.max_new_tokens = {config.sampling.max_new_tokens}"
        )
    if algo.c_ptx > 0 and config.data.ptx is None:
        yield f"data.ptx: not given with algo.c_ptx={algo.c_ptx}; name a source of pairs (data@data.ptx=pairs) or set it to 0"
    if config.data.ptx is not None and algo.c_ptx == 0:
        yield "algo.c_ptx: got 0, but data.ptx is given and would not be read; set algo.c_ptx above 0 or leave data.ptx out"
    if config.model.lora is not None and trainer.reset_reference_every:
        yield (
            "trainer.reset_reference_every: got a reset together with model.lora, where the reference is the base with the "
            "adapters off; set one of the two to 0 or null"
        )
    if algo.plan.dynamic and trainer.responses_per_prompt < 2:
        yield "trainer.responses_per_prompt: got 1 with algo.plan.dynamic, where every group is flat; expected at least 2"


def check_processes(config: RunConfig) -> None:
    """Raise InputError when the started processes do not fit the engine, or are more than the prompts they share."""
    check_engine_ranks(config.engine, config.backend)
    ranks, plan = config.backend.world_size, config.algo.plan
    sizes = {"trainer.prompts_per_step": config.trainer.prompts_per_step}
    if plan.dynamic and plan.gen_batch_prompts is not None:
        sizes["algo.plan.gen_batch_prompts"] = plan.gen_batch_prompts
    for key, size in sizes.items():
        if size < ranks:
            raise InputError(
                f"{key}: got {size} under {ranks} processes, expected at least one prompt for each; raise it or start fewer"
            )


def check_engine_ranks(engine: Engine, backend: Backend) -> None:
    """Raise InputError when the processes cannot be divided into engines."""
    together = getattr(engine, "tensor_parallel_size", 1)
    if backend.world_size % together:
        raise InputError(
            f"engine.tensor_parallel_size: got {together} under {backend.world_size} processes, expected a divisor of that"
        )


@dataclass(frozen=True)
class SftSettings:
    steps: int = 500
    batch_size: int = 128  # pairs per optimizer update
    micro_batch_tokens: int = 16384
    checkpoint_every: int | None = None  # steps; None: only the last
    log_every: int = 10  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_tokens", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Everything a fine-tuning run is made of."""

    run_dir: str
    data: Pairs
    experiment: str | None = None
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    backend: Backend = field(default_factory=SingleBackend)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    sft: SftSettings = field(default_factory=SftSettings)

    def __post_init__(self) -> None:
        if (self.model.path is None) == (self.model.tiny is None):
            raise InputError("model: expected one of model.path and model.tiny")


@dataclass(frozen=True, kw_only=True)
class BoundaryConfig:
    """A boundary evaluation of any models on one task; the first model is the one the others are compared with."""

    models: list[str]  # folders, run folders or hub ids
    task: Task
    out: str
    engine: Engine = field(default_factory=TransformersEngine)
    backend: Backend = field(default_factory=SingleBackend)  # several processes share the samples
    n: int = 256
    k: list[int] | None = None
    problems: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("models: got none, expected at least one, as in models=[BASE,TRAINED]")
        self.settings()

    def settings(self) -> BoundarySettings:
        shared = {f.name: getattr(self, f.name) for f in fields(BoundarySettings) if f.name != "every"}
        return BoundarySettings(**shared)
