"""Images named by list files: ImageNet-22K's text lists, iNaturalist 2018's JSON annotations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.classification import ClassificationData, Split
from datamodules.sources import FileSource


class ListFiles(ClassificationData):
    """Images and labels from one list per split.

    A list that ends in `.json` is an annotation file with `images` (`id`, `file_name`), `annotations` (`image_id`,
    `category_id`) and `categories` (`id`, `name`), as iNaturalist 2018 publishes. Any other is text: one
    `relative/path label` per line, the label after the last blank; empty lines and lines that begin with # are skipped.

    Args:
        root: What the paths in the lists are relative to.
        train_list: List of training images.
        val_list: List of validation images.
        num_classes: Labels must lie in [0, num_classes).
        **options: Further arguments of `ClassificationData`.
    """

    def __init__(self, root: Path, train_list: Path, val_list: Path, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.root = root
        self.lists: dict[Split, Path] = {"train": train_list, "val": val_list}

    def open_split(self, split: Split) -> FileSource:
        path = self.lists[split]
        if not path.is_file():
            raise FileNotFoundError(f"ListFiles: {split}_list: {path} does not exist.")
        source = FileSource(self.root, self._checked(path))
        if len(source) == 0:
            raise ValueError(f"ListFiles: {path} lists no images.")
        # Looking for all of them could take an hour. One is enough to find a wrong root; the rest count as corrupt.
        if not Path(source.name(0)).is_file():
            raise FileNotFoundError(f"ListFiles: {source.name(0)}, the first in {path}, does not exist. Check root.")
        return source

    def _checked(self, path: Path) -> Iterator[tuple[str, int]]:
        for place, image, label in _read_json(path) if path.suffix == ".json" else _read_text(path):
            if not 0 <= label < self.num_classes:
                raise ValueError(f"ListFiles: {path}:{place}: label {label}, expected 0 to {self.num_classes - 1}.")
            yield image, label

    def find_class_names(self) -> list[str] | None:
        path = self.lists["val"]
        if path.suffix != ".json" or not path.is_file():
            return None
        names = {entry["id"]: entry["name"] for entry in _load_json(path).get("categories", [])}
        return [names[label] for label in sorted(names)] if len(names) == self.num_classes else None


def _read_text(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (line number, image, label)."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            image, _, label = entry.rpartition(" ")
            image = image.rstrip()
            if not image or not label.isdecimal():
                raise ValueError(f"ListFiles: {path}:{number}: found {entry!r}, expected `relative/path label`.")
            yield str(number), image, int(label)


def _read_json(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (annotation, image, label)."""
    content = _load_json(path)
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            yield f"annotations[{number}]", names[annotation["image_id"]], int(annotation["category_id"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"ListFiles: {path}: missing {error}; expected `images` with `id` and `file_name`, and `annotations` with "
            "`image_id` and `category_id`."
        ) from error


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"ListFiles: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"ListFiles: {path} holds a JSON {type(content).__name__}, expected an object.")
    return content
