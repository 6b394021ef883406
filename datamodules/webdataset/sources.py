"""Where the shards of a run are: settings, and the manifests that they lead to."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.webdataset.manifest import MANIFEST, Manifest, make_manifest
from datamodules.webdataset.urls import expand_shards, hide_secrets, is_local, local_path

INDEX = "index"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """One data source: tar files as webdataset and img2dataset write them, and the index of their samples.

    Args:
        urls: Shards: a folder, a pattern as `/data/{00000..00331}.tar`, a list of them, or a text file `@shards.txt` of
            one URL a line. Local paths, http(s), s3, gs, all that fsspec knows, and `pipe:COMMAND`. Beside an index
            they are not needed.
        index: Folder of the index that `internimage shards index` makes. None: the folder `index` beside local shards
            (see `index_folder`), where it is made if it is missing or shards have come or gone.
        name: Of the source in logs; None takes that of the index.
        weight: Share of every batch, relative to the other sources: all have one or none has. Without weights the
            sources are one big source.

    Raises:
        ValueError: Neither shards nor an index, or a weight that is not positive.
    """

    urls: str | list[str] | None = None
    index: Path | None = None
    name: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.urls is None and self.index is None:
            raise ValueError("Shards: neither urls nor index is given, expected one of them.")
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"Shards: weight={self.weight}, expected a positive number, or none for a big source.")

    def prepare(self) -> None:
        """Make the index of local shards if it is missing or shards have come or gone.

        Raises:
            FileNotFoundError: There are no shards, or no index of shards that are not local.
        """
        if self.urls is None:
            return
        urls = expand_shards(self.urls)
        folder = self._folder(urls)
        if (folder / MANIFEST).is_file() and _lists(Manifest.open(folder), urls):
            return
        if not all(is_local(url) for url in urls):
            raise FileNotFoundError(
                f"Shards: {folder} is not the index of {len(urls)} shards ({hide_secrets(urls[0])}, ...). Make it "
                "once: internimage shards index "
                f"{hide_secrets(self.urls if isinstance(self.urls, str) else urls[0])} --out {folder}"
            )
        make_manifest(urls, folder, name=self.name or folder.absolute().parent.name)

    def open(self) -> Manifest:
        """Return the manifest.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is of other shards.
        """
        if self.urls is None:
            return Manifest.open(self._folder(None))
        urls = expand_shards(self.urls)
        manifest = Manifest.open(folder := self._folder(urls))
        if not _lists(manifest, urls):
            raise ValueError(
                f"Shards: {folder} is the index of other shards than these {len(urls)} ({hide_secrets(urls[0])}, ...). "
                "Give each source a folder of its own as `index`; start again if shards have come or gone meanwhile."
            )
        return manifest

    def _folder(self, urls: Sequence[str] | None) -> Path:
        if self.index is not None:
            return self.index
        assert self.urls is not None
        urls = urls or expand_shards(self.urls)
        if not is_local(urls[0]):
            raise ValueError(
                f"Shards: {hide_secrets(urls[0])} is not local, so its index needs a folder of its own. Name it "
                "with `index`, and make it with `internimage shards index`."
            )
        return index_folder(urls)


def index_folder(urls: Sequence[str]) -> Path:
    """Return where the index of local shards is, unless a user says otherwise: `index` beside the first of them.

    Where they are not all `*.tar` of that folder, as training shards beside validation shards, the name tells which
    they are: two sources must not share an index.
    """
    paths = [_absolute(url) for url in urls]
    folder = Path(paths[0]).parent
    if set(paths) == {str(path) for path in folder.glob("*.tar")}:
        return folder / INDEX
    names = "\n".join(os.path.relpath(path, folder) for path in paths)
    return folder / f"{INDEX}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _lists(manifest: Manifest, urls: Sequence[str]) -> bool:
    """Tell whether a manifest is of these shards."""
    return len(manifest.counts) == len(urls) and all(
        manifest.url(s) == (_absolute(url) if is_local(url) else url) for s, url in enumerate(urls)
    )


def _absolute(url: str) -> str:
    return os.path.normpath(Path(local_path(url)).absolute())
