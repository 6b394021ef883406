import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tasks.cli import main

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "experiments").rglob("*.yaml")
    if path.parent.name != "clusters"
)
CLUSTERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments" / "clusters").glob("*.yaml"))
DEBUG = [path for path in EXPERIMENTS if "/debug/" in path]
# Training images, by folder: ILSVRC 2012, the fall 2011 release of ImageNet, iNaturalist 2018.
NUM_IMAGES = {"imagenet1k": 1_281_167, "imagenet22k": 14_197_122, "inaturalist2018": 437_513}
PUBLISHED = {
    "imagenet1k/internimage_t_224": 83.5,
    "imagenet1k/internimage_s_224": 84.2,
    "imagenet1k/internimage_b_224": 84.9,
    "imagenet1k/internimage_l_384": 87.7,
    "imagenet1k/internimage_xl_384": 88.0,
    "imagenet1k/internimage_h_640": 89.6,
    "imagenet1k/internimage_g_512": 90.1,
    "inaturalist2018/internimage_h_384": 92.6,
}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["internimage"])


def parse(words, capsys):
    """The whole configuration that a command leads to, with every default."""
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    output = capsys.readouterr()
    assert not stop.value.code, output.err
    return yaml.safe_load(output.out)


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_experiment_parses_by_the_command_on_its_second_line(path, capsys):
    first, second = (ROOT / path).read_text().splitlines()[:2]
    assert re.search(r"Expected: |Published: ", first)
    command, *words = shlex.split(second.removeprefix("# "))
    assert command == "internimage"
    assert words[:3] == ["fit", "-c", path]
    config = parse(words, capsys)
    trainer, data = config["trainer"], config["data"]["init_args"]
    assert trainer["max_steps"] > 0
    stated = re.search(r"Global batch (\d+)", first)
    batch = config["global_batch_size"]
    assert stated is None or int(stated[1]) == batch
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else 1
    assert batch == devices * trainer["num_nodes"] * trainer["accumulate_grad_batches"] * data["batch_size"]


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path.split("/")[1] in NUM_IMAGES])
def test_published_recipe_is_consistent(path, capsys):
    config = parse(["fit", "-c", path], capsys)
    name = path.removeprefix("experiments/").removesuffix(".yaml")
    first, _, *rest = (ROOT / path).read_text().splitlines()
    assert f"Published: {PUBLISHED[name]} top-1" in first if name in PUBLISHED else "Published: none" in first
    # Whole batches only, so an epoch has the floor of the quotient.
    steps_per_epoch = NUM_IMAGES[path.split("/")[1]] // config["global_batch_size"]
    epochs = int(re.search(r"(\d+) epochs", first)[1])
    warmup = re.search(r"epochs?, (\d+) of them warm-up", " ".join(rest))
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert config["trainer"]["max_steps"] == epochs * steps_per_epoch
    assert model["warmup_steps"] == (int(warmup[1]) if warmup else 0) * steps_per_epoch
    assert f"{data['image_size']} px" in first
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.05
    # RandAugment stays on in fine-tuning, erasing does not.
    transform = data["train_transform"]
    if "class_path" in transform:  # of shards, around that of image folders
        transform = transform["init_args"]["transform"]
    assert transform["rand_augment"] == "rand-m9-mstd0.5-inc1"
    assert transform["erasing"] == (0.25 if model["mixup_alpha"] else 0.0)


@pytest.mark.parametrize("path", CLUSTERS)
def test_overlay_changes_hardware_only(path, capsys):
    overlay = yaml.safe_load((ROOT / path).read_text())
    assert overlay.keys() == {"trainer"}
    assert overlay["trainer"].keys() <= {"accelerator", "devices", "num_nodes", "strategy", "precision"}
    config = parse(["fit", "-c", DEBUG[0], "-c", path], capsys)
    assert config["trainer"]["devices"] == overlay["trainer"]["devices"]


def test_readme_has_a_row_for_each_experiment():
    rows = re.findall(r"^\| `([^`]+\.yaml)`", (ROOT / "experiments" / "README.md").read_text(), re.MULTILINE)
    assert sorted(f"experiments/{row}" for row in rows) == EXPERIMENTS


@pytest.mark.parametrize("path", DEBUG)
def test_debug_experiment_reaches_its_number(path, tmp_path):
    cli = main(["fit", "-c", path, "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar=false"])
    metric, expected = re.search(r"Expected: (val/\w+) ([\d.]+)", (ROOT / path).read_text()).groups()
    assert cli.trainer.callback_metrics[metric] >= float(expected)
