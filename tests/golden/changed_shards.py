"""Shards with some parts of their samples broken, and what a datamodule asks its trainer for."""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shard_files import write_tar


@dataclass
class Ranks:
    """All that a datamodule of shards needs of a trainer."""

    rank: int = 0
    num_replicas: int = 1
    accumulate_grad_batches: int = 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"rank": self.rank, "num_replicas": self.num_replicas}


def change_parts(folder: Path, changed: Mapping[str, bytes | None]) -> None:
    """Give files in the shards of a folder other contents, by name; None leaves the file out."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        files |= {name: content for name, content in changed.items() if name in files}
        write_tar(shard, ((name, content) for name, content in files.items() if content is not None))


def read_part(folder: Path, name: str) -> bytes:
    """Return a file of the shards of a folder."""
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            if name in tar.getnames():
                return tar.extractfile(name).read()
    raise KeyError(name)
