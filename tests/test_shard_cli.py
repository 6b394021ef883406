"""Shards by the command: fit, resume, accumulation and limits, validate and predict."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shard_files import NAMES, square, write_pairs
from torch import Tensor

from tasks import Classification
from tasks.cli import main

# Everything random that there is: order, crops, mixup and cutmix, drop path. Epochs have 6 batches, checkpoints come
# every 5 steps, so the resumed run starts inside an epoch.
CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 14,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "tasks.Classification",
        "init_args": {
            "backbone": {"class_path": "internimage.internimage_debug", "init_args": {"drop_path_rate": 0.3}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
            "warmup_steps": 4,
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
        },
    },
    "data": {
        "class_path": "datamodules.ImageLabelShards",
        "init_args": {
            "num_classes": 4,
            "train": {"urls": "train"},
            "val": {"urls": "val"},
            "image_size": 32,
            "batch_size": 8,
            "num_workers": 0,
            "shuffling": {"lanes": 4, "window_shards": 2},
        },
    },
    "checkpoint_last": {"every_n_train_steps": 5},
}
PAIRS: dict[str, Any] = {
    "trainer": CONFIG["trainer"] | {"max_steps": 3},
    "model": {
        "class_path": "tasks.Pretraining",
        "init_args": {
            "backbone": {"class_path": "internimage.internimage_debug"},
            "head": {
                "class_path": "internimage.ClipProjectorHead",
                "init_args": {"hidden_dim": 32, "embed_dim": 16, "num_heads": 2},
            },
            "text": {
                "class_path": "tasks.pretraining.ClipText",
                "init_args": {"width": 16, "num_layers": 1, "num_heads": 2, "context_length": 12},
            },
            "objective": {"class_path": "tasks.pretraining.Clip"},
            "embed_dim": 16,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        },
    },
    "data": {
        "class_path": "datamodules.ImageTextShards",
        "init_args": {
            "train": [{"urls": "train", "weight": 3.0}, {"urls": "few", "weight": 1.0}],
            "val": [{"urls": "val"}, {"urls": "other"}],
            "tokenizer": {
                "class_path": "datamodules.webdataset.text.ClipTokenizer",
                "init_args": {"context_length": 12},
            },
            "class_names": NAMES,
            "image_size": 32,
            "batch_size": 8,
            "num_workers": 0,
        },
    },
}
# Of processes that start in another folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
# Counted since the start of the process, or of time.
OF_PROCESS = "data/"


@pytest.fixture(autouse=True)
def in_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    write_pairs(Path("train"), num_shards=6, per_shard=9)
    write_pairs(Path("val"), num_shards=2, per_shard=11, first=500)
    Path("shards.yaml").write_text(yaml.safe_dump(CONFIG))


def command(name: str, *words: str) -> Any:
    return main([name, "-c", "shards.yaml", *words])


def metrics(folder: str) -> dict[tuple[str, int], str]:
    """What a run logged, as text: (key, step) -> value."""
    with (Path("runs") / folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        (key, int(row["step"])): value
        for row in rows
        for key, value in row.items()
        if value and key != "step" and not key.startswith(OF_PROCESS)
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of each training batch."""
    found: list[Tensor] = []
    step = Classification.training_step

    def noting(self: Classification, batch: Any, batch_idx: int) -> Tensor:
        found.append(batch["image"].clone())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", noting)
    return found


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    command("fit", "--name", "whole")
    step = Classification.training_step

    def die(self: Classification, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 8:
            raise ConnectionAbortedError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "training_step", die)
        with pytest.raises(ConnectionAbortedError):
            command("fit", "--name", "cut", "--data.num_workers", "1")
    command("fit", "--name", "cut", "--ckpt_path", "runs/cut/version_0/checkpoints/last.ckpt")
    expected = {place: value for place, value in metrics("whole/version_0").items() if place[1] >= 5}
    assert {("train/loss", 5), ("val/loss", 5), ("val/top1", 11), ("train/loss", 13)} <= expected.keys()
    assert metrics("cut/version_1") == expected
    a, b = (
        torch.load(f"runs/{run}/checkpoints/last.ckpt", weights_only=True)
        for run in ("whole/version_0", "cut/version_1")
    )
    assert a["global_step"] == b["global_step"] == 14
    assert all(torch.equal(tensor, b["state_dict"][name]) for name, tensor in a["state_dict"].items())


def test_accumulated_steps_have_the_images_of_whole_ones(seen: list[Tensor]) -> None:
    command("fit", "--trainer.max_steps", "4", "--data.batch_size", "12")
    whole = [image.clone() for image in seen]
    seen.clear()
    words = ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", "4"]
    command("fit", *words)
    assert len(seen) == 12
    for step, images in enumerate(whole):
        assert torch.cat(seen[3 * step : 3 * step + 3]).equal(images)


def test_a_limit_of_batches_makes_short_epochs_of_the_same_stream(seen: list[Tensor]) -> None:
    command("fit", "--trainer.max_steps", "8", "--name", "long")
    stream = [image.clone() for image in seen]
    seen.clear()
    command("fit", "--trainer.max_steps", "8", "--trainer.limit_train_batches", "3", "--name", "short")
    assert len(seen) == 8
    assert all(one.equal(other) for one, other in zip(seen, stream, strict=True))
    assert [step for key, step in metrics("short/version_0") if key == "val/top1"] == [2, 5]


def test_overfitting_takes_the_same_batches_again(seen: list[Tensor]) -> None:
    command("fit", "--trainer.max_steps", "6", "--trainer.overfit_batches", "2")
    assert len(seen) == 6
    assert not seen[0].equal(seen[1])
    assert all(seen[step].equal(seen[step % 2]) for step in range(6))


def test_validate_counts_each_good_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    command("fit", "--trainer.max_steps", "5", "--name", "trained")
    write_pairs(Path("other"), num_shards=3, per_shard=7, first=700, changed={705: {"jpg": square(705)[:200]}})
    labels: list[int] = []
    evaluate = Classification.validation_step

    def noting(self: Classification, batch: Any, batch_idx: int) -> None:
        labels.extend(batch["label"][batch["valid"]].tolist())
        evaluate(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "validation_step", noting)
    checkpoint = ["--ckpt_path", "runs/trained/version_0/checkpoints/last.ckpt"]
    with pytest.warns(UserWarning, match="1 of 21 samples of other are bad and left out"):
        cli = command("validate", *checkpoint, "--data.val.urls", "other")
    # Their labels are their numbers modulo 4; they come in order.
    assert labels == [number % 4 for number in range(700, 721) if number != 705]
    top1 = cli.trainer.callback_metrics["val/top1"].item()
    # A count of 20 in float32.
    assert top1 * 20 == pytest.approx(round(top1 * 20), abs=1e-5)


def predicted(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


def test_predict_names_the_samples_of_shards_and_the_files_of_folders() -> None:
    command("fit", "--trainer.max_steps", "5", "--name", "trained")
    checkpoint = ["--ckpt_path", "runs/trained/version_0/checkpoints/last.ckpt"]
    command("predict", *checkpoint, "--output", "of_shards")
    of_shards = predicted("of_shards")
    names = [
        f"{Path('val').absolute()}/{shard:05}.tar/{500 + 11 * shard + i:06}" for shard in (0, 1) for i in range(11)
    ]
    assert [line["path"] for line in of_shards] == names
    Path("images").mkdir()
    for number in (503, 517):
        Path(f"images/{number}.jpg").write_bytes(square(number))
    command("predict", *checkpoint, "--output", "of_files", "--images", "images")
    of_files = predicted("of_files")
    assert [line["path"] for line in of_files] == ["images/503.jpg", "images/517.jpg"]
    for line, number in zip(of_files, (503, 517), strict=True):
        same = of_shards[number - 500]
        assert line["labels"] == same["labels"]
        # Rounding in a batch of another size.
        assert line["probabilities"] == pytest.approx(same["probabilities"], rel=1e-4)


def test_several_sources_are_mixed_in_training_and_evaluated_each_for_itself() -> None:
    write_pairs(Path("few"), num_shards=1, per_shard=4, first=900)
    write_pairs(Path("other"), num_shards=3, per_shard=7, first=700)
    Path("shards.yaml").write_text(yaml.safe_dump(PAIRS))
    cli = command("fit", "--name", "trained", "--trainer.check_val_every_n_epoch", "1")
    logged = cli.trainer.callback_metrics
    # Of 3 steps of 8 samples; 6 and 2 of each.
    assert (logged["data/samples/train"], logged["data/samples/few"]) == (18, 6)
    checkpoint = ["--ckpt_path", "runs/trained/version_0/checkpoints/last.ckpt"]
    both = command("validate", *checkpoint).trainer.callback_metrics
    for number, source in enumerate(("val", "other")):
        alone = command("validate", *checkpoint, "--data.val", json.dumps({"urls": source})).trainer.callback_metrics
        assert {"val/retrieval_r1", "val/zero_shot_top1"} <= alone.keys()
        ending = f"/dataloader_{number}" if number else ""
        assert all(both[name + ending] == value for name, value in alone.items())
        assert len(both) == 2 * len(alone)


@pytest.mark.slow
def test_two_processes_predict_what_one_does_in_the_order_of_the_shards() -> None:
    command("fit", "--trainer.max_steps", "5", "--name", "trained")
    options = ["-c", "shards.yaml", "--ckpt_path", "runs/trained/version_0/checkpoints/last.ckpt"]
    for devices in ("1", "2"):
        words = [*options, "--output", devices, "--trainer.devices", devices, "--trainer.strategy", "ddp"]
        # 22 samples: ranks of 11, in batches of 8 and 3.
        subprocess.run([sys.executable, "-m", "tasks.cli", "predict", *words], check=True, timeout=300, env=ENVIRONMENT)
    one, two = predicted("1"), predicted("2")
    assert [line["path"] for line in two] == [line["path"] for line in one]
    assert len({line["path"] for line in two}) == 22
    for mine, theirs in zip(two, one, strict=True):
        assert mine["labels"] == theirs["labels"]
        # Rounding in a batch of another size.
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-4)
