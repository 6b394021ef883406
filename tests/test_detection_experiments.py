"""The recipes of the published detectors against the optimizer settings of the authors' configs."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import golden
import pytest
import yaml

from tasks.cli import main

ROOT = Path(__file__).parents[1]
# Images with objects: COCO train2017, CrowdHuman.
NUM_IMAGES = {"coco": 117_266, "crowdhuman": 15_000}
CONFIGS = {
    **{
        f"coco/internimage_{size}_mask_rcnn_{length}": f"coco__mask_rcnn_internimage_{size}_fpn_{length}_coco"
        for size in "tsb"
        for length in ("1x", "3x")
    },
    **{
        f"coco/internimage_{size}_cascade_mask_rcnn_{length}": f"coco__cascade_internimage_{size}_fpn_{length}_coco"
        for size in ("l", "xl")
        for length in ("1x", "3x")
    },
    "coco/internimage_t_dino_1x": "coco__dino_4scale_internimage_t_1x_coco_layer_wise_lr",
    "coco/internimage_l_dino_1x": "coco__dino_4scale_internimage_l_1x_coco_layer_wise_lr",
    "coco/internimage_h_dino": "coco__dino_4scale_internimage_h_objects365_coco_ss",
    "coco/internimage_g_dino": "coco__dino_4scale_internimage_g_objects365_coco_ss",
    "coco/cb_internimage_h_dino": "coco__dino_4scale_cbinternimage_h_objects365_coco_ss",
    "lvis/cb_internimage_h_dino_minival": "lvis__dino_4scale_cbinternimage_h_objects365_lvis_minival_ss",
    "lvis/cb_internimage_h_dino_val": "lvis__dino_4scale_cbinternimage_h_objects365_lvis_val_ss",
    "openimages/cb_internimage_h_dino": "openimages__dino_4scale_cbinternimage_h_objects365_openimages_ss",
    "voc/cb_internimage_h_dino_07": "voc__dino_4scale_cbinternimage_h_objects365_voc07",
    "voc/cb_internimage_h_dino_12": "voc__dino_4scale_cbinternimage_h_objects365_voc12",
    "crowdhuman/internimage_xl_cascade_rcnn_3x": "crowd_human__cascade_internimage_xl_fpn_3x_crowd_human",
}
STEPS = {"coco": 20_000, "lvis": 80_000, "openimages": 100_000, "voc": 20_000}


def parse(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    output = capsys.readouterr()
    assert not stop.value.code, output.err
    return yaml.safe_load(output.out)


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_is_the_authors(name, capsys, monkeypatch):
    first, second = (ROOT / "experiments" / f"{name}.yaml").read_text().splitlines()[:2]
    config = parse(shlex.split(second.removeprefix("# internimage ")), capsys, monkeypatch)
    with gzip.open(golden.FOLDER / "optim" / f"det_{CONFIGS[name]}.json.gz") as file:
        authors = json.load(file)
    model, trainer = config["model"]["init_args"], config["trainer"]
    optimizer = model["optimizer"]["init_args"]
    assert optimizer["lr"] == authors["optimizer"]["lr"]
    assert optimizer["weight_decay"] == authors["optimizer"]["weight_decay"]
    assert model["layer_decay"] == authors["paramwise"]["layer_decay_rate"]
    # Only a detector with deformable attention has the offsets that this is the rate of.
    if "dino" in name:
        assert model["sampling_lr_multiplier"] == authors["paramwise"].get("offset_lr_scale", 1.0)
    assert model["warmup_steps"] == authors["lr_config"]["warmup_iters"]
    assert model["warmup_lr_ratio"] == authors["lr_config"]["warmup_ratio"]
    clip = authors["optimizer_config"]["grad_clip"]
    assert trainer["gradient_clip_val"] == (clip["max_norm"] if clip else None)
    epochs = re.search(r"(\d+) epochs", first)
    folder = name.split("/")[0]
    if epochs:
        steps_per_epoch = NUM_IMAGES[folder] // config["global_batch_size"]
        assert trainer["max_steps"] == int(epochs[1]) * steps_per_epoch
        expected = [epoch * steps_per_epoch for epoch in authors["lr_config"]["step"]]
    else:
        assert trainer["max_steps"] == STEPS[folder]
        expected = []
    assert model["schedule"]["init_args"]["milestones"] == expected
