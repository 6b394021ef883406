"""Coloured shapes with captions, in tiny shards: for tests and smoke runs, no downloads needed."""

import getpass
import io
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.webdataset.commands.write import write_shard
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.text import ClipTokenizer, Tokenizer
from datamodules.webdataset.transforms import FastTrain, ImageTransform

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 150, 40),
    "blue": (40, 60, 210),
    "yellow": (230, 210, 40),
    "purple": (140, 40, 160),
    "orange": (240, 130, 20),
}
GROUNDS = {"white": (240, 240, 240), "grey": (150, 150, 150), "brown": (110, 75, 50), "black": (20, 20, 20)}
NUM_CAPTIONS = len(COLOURS) * len(GROUNDS)
SHARD_SAMPLES = 48
# Side of the square images, pixels.
SIDE = 80

# The ground stays in sight, and the shape stays whole enough to be told.
_TRAIN = FastTrain(scale=(0.7, 1.0))
_TOKENIZER = ClipTokenizer(context_length=12)


class SyntheticPairs(ImageTextShards):
    """Images of one shape each with their caption, "a red shape on white", and the colour of the shape as their class.

    Images of the same caption differ by form, place, size and noise. There are 24 captions and 6 classes.

    Args:
        root: Folder for the shards, which are written once, the same bytes each time. None: one in the system's folder
            for temporary files.
        num_samples: Training images.
        num_val_samples: Validation images, none of them a training image.
        image_size: Side of the square images, pixels.
        batch_size: Pairs per device and step.
        num_workers: Loader processes per device.
        train_transform: Random changes of training images.
        tokenizer: From texts to token ids.
        **options: Further arguments of `ImageTextShards`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        root: Path | None = None,
        num_samples: int = 8 * NUM_CAPTIONS,
        num_val_samples: int = NUM_CAPTIONS,
        image_size: int = 64,
        batch_size: int = 16,
        num_workers: int = 0,
        train_transform: ImageTransform = _TRAIN,
        tokenizer: Tokenizer = _TOKENIZER,
        **options: Any,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("num_val_samples", num_val_samples)):
            if value < 1:
                raise ValueError(f"SyntheticPairs: {name}={value}, expected at least 1.")
        root = root or Path(tempfile.gettempdir()) / f"internimage_{getpass.getuser()}"
        # Other numbers are other shards.
        self.folder = root / f"synthetic_pairs_{num_samples}_{num_val_samples}"
        self.num_samples, self.num_val_samples = num_samples, num_val_samples
        super().__init__(
            train=Shards(urls=str(self.folder / "train"), name="shapes"),
            val=Shards(urls=str(self.folder / "val"), name="shapes_val"),
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            train_transform=train_transform,
            tokenizer=tokenizer,
            class_names=list(COLOURS),
            templates=[f"a {{}} shape on {ground}" for ground in GROUNDS],
            **options,
        )

    def prepare_data(self) -> None:
        if not self.folder.is_dir():
            self._write()
        super().prepare_data()

    def _write(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # As a whole or not at all: another process may be about to do the same.
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished_", dir=self.folder.parent))
        try:
            write_pairs(unfinished / "train", self.num_samples)
            write_pairs(unfinished / "val", self.num_val_samples, first=self.num_samples)
            for name in ("train", "val"):
                Shards(urls=str(unfinished / name)).prepare()
            unfinished.rename(self.folder)
        except OSError:
            if not self.folder.is_dir():
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def write_pairs(folder: Path, num_samples: int, first: int = 0) -> None:
    """Write samples of the endless sequence to `<folder>/00000.tar` and so on, each `jpg`, `txt` and `cls`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(first, first + num_samples, SHARD_SAMPLES)):
        stop = min(start + SHARD_SAMPLES, first + num_samples)
        write_shard(folder / f"{number:05}.tar", _samples(range(start, stop)))


def _samples(numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in numbers:
        label = number % len(COLOURS)
        colour, ground = list(COLOURS)[label], list(GROUNDS)[number // len(COLOURS) % len(GROUNDS)]
        caption = f"a {colour} shape on {ground}"
        yield f"{number:06}", {"jpg": _draw(number, colour, ground), "txt": caption.encode(), "cls": b"%d" % label}


def _draw(number: int, colour: str, ground: str) -> bytes:
    """Return the JPEG file of a sample."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    brush = ImageDraw.Draw(image)
    side = int(random.integers(SIDE // 2, SIDE * 3 // 4))
    left, top = (int(place) for place in random.integers(SIDE - side, size=2))
    right, bottom = left + side - 1, top + side - 1
    form = random.integers(3)
    if form == 0:
        brush.ellipse((left, top, right, bottom), fill=COLOURS[colour])
    elif form == 1:
        brush.rectangle((left, top, right, bottom), fill=COLOURS[colour])
    else:
        brush.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
    pixels = np.asarray(image) + random.integers(-8, 9, (SIDE, SIDE, 3))
    stored = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stored, "jpeg", quality=90)
    return stored.getvalue()
