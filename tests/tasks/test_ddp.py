"""Two processes count what one counts: every validation sample once, also where one has fewer batches."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "debug" / "classification.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [17, 23])  # shares of 9 + 8 and 12 + 11: 2 + 1 batches of 8, and 2 + 2
def test_two_uneven_ranks_equal_one(tmp_path, num_samples):
    def validate(devices: int) -> dict[str, float]:
        # The training steps make the ranks' batch-norm statistics differ; validation must still be of one model.
        words = ["fit", "-c", str(EXPERIMENT), "--name", str(devices), "--trainer.default_root_dir", str(tmp_path)]
        words += ["--trainer.max_steps", "4", "--trainer.check_val_every_n_epoch", "1", "--data.batch_size", "8"]
        words += ["--data.num_val_samples", str(num_samples), "--trainer.devices", str(devices)]
        words += ["--trainer.enable_progress_bar", "false", "--trainer.strategy", "ddp"]
        run = tmp_path / str(devices) / "version_0"
        subprocess.run([sys.executable, "-m", "tasks.cli", *words], check=True, timeout=300)
        with (run / "metrics.csv").open() as file:
            (row,) = (row for row in csv.DictReader(file) if row["val/top1"])
        checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
        again = ["validate", "-c", str(run / "config.yaml"), *checkpoint, "--trainer.devices", "1"]
        again += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(run / "again")]
        subprocess.run([sys.executable, "-m", "tasks.cli", *again], check=True, timeout=300)
        with next((run / "again").rglob("metrics.csv")).open() as file:
            (alone,) = csv.DictReader(file)
        return {key: (float(row[key]), float(alone[key])) for key in ("val/top1", "val/top5", "val/loss")}

    for key, (together, alone) in validate(2).items():
        # Counts are exact; the loss adds the same float32 numbers in another order.
        assert together == pytest.approx(alone, rel=1e-5 if key == "val/loss" else 0), key
