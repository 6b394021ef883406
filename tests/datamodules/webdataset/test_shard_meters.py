"""Rates are those of training steps."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.webdataset import meters
from datamodules.webdataset.ledger import Ledger
from datamodules.webdataset.meters import DataMeters, Meter


def test_the_time_of_a_validation_does_not_count(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 70.0, 80.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    trainer: Any = SimpleNamespace(
        global_step=0,
        log_every_n_steps=1,
        world_size=1,
        strategy=SimpleNamespace(reduce=lambda numbers, reduce_op: numbers),
        train_dataloader=SimpleNamespace(take_meter=lambda: (Meter(samples=Counter({0: 40})), 5.0)),
    )
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log_dict=lambda numbers, **options: logged.update(numbers)
    )
    callback = DataMeters(["squares"], 0.1, Ledger(tmp_path), steps_per_epoch=4)
    callback.on_train_start(trainer, module)
    callback.on_validation_start(trainer, module)
    callback.on_validation_end(trainer, module)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, None, 0)
    # 40 images in the 20 seconds around the 60 of the validation, 5 of which went by in waiting.
    assert logged["data/images_per_s"] == 2
    assert logged["data/wait"] == 0.25
    assert logged["data/samples/squares"] == 40
    assert logged["data/epoch"] == 0.25
