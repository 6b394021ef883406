import gzip
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from timm.scheduler import CosineLRScheduler
from torch import nn

import internimage
from internimage import ClipProjectorHead, ConvHead
from internimage.keys import ours_to_official
from tasks import Classification
from tasks.optim import layer_lr_scales, parameter_groups
from tasks.schedules import Cosine, with_warmup

GOLDEN = Path(__file__).parents[1] / "golden" / "optim"


def test_schedule_is_timms_cosine_without_a_warmup_prefix():
    base, warmup, floor = 4e-3, 4e-6, 4e-5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    timm = CosineLRScheduler(
        optimizer, t_initial=50, lr_min=floor, warmup_t=7, warmup_lr_init=warmup, cycle_limit=1, t_in_epochs=False
    )
    for step in range(60):
        timm.step_update(step)
        ours = base * with_warmup(
            step,
            schedule=Cosine(min_lr_ratio=floor / base),
            warmup_steps=7,
            total_steps=50,
            warmup_lr_ratio=warmup / base,
        )
        # Both are float64; the factors are multiplied in another order.
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("cls_*.json.gz")), ids=lambda path: path.name.split(".")[0][4:])
def test_every_learning_rate_and_weight_decay_is_the_authors(path):
    with gzip.open(path) as file:
        golden = json.load(file)
    variant = golden["config"].replace("inaturalist2018__", "").replace("without_lr_decay__", "").split("_")[1]
    decayed = golden["layer_decay"]
    with torch.device("meta"):
        task = Classification(
            getattr(internimage, f"internimage_{variant}")(),
            golden["num_classes"],
            lambda groups: torch.optim.AdamW(groups, lr=golden["base_lr"], weight_decay=golden["weight_decay"]),
            head=ClipProjectorHead if variant in "hg" else ConvHead,
            layer_decay=golden["ratio"] if decayed else 1.0,
            # Theirs is read only where layer decay is on.
            dcn_lr_multiplier=golden["dcn_lr_mul"] if decayed else 1.0,
        )
    task.trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizer = task.configure_optimizers()["optimizer"]
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    config = task.backbone.config
    ours = {
        ours_to_official(names[parameter], config): [group["initial_lr"], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = golden["params"]
    if decayed:  # theirs matches no layer for these and so trains them at the full rate: an oversight we leave out
        for position, block in enumerate(config.post_norm_blocks):
            for name in ("weight", "bias"):
                key = f"levels.2.post_norms.{position}.0.{name}"
                assert expected[key][0] == golden["base_lr"]
                expected[key] = expected[f"levels.2.blocks.{block}.norm1.0.{name}"]
    assert ours.keys() == expected.keys()
    for name, (lr, weight_decay) in expected.items():
        assert ours[name] == [pytest.approx(lr, rel=1e-9), weight_decay], name
    assert len(optimizer.param_groups) <= 2 * 2 * (sum(config.depths) + 1)  # theirs has one for each parameter


def test_layers_decay_from_the_last_block_and_the_stem_follows_the_first():
    scales = layer_lr_scales([["stem"], ["a"], ["b", "b2"], ["c"]], 0.5)
    assert scales == {"stem": 0.25, "a": 0.25, "b": 0.5, "b2": 0.5, "c": 1.0}
    with pytest.raises(ValueError, match=r"layer_decay is 1\.5"):
        layer_lr_scales([["stem"], ["a"]], 1.5)


def test_groups_hold_each_trainable_parameter_once_and_vectors_do_not_decay():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3), nn.Linear(4, 2))
    module[3].requires_grad_(False)
    groups = parameter_groups(module.named_parameters(), lambda name: 0.1 if name.startswith("2") else 1.0)
    assert [(group["lr_scale"], group.get("weight_decay"), len(group["params"])) for group in groups] == [
        (1.0, None, 1),
        (1.0, 0.0, 3),
        (0.1, None, 1),
        (0.1, 0.0, 1),
    ]


def test_schedule_needs_max_steps_and_fits_into_them(tiny_task):
    task = tiny_task()
    task.trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"trainer\.max_steps is -1, expected the number of optimizer steps"):
        task.configure_optimizers()
    task = tiny_task(warmup_steps=5)
    task.trainer = Trainer(max_steps=3, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match="warmup_steps is 5, expected at most the 3 of"):
        task.configure_optimizers()
