"""A run that is killed and resumed sees the batches, and has the losses, of one that was not."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import SyntheticClassification, TrainTransform
from datamodules.sampling import TrainLoader, TrainSampler

# Each run saves to a folder of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3 * 8 * 8, 10)
        self.losses = {}

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])
        assert self.trainer.global_step not in self.losses
        self.losses[self.trainer.global_step] = loss.item()
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder, *, num_workers, limits, ckpt_path=None):
    datamodule = SyntheticClassification(
        image_size=8, batch_size=4, num_samples=22, num_workers=num_workers, train_transform=TrainTransform()
    )
    checkpoints = [
        ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "epoch{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False),
    ]
    model = Linear()
    Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=checkpoints,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    ).fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return model.losses


# Steps 5, 10 and 15 end an epoch, the others lie inside. `step` checkpoints are saved after a batch; `epoch` ones after
# an epoch, or after validation where that runs inside the epoch.
@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"max_steps": 15, "max_epochs": -1}, ["step2", "step5", "step13", "epoch5"]),
        ({"max_epochs": 3}, ["step2", "step5", "epoch10"]),
        ({"max_steps": 15, "max_epochs": -1, "val_check_interval": 2}, ["step4", "step5", "epoch9"]),
        ({"max_steps": 15, "max_epochs": -1, "check_val_every_n_epoch": 2}, ["step5", "epoch10"]),
        ({"max_steps": 15, "max_epochs": -1, "limit_val_batches": 0}, ["step13", "epoch5"]),
        ({"max_steps": 15, "max_epochs": -1, "limit_train_batches": 3}, ["step5", "epoch6"]),
    ],
    ids=["max_steps", "max_epochs", "validation_inside", "validation_rarely", "no_validation", "short_epochs"],
)
def test_a_resumed_run_repeats_the_losses(tmp_path, limits, names):
    whole = fit(tmp_path / "whole", num_workers=0, limits=limits)
    assert sorted(whole) == list(range(15))
    for name in names:
        step = int(name.lstrip("stepoch"))
        resumed = fit(tmp_path / name, num_workers=0, limits=limits, ckpt_path=tmp_path / "whole" / f"{name}.ckpt")
        assert resumed == {number: whole[number] for number in range(step, 15)}, name


def test_prefetching_workers_do_not_shift_the_place(tmp_path):
    limits = {"max_steps": 13, "max_epochs": -1}
    whole = fit(tmp_path / "whole", num_workers=0, limits=limits)
    with_workers = fit(tmp_path / "workers", num_workers=2, limits=limits)
    assert with_workers == whole
    resumed = fit(tmp_path / "more", num_workers=1, limits=limits, ckpt_path=tmp_path / "workers" / "step7.ckpt")
    assert resumed == {number: whole[number] for number in range(7, 13)}


def test_a_second_resume_continues_from_the_first(tmp_path):
    first, second, third = ({"max_steps": steps, "max_epochs": -1} for steps in (5, 7, 12))
    whole = fit(tmp_path / "whole", num_workers=0, limits=third)
    losses = fit(tmp_path / "a", num_workers=0, limits=first)
    losses |= fit(tmp_path / "b", num_workers=0, limits=second, ckpt_path=tmp_path / "a" / "epoch5.ckpt")
    losses |= fit(tmp_path / "c", num_workers=0, limits=third, ckpt_path=tmp_path / "b" / "step7.ckpt")
    assert losses == whole


def keys(loader):
    return [list(batch) for batch in loader]


def loader_of(size, *, num_replicas=1, rank=0, batch_size=4, seed=0):
    sampler = TrainSampler(range(size), batch_size, num_replicas, rank, seed)
    # The data set is the pairs themselves, so that a batch shows which samples it is.
    return TrainLoader(Echo(), batch_size=batch_size, sampler=sampler, drop_last=True, collate_fn=list)


class Echo(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return key

    def __len__(self):
        raise AssertionError("the sampler knows the length")


def test_the_place_holds_for_another_number_of_ranks():
    whole = keys(loader_of(40))
    loader = loader_of(40)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert state["samples"] == 12
    ranks = [loader_of(40, num_replicas=2, rank=rank, batch_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    rest = [sorted(a + b) for a, b in zip(*map(keys, ranks), strict=True)]
    assert rest[:7] == [sorted(batch) for batch in whole[3:]]


def test_a_rest_too_small_for_the_new_global_batch_is_skipped():
    loader = loader_of(18, batch_size=4)
    loader.load_state_dict({"epoch": 2, "samples": 15, "seed": 0, "size": 18})
    assert {epoch for epoch, _ in next(iter(loader))} == {3}
    assert loader.state_dict() == {"epoch": 3, "samples": 4, "seed": 0, "size": 18}


def test_without_a_saved_place_the_trainers_epoch_counts():
    loader = loader_of(12)
    loader.sampler.set_epoch(5)
    next(iter(loader))
    assert loader.state_dict() == {"epoch": 5, "samples": 4, "seed": 0, "size": 12}
    rest = keys(loader)
    assert [{epoch for epoch, _ in batch} for batch in rest] == [{5}, {5}, {6}]


def test_a_place_in_other_data_is_an_error_and_a_finished_epoch_is_not():
    loader = loader_of(40)
    assert len(keys(loader)) == 10
    other = loader_of(44)
    other.load_state_dict(loader.state_dict())
    assert {epoch for batch in keys(other) for epoch, _ in batch} == {1}
    next(iter(loader))
    with pytest.raises(ValueError, match=r"40 samples shuffled with seed 0; this run has 44 samples"):
        other.load_state_dict(loader.state_dict())
