"""The training loader is one stream of batches with a small state, whatever the workers have prefetched."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.sampling import loader_generator
from datamodules.webdataset.loader import ShardLoader, StepKey
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.plan import Plan, SourceSize

WEIGHTED = (2.0, 1.0)


def make_plan(*, weights: tuple[float, float] | None = WEIGHTED, **changes: Any) -> Plan:
    options: dict[str, Any] = {"global_batch": 12, "seed": 4, "lanes": 3, "window_shards": 2} | changes
    first, second = weights or (None, None)
    one = SourceSize(name="one", counts=np.full(8, 11), weight=first)
    other = SourceSize(name="other", counts=np.array([9, 4, 8]), weight=second)
    return Plan([one, other], **options)


class Places(Dataset[tuple[Tensor, Meter]]):
    """Batches that are the places of their samples, `(rows, 5)`."""

    def __init__(self, plan: Plan, size: int, first_row: int) -> None:
        self.plan, self.size, self.first_row = plan, size, first_row

    def __getitem__(self, key: StepKey) -> tuple[Tensor, Meter]:
        start = self.first_row + key.micro * self.size
        places = self.plan.rows(key.epoch, key.step, start, start + self.size)
        fields = (places.source, places.epoch, places.position, places.shard, places.sample)
        return torch.from_numpy(np.stack(fields, axis=1)), Meter(samples=Counter({0: self.size}))


def make_loaders(
    plan: Plan, *, world: int = 1, accumulation: int = 1, num_workers: int = 0, context: str | None = None
) -> list[ShardLoader]:
    """Return the loader of each rank."""
    size = plan.global_batch // (world * accumulation)
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": True, "prefetch_factor": 3}
    return [
        ShardLoader(
            Places(plan, size, rank * size * accumulation),
            plan=plan,
            digest="0123456789abcdef",
            accumulation=accumulation,
            num_replicas=world,
            generator=loader_generator(),
            multiprocessing_context=context,
            **(workers if num_workers else {}),
        )
        for rank in range(world)
    ]


def stream(loader: ShardLoader) -> Iterator[Tensor]:
    """Yield batches over all epochs, as Lightning takes them."""
    while True:
        yield from loader


class Run:
    """All ranks of a run, step by step."""

    def __init__(self, loaders: list[ShardLoader]) -> None:
        self.loaders = loaders
        self.streams = [stream(loader) for loader in loaders]

    def take(self, steps: int) -> list[list[list[int]]]:
        """Return the rows of the next global batches."""
        accumulation = self.loaders[0].steps.accumulation
        taken = []
        for _ in range(steps):
            rows: list[list[int]] = []
            for batches in self.streams:
                for batch in islice(batches, accumulation):
                    rows += batch.tolist()
            taken.append(rows)
        return taken

    def state(self) -> dict[str, Any]:
        """Return the state, as a checkpoint keeps it."""
        states = [json.loads(json.dumps(loader.state_dict())) for loader in self.loaders]
        assert states == states[:1] * len(states)
        return dict(states[0])


def resumed(state: dict[str, Any], loaders: list[ShardLoader]) -> Run:
    for loader in loaders:
        loader.load_state_dict(state)
    return Run(loaders)


def test_the_stream_is_that_of_the_plan_over_all_epochs() -> None:
    plan = make_plan()
    keys = [StepKey(epoch, step, 0) for epoch in range(3) for step in range(plan.num_steps)]
    expected = [Places(plan, 12, 0)[key][0].tolist() for key in keys]
    assert Run(make_loaders(plan)).take(3 * plan.num_steps) == expected


@pytest.mark.parametrize("weights", [None, WEIGHTED], ids=["one", "weighted"])
@pytest.mark.parametrize(("world", "accumulation", "num_workers"), [(2, 3, 0), (4, 1, 0), (1, 12, 0), (2, 2, 2)])
def test_global_batches_do_not_depend_on_the_split(
    weights: tuple[float, float] | None, world: int, accumulation: int, num_workers: int
) -> None:
    plan = make_plan(weights=weights)
    steps = 2 * plan.num_steps + 1
    loaders = make_loaders(plan, world=world, accumulation=accumulation, num_workers=num_workers)
    assert [len(loader) for loader in loaders] == [plan.num_steps * accumulation] * world
    assert Run(loaders).take(steps) == Run(make_loaders(plan)).take(steps)


# Steps 9 and 18 end an epoch.
@pytest.mark.parametrize("before", [1, 5, 9, 14])
def test_a_resumed_run_goes_on_with_the_next_batch_on_other_ranks_and_workers(before: int) -> None:
    plan = make_plan()
    assert plan.num_steps == 9
    whole = Run(make_loaders(plan)).take(22)
    # Its workers are ahead of the trainer when the state is taken, and go on.
    first = Run(make_loaders(plan, world=2, num_workers=2))
    assert first.take(before) == whole[:before]
    state = first.state()
    for split in (
        {"world": 1, "num_workers": 2},
        {"world": 2, "accumulation": 2, "num_workers": 1},
        {"world": 3, "accumulation": 4},
    ):
        again = resumed(state, make_loaders(plan, **split))
        assert again.take(22 - before) == whole[before:]
    assert first.take(22 - before) == whole[before:]


def test_spawned_workers_deliver_the_same_batches_and_resume() -> None:
    plan = make_plan()
    whole = Run(make_loaders(plan)).take(12)
    first = Run(make_loaders(plan, num_workers=1, context="spawn"))
    assert first.take(7) == whole[:7]
    assert resumed(first.state(), make_loaders(plan, world=2)).take(5) == whole[7:]


def test_persistent_workers_can_be_sent_back() -> None:
    run = Run(make_loaders(make_plan(), num_workers=2))
    first = run.take(3)
    state = run.state()
    rest = run.take(9)
    again = resumed(state, run.loaders)
    assert again.take(9) == rest
    assert first[0] not in rest


def test_a_resumed_run_asks_for_nothing_that_was_seen() -> None:
    plan, asked = make_plan(), []

    class Watched(Places):
        def __getitem__(self, key: StepKey) -> tuple[Tensor, Meter]:
            asked.append(key)
            return super().__getitem__(key)

    loader = ShardLoader(Watched(plan, 12, 0), plan=plan, digest="0123456789abcdef")
    run = Run(make_loaders(plan))
    run.take(5)
    resumed(run.state(), [loader]).take(2)
    assert asked == [StepKey(0, 5, 0), StepKey(0, 6, 0)]


def test_a_step_can_be_resumed_in_its_middle_by_the_same_split_only() -> None:
    plan = make_plan()
    loaders = make_loaders(plan, world=2, accumulation=3)
    run = Run(loaders)
    run.take(4)
    rest = [[batch.tolist() for batch in islice(batches, 5)] for batches in run.streams]
    state = run.state()
    assert (state["step"], state["micro"]) == (5, 2)
    again = resumed(state, make_loaders(plan, world=2, accumulation=3))
    assert [next(batches).tolist() for batches in again.streams] == [next(each).tolist() for each in run.streams]
    assert len(rest) == 2
    with pytest.raises(ValueError, match=r"accumulation=3, behind 2 of the batches .* this run has accumulation=1"):
        make_loaders(plan, world=2)[0].load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_replicas=2, behind 2 of the batches .* this run has num_replicas=4"):
        make_loaders(plan, world=4, accumulation=3)[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "seed=4, this run has seed=5"),
        ({"global_batch": 24}, "global_batch=12, this run has global_batch=24"),
        ({"lanes": 2}, "lanes=3, this run has lanes=2"),
        ({"window_shards": 1}, "window_shards=2, this run has window_shards=1"),
        ({"resampled": True}, "resampled=False, this run has resampled=True"),
        ({"epoch_samples": 60}, "epoch_samples=None, this run has epoch_samples=60"),
        ({"weights": (1.0, 1.0)}, r"weights=\[2.0, 1.0\], this run has weights=\[1.0, 1.0\]"),
        ({"weights": None}, r"weights=\[2.0, 1.0\], this run has weights=None"),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    run = Run(make_loaders(make_plan()))
    run.take(1)
    with pytest.raises(ValueError, match=f"step 1 of epoch 0 of a run with {message}. Resume with the same, or start"):
        resumed(run.state(), make_loaders(make_plan(**changes)))


def test_a_state_of_other_data_is_refused_by_name() -> None:
    run = Run(make_loaders(make_plan()))
    run.take(1)
    other = ShardLoader(Places(make_plan(), 12, 0), plan=make_plan(), digest="fedcba9876543210")
    with pytest.raises(ValueError, match="data=0123456789abcdef, this run has data=fedcba9876543210"):
        other.load_state_dict(run.state())


def test_the_state_is_small_and_there_is_none_before_the_first_batch() -> None:
    loader = make_loaders(make_plan(seed=2**63 - 1))[0]
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    loader.steps.set_epoch(7)
    next(iter(loader))
    assert loader.steps.place == StepKey(7, 1, 0)
    loader.steps.place = StepKey(10**6, 10**6, 7)
    assert len(json.dumps(loader.state_dict())) < 1000


def test_the_loader_adds_up_the_counts_of_batches_that_it_handed_out() -> None:
    loader = make_loaders(make_plan(), num_workers=2)[0]
    batches = iter(loader)
    next(batches)
    next(batches)
    meter, waited = loader.take_meter()
    assert meter.samples == {0: 24}
    assert waited > 0
    assert loader.take_meter() == (Meter(), 0.0)
    next(batches)
    assert loader.take_meter()[0].samples == {0: 12}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_of_the_model_are_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    Run(make_loaders(make_plan(), num_workers=num_workers)).take(12)
    assert torch.equal(torch.get_rng_state(), before)


class Watcher(LightningModule):
    """A model that notes its batches by the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[int, list[list[list[int]]]] = {}

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.setdefault(self.trainer.global_step, []).append(batch.tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, *, max_steps: int, accumulation: int, ckpt_path: Path | None = None) -> dict[int, Any]:
    model = Watcher()
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulation,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = make_loaders(make_plan(), accumulation=accumulation)[0]
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


# Steps 9 and 18 end an epoch.
@pytest.mark.parametrize("before", [4, 9, 13])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_trainer_resumes_at_the_step_of_its_checkpoint(tmp_path: Path, before: int) -> None:
    whole = fit(tmp_path / "whole", max_steps=20, accumulation=2)
    assert list(whole) == list(range(20))
    rows = [[row for batch in batches for row in batch] for batches in whole.values()]
    assert rows == Run(make_loaders(make_plan())).take(20)
    checkpoint = tmp_path / "whole" / f"step={before}.ckpt"
    rest = fit(tmp_path / "rest", max_steps=20, accumulation=2, ckpt_path=checkpoint)
    assert rest == {step: batches for step, batches in whole.items() if step >= before}
