"""A run that dies and is resumed gives the numbers of one that did not: losses, validation, weights, averages."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tasks import Classification
from tasks.cli import main

# Everything random that there is: order, augmentation, mixup and cutmix, drop path. Epochs have 6 batches, checkpoints
# come every 5 steps, so the resumed run starts inside an epoch.
EXPERIMENT = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 14
  log_every_n_steps: 1
  gradient_clip_val: 5.0
  enable_progress_bar: false
  callbacks:
    - class_path: tasks.EMA
      init_args: {decay: 0.9}
model:
  class_path: tasks.Classification
  init_args:
    backbone:
      class_path: internimage.internimage_debug
      init_args: {drop_path_rate: 0.3}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 3.0e-3}
    warmup_steps: 4
    label_smoothing: 0.1
    mixup_alpha: 0.8
    cutmix_alpha: 1.0
data:
  class_path: datamodules.SyntheticClassification
  init_args:
    num_classes: 4
    image_size: 32
    batch_size: 8
    num_samples: 48
    num_val_samples: 16
    train_transform: {flip: 0.5, rand_augment: rand-m9-mstd0.5-inc1, erasing: 0.25}
checkpoint_last:
  every_n_train_steps: 5
"""


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The command that trains EXPERIMENT, up to its run's name."""
    monkeypatch.setattr(sys, "argv", ["internimage"])
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return ["fit", "-c", str(path), "--trainer.default_root_dir", str(tmp_path / "runs"), "--name"]


def metrics(folder: Path) -> dict[tuple[str, int], str]:
    """What a run logged, as text: (key, step) -> value."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(key, int(row["step"])): value for row in rows for key, value in row.items() if value and key != "step"}


def check_same(whole: Path, resumed: Path) -> None:
    expected = {place: value for place, value in metrics(whole).items() if place[1] >= 5}
    assert {("train/loss", 5), ("val/loss", 5), ("val/top1", 11), ("train/loss", 13)} <= expected.keys()
    assert metrics(resumed) == expected
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, resumed))
    assert a["global_step"] == b["global_step"] == 14
    for part in ("state_dict", "current_state_dict"):
        assert all(torch.equal(tensor, b[part][name]) for name, tensor in a[part].items())


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(words, tmp_path, monkeypatch):
    main([*words, "whole"])
    step = Classification.training_step

    def die(self, batch, batch_idx):
        if self.global_step == 8:
            raise ConnectionAbortedError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", die)
    with pytest.raises(ConnectionAbortedError):
        main([*words, "cut"])
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["internimage"])
    last = tmp_path / "runs" / "cut" / "version_0" / "checkpoints" / "last.ckpt"
    main([*words, "cut", "--ckpt_path", str(last)])
    check_same(tmp_path / "runs" / "whole" / "version_0", tmp_path / "runs" / "cut" / "version_1")


@pytest.mark.slow
def test_killed_process_is_resumed_by_another(words, tmp_path):
    command = [sys.executable, "-m", "tasks.cli", *words]
    subprocess.run([*command, "whole"], check=True)
    last = tmp_path / "runs" / "cut" / "version_0" / "checkpoints" / "last.ckpt"
    with subprocess.Popen([*command, "cut"]) as process:
        while not last.exists() and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    if torch.load(last, weights_only=True)["global_step"] != 5:
        pytest.skip("the run was too quick to be killed after its first checkpoint")
    subprocess.run([*command, "cut", "--ckpt_path", str(last)], check=True)
    check_same(tmp_path / "runs" / "whole" / "version_0", tmp_path / "runs" / "cut" / "version_1")
