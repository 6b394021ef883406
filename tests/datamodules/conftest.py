from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((60, 45), Image.Resampling.BICUBIC).save(folder / f"{number:03}.jpg", quality=95)


@pytest.fixture
def class_folders(tmp_path):
    """root/train and root/val with classes cat, dog, owl: 8 and 3 images each."""
    root = tmp_path / "images"
    for number, name in enumerate(["cat", "dog", "owl"]):
        write_images(root / "train" / name, 8, seed=number)
        write_images(root / "val" / name, 3, seed=10 + number)
    return root
