"""Learning rate and weight decay of every parameter of every segmentor that the authors configured."""

import gzip
import json
from dataclasses import replace
from functools import cache

import golden
import pytest
import torch
from lightning.pytorch import Trainer

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.schedules import Cosine, Poly, Steps, with_warmup
from tasks.segmentation import Mask2Former, SegFormer, UPerNet
from tasks.segmentation.keys import segmentor_ours_to_official
from tasks.segmentation.mask2former_keys import mask2former_ours_to_official
from tasks.segmentation.task import Segmentation

FILES = sorted((golden.FOLDER / "optim").glob("seg_*.json.gz"))
SEGMENTORS = {"upernet": UPerNet, "segformer": SegFormer, "mask2former": Mask2Former}


def read(path):
    with gzip.open(path) as file:
        return json.load(file)


@cache
def segmentor(kind, size):
    """A segmentor without memory; it holds no learning rates, so that all recipes can share it."""
    with torch.device("meta"):
        backbone = InternImage(replace(CONFIGS[size], layer_scale=None if size in "HG" else 1.0))
        return SEGMENTORS[kind](backbone, 3)


def build(name, stored):
    """The task of a config, and the map from our names to the authors'."""
    kind = next(kind for kind in SEGMENTORS if kind in name)
    model = segmentor(kind, name.split("internimage_")[1].split("_")[0].upper())
    recipe, settings = stored["optimizer"], stored["paramwise"]
    task = Segmentation(
        model.backbone,
        3,
        lambda groups: torch.optim.AdamW(groups, lr=recipe["lr"], weight_decay=recipe["weight_decay"]),
        segmentor=lambda backbone, num_classes: model,
        layer_decay=settings["layer_decay_rate"],
        sampling_lr_multiplier=settings.get("offset_lr_scale", 1.0),
    )
    rename = mask2former_ours_to_official if kind == "mask2former" else segmentor_ours_to_official
    return task, lambda key: rename(key, model.backbone.config)


def without_oversights(expected, config, rate, decay):
    """Change the authors' numbers where `layer_lr_scales` says that ours differ."""
    last = config.depths[3] - 1
    for tensor in ("weight", "bias"):
        for position, block in enumerate(config.post_norm_blocks):
            post_norm = f"backbone.levels.2.post_norms.{position}.0.{tensor}"
            assert decay == 1 or expected[post_norm][0] != pytest.approx(  # theirs: block `position` of the stage
                expected[f"backbone.levels.2.blocks.{block}.norm1.0.{tensor}"][0]
            )
            expected[post_norm] = expected[f"backbone.levels.2.blocks.{block}.norm1.0.{tensor}"]
        if (norm := f"backbone.levels.3.norm.0.{tensor}") in expected:
            assert decay == 1 or expected[norm][0] < 0.999 * decay * rate  # theirs: the first block of the stage
            expected[norm] = expected[f"backbone.levels.3.blocks.{last}.norm1.0.{tensor}"]
    return expected


def test_every_config_is_there():
    assert len(FILES) == 28


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.split(".")[0][4:])
def test_every_learning_rate_and_weight_decay_is_the_authors(path):
    stored = read(path)
    task, to_official = build(path.name, stored)
    rate, decay = stored["optimizer"]["lr"], stored["paramwise"]["layer_decay_rate"]
    task.trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer = task.configure_optimizers()["optimizer"]
    names = {parameter: key for key, parameter in task.model.named_parameters()}
    ours = {
        to_official(names[parameter]): [group["initial_lr"], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    theirs = {name: list(stored["groups"][group][1:3]) for name, group in stored["params"].items()}
    expected = without_oversights(theirs, task.backbone.config, rate, decay)
    assert ours.keys() == expected.keys()
    for key, (lr, weight_decay) in expected.items():
        assert ours[key] == [pytest.approx(lr, rel=1e-9), weight_decay], key
    assert len(optimizer.param_groups) <= 2 * (sum(task.backbone.config.depths) + 2)


def test_sampling_offsets_of_mask2former_have_a_factor_of_their_own():
    """The authors' looks for them in the backbone."""
    stored = read(next(path for path in FILES if "mask2former" in path.name))
    stored["paramwise"]["offset_lr_scale"] = 0.1
    task, _ = build(next(path.name for path in FILES if "mask2former" in path.name), stored)
    slow = [name for name, scale in task.lr_scales().items() if scale == 0.1]
    assert len(slow) == 6 * 2
    assert all(".sampling_offsets." in name for name in slow)


def mmcv_poly(step, total, base, recipe):
    """The rate of step `step` as mmcv's hook computes it."""
    regular = (base - recipe["min_lr"]) * (1 - step / total) ** recipe["power"] + recipe["min_lr"]
    if step < recipe["warmup_iters"]:
        return regular * (1 - (1 - step / recipe["warmup_iters"]) * (1 - recipe["warmup_ratio"]))
    return regular


@pytest.mark.parametrize("changes", [{}, {"power": 0.9, "min_lr": 1e-6}], ids=["authors", "other"])
def test_poly_is_mmcvs_in_the_warm_up_too(changes):
    recipe = read(FILES[0])["lr_config"]
    assert recipe["policy"] == "poly"
    assert recipe["warmup"] == "linear"
    recipe |= changes
    base, total = 6e-5, 160_000
    schedule = Poly(power=recipe["power"], min_lr_ratio=recipe["min_lr"] / base)
    for step in (0, 1, 700, 1499, 1500, 1501, 90_000, 159_999):
        ours = base * with_warmup(
            step,
            schedule=schedule,
            warmup_steps=recipe["warmup_iters"],
            warmup_lr_ratio=recipe["warmup_ratio"],
            total_steps=total,
        )
        # Both are float64; the factors are multiplied in another order.
        assert ours == pytest.approx(mmcv_poly(step, total, base, recipe), rel=1e-12)
    assert schedule(total, total) == schedule(total + 5, total) == schedule.min_lr_ratio


def test_the_recipes_of_all_configs_are_the_same():
    assert {json.dumps(read(path)["lr_config"], sort_keys=True) for path in FILES} == {
        json.dumps(read(FILES[0])["lr_config"], sort_keys=True)
    }


@pytest.mark.parametrize("schedule", [Cosine(), Steps(milestones=(2,))], ids=["cosine", "steps"])
def test_the_warm_up_of_other_schedules_leads_to_the_base_rate(schedule):
    options = {"schedule": schedule, "warmup_steps": 4, "warmup_lr_ratio": 0.2, "total_steps": 10}
    assert [with_warmup(step, **options) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, schedule(4, 10)])


def test_poly_refuses_what_makes_no_schedule():
    with pytest.raises(ValueError, match="power is 0, expected a positive number"):
        Poly(power=0)
    with pytest.raises(ValueError, match=r"min_lr_ratio is 1\.5"):
        Poly(min_lr_ratio=1.5)
