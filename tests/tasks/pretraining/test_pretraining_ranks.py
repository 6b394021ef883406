"""Two processes against one with the same global batch: through the command, and of a whole step of M3I."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from internimage import ClipProjectorHead, internimage_debug
from tasks.pretraining import M3I, ClipText, Towers, m3i, m3i_mixing

ROOT = Path(__file__).parents[3]
NUM_STEPS = 6  # an epoch


def options(folder, devices, **trainer):
    """What differs from an experiment for smoke runs."""
    return {
        "trainer": {
            "devices": devices,
            "strategy": "ddp",
            "max_steps": NUM_STEPS,
            "check_val_every_n_epoch": 1,
            # A gradient that is too large by a factor would not show behind a clip, nor with Adam.
            "gradient_clip_val": None,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "rank_record.RankRecord", "init_args": {"folder": str(folder / "ranks")}}],
        }
        | trainer,
        "model": {
            "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}, "warmup_steps": 0}
        },
        # The last batch of rank 1 in evaluation has no pair: the 17th is of rank 0.
        "data": {
            "init_args": {
                "root": str(folder.parent / "shards"),
                "batch_size": 16 // devices,
                "num_samples": 16 * NUM_STEPS,
                "num_val_samples": 17,
            }
        },
    }


def command(subcommand, experiment, changes, folder, *words):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    files = ["-c", f"experiments/debug/{experiment}.yaml", "-c", str(folder / "changes.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "golden"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "tasks.cli", subcommand, *files, "--name", "run", *words]
    subprocess.run(run, check=True, timeout=300, cwd=ROOT, env=environment)


def fit(experiment, folder, devices, changes=None, words=()):
    """Train, and return what each rank kept."""
    command("fit", experiment, changes or options(folder, devices), folder, *words)
    return [torch.load(folder / "ranks" / f"rank_{rank}.pt") for rank in range(devices)]


def validation(folder, version=0):
    with (folder / "run" / f"version_{version}" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/retrieval_r1"]]
    return {name: float(value) for name, value in rows[-1].items() if name.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["clip", "siglip"])
def test_two_ranks_train_and_count_as_one_with_the_same_global_batch(tmp_path, experiment):
    (alone,) = fit(experiment, tmp_path / "one", 1)
    ranks = fit(experiment, tmp_path / "two", 2)
    assert len(alone["steps"]) == NUM_STEPS
    for step, *shares in zip(alone["steps"], *(rank["steps"] for rank in ranks), strict=True):
        mean = sum(share["train/loss"] for share in shares) / 2
        # Float32 sums in another order, over six steps.
        assert mean == pytest.approx(step["train/loss"], rel=1e-4), step["step"]
        assert shares[0]["train/scale"] == pytest.approx(step["train/scale"], rel=1e-4)
    moved = abs(alone["steps"][-1]["train/loss"] - alone["steps"][0]["train/loss"])
    assert moved > 0.01  # far more than the tolerance
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    counted = validation(tmp_path / "one")
    assert counted["val/retrieval_r1"] < 1
    assert validation(tmp_path / "two") == counted


@pytest.mark.slow
def test_ranks_of_m3i_stay_alike_and_resume_where_they_were(tmp_path):
    # Of M3I two ranks do not equal one: a partner is of the same rank, and each rank draws its own cells.
    def changes(folder, max_epochs):
        made = options(folder, 2, max_steps=2 * NUM_STEPS, max_epochs=max_epochs)
        made["trainer"]["callbacks"].append({"class_path": "tasks.EMA", "init_args": {"decay": 0.9}})
        made["model"]["init_args"]["frozen_stages"] = 1
        return made

    whole = fit("m3i", tmp_path / "whole", 2, changes(tmp_path / "whole", None))
    fit("m3i", tmp_path / "half", 2, changes(tmp_path / "half", 1))
    last = tmp_path / "half" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    rest = fit("m3i", tmp_path / "half", 2, changes(tmp_path / "half", None), ["--ckpt_path", str(last)])

    for rank, (resumed, expected) in enumerate(zip(rest, whole, strict=True)):
        assert resumed["steps"] == expected["steps"][NUM_STEPS:], rank
        for name, weight in expected["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
            assert torch.equal(whole[0]["weights"][name], weight), name
    terms = {f"train/{name}" for name in ("same_view", "other_view", "text", "category", "momentum", "target_std")}
    assert terms <= whole[0]["steps"][0].keys()
    assert whole[0]["steps"][0]["train/text"] != whole[1]["steps"][0]["train/text"]
    target, online = (
        whole[0]["weights"][f"{part}.backbone.stages.3.norm.weight"] for part in ("objective.target", "model")
    )
    assert not torch.equal(target, online)
    assert validation(tmp_path / "half", 1) == validation(tmp_path / "whole")

    # What two ranks counted with the averages, one counts.
    last = tmp_path / "whole" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    alone = options(tmp_path / "alone", 1, callbacks=None, logger={"class_path": "CSVLogger"})
    alone["trainer"]["logger"]["init_args"] = {"save_dir": str(tmp_path / "alone")}
    command("validate", "m3i", alone, tmp_path / "alone", "--ckpt_path", str(last))
    with next((tmp_path / "alone").rglob("metrics.csv")).open() as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[name]) for name in validation(tmp_path / "whole")} == validation(tmp_path / "whole")


class Step(nn.Module):
    """The loss of M3I with all terms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        head = partial(ClipProjectorHead, hidden_dim=32, embed_dim=24, num_heads=4)
        text = partial(ClipText, width=16, num_layers=1, num_heads=2, vocab_size=50, context_length=6)
        self.towers = Towers(internimage_debug(), 16, head, text)
        self.objective = M3I(decoder_dim=32, decoder_depth=1, decoder_heads=4, initial_scale=10.0)
        self.objective.build(self.towers, 5)
        with torch.no_grad():
            for parameter in self.parameters():  # from zero, offsets have no gradient to give on
                parameter += 0.02 * torch.randn_like(parameter)

    def forward(self, batch):
        return sum(self.objective.losses(self.towers, batch).values())


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    corner, side = (torch.rand(8, 2, 2, generator=generator) * 0.3 + least for least in (0.0, 0.4))
    flip = torch.randint(2, (8, 2, 1), generator=generator)
    valid = torch.ones(8, dtype=torch.bool)
    valid[2] = False  # of rank 0, so that the ranks have 2 and 4 mixed images that count
    return {
        "image": torch.randn(8, 3, 64, 64, generator=generator),
        "other_image": torch.randn(8, 3, 64, 64, generator=generator),
        "view": torch.cat([corner, side, flip], -1),
        "text": torch.randint(50, (8, 6), generator=generator),
        "text_length": torch.full((8,), 6),
        "label": torch.tensor([3, 1, 0, 4, -1, -1, -1, -1]),  # rank 1 has none
        "valid": valid,
    }


def compare_step(rank, folder):
    torch.set_num_threads(1)
    cells = torch.rand(8, 4, generator=torch.Generator().manual_seed(2))
    draw, roll = torch.rand, m3i.of_partner

    def run(step, share, of_partner):
        batch = {name: part[share] for name, part in whole_batch().items()}
        torch.rand = lambda *size, device: cells[share]
        m3i.of_partner = m3i_mixing.of_partner = of_partner
        try:
            loss = step(batch)
        finally:
            torch.rand, m3i.of_partner, m3i_mixing.of_partner = draw, roll, roll
        loss.backward()
        return loss.detach()

    # One process whose partners are those of two ranks.
    alone = Step()
    expected = run(alone, slice(None), lambda x: torch.cat([half.roll(1, 0) for half in x.chunk(2)]))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared = DistributedDataParallel(Step())
    loss = run(shared, slice(4 * rank, 4 * rank + 4), roll)
    distributed.all_reduce(loss)
    # Float32 through networks, four images at a time or eight.
    torch.testing.assert_close(loss / 2, expected, rtol=1e-5, atol=0)
    for name, parameter in alone.named_parameters():
        gradient = shared.module.get_parameter(name).grad
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None:
            assert parameter.grad.any(), name
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    distributed.destroy_process_group()


def test_a_step_of_m3i_on_two_ranks_is_that_of_one_with_the_same_partners(tmp_path):
    torch.multiprocessing.spawn(compare_step, (tmp_path,), nprocs=2)
