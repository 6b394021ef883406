"""What shards are made from: image files with their labels, captions or JSON, from folders, lists and COCO files.

Each is walked anew for every pass over it, so that millions of files take no memory.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datamodules.sources import find_images

# Number of a file's line, and what it says by column.
Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample to be: where its image is, and its other parts.

    Args:
        image: Path of the image file.
        parts: Text by extension: a class as `cls`, a caption as `txt`, anything else as `json`.
    """

    image: str
    parts: Mapping[str, str]


class Entries(Protocol):
    """What `make` reads twice: once to count and check, once to write."""

    def __iter__(self) -> Iterator[Entry]: ...

    def notes(self) -> Mapping[str, Any]:
        """Return the content of JSON files that go beside the shards, by name."""


class FolderEntries:
    """Class folders, `<folder>/<class>/**/<image>`; labels follow the sorted names, which `classes.json` lists.

    Args:
        folder: Holds the class folders.

    Raises:
        FileNotFoundError: It does not exist or has no subfolders.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not self.classes:
            found = "has no class folders" if folder.is_dir() else "is no folder"
            raise FileNotFoundError(f"shards make: {folder} {found}; expected {folder}/<class>/<image>.")

    def __iter__(self) -> Iterator[Entry]:
        for label, name in enumerate(self.classes):
            for path in find_images(self._folder / name):
                yield Entry(str(path), {"cls": str(label)})

    def notes(self) -> Mapping[str, Any]:
        return {"classes.json": self.classes}


class ListEntries:
    """A list of images with captions, labels or both.

    `.csv` and `.tsv` have a header line; `.jsonl` has one object a line; any other is text, `path label` a line, the
    label after the last blank, empty lines and lines that begin with # skipped.

    Args:
        path: The list, UTF-8.
        root: What the images' paths are relative to; None takes the list's folder.
        columns: Names of the columns of path, caption and label. Of the last two one may be missing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: While walking: a line lacks its path, its label is no number, or it has neither caption nor label.
    """

    def __init__(
        self, path: Path, root: Path | None = None, columns: tuple[str, str, str] = ("path", "caption", "label")
    ) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"shards make: {path} does not exist.")
        self._path, self._root, self._columns = path, root or path.parent, columns

    def __iter__(self) -> Iterator[Entry]:
        name, caption, label = self._columns
        for line, row in self._rows():
            where = f"shards make: {self._path}:{line}"
            # Spreadsheets write missing values as empty ones.
            image, text, number = (None if row.get(column) in (None, "") else row[column] for column in self._columns)
            if not isinstance(image, str):
                raise ValueError(f"{where}: no {name!r} in {_shown(row)}. Name the column with --path-column.")
            if text is None and number is None:
                raise ValueError(
                    f"{where}: neither {caption!r} nor {label!r} in {_shown(row)}. Name the columns with "
                    "--caption-column and --label-column."
                )
            if number is not None and not str(number).strip().isdecimal():
                raise ValueError(f"{where}: {label!r} is {number!r}, expected the number of a class, from 0.")
            parts = {} if text is None else {"txt": str(text)}
            yield Entry(str(self._root / image), parts if number is None else parts | {"cls": str(number).strip()})

    def notes(self) -> Mapping[str, Any]:
        return {}

    def _rows(self) -> Iterable[Row]:
        # Spreadsheets begin a file with a mark of its encoding.
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            if self._path.suffix in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="," if self._path.suffix == ".csv" else "\t")
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, start=1):
                entry = line.strip()
                if self._path.suffix == ".jsonl" and entry:
                    yield number, self._object(number, entry)
                elif entry and not entry.startswith("#"):
                    image, _, label = entry.rpartition(" ")
                    yield number, dict(zip(self._columns, (image.rstrip(), None, label), strict=True))

    def _object(self, number: int, line: str) -> Mapping[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"shards make: {self._path}:{number} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"shards make: {self._path}:{number}: a JSON {type(found).__name__}, expected an object.")
        return found


class CaptionEntries:
    """COCO captions: the first caption of an image is its `txt`, and all are `captions` in its `json`.

    Args:
        annotations: JSON file with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).
        images: Folder that the file names are relative to.

    Raises:
        ValueError: It is not of that form. Images without a caption are left out.
    """

    def __init__(self, annotations: Path, images: Path) -> None:
        self._images = images
        content = load_object(annotations)
        captions: dict[Any, list[str]] = {}
        try:
            for annotation in content["annotations"]:
                captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
            self._captions = [
                (image["file_name"], image["id"], captions[image["id"]])
                for image in content["images"]
                if image["id"] in captions
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"shards make: {annotations}: {type(error).__name__} {error}; expected `images` with `id` and "
                "`file_name`, and `annotations` with `image_id` and `caption`."
            ) from error

    def __iter__(self) -> Iterator[Entry]:
        for name, number, captions in self._captions:
            more = json.dumps({"captions": captions, "image_id": number})
            yield Entry(str(self._images / name), {"txt": captions[0], "json": more})

    def notes(self) -> Mapping[str, Any]:
        return {}


def load_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"shards make: {path} does not exist.") from error
    except ValueError as error:
        raise ValueError(f"shards make: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"shards make: {path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def _shown(row: Mapping[str, Any]) -> str:
    text = str(dict(row))
    return text if len(text) <= 200 else f"{text[:200]} ..."
