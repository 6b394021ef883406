"""LightningModules: a backbone, a head, a loss, metrics and an optimizer. Callbacks for their runs, and the command."""

from tasks.base import InitCheckpoint, Task
from tasks.callbacks import EMA
from tasks.classification import Classification
from tasks.detection.task import Detection
from tasks.pretraining.task import Pretraining
from tasks.schedules import Cosine, Poly, Schedule, Steps
from tasks.segmentation.task import Segmentation

__all__ = [
    "EMA",
    "Classification",
    "Cosine",
    "Detection",
    "InitCheckpoint",
    "Poly",
    "Pretraining",
    "Schedule",
    "Segmentation",
    "Steps",
    "Task",
]
