"""Images sorted into one folder per class."""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import find_classes, make_dataset

from datamodules.classification import ClassificationData, Split
from datamodules.sources import IMAGE_SUFFIXES, FileSource


class ImageFolders(ClassificationData):
    """Class folders: ImageNet-1K's layout, or one folder that is split here.

    Labels follow the sorted names of the class folders. Images may lie in subfolders of them.

    Args:
        root: Holds `train/<class>/` and `val/<class>/`; with `val_fraction`, holds `<class>/` directly.
        num_classes: Number of class folders; checked in `setup`.
        val_fraction: Share of each class that is held out for validation. The choice depends on `seed` and on the
            images' names: the same on every machine, and nearly the same when images are added.
        **options: Further arguments of `ClassificationData`.

    Raises:
        ValueError: `val_fraction` outside (0, 1).
    """

    def __init__(self, root: Path, num_classes: int = 1000, val_fraction: float | None = None, **options: Any) -> None:
        super().__init__(num_classes, **options)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"ImageFolders: val_fraction={val_fraction}, expected a share between 0 and 1, or null.")
        self.root = root
        self.val_fraction = val_fraction

    def open_split(self, split: Split) -> FileSource:
        folder = self._folder(split)
        classes = self._classes(folder)
        if len(classes) != self.num_classes:
            raise ValueError(
                f"ImageFolders: {folder} has {len(classes)} class folders, num_classes={self.num_classes}."
            )
        if split == "val" and self.val_fraction is None:
            self._check_same_classes(classes)
        ids = {name: label for label, name in enumerate(classes)}
        try:
            samples = make_dataset(folder, ids, extensions=IMAGE_SUFFIXES)
        except FileNotFoundError as error:  # torchvision's text names the empty classes
            raise FileNotFoundError(f"ImageFolders: {folder}: {error}") from error
        files = [(Path(path).relative_to(folder).as_posix(), label) for path, label in samples]
        if self.val_fraction is not None:
            held_out = self._held_out(files, self.val_fraction)
            files = [file for file in files if (file[0] in held_out) == (split == "val")]
        return FileSource(folder, files)

    def find_class_names(self) -> list[str] | None:
        folder = self._folder("val")
        return self._classes(folder) if folder.is_dir() else None

    def _folder(self, split: Split) -> Path:
        return self.root / split if self.val_fraction is None else self.root

    def _classes(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            hint = f" With class folders directly in {self.root}, set val_fraction." if self.root.is_dir() else ""
            raise FileNotFoundError(f"ImageFolders: {folder} does not exist.{hint}")
        try:
            names: list[str] = find_classes(folder)[0]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"ImageFolders: {folder} has no class folders.") from error
        return names

    def _check_same_classes(self, val_classes: list[str]) -> None:
        # Evaluation alone needs no training images.
        if (self.root / "train").is_dir() and (train := self._classes(self.root / "train")) != val_classes:
            different = sorted(set(train) ^ set(val_classes))
            raise ValueError(
                f"ImageFolders: train and val in {self.root} have different class folders, so their labels would "
                f"disagree: {', '.join(different[:5])} in one of them only."
            )

    def _held_out(self, files: list[tuple[str, int]], fraction: float) -> set[str]:
        by_label: dict[int, list[str]] = defaultdict(list)
        for path, label in files:
            by_label[label].append(path)
        held_out: set[str] = set()
        for paths in by_label.values():
            if len(paths) < 2:
                raise ValueError(
                    f"ImageFolders: the class of {self.root / paths[0]} has one image; val_fraction needs two, one to "
                    "train on and one to hold out."
                )
            paths.sort(key=lambda path: hashlib.sha256(f"{self.seed}/{path}".encode()).digest())
            count = min(max(round(fraction * len(paths)), 1), len(paths) - 1)
            held_out.update(paths[:count])
        return held_out
