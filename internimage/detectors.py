"""Which detector a state dict holds, read off its keys, which may be the authors' or ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from internimage.dense import count_classes, plural
from internimage.layouts import Layout
from internimage.weight_files import WeightFile

Family = Literal["R-CNN", "DINO"]

_FAMILIES: dict[Family, re.Pattern[str]] = {
    "R-CNN": re.compile(r"roi_head\.|rpn_head\.|roi\.|rpn\."),
    "DINO": re.compile(r"(bbox_head\.)?transformer\."),
}
_LAYERS: dict[Family, re.Pattern[str]] = {
    "R-CNN": re.compile(r"(?:roi_head\.bbox_head|roi\.box_heads)\.(\d+)\."),
    "DINO": re.compile(r"(?:bbox_head\.)?transformer\.decoder(?:\.layers)?\.(\d+)\."),
}
_CLASSES: dict[Family, re.Pattern[str]] = {
    "R-CNN": re.compile(r"(roi_head\.bbox_head(\.0)?\.fc_cls|roi\.box_heads\.0\.classes)\.weight"),
    "DINO": re.compile(r"(bbox_head\.cls_branches|transformer\.classes)\.0\.weight"),
}
_MASKS = re.compile(r"roi_head\.mask_head\.|roi\.mask_heads\.")
_PARTS = re.compile(r"(?:bbox_head\.)?transformer\..*\bffn(?:s\.0\.fc1_|\.fc1\.)(\d+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Detector:
    """What tells one detector from another.

    Args:
        family: Two-stage, or DINO.
        num_backbones: 2 in a composite.
        num_layers: Stages of boxes in an R-CNN, decoder layers in a DINO.
        num_classes: Without the background; None where the class layer is missing.
        masks: Predicts masks.
        ffn_parts: Parts that the feed-forward networks of a DINO are stored in.
    """

    family: Family
    num_backbones: int
    num_layers: int
    num_classes: int | None
    masks: bool
    ffn_parts: int

    def fits(self, built: "Detector") -> bool:
        """Whether this differs from `built` in no more than classes, masks and the form of the feed-forward networks.

        One backbone goes into both of a composite.
        """
        num_backbones = built.num_backbones if self.num_backbones == 1 else self.num_backbones
        return replace(self, num_backbones=num_backbones, num_classes=0, masks=False, ffn_parts=1) == replace(
            built, num_classes=0, masks=False, ffn_parts=1
        )

    def __str__(self) -> str:
        classes = count_classes(self.num_classes)
        if self.family == "DINO":
            parts = f", feed-forward networks in {self.ffn_parts} parts" if self.ffn_parts > 1 else ""
            return f"{'CB-' * (self.num_backbones > 1)}DINO ({plural(self.num_layers, 'layer')}, {classes}{parts})"
        if self.num_layers > 1:
            return f"Cascade {'Mask ' * self.masks}R-CNN ({self.num_layers} stages, {classes})"
        return f"{'Mask' if self.masks else 'Faster'} R-CNN ({classes})"


def find_detector(shapes: Mapping[str, Sequence[int]], num_backbones: int) -> Detector | None:
    """Recognise a detector by the shapes of its tensors, or return None.

    Args:
        shapes: Key, without anything in front of the detector's own, to shape.
        num_backbones: Of the detector.
    """
    family = next((name for name, start in _FAMILIES.items() if any(map(start.match, shapes))), None)
    if family is None:
        return None
    classes = next((shape[0] for key, shape in shapes.items() if _CLASSES[family].fullmatch(key)), None)
    if classes is not None and family == "R-CNN":
        classes -= 1
    return Detector(
        family=family,
        num_backbones=num_backbones,
        num_layers=_count(_LAYERS[family], shapes),
        num_classes=classes,
        masks=any(map(_MASKS.match, shapes)),
        ffn_parts=_count(_PARTS, shapes),
    )


def detector_of(layout: Layout, file: WeightFile) -> Detector | None:
    """Recognise the detector around the backbone that `layout` found in a file, or return None."""
    shapes = {key: file.tensors[name].shape for key, name in layout.model_keys().items()}
    return find_detector(shapes, layout.num_backbones)


def _count(pattern: re.Pattern[str], keys: Mapping[str, object]) -> int:
    """Count from the highest number that the pattern finds; 1 where there is none."""
    return 1 + max((int(match[1]) for key in keys if (match := pattern.match(key))), default=0)
