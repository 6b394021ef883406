"""Learning rate and weight decay of every parameter of every detector that the authors configured."""

import gzip
import json

import golden
import pytest
import torch
from golden_detectors import backbone_and_detector, backbone_config, num_classes, to_official
from lightning.pytorch import Trainer

from tasks import Detection, Steps

FILES = sorted((golden.FOLDER / "optim").glob("det_*.json.gz"))


def rates(golden_file):
    """The authors' key -> learning rate and weight decay."""
    return {name: list(golden_file["groups"][group][1:3]) for name, group in golden_file["params"].items()}


def without_oversights(expected, name, config, rate, decay):
    """Change the authors' numbers where `layer_lr_scales` says that ours differ."""
    prefixes = ["backbone."]
    if "cbinternimage" in name:
        # Their names of a composite match no layer, so that all of it learns at the full rate. Ours learns like H.
        with gzip.open(golden.FOLDER / "optim" / "det_coco__dino_4scale_internimage_h_objects365_coco_ss.json.gz") as f:
            single = json.load(f)
        scale = {key: single["groups"][group][0] for key, group in single["params"].items()}
        prefixes = ["backbone.cb_modules.0.", "backbone.cb_modules.1."]
        for key in expected:
            for prefix in prefixes:
                plain = key.replace(prefix, "backbone.")
                if key.startswith(prefix) and plain in scale:
                    expected[key][0] = scale[plain] * rate
        # What joins the two backbones at a stage learns like the stage's first block.
        first = [f"backbone.cb_modules.1.levels.{stage}.blocks.0.norm1.0.bias" for stage in range(4)]
        for key in expected:
            for stage in range(4):
                if key.startswith((f"backbone.cb_linears.{stage}.", f"backbone.cb_modules.1.gamma{stage}")):
                    expected[key][0] = expected[first[stage]][0]
    last = config.depths[3] - 1
    for prefix in prefixes:
        for tensor in ("weight", "bias"):
            for position, block in enumerate(config.post_norm_blocks):
                post_norm = f"{prefix}levels.2.post_norms.{position}.0.{tensor}"
                expected[post_norm] = expected[f"{prefix}levels.2.blocks.{block}.norm1.0.{tensor}"]
            if (norm := f"{prefix}levels.3.norm.0.{tensor}") in expected:
                assert decay == 1 or expected[norm][0] < 0.999 * decay * rate  # theirs: the first block of the stage
                expected[norm] = expected[f"{prefix}levels.3.blocks.{last}.norm1.0.{tensor}"]
    return expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.split(".")[0][4:])
def test_every_learning_rate_and_weight_decay_is_the_authors(path):
    with gzip.open(path) as file:
        stored = json.load(file)
    name, settings, recipe = path.name.removesuffix(".json.gz"), stored["paramwise"], stored["optimizer"]
    backbone, detector = backbone_and_detector(name)
    config = backbone_config(name)
    with torch.device("meta"):
        task = Detection(
            backbone(),
            num_classes(name),
            lambda groups: torch.optim.AdamW(groups, lr=recipe["lr"], weight_decay=recipe["weight_decay"]),
            detector=detector,
            layer_decay=settings["layer_decay_rate"],
            sampling_lr_multiplier=settings.get("offset_lr_scale", 1.0),
        )
    task.trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer = task.configure_optimizers()["optimizer"]
    names = {parameter: key for key, parameter in task.model.named_parameters()}
    ours = {
        to_official(name, names[parameter]): [group["initial_lr"], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = without_oversights(rates(stored), name, config, recipe["lr"], settings["layer_decay_rate"])
    assert ours.keys() == expected.keys()
    for key, (lr, weight_decay) in expected.items():
        assert ours[key] == [pytest.approx(lr, rel=1e-9), weight_decay], key
    blocks = sum(config.depths)
    assert len(optimizer.param_groups) <= 2 * (blocks + 2) + 1


def test_schedule_is_constant_between_milestones():
    schedule = Steps(milestones=(8, 11))
    assert [schedule(step, 12) for step in (0, 7, 8, 10, 11, 12)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    for options, message in (
        ({"milestones": (11, 8)}, r"milestones are \[11, 8\], expected rising"),
        ({"milestones": (0,)}, r"milestones are \[0\]"),
        ({"factor": 0.0}, r"factor is 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Steps(**options)
