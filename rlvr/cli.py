"""The command line: ``rlvr VERB [key=value ...]``. Imports torch only once a verb really runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlvr.errors import InputError

DRY_RUN = "--dry-run"
HELP = """\
rlvr: reinforcement learning with verifiable rewards, and a measure of what it does to a model

usage: rlvr VERB [--config-dir DIR] [key=value ...]

verbs
  train     experiment=NAME       RL training, then boundary evaluation and a report; continues an unfinished run
  sft       experiment=NAME       supervised fine-tuning on (prompt, response) pairs
  boundary  models=[A,B] task=T   sample n answers per problem from every model, verify, estimate pass@k, compare
  report    DIR                   rebuild report.html of a run or of a boundary folder
  doctor    [RUN_DIR]             what is installed, what works here and why the rest does not; or the state of a run

examples
  rlvr train experiment=quickstart
  rlvr train experiment=quickstart algo.clip_eps_high=0.28 trainer.steps=5 run_dir=runs/clip_higher
  rlvr boundary models=[runs/countdown_base,runs/quickstart] task=countdown n=64 max_new_tokens=32 out=boundaries/mine

train, sft and boundary take --dry-run: check the settings, print them all, do nothing.
rlvr VERB --help says more. Exit codes: 0 done, 2 the input is wrong, 1 anything else, 130 interrupted (state saved).
"""

VERB_HELP = {
    "train": """\
rlvr train experiment=NAME [key=value ...]

Trains, evaluates the base and every checkpoint, writes RUN_DIR/report.html. RUN_DIR is runs/NAME unless run_dir= says
otherwise; an unfinished run there is continued, a finished one is never overwritten.

groups    experiment= algo= task= reward= model= engine= backend=     a file of the recipes, or of --config-dir DIR
common    trainer.steps= trainer.prompts_per_step= trainer.responses_per_prompt= trainer.minibatch_prompts=
          optimizer.lr= sampling.temperature= sampling.max_new_tokens= boundary.n= boundary.every= (0: off)
          seed= run_dir= model.path= wandb.mode=online|offline, every algorithm setting under algo.
--dry-run checks the settings and prints them with the share of each process; it opens no model and no data and writes
          nothing.

examples
  rlvr train experiment=quickstart seed=1 run_dir=runs/seed1
  rlvr train experiment=quickstart reward=random run_dir=runs/control
  rlvr train experiment=gsm8k_grpo model.path=Qwen/Qwen2.5-0.5B
  rlvr train experiment=quickstart algo=custom algo._target_=my_algo.MedianBaseline algo.scale=0.5 run_dir=runs/mine
  rlvr train experiment=gsm8k_grpo trainer.minibatch_prompts=8 --dry-run
""",
    "sft": """\
rlvr sft experiment=NAME [key=value ...]

Trains a model on (prompt, response) pairs and leaves it in RUN_DIR/checkpoints. A finished run is left as it is.
--dry-run checks the settings and prints them.

examples
  rlvr sft experiment=countdown_base
  rlvr sft experiment=pairs data.path=pairs.jsonl model.path=Qwen/Qwen2.5-0.5B run_dir=runs/distilled
""",
    "boundary": """\
rlvr boundary models=[A,B,...] task=NAME out=DIR [n=256] [key=value ...]

Each model is a Hugging Face folder, a run folder (its newest checkpoint) or a hub id; the first is the base of the
comparisons. A re-run continues the samples in DIR.

--dry-run checks the settings and prints them.

keys      n= k=[1,8,64] problems= temperature= top_p= max_new_tokens= seed= engine= backend= task.FIELD=

example
  rlvr boundary models=[runs/countdown_base,runs/quickstart] task=countdown n=64 max_new_tokens=32 out=boundaries/mine
""",
    "report": """\
rlvr report DIR

Rebuilds DIR/report.html from what is on disk. DIR is a run folder or a boundary folder.

example
  rlvr report runs/quickstart
""",
    "doctor": """\
rlvr doctor [--quick] [RUN_DIR]

Lists versions and devices and tries every engine and back end: a one-step run of a tiny random model each, in processes of
their own with a time limit. --quick leaves the trying out. Exits with 0 when the default (engine=transformers
backend=single) works, else 1.

With a folder: how far that run is, whether its newest checkpoint can be read (exit code 1 when not), what continues it.

examples
  rlvr doctor
  rlvr doctor runs/quickstart
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    verb, rest = arguments[0], arguments[1:]
    verbs: dict[str, Callable[[list[str]], int | None]]
    verbs = {"train": train, "sft": sft, "boundary": boundary, "report": report, "doctor": doctor}
    try:
        if verb not in verbs:
            raise InputError(f"rlvr: no verb {verb!r}, expected one of {', '.join(verbs)}; rlvr --help shows examples")
        if {"-h", "--help"} & set(rest):
            print(VERB_HELP[verb])
            return 0
        return verbs[verb](rest) or 0
    except InputError as error:
        if not error.told and _speaks():
            lines = "\n".join(f"  {line}" for line in str(error).splitlines())
            where = "" if _is_main() else f" on rank {os.environ['RANK']}"
            print(f"rlvr {verb}: the input is wrong{where}\n{lines}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _is_main():
            print(f"\ninterrupted; what is done is saved. Continue with: {_command_line(arguments)}", file=sys.stderr)
        return 130


def train(arguments: list[str]) -> None:
    settings = _compose("train", arguments)
    if {"model.path", "model.make"} & {word.partition("=")[0] for word in arguments} == {"model.path"}:
        settings["model"]["make"] = None  # the recipe knows how to make its own model, not one that the user names
    config = _read("RunConfig", settings)
    if DRY_RUN in arguments:
        return _show(config, _shares(config))
    _make_base(config.model, _config_dirs(arguments))
    from rlvr import runs
    from rlvr.backend import reporting
    from rlvr.trainer import Trainer

    runs.refuse_finished(config)
    with reporting(config.backend):
        Trainer(config).run()
    if not _is_main():
        return
    print(f"\nreport: {Path(config.run_dir) / 'report.html'}\n{_summary(Path(config.run_dir))}")


def sft(arguments: list[str]) -> None:
    settings = _compose("sft", arguments)
    if DRY_RUN in arguments:
        return _show(_read("SftConfig", settings))
    made = _run_sft(settings)
    if _is_main():
        print(f"model: {made}")


def boundary(arguments: list[str]) -> None:
    config = _read("BoundaryConfig", _compose("boundary", arguments))
    if DRY_RUN in arguments:
        return _show(config)
    from rlvr.backend import reporting
    from rlvr.boundary.evaluate import evaluate_paths

    with reporting(config.backend):
        evaluate_paths(config)
    if _is_main():
        print(f"report: {Path(config.out) / 'report.html'}")


def report(arguments: list[str]) -> None:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise InputError(f"rlvr report: got {' '.join(arguments) or 'nothing'}, expected one folder of a run or an evaluation")
    from rlvr.boundary.report import write_report

    print(f"report: {write_report(Path(arguments[0]))}")


def doctor(arguments: list[str]) -> int:
    from rlvr.doctor import doctor

    return doctor(arguments)


def _show(config: Any, note: str = "") -> None:
    """Print the settings as ``config.yaml`` would hold them: every default filled in."""
    import yaml

    from rlvr.build import to_mapping

    if _is_main():
        print(yaml.safe_dump(to_mapping(config), sort_keys=False) + note)


def _shares(config: Any) -> str:
    """What each of the processes that torchrun counts in WORLD_SIZE would get, as a YAML comment. Refuses too many."""
    from rlvr.backend import SingleBackend
    from rlvr.config import check_processes

    config.backend.world_size = processes = int(os.environ.get("WORLD_SIZE", "1"))  # as its start() would find
    if processes > 1 and isinstance(config.backend, SingleBackend):
        config.backend.start()  # refuses several before it does anything
    check_processes(config)
    trainer = config.trainer
    least, rest = divmod(trainer.prompts_per_step, processes)
    share = f"{least} to {least + 1}" if rest else str(least)
    return (
        f"# processes: {processes}, prompts per process and step: {share} (x {trainer.responses_per_prompt} responses), "
        f"updates per step: {trainer.updates_per_step}"
    )


def _is_main() -> bool:
    """Whether this is rank 0, the process that speaks. torchrun numbers the processes in RANK."""
    return os.environ.get("RANK", "0") == "0"


def _speaks() -> bool:
    """Whether this process tells the user of wrong input: rank 0, or the first of the others where rank 0 has not met it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["WORLD_SIZE"] == "1":
        return _is_main()
    from rlvr.watchdog import connect

    if not _is_main():
        time.sleep(3)  # torchrun ends this process meanwhile where rank 0 is on the same machine and has met it
    return connect("wrong input").add("told", 1) == 1


def _compose(primary: str, arguments: list[str]) -> dict[str, Any]:
    from rlvr.compose import compose

    overrides, config_dirs, rest = [], [], iter(arguments)
    for word in rest:
        if word == "--config-dir":
            config_dirs.append(next(rest, ""))
        elif word.startswith("--config-dir="):
            config_dirs.append(word.partition("=")[2])
        elif word.startswith("-") and word != DRY_RUN:
            raise InputError(f"no option {word!r}, expected key=value settings, --config-dir DIR or {DRY_RUN}")
        elif word == DRY_RUN:
            continue
        else:
            overrides.append(word)
    sys.path.insert(0, "")  # a module of the user's in the current folder can be a component, as with python -m
    return compose(primary, overrides, config_dirs)


def _config_dirs(arguments: list[str]) -> list[str]:
    """The ``--config-dir`` options of a command line, to hand on."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return [
        f"--config-dir={after if word == '--config-dir' else word.partition('=')[2]}"
        for word, after in pairs
        if word.partition("=")[0] == "--config-dir"
    ]


def _read(schema: str, settings: dict[str, Any]) -> Any:
    from rlvr import config
    from rlvr.build import from_mapping

    return from_mapping(getattr(config, schema), settings)


def _run_sft(settings: dict[str, Any]) -> Path:
    config = _read("SftConfig", settings)
    from rlvr.backend import reporting
    from rlvr.sft import run_sft

    with reporting(config.backend):
        return run_sft(config)


def _make_base(model: Any, config_dirs: list[str]) -> None:
    """Make the starting model with ``rlvr sft`` when the settings say how.

    A finished one is left as it is, an interrupted one is completed, one that was made by other settings is refused.
    """
    if model.make is None or model.path is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return  # several processes do not pre-train: Trainer says which command makes a missing model
    if not Path(model.path).exists():
        print(f"{model.path} is not there yet; making it with: rlvr sft experiment={model.make} run_dir={model.path}")
    _run_sft(_compose("sft", [f"experiment={model.make}", f"run_dir={model.path}", *config_dirs]))


def _summary(run_dir: Path) -> str:
    """The three numbers that matter: pass@1, pass at the largest k, and their change, each with its interval."""
    import json

    path = run_dir / "boundary" / "boundary.json"
    if not path.is_file():
        return "no boundary evaluation (boundary.every=0)"
    found = json.loads(path.read_text())
    base, last, top = found["models"][0], found["models"][-1], str(found["k"][-1])

    def value(model: dict[str, Any], k: str) -> str:
        low, high = model["ci95"][k]
        return f"{model['pass_at_k'][k]:.3f} [{low:.3f}, {high:.3f}]"

    lines = [f"pass@{k:<5} base {value(base, k)}   {last['name']} {value(last, k)}" for k in dict.fromkeys(["1", top])]
    if found["comparisons"]:
        gap = found["comparisons"][-1]["delta_se"]
        low, high = gap["ci95"]
        lines.append(
            f"sampling-efficiency gap, base pass@{gap['k']} - trained pass@1: {gap['value']:.3f} [{low:.3f}, {high:.3f}]"
        )
    return "\n".join([*lines, "intervals: 95 %, over the population of problems like these"])


def _command_line(arguments: Sequence[str]) -> str:
    import shlex

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same torchrun command"
    return shlex.join(["rlvr", *arguments])


if __name__ == "__main__":
    sys.exit(main())
