"""Whole weights of models that may lie in shards: written to Hugging Face folders, copied from model to model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlvr.backend import Backend
from rlvr.lora import merged_weights, save_adapter, save_merged


def write_model(
    folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, backend: Backend, merge: bool = False
) -> None:
    """A plain Hugging Face folder of a trained model; with adapters theirs, or with ``merge`` the merged model and theirs.

    Every rank calls it. Rank 0 collects the weights in host memory, one tensor at a time, and writes; nobody gathers
    optimizer state.
    """
    inner: Any = model
    adapted = hasattr(model, "peft_config")
    plain = inner.get_base_model() if adapted else inner
    tied = {name for name, _ in plain.named_parameters(remove_duplicate=False)} - {name for name, _ in plain.named_parameters()}
    merged = (pair for pair in merged_weights(model, backend.gathered) if pair[0] not in tied)  # each tensor is written once
    adapters = host_copies(trained_weights(model, backend), backend) if adapted else {}
    weights = host_copies(merged, backend) if merge or not adapted else {}
    if backend.rank != 0:
        return
    if adapted and merge:
        save_merged(model, folder, weights, adapters)
    elif adapted:
        save_adapter(model, folder, adapters)
    else:
        buffers = {name: value for name, value in plain.state_dict().items() if name not in weights and name not in tied}
        plain.save_pretrained(folder, state_dict={**buffers, **weights})
    tokenizer.save_pretrained(folder)


def trained_weights(model: nn.Module, backend: Backend) -> Iterator[tuple[str, Tensor]]:
    """(name in the model, whole tensor) of the parameters that are trained, each valid until the next is asked for."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with backend.gathered([parameter]):
                yield name, parameter.detach()


def host_copies(weights: Iterable[tuple[str, Tensor]], backend: Backend) -> dict[str, Tensor]:
    """The tensors in host memory on rank 0; the other ranks take part in gathering and keep nothing."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in weights if backend.rank == 0}


def copy_weights(source: nn.Module, target: nn.Module, backend: Backend) -> None:
    """Overwrite a model with another of the same shape. Every rank calls it."""
    own = dict(target.named_parameters())
    with torch.no_grad():
        for name, tensor in merged_weights(source, backend.gathered):
            if name in own:  # a tied name is another name of one that is
                with backend.gathered([own[name]], writer=0):
                    own[name].copy_(tensor)
