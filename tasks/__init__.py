"""LightningModules: a backbone, a head, a loss, metrics and an optimizer. Callbacks for their runs, and the command."""

from tasks.base import InitCheckpoint, Task
from tasks.callbacks import EMA
from tasks.classification import Classification

__all__ = ["EMA", "Classification", "InitCheckpoint", "Task"]
