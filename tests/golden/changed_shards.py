"""Shards with some parts of their samples broken."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

from shard_files import write_tar


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
