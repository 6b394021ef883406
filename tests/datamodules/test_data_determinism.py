import multiprocessing
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import BatchSampler, DataLoader

from datamodules import ImageFolders, SyntheticClassification, TrainTransform
from datamodules.sampling import EvalSampler, TrainLoader, TrainSampler


def folders(root, **options):
    datamodule = ImageFolders(root, num_classes=3, image_size=24, batch_size=4, **options)
    datamodule.setup("fit")
    return datamodule


def epochs(loader, count=2):
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


def test_batches_are_the_same_for_any_number_of_workers(class_folders):
    expected = epochs(folders(class_folders, num_workers=0).train_dataloader())
    assert len(expected) == 2 * 6
    assert expected[0]["image"].shape == (4, 3, 24, 24)
    assert expected[0]["image"].dtype == torch.float32
    assert expected[0]["label"].dtype == torch.int64
    for num_workers in (1, 2):
        assert_same(epochs(folders(class_folders, num_workers=num_workers).train_dataloader()), expected)


@pytest.mark.parametrize(
    ("start_method", "persistent"),
    [("fork", False), pytest.param("spawn", True, marks=pytest.mark.slow)],  # spawn imports everything again
)
def test_batches_are_the_same_however_workers_live(class_folders, start_method, persistent):
    datamodule = folders(class_folders, num_workers=2)
    expected = epochs(datamodule.train_dataloader())
    loader = datamodule.train_dataloader()
    other = TrainLoader(
        loader.dataset,
        batch_size=4,
        sampler=loader.sampler,
        num_workers=1,
        persistent_workers=persistent,
        multiprocessing_context=multiprocessing.get_context(start_method),
    )
    assert_same(epochs(other), expected)


def test_each_epoch_has_another_order_and_other_crops(class_folders):
    datamodule = folders(class_folders, num_workers=0)
    dataset = datamodule.train_dataloader().dataset
    assert not torch.equal(dataset[0, 5]["image"], dataset[1, 5]["image"])
    assert torch.equal(dataset[1, 5]["image"], dataset[1, 5]["image"])
    orders = []
    for epoch in range(2):
        sampler = TrainSampler(dataset, batch_size=4)
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))


@pytest.mark.parametrize("start", [0, 8])
def test_a_global_batch_is_the_same_for_any_number_of_ranks(start):
    dataset, steps = range(50), {}
    for num_replicas in (1, 2, 4):
        per_rank = []
        for rank in range(num_replicas):
            batch_size = 8 // num_replicas
            sampler = TrainSampler(dataset, batch_size, num_replicas, rank, seed=3)
            sampler.place = (2, start)
            per_rank.append(list(BatchSampler(sampler, batch_size, drop_last=False)))
            assert len(sampler) == 6 * batch_size
        steps[num_replicas] = [sorted(chain(*batches)) for batches in zip(*per_rank, strict=True)]
    assert steps[1] == steps[2] == steps[4]
    assert [len(batch) for batch in steps[1]] == [8] * 6
    # 50 samples are 6 whole global batches; what an epoch's start has cut off comes from the next one.
    assert [{epoch for epoch, _ in batch} for batch in steps[1]] == [{2}] * (6 - start // 8) + [{3}] * (start // 8)


@pytest.mark.parametrize(("size", "num_replicas"), [(10, 1), (10, 3), (2, 4), (12, 4)])
def test_evaluation_sees_each_sample_once_over_all_ranks(size, num_replicas):
    shares = [list(EvalSampler(range(size), num_replicas, rank)) for rank in range(num_replicas)]
    assert sorted(chain(*shares)) == list(range(size))
    assert [len(EvalSampler(range(size), num_replicas, rank)) for rank in range(num_replicas)] == [
        len(share) for share in shares
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_loaders_do_not_draw_from_the_global_generator():
    datamodule = SyntheticClassification(image_size=8)
    datamodule.setup("fit")
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(LightningModule):
    """Collects what each rank sees; has a parameter only because DDP wants one."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder, self.seen = folder, {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["image"].mean((1, 2, 3)))
        return self.weight

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch["image"].mean((1, 2, 3)))

    def on_fit_end(self):
        torch.save(self.seen, self.folder / f"{self.global_rank}of{self.trainer.world_size}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_two_ddp_ranks_share_the_batches_of_one(tmp_path, use_distributed_sampler):
    transform = TrainTransform(rand_augment=None)
    for devices in (1, 2):
        datamodule = SyntheticClassification(
            image_size=16, batch_size=4 // devices, num_samples=18, num_val_samples=7, train_transform=transform
        )
        Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="auto" if devices == 1 else "ddp_fork",
            use_distributed_sampler=use_distributed_sampler,
            max_epochs=2,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Recorder(tmp_path), datamodule=datamodule)
    one = torch.load(tmp_path / "0of1.pt")
    two = [torch.load(tmp_path / f"{rank}of2.pt") for rank in range(2)]
    assert len(one["train"]) == 8
    for step, expected in enumerate(one["train"]):
        together = torch.cat([rank["train"][step] for rank in two])
        assert torch.equal(together.sort().values, expected.sort().values)
    together = torch.cat([batch for rank in two for batch in rank["val"]])
    assert torch.equal(together.sort().values, torch.cat(one["val"]).sort().values)
    assert len(together) == 2 * 7


def test_lightning_leaves_the_samplers_alone(class_folders):
    datamodule = folders(class_folders, num_workers=0)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, torch.utils.data.distributed.DistributedSampler)
