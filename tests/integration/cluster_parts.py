"""Components of the runs in test_cluster_path.py, named on the command line by their dotted paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from rlvr.rollout.vllm_engine import VllmEngine


@dataclass
class CorruptedVllm(VllmEngine):
    """vLLM whose third weight sync gets one tensor wrong: half of what the trainer sends."""

    tensor: str = "model.layers.1.mlp.down_proj.weight"
    _syncs: int = field(default=0, init=False, repr=False)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._syncs += 1
        super().update_weights(self._spoilt(weights) if self._syncs == 3 else weights)

    def _spoilt(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor * 0.5 if name == self.tensor else tensor
