"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers compute x (W + s B A), s = alpha / r, with only A and B trained.

With the adapters off the model is the base again, so the frozen reference costs no second copy. Checkpoints are adapters
(``adapter_config.json`` and ``adapter_model.safetensors``, as peft writes them), or whole merged models on request. The only
importer of peft, and only inside functions.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlvr.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUBFOLDER = "adapter"  # of a merged checkpoint: what training resumes from
ALL_LINEAR = "all-linear"
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Lora:
    """Train adapters instead of the weights. There is no dropout: it would make the ratio differ from 1."""

    r: int = 16  # rank of each update
    alpha: float = 32  # updates are scaled by alpha / r
    targets: str | list[str] = ALL_LINEAR  # names of linear layers, [q_proj, v_proj] say; all-linear: all but the head
    merge_checkpoints: bool = False  # checkpoints are whole merged models, the adapter beside them in adapter/

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"r: got {self.r}, expected at least 1")
        if not self.alpha > 0:
            raise InputError(f"alpha: got {self.alpha}, expected above 0")
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise InputError(f"targets: got {self.targets!r}, expected {ALL_LINEAR} or names of linear layers")


def add_adapter(model: nn.Module, lora: Lora, seed: int = 0) -> nn.Module:
    """The model with new adapters, which change nothing yet (B is 0). Only their weights require a gradient.

    Turn gradient checkpointing on before, as ``load_policy`` does: peft then makes the embeddings' output require a gradient,
    without which none would reach the adapters. The same seed gives the same A on every process.
    """
    peft = _peft()
    targets = [lora.targets] if isinstance(lora.targets, str) and lora.targets != ALL_LINEAR else lora.targets
    if targets != ALL_LINEAR:
        _check_targets(model, targets)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return _wrap(peft, model, config, seed)


def restore_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The base ``model`` with the adapters of a checkpoint, merged or not, to train further."""
    return _attach(model, folder, "CAUSAL_LM")


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """The base ``model`` with an adapter folder merged into its weights: a plain Hugging Face model of the same class.

    An adapter trained on top of it loads here, while transformers refuses a base that is itself an adapter: write the merged
    model to a folder of its own first where others should open what comes after.
    """
    merged = _attach(model, folder, None).merge_and_unload().requires_grad_(True)  # peft froze the base
    # A new adapter on top must name this folder, not the base below it, as what it belongs to.
    merged.name_or_path = str(folder)
    return merged


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str | Path) -> str:
    """Folder or hub id of the model that an adapter (a folder, or a merged checkpoint's) was trained on."""
    settings = _adapter_folder(path) / CONFIG
    base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    remedy = f"set base_model_name_or_path in {settings} to the model's folder or hub id"
    if not base:
        raise InputError(f"model.path: the adapter in {path} does not name the model it belongs to; {remedy}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(f"model.path: the adapter in {path} belongs to {base}, and nothing is there; put it back or {remedy}")
    return base


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes. Changes nothing for a model without adapters."""
    layers = [layer for layer in _lora_layers(model).values() if not layer.disable_adapters]
    required_grad = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, required in required_grad:  # enabling marks adapters as trained, also those of a frozen model
            parameter.requires_grad_(required)


def merged_weights(model: nn.Module, gathered: Gather = nullcontext) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, W + s B A) of every parameter of the base, tied names included; the model stays as it is.

    One tensor at a time: each is valid until the next is asked for. ``gathered(parameters)`` is entered around each tensor
    with the parameters it is made of, for back ends that keep them in shards. Merged in float32, given in W's dtype. A model
    without adapters gives its parameters.
    """
    layers = _lora_layers(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if layers and (".lora_A." in name or ".lora_B." in name):
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        if layer is None:
            with gathered([parameter]):
                yield _plain_name(name) if layers else name, parameter.detach()
            continue
        (adapter,) = layer.active_adapters
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [r, in], [out, r]
        with gathered([parameter, a, b]):
            update = (b.detach().float() @ a.detach().float()) * layer.scaling[adapter]  # [out, in]
            weight = parameter.detach()
            yield _plain_name(name), (weight.float() + (update.T if layer.fan_in_fan_out else update)).to(weight.dtype)


def save_adapter(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters and their settings. ``state``: the adapter tensors by parameter name, where ``model`` has shards."""
    from peft import get_peft_model_state_dict

    peft_model: Any = model
    weights = get_peft_model_state_dict(model, state_dict=state and dict(state), save_embedding_layers=False)
    wanted = 2 * len(_lora_layers(model))
    assert len(weights) == wanted, f"save_adapter: got {len(weights)} tensors, the model has {wanted}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    config = copy.copy(peft_model.active_peft_config)
    config.inference_mode, config.target_modules = True, sorted(config.target_modules)  # a set: its order differs by process
    config.save_pretrained(folder)


def save_merged(
    model: nn.Module,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the merged model as a plain Hugging Face folder with the adapter in ``adapter/``.

    ``weights``: all of ``merged_weights``, and ``state`` as in ``save_adapter``, where ``model`` has shards.
    """
    base = model.get_base_model()  # type: ignore[operator]
    parameters = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    buffers = {_plain_name(name): value for name, value in base.state_dict().items() if name not in parameters}
    base.save_pretrained(folder, state_dict={**buffers, **(weights or dict(merged_weights(model)))})
    save_adapter(model, folder / SUBFOLDER, state)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError('model.lora: adapters need peft, which is not installed; pip install "rlvr[peft]"') from error
    return peft


def _wrap(peft: Any, model: nn.Module, config: Any, seed: int) -> Any:
    source = str(getattr(model, "name_or_path", ""))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
    # Absolute, so that the adapter finds its base from any working directory.
    config.base_model_name_or_path = str(Path(source).resolve()) if source and Path(source).is_dir() else source or None
    return wrapped


def _attach(model: nn.Module, folder: str | Path, task_type: str | None) -> Any:
    """The model with a folder's adapters. ``task_type`` None: only to merge, whatever head the model has."""
    peft, source = _peft(), _adapter_folder(folder)
    config = peft.PeftConfig.from_pretrained(str(source))
    if config.peft_type != "LORA":
        raise InputError(f"model.path: the adapter in {source} is of type {config.peft_type.value}, expected LORA")
    if not (source / WEIGHTS).is_file():
        raise InputError(f"model.path: {source} has no {WEIGHTS}, expected one beside {CONFIG}")
    config.task_type, config.inference_mode, config.lora_dropout = task_type, False, 0.0
    config.base_model_name_or_path = None  # peft would warn where the base has moved
    mismatch = f"model.path: the adapter in {source} does not fit {getattr(model, 'name_or_path', 'the model')}"
    try:
        wrapped = _wrap(peft, model, config, seed=0)
        found = wrapped.load_adapter(str(source), "default", is_trainable=True, torch_device="cpu")
    except (RuntimeError, ValueError) as error:  # other shapes; no such layers
        raise InputError(f"{mismatch}: {str(error).splitlines()[-1].strip()}") from error
    if found.missing_keys or found.unexpected_keys:
        example = [*found.missing_keys, *found.unexpected_keys][0]
        raise InputError(
            f"{mismatch}: {len(found.missing_keys)} tensors missing, {len(found.unexpected_keys)} unknown, such as {example}"
        )
    return wrapped


def _adapter_folder(path: str | Path) -> Path:
    folders = (Path(path), Path(path) / SUBFOLDER)
    for folder in folders:
        if (folder / CONFIG).is_file():
            return folder
    raise InputError(f"model.path: got {str(path)!r}, expected a folder with {CONFIG}, or with one in {SUBFOLDER}/")


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Raise InputError for a name that no linear layer of the model's body has."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = dict(model.named_modules())
    body = [name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and m not in ends]
    known = sorted({name.rpartition(".")[2] for name in body})
    for target in targets:
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        if any(modules[name] in ends for name in matched):
            raise InputError(
                f"model.lora.targets: got {target}, the embeddings or the output layer, which often share their weights; "
                f"expected layers between them: {', '.join(known)}"
            )
        if not matched or not set(matched) <= set(body):
            nearest = sorted(known, key=lambda name: -difflib.SequenceMatcher(None, name, target).ratio())
            kind = "matches modules that are not linear layers" if matched else "matches no module"
            raise InputError(f"model.lora.targets: got {target}, which {kind}; the model has {', '.join(nearest[:8])}")
