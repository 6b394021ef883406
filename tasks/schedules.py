"""Learning rate over a run: what follows the warm-up. Chosen in YAML by class.

A schedule maps an optimizer step, counted from 0, and the total number of steps to a factor on the base rate.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


class Schedule(ABC):
    """Base of the schedules.

    Attributes:
        scaled_warmup: Whether the warm-up is a factor on the schedule's own rate of each step. Otherwise it leads to
            the base rate, and the schedule says nothing before its end.
    """

    scaled_warmup: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, step: int, total_steps: int) -> float:
        """Return the factor for step `step` of `total_steps`."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `min_lr_ratio` over the whole run, and constant after it.

    As in the authors' classification recipe (timm without a warm-up prefix) its clock starts with the warm-up, so that
    the rate after the warm-up is a little below the base rate.

    Args:
        min_lr_ratio: Learning rate at the last step, as a fraction of the base rate.

    Raises:
        ValueError: `min_lr_ratio` outside [0, 1].
    """

    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"Cosine: min_lr_ratio is {self.min_lr_ratio}, expected a share of lr from 0 to 1.")

    def __call__(self, step: int, total_steps: int) -> float:
        progress = min(1.0, step / total_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    """Constant, and multiplied by `factor` at each milestone: the authors' detection recipe.

    Args:
        milestones: Optimizer steps, rising. Empty for a constant rate.
        factor: Of each milestone.

    Raises:
        ValueError: The milestones do not rise, or `factor` is outside (0, 1].
    """

    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) < 1:
            raise ValueError(f"Steps: milestones are {list(self.milestones)}, expected rising positive step numbers.")
        if not 0 < self.factor <= 1:
            raise ValueError(f"Steps: factor is {self.factor}, expected a number in (0, 1].")

    def __call__(self, step: int, total_steps: int) -> float:
        return self.factor ** sum(step >= milestone for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Poly(Schedule):
    """From 1 to `min_lr_ratio` along `(1 - step / total_steps) ** power`: the authors' segmentation recipe.

    As in mmseg the rate falls from the first step on, during the warm-up too, which is a factor on it.

    Args:
        power: 1 falls along a straight line.
        min_lr_ratio: Learning rate after the last step, as a fraction of the base rate. mmseg's `min_lr` is a rate
            itself, the same for all layers; it is 0 in every config of the authors.

    Raises:
        ValueError: `power` is not positive, or `min_lr_ratio` outside [0, 1].
    """

    scaled_warmup = True

    power: float = 1.0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"Poly: power is {self.power}, expected a positive number.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"Poly: min_lr_ratio is {self.min_lr_ratio}, expected a share of lr from 0 to 1.")

    def __call__(self, step: int, total_steps: int) -> float:
        left = max(0.0, 1 - step / total_steps)
        return float(self.min_lr_ratio + (1 - self.min_lr_ratio) * left**self.power)


COSINE = Cosine()  # to zero: the default of tasks


def with_warmup(step: int, *, schedule: Schedule, warmup_steps: int, warmup_lr_ratio: float, total_steps: int) -> float:
    """Return the factor at `step`.

    Over `warmup_steps` it rises linearly from `warmup_lr_ratio` to 1, times the schedule's where that has
    `scaled_warmup`; then it is the schedule's.
    """
    if step >= warmup_steps:
        return schedule(step, total_steps)
    rise = warmup_lr_ratio + (1 - warmup_lr_ratio) * step / warmup_steps
    return rise * schedule(step, total_steps) if schedule.scaled_warmup else rise
