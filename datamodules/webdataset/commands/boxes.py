"""Detection data as shards: what `datamodules.detection.shards` reads, from COCO's annotation format."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamodules.detection.coco import CocoSource
from datamodules.detection.shards import CATEGORIES, to_json
from datamodules.webdataset.commands.entries import Entry


class BoxEntries:
    """COCO detection: boxes, labels and masks of an image are its `json`; `categories.json` names the classes.

    Args:
        annotations: JSON file.
        images: Folder that the file names are relative to.

    Raises:
        FileNotFoundError: The JSON file or an image is missing.
        ValueError: It is not COCO's format.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        # As for evaluation: all objects go into the shards, and whoever trains on them leaves out the unfit.
        self._source = CocoSource(annotations, images)

    def __iter__(self) -> Iterator[Entry]:
        for index in range(len(self._source)):
            yield Entry(self._source.name(index), {"json": json.dumps(to_json(self._source, index))})

    def notes(self) -> Mapping[str, Any]:
        return {CATEGORIES: asdict(self._source.categories)}
