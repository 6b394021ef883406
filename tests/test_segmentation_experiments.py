"""The recipes of the published segmentors against the optimizer settings of the authors' configs."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import golden
import pytest
import torch
import yaml
from checkpoint_files import hollow, saved

import internimage
from datamodules.segmentation.layouts import known_layout
from internimage.hub import published
from tasks import segmentation
from tasks.cli import main
from tasks.segmentation.checkpoints import load_segmentor

ROOT = Path(__file__).parents[1]
STREETS = "512x1024_160k"
CONFIGS = {
    **{
        f"ade20k/internimage_{size}_upernet": f"ade20k__upernet_internimage_{size}_{pixels}_160k_ade20k"
        for size, pixels in {"t": 512, "s": 512, "b": 512, "l": 640, "xl": 640, "h": 896, "g": 896}.items()
    },
    "ade20k/internimage_h_mask2former": "ade20k__mask2former_internimage_h_896_80k_cocostuff2ade20k_ss",
    "ade20k/internimage_h_mask2former_ms": "ade20k__mask2former_internimage_h_896_80k_cocostuff2ade20k_ms",
    **{
        f"cityscapes/internimage_{size}_upernet": f"cityscapes__upernet_internimage_{size}_{STREETS}_cityscapes"
        for size in ("t", "s", "b", "l", "xl")
    },
    **{
        f"cityscapes/internimage_{size}_{ours}": f"cityscapes__{head}_internimage_{size}_{STREETS}_mapillary2cityscapes"
        for size in ("l", "xl")
        for ours, head in {"upernet_mapillary": "upernet", "segformer": "segformer"}.items()
    },
    "cityscapes/internimage_h_mask2former": (
        "cityscapes__mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes"
    ),
    **{
        f"mapillary/internimage_{size}_{head}": f"mapillary__{head}_internimage_{size}_512x1024_80k_mapillary"
        for size in ("l", "xl")
        for head in ("upernet", "segformer")
    },
    "mapillary/internimage_h_mask2former": "mapillary__mask2former_internimage_h_896x896_80k_mapillary",
    "cocostuff/internimage_h_mask2former_164k": "coco_stuff164k__mask2former_internimage_h_896_80k_cocostuff164k",
    "cocostuff/internimage_h_mask2former_10k": (
        "coco_stuff10k__mask2former_internimage_h_512_40k_cocostuff164k_to_10k"
    ),
    "nyu/internimage_h_mask2former": "nyu_depth_v2__mask2former_internimage_h_480_40k_nyu",
    "pascal_context/internimage_h_mask2former_59": (
        "pascal_context__mask2former_internimage_h_480_40k_pascal_context_59"
    ),
}
HEADS = {"upernet": "UPerNet", "segformer": "SegFormer", "mask2former": "Mask2Former"}
# Evaluated by sliding windows of the size of the crops, 512 pixels apart.
SLIDING = ("cityscapes/internimage_h_mask2former", "mapillary/internimage_h_mask2former")
# In the names of the configs: crops are squares of such a side, or 512 x 1024.
SQUARE = re.compile(r"_(\d+)(?:x\1)?_\d+k_")


def parse(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    output = capsys.readouterr()
    assert not stop.value.code, output.err
    return yaml.safe_load(output.out)


def test_every_config_has_a_recipe():
    files = {path.name.removeprefix("seg_").split(".")[0] for path in (golden.FOLDER / "optim").glob("seg_*")}
    assert len(CONFIGS) == 28
    assert set(CONFIGS.values()) == files


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_the_authors(name, capsys, monkeypatch):
    first, second = (ROOT / "experiments" / f"{name}.yaml").read_text().splitlines()[:2]
    weights = published().get(CONFIGS[name].partition("__")[2].removesuffix("_ss"))
    # The list has results of a single scale.
    number = "62.9" if name.endswith("_ms") else weights and weights.result
    assert f". Published: {f'{number} mIoU' if number else 'no number'}" in first
    config = parse(shlex.split(second.removeprefix("# internimage ")), capsys, monkeypatch)
    with gzip.open(golden.FOLDER / "optim" / f"seg_{CONFIGS[name]}.json.gz") as file:
        authors = json.load(file)
    model, trainer, data = config["model"]["init_args"], config["trainer"], config["data"]["init_args"]
    optimizer, schedule = model["optimizer"]["init_args"], model["schedule"]["init_args"]
    assert optimizer["lr"] == authors["optimizer"]["lr"]
    assert optimizer["weight_decay"] == authors["optimizer"]["weight_decay"]
    assert list(optimizer["betas"]) == authors["optimizer"]["betas"]
    assert model["layer_decay"] == authors["paramwise"]["layer_decay_rate"]
    assert model["schedule"]["class_path"].endswith("Poly")
    assert schedule["power"] == authors["lr_config"]["power"]
    assert schedule["min_lr_ratio"] == authors["lr_config"]["min_lr"] == 0
    assert model["warmup_steps"] == authors["lr_config"]["warmup_iters"]
    assert model["warmup_lr_ratio"] == authors["lr_config"]["warmup_ratio"]
    clip = authors["optimizer_config"].get("grad_clip")
    assert trainer["gradient_clip_val"] == (clip["max_norm"] if clip else None)
    # Length, head and crop are in the names of the authors' configs.
    thousands = re.search(r"_(\d+)k_", CONFIGS[name])
    assert trainer["max_steps"] == 1000 * int(thousands[1])
    head = next(head for head in HEADS if f"__{head}_" in CONFIGS[name])
    assert model["segmentor"]["class_path"].endswith(f".{HEADS[head]}")
    square = SQUARE.search(CONFIGS[name])
    crop = [int(square[1])] * 2 if square else [512, 1024]
    assert data["train_transform"]["crop"] == crop
    stride = {"crop": crop, "stride": [512, 512], "device": None}
    assert model["window"] == (stride if name in SLIDING else None)


def keys_of(source):
    """Return the name of the stored keys of a published file."""
    name = source.removeprefix("hub:")
    found = [path.name.split(".")[0] for path in (golden.FOLDER / "keys").glob(f"seg_*__{name}.json.gz")]
    return found[0] if found else re.fullmatch(r"internimage_([a-z]+)_\w+", name)[1].upper()


# Other recipes start one of the same segmentors from the same file.
@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if not re.fullmatch(r"cityscapes/internimage_\w+_upernet|.*_ms", name)]
)
def test_the_weights_that_a_recipe_starts_from_fit_its_segmentor(name, tmp_path, monkeypatch):
    config = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    init, options = model["init_checkpoint"], model["segmentor"].get("init_args", {})
    num_classes = data.get("num_classes") or len(known_layout(data["dataset"]).class_names)
    backbone, kind = (model[part]["class_path"].rpartition(".")[2] for part in ("backbone", "segmentor"))
    with torch.device("meta"):
        built = getattr(internimage, backbone)(**model["backbone"]["init_args"])
        segmentor = getattr(segmentation, kind)(built, num_classes, **options)
    # Full size without its gigabytes.
    monkeypatch.setattr("internimage.loading._copy", lambda model, values, complete: None)
    assert init["source"].removeprefix("hub:") in published()
    keys = keys_of(init["source"])
    path = saved(tmp_path / "weights.pth", {"state_dict": hollow(keys)})
    report = load_segmentor(segmentor, path, head=init.get("head", "load"))
    reasons = set(report.missing.values())
    if not keys.startswith("seg_"):
        assert reasons <= {"the file has no segmentor", "the file has no layer scale, and 1 is none"}
        assert sum(key.startswith("backbone.") for key in report.taken) > 400
    else:
        assert reasons == ({"head='new'"} if "head" in init else set())
