"""Sample n answers per problem from every model, verify, and write what they say: ``boundary.json`` and ``report.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlvr import checkpoint
from rlvr.backend import Backend
from rlvr.boundary.estimators import crossover, mean_interval, paired_difference, problem_curve, solvable_sets
from rlvr.boundary.report import write_report
from rlvr.boundary.store import SampleStore
from rlvr.build import to_mapping
from rlvr.config import BoundaryConfig, BoundarySettings, RunConfig, check_engine_ranks
from rlvr.model import load_tokenizer, resolve_path
from rlvr.rewards import grade
from rlvr.rollout import Engine
from rlvr.rollout.collect import draw
from rlvr.rollout.engine import hash_seed, in_order
from rlvr.rollout.shares import Shares
from rlvr.tasks import Task
from rlvr.types import InputError, Prompt, Sampling

DELTA_SE_K = 256  # the paper's; the largest k of the evaluation when n is smaller
SAMPLES_PER_CALL = 2048  # answers drawn, verified and stored at a time: what a kill can cost


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of an evaluation: the name of its curve, where it lies, and the training step it was taken at."""

    name: str
    path: str
    step: int = 0


def evaluate(
    folder: Path,
    models: Sequence[EvaluatedModel],
    task: Task,
    engine: Engine,
    settings: BoundarySettings,
    sampling: Sampling,
    backend: Backend,
) -> None:
    """Fill the sample stores and write ``boundary.json``. The first model is the one others are compared with.

    Every rank calls it and draws a share of the samples; rank 0 keeps the stores and writes.
    """
    prompts = evaluation_prompts(task, settings)
    main, entries = backend.rank == 0, []
    if main:
        checkpoint.write_jsonl(folder / "problems.jsonl", [{"id": p.id, "text": p.text, "gold": p.gold} for p in prompts])
    for model in models:
        identity = {
            "model": model.path,
            "step": model.step,
            "task": to_mapping(task),
            "sampling": asdict(sampling),
            "seed": settings.seed,
        }
        store = SampleStore(folder, model.name, task.name, identity) if main else None
        fill(store, model, prompts, task, engine, settings, sampling, backend)
        if store is not None:
            entries.append(_model_entry(model, store, prompts, settings))
    if main:
        result = {
            "task": task.name,
            "n": settings.n,
            "k": settings.ks(),
            "sampling": {**asdict(sampling), "seed": settings.seed},
            "estimand": "population",
            "sampled_distinct": all(entry.pop("distinct_seeds") for entry in entries),
            "models": entries,
            "comparisons": [_comparison(entries[0], entry, settings) for entry in entries[1:]],
        }
        checkpoint.write_json(folder / "boundary.json", result)


def evaluation_prompts(task: Task, settings: BoundarySettings) -> list[Prompt]:
    """The problems of an evaluation. Raises InputError when there are not as many as asked for."""
    prompts = list(task.prompts("test"))[: settings.problems]
    if not prompts:
        raise InputError(f"boundary.problems: the test set of {task.name} is empty; expected at least one problem")
    if settings.problems is not None and len(prompts) < settings.problems:
        raise InputError(f"boundary.problems: got {settings.problems}, but the test set of {task.name} has {len(prompts)}")
    return prompts


def fill(
    store: SampleStore | None,
    model: EvaluatedModel,
    prompts: Sequence[Prompt],
    task: Task,
    engine: Engine,
    settings: BoundarySettings,
    sampling: Sampling,
    backend: Backend,
) -> None:
    """Draw the samples that the store lacks; ``store`` is None on ranks other than 0.

    Each sample has its own seed, so it does not matter in how many sittings or by which rank it is drawn.
    """
    at_hand = backend.gather(store.sample_ids() if store is not None else {})[0]
    missing = [(p, i) for p in prompts for i in range(settings.n) if i not in at_hand.get(p.id, ())]
    total = len(prompts) * settings.n
    if not missing:
        return
    tokenizer = load_tokenizer(model.path)
    engine.load(model.path, [tokenizer.eos_token_id])
    reward, shares = task.reward(), Shares(engine, backend)
    size, initial = SAMPLES_PER_CALL * shares.engines, total - len(missing)
    with tqdm(total=total, initial=initial, unit="answer", desc=f"evaluate {model.name}", disable=store is None) as bar:
        for start in range(0, len(missing), size):
            backend.phase(
                f"evaluate {model.name}: answers {initial + start} to {min(initial + start + size, total)} of {total}"
            )
            wanted: dict[str, list[int]] = {}
            for prompt, index in missing[start : start + size]:
                wanted.setdefault(prompt.id, []).append(index)
            asked = [prompt for prompt in prompts if prompt.id in wanted]
            own = shares.drawn(asked)
            seeds = [[hash_seed("boundary", settings.seed, p.id, i) for i in wanted[p.id]] for p in own]
            numbers = [wanted[p.id] for p in own]
            drawn = draw(engine, tokenizer, own, seeds, sampling, model.step, numbers)
            groups = [rows for rows, _ in in_order(drawn, len(own))]
            graded = [(own[place], groups[place]) for place in shares.graded(len(own))]
            verdicts = iter(grade(reward, [p for p, rows in graded for _ in rows], [row for _, rows in graded for row in rows]))
            done = shares.gather([[next(verdicts) for _ in rows] for _, rows in graded], len(asked))
            if store is not None:
                store.append(row for rows in done for row in rows)
            bar.update(sum(map(len, done)))


def _model_entry(
    model: EvaluatedModel, store: SampleStore, prompts: Sequence[Prompt], settings: BoundarySettings
) -> dict[str, Any]:
    """Counts per problem over the first n samples of each, and the curve."""
    wanted = {prompt.id for prompt in prompts}
    correct: Counter[str] = Counter()
    statuses: dict[str, Counter[str]] = {prompt.id: Counter() for prompt in prompts}
    seeds: dict[str, set[int]] = {prompt.id: set() for prompt in prompts}
    for row in store:
        if row["problem"] in wanted and row["sample"] < settings.n:
            correct[row["problem"]] += bool(row["correct"])
            statuses[row["problem"]][row["status"]] += 1
            seeds[row["problem"]].add(row["seed"])
    counts = [correct[prompt.id] for prompt in prompts]
    curve = {k: problem_curve(settings.n, counts, k) for k in settings.ks()}
    return {
        "name": model.name,
        "path": model.path,
        "step": model.step,
        "pass_at_k": {str(k): float(values.mean()) for k, values in curve.items()},
        "ci95": {str(k): list(mean_interval(values, k == settings.n)) for k, values in curve.items()},
        "problems": [
            {"id": p.id, "n": settings.n, "correct": correct[p.id], "status": dict(sorted(statuses[p.id].items()))}
            for p in prompts
        ],
        "distinct_seeds": all(len(own) == settings.n for own in seeds.values()),
    }


def _comparison(base: dict[str, Any], model: dict[str, Any], settings: BoundarySettings) -> dict[str, Any]:
    counts = [[problem["correct"] for problem in entry["problems"]] for entry in (base, model)]
    ks = settings.ks()
    curves = [{k: problem_curve(settings.n, own, k) for k in ks} for own in counts]
    differences = {k: paired_difference(curves[0][k], curves[1][k]) for k in ks}
    k = max(k for k in ks if k <= DELTA_SE_K)
    # base pass@K - model pass@1 of the same problems: a paired difference with the roles turned round
    gap, low, high = paired_difference(problem_curve(settings.n, counts[1], 1), curves[0][k])
    return {
        "base": base["name"],
        "model": model["name"],
        "difference": {str(k): list(values) for k, values in differences.items()},
        "crossover": crossover(ks, differences),
        "delta_se": {"k": k, "value": gap, "ci95": [low, high]},
        "solvable": solvable_sets(settings.n, counts[0], counts[1]),
    }


def run_models(config: RunConfig, base_path: str) -> list[EvaluatedModel]:
    """The base of a run and the checkpoints that its settings ask to evaluate."""
    every, last = config.boundary.every or config.trainer.checkpoint_every, config.trainer.steps
    folder = Path(config.run_dir)
    steps = [s for s in checkpoint.saved_steps(folder) if s == last or (s % every == 0 and s < last and s > 0)]
    names = [(checkpoint.step_name(step), step) for step in steps]
    saved = [EvaluatedModel(name, str(folder / "checkpoints" / name), step) for name, step in names]
    return [EvaluatedModel("base", base_path, 0), *saved]


def evaluate_run(config: RunConfig, base_path: str) -> None:
    """Boundary evaluation of a finished training run, unless switched off, and the run's report."""
    folder = Path(config.run_dir)
    if config.boundary.every != 0:
        sampling = config.boundary.sampling(config.sampling)
        models = run_models(config, base_path)
        evaluate(folder / "boundary", models, config.task, config.engine, config.boundary, sampling, config.backend)
    if config.backend.rank == 0:
        write_report(folder)


def evaluate_paths(config: BoundaryConfig) -> None:
    """The evaluation of ``rlvr boundary``: any folders and hub ids, named by their last path part."""
    paths = [resolve_path(path, "models") for path in config.models]
    names = unique_names(paths)
    steps = [int(name.removeprefix("step_")) if name.startswith("step_") else 0 for name in (Path(p).name for p in paths)]
    models = [EvaluatedModel(*fields) for fields in zip(names, paths, steps, strict=True)]
    settings = config.settings()
    sampling = settings.sampling(Sampling(config.max_new_tokens))
    config.backend.start()
    check_engine_ranks(config.engine, config.backend)
    evaluate(Path(config.out), models, config.task, config.engine, settings, sampling, config.backend)
    if config.backend.rank == 0:
        write_report(Path(config.out))
    config.engine.close()
    config.backend.stop()


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for every path: the last part, more of the path where that is not unique. Raises InputError for twins."""
    if len(set(paths)) < len(paths):
        raise InputError(f"models: got {', '.join(paths)}, where one appears twice; name each once")
    for depth in range(1, 1 + max(len(Path(path).parts) for path in paths)):
        names = ["-".join(Path(path).parts[-depth:]).replace("/", "") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [path.replace("/", "-") for path in paths]
