"""Which segmentor a state dict holds, read off its keys, which may be the authors' or ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from internimage.dense import count_classes
from internimage.layouts import Layout
from internimage.weight_files import WeightFile

Family = Literal["UPerNet", "SegFormer", "Mask2Former"]

_FAMILIES: dict[Family, re.Pattern[str]] = {
    "Mask2Former": re.compile(
        r"decode_head\.(pixel_decoder|transformer_decoder|mask_embed|cls_embed|query_embed)\."
        r"|pixel_decoder\.|decoder\.(decoder|class_predictor|queries_embedder)\."
    ),
    "UPerNet": re.compile(
        r"decode_head\.(psp_modules|bottleneck|lateral_convs|fpn_convs|fpn_bottleneck)\."
        r"|head\.(pooling|laterals|outputs|fuse_outputs)\."
    ),
    "SegFormer": re.compile(r"decode_head\.(convs|fusion_conv)\.|head\.(levels|fuse)\."),
}
_CLASSES = re.compile(r"(decode_head\.(conv_seg|cls_embed)|head\.classifier|decoder\.class_predictor)\.weight")
_QUERIES = re.compile(r"(decode_head\.query_embed|decoder\.queries_embedder)\.weight")
_AUXILIARY = re.compile(r"auxiliary(_head)?\.")


@dataclass(frozen=True, kw_only=True)
class Segmentor:
    """What tells one segmentor from another.

    Args:
        family: The head.
        num_classes: Length of the scores at a pixel, without "no object"; None where the class layer is missing.
        queries: Number and channels of the queries of a Mask2Former; None where they are missing, or there are none.
        auxiliary: A UPerNet has its auxiliary head.
    """

    family: Family
    num_classes: int | None
    queries: tuple[int, int] | None
    auxiliary: bool

    def fits(self, built: "Segmentor") -> bool:
        """Whether this differs from `built` in no more than classes and the auxiliary head."""
        known = self.queries is not None and built.queries is not None
        return self.family == built.family and (not known or self.queries == built.queries)

    def __str__(self) -> str:
        classes = count_classes(self.num_classes)
        if self.queries is not None:
            number, channels = self.queries
            return f"{self.family} ({number} queries of {channels} channels, {classes})"
        without = " without auxiliary head" if self.family == "UPerNet" and not self.auxiliary else ""
        return f"{self.family}{without} ({classes})"


def find_segmentor(shapes: Mapping[str, Sequence[int]]) -> Segmentor | None:
    """Recognise a segmentor by the shapes of its tensors, or return None.

    Args:
        shapes: Key, without anything in front of the segmentor's own, to shape.
    """
    family = next((name for name, start in _FAMILIES.items() if any(map(start.match, shapes))), None)
    if family is None:
        return None
    classes = next((shape[0] for key, shape in shapes.items() if _CLASSES.fullmatch(key)), None)
    if classes is not None and family == "Mask2Former":
        classes -= 1
    return Segmentor(
        family=family,
        num_classes=classes,
        queries=next(((shape[0], shape[1]) for key, shape in shapes.items() if _QUERIES.fullmatch(key)), None),
        auxiliary=any(map(_AUXILIARY.match, shapes)),
    )


def segmentor_of(layout: Layout, file: WeightFile) -> Segmentor | None:
    """Recognise the segmentor around the backbone that `layout` found in a file, or return None."""
    return find_segmentor({key: file.tensors[name].shape for key, name in layout.model_keys().items()})
