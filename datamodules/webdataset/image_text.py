"""Images with texts from shards: LAION, YFCC15M, CC12M, or your own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.webdataset.captions import Captions
from datamodules.webdataset.data import ShardData, Use, as_list
from datamodules.webdataset.formats import Format, ImageLabelFormat, ImageTextFormat
from datamodules.webdataset.labels import Labels
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.text import ClipTokenizer, Tokenizer, class_prompts
from datamodules.webdataset.transforms import FastEval, FastTrain, ImageTransform
from datamodules.webdataset.writers import ImageWriter

# Crops that keep most of the image, since a text speaks of all of it.
_TRAIN = FastTrain(scale=(0.4, 1.0))
_EVAL = FastEval()
_TOKENIZER = ClipTokenizer()
_CAPTIONS = Captions()
_LABELS = Labels()


class ImageTextShards(ShardData):
    """Yield `ImageTextBatch`es: what `tasks.Pretraining` trains on and is evaluated on.

    Args:
        train: Sources of the training pairs.
        val: Sources of pairs for evaluation, each with a loader of its own. Labels that they have count too.
        zero_shot: Sources of labelled images without texts for zero-shot classification, each with a loader of its own.
        image_size: Side of the square images, pixels.
        train_transform: Random changes of training images; `TwoViews` makes two views of each.
        eval_transform: What happens to images in evaluation.
        tokenizer: From texts to token ids.
        captions: Which part of a sample is its text.
        class_names: Names of the classes for zero-shot classification, in the order of their labels, or a file of them:
            a JSON list, or text of one a line. None: labels are not read.
        templates: Prompts for each class, `{}` where the name goes; None takes a short list.
        labels: Where labels are.
        **options: Further arguments of `ShardData`.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        train: Shards | list[Shards] | None = None,
        val: Shards | list[Shards] | None = None,
        zero_shot: Shards | list[Shards] | None = None,
        image_size: int = 224,
        train_transform: ImageTransform = _TRAIN,
        eval_transform: ImageTransform = _EVAL,
        tokenizer: Tokenizer = _TOKENIZER,
        captions: Captions = _CAPTIONS,
        class_names: list[str] | Path | None = None,
        templates: list[str] | None = None,
        labels: Labels = _LABELS,
        **options: Any,
    ) -> None:
        super().__init__(train, val, **options)
        if image_size < 1:
            raise ValueError(f"ImageTextShards: image_size={image_size}, expected at least 1.")
        self.image_size = image_size
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.tokenizer, self.captions, self.labels = tokenizer, captions, labels
        self.class_names = _read_names(class_names)
        self.num_classes = len(self.class_names) if self.class_names else None
        self.templates = templates
        self.zero_shot = as_list(zero_shot)
        if self.zero_shot and not self.class_names:
            raise ValueError("ImageTextShards: zero_shot names labelled images, expected their class_names too.")

    @property
    def class_prompts(self) -> tuple[Tensor, Tensor] | None:
        """Token ids `(C, T, L)` of the T prompts of each class, and their lengths `(C, T)`."""
        if self.class_names is None:
            return None
        prompts = class_prompts(self.class_names, self.templates)
        ids, length = self.tokenizer.encode([text for texts in prompts for text in texts])
        num_classes, num_prompts = len(prompts), len(prompts[0])
        return ids.view(num_classes, num_prompts, -1), length.view(num_classes, num_prompts)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # What the tokenizer needs takes seconds to import: once here, and worker processes inherit it.
        self.tokenizer.encode([""])

    def form(self, use: Use) -> Format:
        transform = self.train_transform if use == "train" else self.eval_transform
        # Evaluation asks each image about one text, always the same.
        captions = self.captions if use == "train" else replace(self.captions, weights=None)
        return ImageTextFormat(
            writer=transform.build(self.image_size),
            tokenizer=self.tokenizer,
            captions=captions,
            num_classes=self.num_classes or 0,
            labels=self.labels,
        )

    def sources(self) -> list[Shards]:
        return [*super().sources(), *self.zero_shot]

    def eval_sources(self, use: Use) -> list[tuple[Shards, Format]]:
        sources = super().eval_sources(use)
        if use == "predict" or not self.zero_shot:
            return sources
        labelled = ImageLabelFormat(
            writer=self.eval_transform.build(self.image_size),
            num_classes=self.num_classes or 0,
            label_key=self.labels.key,
            label_map=self.labels.label_map,
        )
        return sources + [(shards, labelled) for shards in self.zero_shot]

    def predict_writer(self) -> ImageWriter:
        return self.eval_transform.build(self.image_size)


def _read_names(names: list[str] | Path | None) -> list[str] | None:
    if names is None or isinstance(names, list):
        return names
    content = Path(names).read_text(encoding="utf-8")
    if Path(names).suffix == ".json":
        listed: list[str] = json.loads(content)
        return listed
    return [line.strip() for line in content.splitlines() if line.strip()]
