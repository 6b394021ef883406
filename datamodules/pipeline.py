"""The one place that knows albumentations (and timm's PIL augmentations): settings become functions on images.

albumentations runs the order of the steps, their probabilities, flips and padding. Everything that resamples pixels
goes through PIL, as in the authors' code: OpenCV's bicubic does not antialias, so its pixels differ visibly.

Randomness: a pipeline takes a seed, and nothing else decides what it does. timm draws from the global generators of
`random`, NumPy and torch; they are seeded for the call and put back afterwards.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from datamodules.transforms import EvalTransform, ImageDoesNotFitError, TrainTransform

# albumentations otherwise asks the package index for a newer version, with a two-second wait, at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation


class Pipeline:
    """Steps on the decoded image, normalisation, and optional erasing.

    Args:
        steps: albumentations transforms on `(H, W, 3)` uint8.
        image_size: Side that the steps must leave, pixels.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.
        erasing: Probability of random erasing.
    """

    def __init__(
        self,
        steps: Sequence[A.BasicTransform],
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        erasing: float = 0.0,
    ) -> None:
        self.image_size = image_size
        self._steps = A.Compose(list(steps))
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)
        self._erase = (
            RandomErasing(erasing, mode="pixel", max_count=1, device="cpu")  # type: ignore[no-untyped-call]
            if erasing > 0
            else None
        )

    def __call__(self, image: Image.Image, seed: np.random.SeedSequence | None = None) -> Tensor:
        """Turn an RGB image into `(3, image_size, image_size)` float32; None suits pipelines without randomness.

        Raises:
            ImageDoesNotFitError: The image does not fit into `image_size`, and the pipeline only pads.
        """
        if seed is None:
            return self._run(image)
        python, numpy, torch_, albumentations = (int(word) for word in seed.generate_state(4))
        # One generator shared by all steps. `set_random_seed` would give each step its own with the same seed, so that
        # two steps would draw the same numbers.
        self._steps.set_random_state(np.random.default_rng(albumentations), random.Random(albumentations))
        with _seeded(python, numpy, torch_):
            return self._run(image)

    def _run(self, image: Image.Image) -> Tensor:
        pixels = self._steps(image=np.asarray(image))["image"]
        if pixels.shape != (self.image_size, self.image_size, 3):
            raise ImageDoesNotFitError(
                f"image of {image.height} x {image.width} pixels does not fit into image_size={self.image_size}: "
                'fit="pad" never shrinks. Use fit="resize" or "crop", or a larger image_size.'
            )
        # The arithmetic of torchvision's ToTensor and Normalize, in their order, for equal bits.
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
        tensor = tensor.div_(255).sub_(self._mean).div_(self._std)
        return tensor if self._erase is None else self._erase(tensor)


class PILStep(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations ships no types
    """A function on PIL images as an albumentations step; the pixels keep their uint8 RGB form."""

    def __init__(self, function: Callable[[Image.Image], Image.Image]) -> None:
        super().__init__(p=1.0)
        self.function = function

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Apply the function to `(H, W, 3)` uint8."""
        return np.asarray(self.function(Image.fromarray(img)))


def train_pipeline(settings: TrainTransform, image_size: int) -> Pipeline:
    """Build what `TrainTransform` describes."""
    steps: list[A.BasicTransform]
    if settings.fit == "crop":
        crop = RandomResizedCropAndInterpolation(  # type: ignore[no-untyped-call]
            image_size, settings.scale, settings.ratio, interpolation="bicubic"
        )
        steps = [PILStep(crop)]
    else:
        steps = [_fit_whole(settings.fit, image_size, place="random")]
    if settings.flip > 0:
        steps.append(A.HorizontalFlip(p=settings.flip))
    if settings.rand_augment is not None:
        # Translation range and fill colour as timm's `create_transform` passes them, which the authors call.
        hints = {
            "translate_const": int(image_size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in settings.mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        steps.append(PILStep(_rand_augment(settings.rand_augment, hints)))
    return Pipeline(steps, image_size, settings.mean, settings.std, settings.erasing)


def eval_pipeline(settings: EvalTransform, image_size: int) -> Pipeline:
    """Build what `EvalTransform` describes."""
    if settings.fit == "crop":
        step = PILStep(partial(_centre, round(image_size / settings.crop_pct), image_size))
    else:
        step = _fit_whole(settings.fit, image_size, place="center")
    return Pipeline([step], image_size, settings.mean, settings.std)


def _rand_augment(policy: str, hints: dict[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """Return timm's RandAugment, in which to keep no bit is black again: Pillow 13 made that an error."""
    augment = rand_augment_transform(policy, hints)
    for operation in augment.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return augment  # type: ignore[no-any-return]


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = posterize(image, bits_to_keep, **options)  # type: ignore[no-untyped-call]
    return posterized


def _fit_whole(fit: str, image_size: int, *, place: str) -> A.BasicTransform:
    if fit == "pad":
        return A.PadIfNeeded(image_size, image_size, position=place, border_mode=cv2.BORDER_CONSTANT, fill=0)
    return PILStep(partial(_squeeze, image_size))


# Functions of the module, not closures: a worker process that is spawned gets its pipeline pickled.
def _centre(shorter_side: int, image_size: int, image: Image.Image) -> Image.Image:
    resized = F.resize(image, [shorter_side], InterpolationMode.BICUBIC)
    cropped: Image.Image = F.center_crop(resized, [image_size, image_size])
    return cropped


def _squeeze(image_size: int, image: Image.Image) -> Image.Image:
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


@contextmanager
def _seeded(python: int, numpy: int, torch_: int) -> Iterator[None]:
    """Seed the global generators inside, restore them after: a loader in the main process must not move them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - timm uses the global one
    random.seed(python)
    np.random.seed(numpy)  # noqa: NPY002
    torch.default_generator.manual_seed(torch_)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
