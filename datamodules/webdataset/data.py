"""The datamodule over shards: order, resume, mixing, replacement and counts, for any form of batch."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Subset

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from datamodules.loading import find_files
from datamodules.sampling import loader_generator
from datamodules.webdataset.dataset import EvalBatches, TrainBatches
from datamodules.webdataset.eval_loader import EvalLoader, warn_of_bad
from datamodules.webdataset.formats import Format, normalize
from datamodules.webdataset.ledger import Ledger
from datamodules.webdataset.loader import ShardLoader
from datamodules.webdataset.meters import DataMeters
from datamodules.webdataset.plan import EvalPlan, Plan, SourceSize
from datamodules.webdataset.predict import FileBatches, PredictFormat
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.settings import DIRECT, SHUFFLING, Access, Shuffling
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.worker import start_worker
from datamodules.webdataset.writers import ImageWriter

Use = Literal["train", "val", "predict"]


class ShardData(LightningDataModule):
    """Training and evaluation batches from tar files, by index; a subclass says what a batch is (`form`).

    The samples of a global batch depend on (seed, epoch, step) alone, and each random change on (seed, epoch,
    position): not on nodes, ranks, workers or what ran before. A checkpoint holds the place, from which a run goes on
    with other numbers of ranks and workers too. Evaluation sees each sample once over all ranks, and rows that fill up
    the last batches are marked in `valid`.

    Images travel as uint8 and are normalised after the transfer to the device, by this datamodule's hook; whoever takes
    a loader without a trainer calls `normalize` (`datamodules.webdataset.formats`).

    Args:
        train: Sources of the training samples.
        val: Sources of evaluation, each with a loader of its own.
        batch_size: Samples per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        num_workers: Loader processes per device; 0 loads in the main process.
        prefetch_factor: Batches that each worker makes ahead.
        seed: Of order, random changes and replacements.
        shuffling: In which order training takes the samples.
        access: How shards are reached.
        max_bad_share: Share of the samples that may be bad before training stops with an error.
        ledger: Folder that lists bad samples; those listed already are not read again. None: `bad_samples` in the
            trainer's folder, which is only written.
        mean: Of RGB in [0, 1], subtracted.
        std: What the difference is divided by.
        predict_paths: Image files, and folders that are searched with their subfolders. None: the evaluation samples.

    Raises:
        ValueError: A number out of range, or nothing to train on or to evaluate.
    """

    def __init__(
        self,
        train: Shards | list[Shards] | None = None,
        val: Shards | list[Shards] | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        seed: int = 0,
        shuffling: Shuffling = SHUFFLING,
        access: Access = DIRECT,
        max_bad_share: float = 0.005,
        ledger: Path | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        predict_paths: list[Path] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{type(self).__name__}: {name}={value}, expected at least {least}.")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"{type(self).__name__}: max_bad_share={max_bad_share}, expected 0 to 1.")
        if not train and not val:
            raise ValueError(f"{type(self).__name__}: neither train nor val names shards.")
        self.train, self.val = as_list(train), as_list(val)
        self.batch_size, self.num_workers, self.prefetch_factor = batch_size, num_workers, prefetch_factor
        self.eval_batch_size = batch_size
        self.seed, self.shuffling, self.access = seed, shuffling, access
        self.max_bad_share, self.ledger = max_bad_share, ledger
        self.mean, self.std = mean, std
        self.predict_paths = predict_paths or []

    @abstractmethod
    def form(self, use: Use) -> Format:
        """Return how samples become a batch."""

    def sources(self) -> list[Shards]:
        """Return all sources, whose indices are made if they are missing."""
        return [*self.train, *self.val]

    def eval_sources(self, use: Use) -> list[tuple[Shards, Format]]:
        """Return the sources that are evaluated or predicted, with what their batches are."""
        form = self.form(use)
        return [(shards, form) for shards in self.val]

    def predict_writer(self) -> ImageWriter:
        """Return what turns an image file into a row; where batches have no such rows, override `file_loader`."""
        raise NotImplementedError(
            f"{type(self).__name__}: it has no `predict_writer`, so predict_paths cannot be read. Define one, or "
            "override `file_loader`."
        )

    def prepare_data(self) -> None:
        if self.predict_paths and self.trainer is not None and self.trainer.predicting:
            return
        for shards in self.sources():
            shards.prepare()

    def setup(self, stage: str) -> None:
        if self.trainer is None:
            self.prepare_data()
        if stage == "fit" and self.trainer is not None:
            self._add_meters()

    def train_dataloader(self) -> ShardLoader:
        if not self.train:
            raise ValueError(f"{type(self).__name__}: train names no shards.")
        ranks, plan, reader = self._ranks(), self._plan(), self._reader(self.train)
        dataset = TrainBatches(
            reader,
            self.form("train"),
            self.seed,
            plan=plan,
            batch_size=self.batch_size,
            first_row=ranks["rank"] * (plan.global_batch // ranks["num_replicas"]),
            accumulation=self._accumulation(),
        )
        return ShardLoader(
            dataset,
            plan=plan,
            digest=hashlib.sha256("".join(manifest.digest for manifest in reader.manifests).encode()).hexdigest()[:32],
            accumulation=self._accumulation(),
            num_replicas=ranks["num_replicas"],
            **self._loading(),
        )

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        return self._eval_loaders("val")

    def test_dataloader(self) -> EvalLoader | list[EvalLoader]:
        return self._eval_loaders("val")

    def predict_dataloader(self) -> DataLoader[Any] | list[EvalLoader]:
        if not self.predict_paths:
            return self._eval_loaders("predict")
        return self.file_loader(find_files(self.predict_paths, type(self).__name__))

    def file_loader(self, files: list[Path]) -> DataLoader[Any]:
        """Return this rank's batches of the image files of all ranks, for `predict_paths`."""
        ranks = self._ranks()
        mine = files[ranks["rank"] :: ranks["num_replicas"]]
        dataset = FileBatches(mine, PredictFormat(writer=self.predict_writer()), self.eval_batch_size)
        return EvalLoader(dataset, report=warn_of_bad, in_step=False, **self._loading())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = normalize(batch, self.mean, self.std)
        # Lightning converts to the precision of training before the transfer, when images are still integers.
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def describe(self) -> str:
        """Say what training takes of each source; exact."""
        return self._plan().report()

    def _plan(self) -> Plan:
        manifests = [shards.open() for shards in self.train]
        return Plan(
            [
                SourceSize(name=manifest.name, counts=manifest.counts, weight=shards.weight)
                for shards, manifest in zip(self.train, manifests, strict=True)
            ],
            global_batch=self.batch_size * self._ranks()["num_replicas"] * self._accumulation(),
            seed=self.seed,
            lanes=self.shuffling.lanes,
            window_shards=self.shuffling.window_shards,
            resampled=self.shuffling.resampled,
            epoch_samples=self.shuffling.epoch_samples,
        )

    def _reader(self, sources: Sequence[Shards]) -> Reader:
        manifests = [shards.open() for shards in sources]
        known = None
        if self.ledger is not None:
            known = Ledger(self.ledger).known([m.name for m in manifests], [m.digest for m in manifests])
        return Reader(manifests, self.access.build(), known=known, max_sample_bytes=self.access.max_sample_bytes)

    def _eval_loaders(self, use: Use) -> EvalLoader | list[EvalLoader]:
        loaders = [self._eval_loader(shards, form, use) for shards, form in self.eval_sources(use)]
        return loaders[0] if len(loaders) == 1 else loaders

    def _eval_loader(self, shards: Shards, form: Format, use: Use) -> EvalLoader:
        reader, ranks = self._reader([shards]), self._ranks()
        plan = EvalPlan(reader.manifests[0].counts, self.eval_batch_size, **ranks)
        if plan.num_samples == 0:
            raise ValueError(
                f"{type(self).__name__}: source {reader.manifests[0].name} has no samples to evaluate, expected some. "
                "Check its shards with `internimage shards verify`."
            )
        dataset = EvalBatches(reader, form, plan=plan)
        if use == "predict":
            # Ranks need not agree on the number of batches, and one without a sample has nothing to write.
            some = Subset(dataset, _with_samples(plan))
            return EvalLoader(some, report=warn_of_bad, in_step=False, **self._loading())
        return EvalLoader(dataset, report=warn_of_bad, in_step=True, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "prefetch_factor": self.prefetch_factor if self.num_workers > 0 else None,
            "worker_init_fn": start_worker,
            "pin_memory": torch.cuda.is_available(),
            "generator": loader_generator(),
            "collate_fn": _as_it_is,
        }

    def _add_meters(self) -> None:
        assert self.trainer is not None
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if not self.train or any(isinstance(callback, DataMeters) for callback in callbacks):
            return
        folder = self.ledger or Path(self.trainer.default_root_dir) / "bad_samples"
        plan = self._plan()
        rank_zero_info(f"{type(self).__name__}: {plan.report()}")
        names = [source.name for source in plan.sources]
        # In front: checkpoints are saved behind all that is logged.
        callbacks.insert(
            0, DataMeters(names, self.max_bad_share, Ledger(folder, self.trainer.global_rank), plan.num_steps)
        )

    def _accumulation(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    def _ranks(self) -> dict[str, int]:
        # Lightning's own answer also holds for strategies in which several ranks read the same samples.
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return ranks or {"num_replicas": 1, "rank": 0}


def as_list(shards: Shards | list[Shards] | None) -> list[Shards]:
    """Return the sources of an argument that may be none, one or several."""
    if shards is None:
        return []
    return [shards] if isinstance(shards, Shards) else shards


def _as_it_is(batch: Any) -> Any:
    """Keep a batch: torch would make tensors of the arrays in it, which are for the host, and lists of the tuples."""
    return batch


def _with_samples(plan: EvalPlan) -> list[int]:
    # Lightning takes no loader of length 0, so a rank without samples has an empty batch.
    return [number for number in range(len(plan)) if plan.rows(number)[2].any()] or [*range(len(plan))][:1]
