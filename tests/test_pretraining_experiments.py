"""The stages of pretraining: each recipe builds, and starts from the weights that the one before leaves."""

import json
import shlex
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import saved
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor, nn

from datamodules.webdataset.sources import Shards
from datamodules.webdataset.synthetic import COLOURS, write_pairs
from internimage import ClipProjectorHead
from internimage.checkpoints import Report, load_checkpoint
from tasks import Pretraining
from tasks.base import InitCheckpoint, Task
from tasks.cli import main

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
# Stages in their order, from data to data.
CHAINS = {
    size: [
        f"pretrain_427m/internimage_{size}_m3i",
        f"imagenet22k/internimage_{size}_192",
        f"imagenet22k/internimage_{size}_192to384",
        f"imagenet1k/internimage_{size}_{pixels}",
    ]
    for size, pixels in {"h": 224, "g": 512}.items()
}
JOINT = [f"pretrain_427m/internimage_{name}" for name in ("h_clip", "h_siglip", "h_m3i", "g_m3i")]
TUXPAINT = ["tuxpaint/clip", "tuxpaint/m3i"]
# Parameters of the backbones without their heads, in millions: those of `tests/golden/keys` less the classifiers'.
MILLIONS = {"h": 1073, "g": 3053}
NEW_HEAD = {"head.fc.weight", "head.fc.bias"}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Relative paths of the recipes lead here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    Path("data/imagenet1k").mkdir(parents=True)
    Path("data/imagenet1k/class_names.txt").write_text("\n".join(COLOURS))
    Path("data/tuxpaint").mkdir()
    Path("data/tuxpaint/classes.json").write_text(json.dumps(list(COLOURS)))


def recipe(name: str) -> dict[str, Any]:
    """Return what the YAML says."""
    return yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())


def built(name: str) -> tuple[Task, LightningDataModule]:
    """Build task and data of a recipe as the command does, on the meta device."""
    options = recipe(name)
    parser = ArgumentParser()
    parser.add_argument("--model", type=Task)
    parser.add_argument("--data", type=LightningDataModule)
    parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
    with torch.device("meta"):
        parts = parser.instantiate(parser.parse_object({key: options[key] for key in ("model", "data")}))
    return parts.model, parts.data


def weights_file(path: Path, task: nn.Module) -> Path:
    """Write a checkpoint with the keys and shapes of a task, each tensor one number, expanded."""
    return saved(path, {"state_dict": {key: torch.zeros(()).expand(x.shape) for key, x in task.state_dict().items()}})


@pytest.mark.parametrize("name", [*JOINT, *TUXPAINT])
def test_objective_text_and_data_go_together(name):
    task, data = built(name)
    assert isinstance(task, Pretraining)
    assert task.towers.text.context_length == data.tokenizer.context_length
    assert data.train_transform.build(data.image_size).num_views == task.objective.num_views
    assert isinstance(task.towers.head, ClipProjectorHead)
    # Where the data has classes, their names are prompts.
    assert (data.class_prompts is None) == (data.num_classes is None)
    if data.class_prompts is not None:
        ids, length = data.class_prompts
        assert ids.shape[:2] == length.shape
        assert len(ids) == data.num_classes


@pytest.mark.parametrize("name", JOINT)
def test_joint_recipe_is_the_plan(name):
    config = recipe(name)
    model, batch = config["model"]["init_args"], config["global_batch_size"]
    assert batch == 16_384
    # To the thousand: the number of pairs is not known more exactly.
    assert config["trainer"]["max_steps"] == round(30 * 427e6 / batch, -3)
    optimizer = model["optimizer"]["init_args"]
    assert optimizer["lr"] == 1e-3 * (batch / 4096) ** 0.5
    assert optimizer["betas"] == [0.9, 0.95]
    # Contrastive terms compare what a step has, so nothing is accumulated.
    assert "accumulate_grad_batches" not in config["trainer"]
    assert [source["name"] for source in config["data"]["init_args"]["train"]] == ["laion400m", "yfcc15m", "cc12m"]


@pytest.mark.parametrize("size", CHAINS)
def test_each_stage_names_the_run_before_it(size):
    for before, after in pairwise(CHAINS[size]):
        init = recipe(after)["model"]["init_args"]["init_checkpoint"]
        if not init["source"].startswith("hub:"):
            assert init["source"].startswith(f"runs/{Path(before).name}/version_0/checkpoints/")
        _, command = (EXPERIMENTS / f"{after}.yaml").read_text().splitlines()[:2]
        assert shlex.split(command)[4] == f"experiments/{after}.yaml"  # which names the run


@pytest.mark.parametrize("name", JOINT)
def test_weights_of_the_joint_stage_fit_the_classifier_of_22k(name, tmp_path, monkeypatch):
    # Full size without its gigabytes.
    monkeypatch.setattr("internimage.loading._copy", lambda model, values, complete: None)
    task, _ = built(name)
    size = name.partition("internimage_")[2][0]
    assert sum(x.numel() for x in task.backbone.parameters()) == pytest.approx(MILLIONS[size] * 1e6, rel=1e-3)
    classifier, _ = built(CHAINS[size][1])
    init = classifier.init_checkpoint
    report = load_checkpoint(classifier.model, weights_file(tmp_path / "joint.ckpt", task), head=init.head)
    assert report.missing.keys() == NEW_HEAD
    assert report.taken.keys() == classifier.model.state_dict().keys() - NEW_HEAD
    assert not report.unexpected


@pytest.mark.parametrize("size", CHAINS)
def test_weights_of_each_later_stage_fit_the_next(size, tmp_path, monkeypatch):
    monkeypatch.setattr("internimage.loading._copy", lambda model, values, complete: None)
    tasks = [built(name)[0] for name in CHAINS[size][1:]]
    label_map = tmp_path / "map.txt"
    label_map.write_text("\n".join(str(20 * row) for row in range(1000)))
    for before, after in pairwise(tasks):
        head = after.init_checkpoint.head
        path = weights_file(tmp_path / "before.ckpt", before)
        report = load_checkpoint(after.model, path, head=head, label_map=label_map if head == "map" else None)
        assert report.taken.keys() == after.model.state_dict().keys()
        assert not report.missing


# What makes the recipes small. Three classes of the last stage are these of the one before.
ROWS = (4, 0, 2)
TINY: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "accumulate_grad_batches": 1,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "model": {
        "init_args": {
            "backbone": {"class_path": "internimage.internimage_debug", "init_args": {"drop_path_rate": 0.1}},
            "head": {
                "class_path": "internimage.ClipProjectorHead",
                "init_args": {"hidden_dim": 32, "embed_dim": 16, "num_heads": 2},
            },
            "warmup_steps": 1,
        }
    },
    "data": {"init_args": {"batch_size": 8, "num_workers": 0}},
}
TINY_TEXT = {"width": 16, "num_layers": 1, "num_heads": 2, "context_length": 12}
TINY_OBJECTIVES: dict[str, dict[str, Any]] = {
    "h_clip": {},
    "h_m3i": {"category_weight": 0.0, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}


def write_data() -> None:
    """Write tiny data where the recipes of H look for it: shapes of six colours, and folders of three classes."""
    for number, name in enumerate(["laion400m", "yfcc15m", "cc12m", "pairs_val", "imagenet1k_val"]):
        write_pairs(Path("data") / name, 24, first=24 * number)
        Shards(urls=f"data/{name}").prepare()
    write_pairs(Path("data/imagenet22k/train"), 48)
    write_pairs(Path("data/imagenet22k/val"), 24, first=48)
    Path("data/imagenet22k/map22kto1k.txt").write_text("".join(f"{row}\n" for row in ROWS))
    for split in ("train", "val"):
        for label in range(len(ROWS)):
            folder = Path("data/imagenet1k") / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (70, 70), (80 * label, 20 * number, 90)).save(folder / f"{number}.png")


class Start:
    """How a run started: what it was built with, what it loaded, what it had before its first step, and at its end."""

    fresh: dict[str, Tensor]
    report: Report
    weights: dict[str, Tensor]
    after: dict[str, Tensor]


def fit(name: str, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], data: dict[str, Any]) -> Start:
    """Run a recipe, small, by the command, and return how it started."""
    changes = {
        "trainer": TINY["trainer"],
        "model": {"init_args": TINY["model"]["init_args"] | model},
        "data": {"init_args": TINY["data"]["init_args"] | data},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(changes))
    start = Start()
    load = Task.load_weights

    def load_and_keep(task: Task, init: InitCheckpoint) -> Report:
        start.fresh = {key: x.clone() for key, x in task.model.state_dict().items()}
        start.report = load(task, init)
        return start.report

    def keep(task: Task) -> None:
        start.weights = {key: x.clone() for key, x in task.model.state_dict().items()}

    with monkeypatch.context() as patch:
        patch.setattr(Task, "load_weights", load_and_keep)
        patch.setattr(Task, "on_train_start", keep, raising=False)
        cli = main(["fit", "-c", str(EXPERIMENTS / f"{name}.yaml"), "-c", "tiny.yaml"])
    assert cli.trainer.global_step == 2
    start.after = {key: x.clone() for key, x in cli.model.model.state_dict().items()}
    return start


def stored(run: str, name: str) -> dict[str, Tensor]:
    """Return the model's weights in the checkpoint of a run."""
    checkpoint = torch.load(Path("runs") / run / "version_0/checkpoints" / name, weights_only=False)
    return {key.removeprefix("model."): x for key, x in checkpoint["state_dict"].items() if key.startswith("model.")}


def assert_loaded(start: Start, before: dict[str, Tensor], keys: Iterable[str]) -> None:
    """Check that a run started with these weights, which were not those that it was built with."""
    stem = "backbone.stem.conv1.weight"
    assert not torch.equal(start.fresh[stem], before[stem])
    for key in keys:
        assert torch.equal(start.weights[key], before[key]), key


@pytest.mark.parametrize("objective", ["h_m3i", pytest.param("h_clip", marks=pytest.mark.slow)])
def test_four_stages_by_the_command_each_from_the_one_before(objective, monkeypatch):
    write_data()
    joint = f"internimage_{objective}"
    model = recipe(f"pretrain_427m/{joint}")["model"]["init_args"]
    start = fit(
        f"pretrain_427m/{joint}",
        monkeypatch,
        model={
            "embed_dim": 16,
            "text": {**model["text"], "init_args": TINY_TEXT},
            "objective": {**model["objective"], "init_args": TINY_OBJECTIVES[objective]},
        },
        data={
            "image_size": 64,
            "tokenizer": {
                "class_path": "datamodules.webdataset.text.ClipTokenizer",
                "init_args": {"context_length": 12},
            },
        },
    )
    before = stored(joint, "last.ckpt")
    assert any(not torch.equal(start.weights[key], x) for key, x in before.items())

    # From images and texts to classes: all but the last layer, and no text tower.
    init = recipe(CHAINS["h"][1])["model"]["init_args"]["init_checkpoint"]
    if objective == "h_clip":
        init["source"] = init["source"].replace("internimage_h_m3i", joint)
    start = fit(CHAINS["h"][1], monkeypatch, {"init_checkpoint": init}, {"num_classes": len(COLOURS), "image_size": 32})
    assert start.report.missing.keys() == NEW_HEAD
    others = [key for key in before if not key.startswith(("backbone.", "head."))]
    assert any(key.startswith("text.") for key in others)
    assert f"model.* (another part, {len(others)} tensors)" in str(start.report)
    assert "missing: head.fc.weight, head.fc.bias (head='new')" in str(start.report)
    assert start.report.taken.keys() == start.weights.keys() - NEW_HEAD
    assert_loaded(start, before, start.report.taken)
    for key in NEW_HEAD:
        assert torch.equal(start.weights[key], start.fresh[key])
    assert start.weights["head.fc.weight"].shape == (len(COLOURS), 16)

    # To larger images: everything.
    before = stored("internimage_h_192", "best.ckpt")
    start = fit(CHAINS["h"][2], monkeypatch, {}, {"num_classes": len(COLOURS), "image_size": 64})
    assert not start.report.missing
    assert before.keys() == start.weights.keys() == start.report.taken.keys()
    assert_loaded(start, before, before)

    # To the classes of ImageNet-1K: the rows of the last layer that stand for them.
    before = stored("internimage_h_192to384", "best.ckpt")
    start = fit(CHAINS["h"][3], monkeypatch, {}, {"num_classes": len(ROWS), "image_size": 64})
    assert not start.report.missing
    assert start.report.adapted.keys() == NEW_HEAD
    assert_loaded(start, before, before.keys() - NEW_HEAD)
    for key in NEW_HEAD:
        assert torch.equal(start.weights[key], before[key][list(ROWS)])
    # And trained on.
    stem = "backbone.stem.conv1.weight"
    assert not torch.equal(start.after[stem], start.weights[stem])
