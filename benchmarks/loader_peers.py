"""What `benchmarks.loader` compares with, on the same shards with the same augmentation.

Of its peers, webdataset is a dependency of this project; litdata is not, and is left out where it is not installed. The
pipeline in the manner of open_clip follows the stages of its `data.py` on webdataset 1, since its own function needs a
webdataset below 1; a flip is added to its transform. The peers' images are float32 and normalised, litdata's uint8.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import io, transforms
from torchvision.transforms import v2

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD

SCALE = (0.08, 1.0)
# Samples in open_clip's shuffle buffer are 5,000; no more than there are here.
BUFFER = 5000
# Yields `(images, texts)` of one pass over the shards, in one worker.
Loader = DataLoader[Any]


def pil_transform(image_size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return open_clip's transform for training, with a flip."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            to_rgb,
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def first_row(tokenizer: SimpleTokenizer, text: str) -> torch.Tensor:
    return tokenizer(text)[0]


def open_clip_like(urls: list[str], image_size: int, batch_size: int) -> Loader:
    """Return the stages of open_clip's training pipeline."""
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.detshuffle(bufsize=2000, initial=500, seed=0),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=BUFFER, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=pil_transform(image_size), text=partial(first_row, SimpleTokenizer())),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size, partial=True),
    )
    return worker_loader(pipeline)


def fluent(urls: list[str], image_size: int, batch_size: int) -> Loader:
    """Return webdataset's fluent pipeline, as its documentation writes it."""
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(pil_transform(image_size), partial(first_row, SimpleTokenizer()))
        .batched(batch_size, partial=True)
    )
    return worker_loader(pipeline)


def worker_loader(pipeline: Any) -> Loader:
    return DataLoader(pipeline, batch_size=None, num_workers=1, persistent_workers=True)


def has_litdata() -> bool:
    return importlib.util.find_spec("litdata") is not None


def copy_to_litdata(urls: list[str], folder: Path) -> None:
    """Write the pairs of the shards as litdata's chunks of the same number of bytes."""
    import litdata

    litdata.optimize(
        fn=read_shard,
        inputs=urls,
        output_dir=str(folder),
        chunk_bytes=max(Path(url).stat().st_size for url in urls),
        num_workers=1,
    )


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    for sample in webdataset.WebDataset(url, shardshuffle=False, empty_check=False):
        yield {"image": sample["jpg"], "text": sample["txt"].decode()}


def litdata_loader(folder: Path, image_size: int, batch_size: int) -> Loader:
    """Return litdata's loader with torchvision's decoder and transforms, uint8 out."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(folder), shuffle=True, drop_last=False, transform=LitdataTransform(image_size)
    )
    loader: Loader = litdata.StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=1, persistent_workers=True, drop_last=False
    )
    return loader


class LitdataTransform:
    """From a pair of litdata's chunks to a row of the batch.

    Args:
        image_size: Side of the square image, pixels.
    """

    def __init__(self, image_size: int) -> None:
        interpolation = v2.InterpolationMode.BICUBIC
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=SCALE, interpolation=interpolation, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.tokenizer = SimpleTokenizer()

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        data = torch.frombuffer(bytearray(sample["image"]), dtype=torch.uint8)
        image = io.decode_jpeg(data, mode=io.ImageReadMode.RGB)
        return self.augment(image), self.tokenizer(sample["text"])[0]
