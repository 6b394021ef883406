"""Pretraining by the command, with a datamodule from outside the project."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy_pairs import ToyPairs

from tasks.cli import main

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
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
                "init_args": {"width": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32, "context_length": 8},
            },
            "objective": {"class_path": "tasks.pretraining.Clip", "init_args": {"label_smoothing": 0.1}},
            "embed_dim": 16,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        },
    },
    "data": {"class_path": "toy_pairs.ToyPairs", "init_args": {"num_samples": 6, "batch_size": 4}},
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    Path("toy.yaml").write_text(yaml.safe_dump(CONFIG))


def command(name, *words):
    return main([name, "-c", "toy.yaml", *words])


def test_pairs_without_classes_are_fitted_validated_and_embedded():
    cli = command("fit")
    assert cli.model.num_classes is None
    checkpoints = Path("runs/toy/version_0/checkpoints")
    assert {path.name for path in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    with Path("runs/toy/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {"train/loss", "train/contrastive", "train/scale", "val/retrieval_r1", "val/image_to_text_r5"}
    assert expected <= rows[0].keys()
    assert not any("zero_shot" in name for name in rows[0])

    best = f"--ckpt_path={checkpoints / 'last.ckpt'}"
    command("validate", best)
    cli = command("predict", best, "--output=out")
    with np.load("out/embeddings_00000_00000.npz") as file:
        assert file["key"].tolist() == [f"pair/{number}" for number in range(6)]  # without the filling
        image, text = torch.from_numpy(file["image"]), torch.from_numpy(file["text"])
    pairs = ToyPairs(num_samples=6).pairs
    model = cli.model.eval()
    with torch.no_grad():
        vectors = model(torch.stack([pair["image"] for pair in pairs]))
        length = torch.tensor([pair["text_length"] for pair in pairs])
        texts = model.towers.encode_text(torch.stack([pair["text"] for pair in pairs]), length)
    # Float32 of batches of another size.
    torch.testing.assert_close(image, vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, texts, rtol=1e-4, atol=1e-5)


def test_classes_come_from_the_data():
    cli = command("validate", "--data.num_classes=3")
    assert cli.model.num_classes == 3
    metrics = cli.trainer.callback_metrics
    data = cli.datamodule
    ids, length = data.class_prompts
    with torch.no_grad():
        model = cli.model.eval()
        images = model(torch.stack([pair["image"] for pair in data.pairs]))
        classes = torch.stack([model.towers.encode_text(*each).mean(0) for each in zip(ids, length, strict=True)])
    best = (images @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(1)
    right = (best == torch.tensor([pair["label"] for pair in data.pairs])).float().mean()
    assert metrics["val/zero_shot_top1"].item() == pytest.approx(right.item())
    assert metrics["val/zero_shot_top5"] == 1  # three classes
    assert "val/retrieval_r1" in metrics


def test_embeddings_are_split_over_files(tmp_path):
    from tasks.pretraining.embeddings import EmbeddingWriter

    writer, trainer = EmbeddingWriter(tmp_path / "out", num_rows=3), type("Run", (), {"global_rank": 2})()
    for start in range(0, 8, 2):
        image = torch.arange(start, start + 2)[:, None].float()
        prediction = {"key": [f"{start}", f"{start + 1}"], "image": image}
        if start == 6:
            prediction["text"] = image  # from another loader
        writer.write_on_batch_end(trainer, None, prediction, None, {}, 0, 0)
    writer.on_predict_epoch_end(trainer, None)
    files = {path.name: dict(np.load(path)) for path in sorted((tmp_path / "out").iterdir())}
    assert [*files] == [f"embeddings_00002_0000{part}.npz" for part in range(3)]
    assert [file["key"].tolist() for file in files.values()] == [["0", "1", "2", "3"], ["4", "5"], ["6", "7"]]
    assert ["text" in file for file in files.values()] == [False, False, True]
