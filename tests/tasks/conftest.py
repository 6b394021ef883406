from collections.abc import Callable

import pytest
import torch

from internimage import internimage_debug
from tasks import Classification


@pytest.fixture
def tiny_task() -> Callable[..., Classification]:
    """Build a classifier of four classes on the debug backbone; arguments go to `Classification`."""

    def build(drop_path_rate: float = 0.0, **arguments) -> Classification:
        torch.manual_seed(0)
        defaults = {"num_classes": 4, "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)}
        return Classification(internimage_debug(drop_path_rate=drop_path_rate), **(defaults | arguments))

    return build
