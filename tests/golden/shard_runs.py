"""Trainer runs over shards, by several processes, that note which samples each step of each rank had.

As a script it runs the jobs of a JSON file one after the other. It imports the project once and forks a process for
each rank, as a launcher would start them; it never trains itself.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What a run may take in all, and how long ranks may live on when another one has died, seconds.
MAX_SECONDS, GRACE = 240.0, 60.0


@dataclass(kw_only=True)
class Job:
    """One `Trainer.fit`, or the part of one that the ranks of this host have.

    `folder` is for what it writes. `train` and `val` are arguments of `Shards`. `world` counts the processes of all
    hosts. `kill` is a rank, and the training step in which it dies of SIGKILL. `data`, `shuffling`, `access` and
    `trainer` are further arguments, `environment` further variables.
    """

    folder: str
    train: list[dict[str, Any]]
    val: list[dict[str, Any]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=lambda: [0])
    world: int = 1
    max_steps: int = 9
    resume: str | None = None
    kill: tuple[int, int] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    shuffling: dict[str, Any] = field(default_factory=lambda: {"lanes": 4, "window_shards": 2})
    access: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def steps(self) -> dict[int, list[str]]:
        """Return the keys of each optimizer step, the ranks' parts one behind the other."""
        found: dict[int, list[str]] = defaultdict(list)
        for rank in self.ranks:
            for line in (Path(self.folder) / f"train_{rank}.txt").read_text().splitlines():
                step, *keys = line.split()
                found[int(step)] += keys
        return dict(found)

    def evaluated(self) -> list[list[str]]:
        """Return the keys of the last validation over the ranks, for each source."""
        lines: list[list[str]] = [[] for _ in self.val]
        for rank in self.ranks:
            path = Path(self.folder) / f"val_{rank}.txt"
            for line in path.read_text().rpartition("start\n")[2].splitlines():
                number, *keys = line.split()
                lines[int(number)] += keys
        return lines

    def result(self, rank: int) -> dict[str, Any]:
        """Return how the run ended on a rank: `error`, `message`, `step`, `metrics`; nothing if it was killed."""
        path = Path(self.folder) / f"result_{rank}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def status(self) -> list[int]:
        """Return the exit status of each rank, negative for a signal; -9 also for one that had to be ended."""
        status: list[int] = json.loads((Path(self.folder) / f"status_{self.ranks[0]}.json").read_text())
        return status

    def checkpoint(self) -> str:
        """Return the path of the last checkpoint."""
        return str(Path(self.folder) / "checkpoints" / "last.ckpt")


def command(jobs: list[Job], path: Path) -> list[str]:
    """Return the command that runs `jobs`, which are written to `path`."""
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    return [sys.executable, __file__, str(path)]


def environment() -> dict[str, str]:
    """Return the environment variables of that command."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "no_proxy": "*"}


def run(*jobs: Job) -> None:
    """Run jobs one after the other."""
    folder = Path(jobs[0].folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not a pipe: it would stay open as long as the loader processes of a killed rank live.
    with (folder / "log.txt").open("w") as log:
        code = subprocess.run(command(list(jobs), folder / "jobs.json"), env=environment(), stdout=log, stderr=log)
    assert code.returncode == 0, (folder / "log.txt").read_text()[-4000:]


def train(job: Job, rank: int) -> None:
    """Be one rank of a job."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from datamodules.webdataset.image_text import ImageTextShards
    from datamodules.webdataset.settings import Access, Shuffling
    from datamodules.webdataset.sources import Shards

    folder = Path(job.folder)

    def note(name: str, line: str) -> None:
        # Closed at once, so that it is there after a SIGKILL.
        with (folder / f"{name}_{rank}.txt").open("a") as file:
            file.write(line + "\n")

    class Noting(LightningModule):
        """Fits the mean colour to the label; sums what it is evaluated on."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if job.kill == (rank, self.global_step):
                os.kill(os.getpid(), signal.SIGKILL)
            note("train", " ".join([str(self.global_step), *_names(batch["key"])]))
            return (self.linear(batch["image"].mean((2, 3))) - batch["label"][:, None]).square().mean()

        def on_validation_start(self) -> None:
            note("val", "start")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            valid = batch["valid"]
            keys = [key for key, ok in zip(batch["key"], valid.tolist(), strict=True) if ok]
            note("val", " ".join([str(dataloader_idx), *_names(keys)]))
            sums = {"count": valid.sum().double(), "pixels": batch["image"][valid].double().sum()}
            for name, value in sums.items():
                self.log(f"val/{name}", value, reduce_fx="sum", sync_dist=True, batch_size=1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    torch.set_num_threads(1)
    batch_size = job.data.pop("global_batch", 16) // job.world // job.trainer.get("accumulate_grad_batches", 1)
    access: dict[str, Any] = {name: Path(value) if name == "cache" else value for name, value in job.access.items()}
    data = ImageTextShards(
        train=[Shards(**{**one, **_index(one)}) for one in job.train],
        val=[Shards(**{**one, **_index(one)}) for one in job.val],
        batch_size=batch_size,
        image_size=32,
        shuffling=Shuffling(**job.shuffling),
        access=Access(**access),
        **{"num_workers": 0, "class_names": ["red", "green", "blue", "yellow"], **job.data},
    )
    options = {
        "accelerator": "cpu",
        "devices": job.world,
        "strategy": "ddp",
        "max_steps": job.max_steps,
        "log_every_n_steps": 1,
        "limit_val_batches": 1.0 if job.val else 0,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    last = ModelCheckpoint(folder / "checkpoints", "last", every_n_train_steps=2, enable_version_counter=False)
    logger = CSVLogger(folder, "logs", version="", flush_logs_every_n_steps=1)
    trainer = Trainer(default_root_dir=folder, logger=logger, callbacks=[last], **{**options, **job.trainer})
    result: dict[str, Any] = {"error": None, "message": ""}
    try:
        trainer.fit(Noting(), datamodule=data, ckpt_path=job.resume)
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error)}
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    result |= {"step": trainer.global_step, "metrics": metrics}
    (folder / f"result_{rank}.json").write_text(json.dumps(result))


def _names(keys: list[str]) -> list[str]:
    return [key.rpartition("/")[2] for key in keys]


def _index(shards: dict[str, Any]) -> dict[str, Path]:
    return {"index": Path(shards["index"])} if "index" in shards else {}


def _fork(job: Job) -> None:
    """Run the ranks of this host, and note how each ended; none is left behind."""
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    alive: dict[int, int] = {}
    for rank in job.ranks:
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
                os.environ |= job.environment
                train(job, rank)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        alive[child] = rank
    status, deadline = dict.fromkeys(job.ranks, 0), started + MAX_SECONDS
    while alive:
        child, code = os.waitpid(-1, os.WNOHANG)
        if child in alive:
            status[alive.pop(child)] = os.waitstatus_to_exitcode(code)
            if os.waitstatus_to_exitcode(code):
                deadline = min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            for left in alive:
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    (Path(job.folder) / f"status_{job.ranks[0]}.json").write_text(json.dumps([status[rank] for rank in job.ranks]))


if __name__ == "__main__":
    # What a fork would otherwise import again and again.
    import lightning.pytorch  # noqa: F401

    import datamodules.webdataset.image_text  # noqa: F401

    for described in json.loads(Path(sys.argv[1]).read_text()):
        _fork(Job(**{**described, "kill": described["kill"] and tuple(described["kill"])}))
