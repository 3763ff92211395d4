"""Back ends: processes, devices, optimizer steps. The only package that imports accelerate and deepspeed."""

from rlvr.backend.base import Backend, OptimizerSettings, TrainedModel, reporting
from rlvr.backend.data_parallel import DataParallelBackend, SingleBackend
from rlvr.backend.deepspeed import DeepSpeedBackend

__all__ = [
    "Backend",
    "DataParallelBackend",
    "DeepSpeedBackend",
    "OptimizerSettings",
    "SingleBackend",
    "TrainedModel",
    "reporting",
]
