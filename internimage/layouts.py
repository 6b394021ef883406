"""Where the weights of an InternImage stand in a state dict, and under whose names."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from internimage.config import NUM_STAGES, InternImageConfig
from internimage.keys import head_keys, ours_to_official
from internimage.variants import CONFIGS
from internimage.weight_files import HOOK_PREFIX, CheckpointError, WeightFile

Naming = Literal["authors", "transformers", "ours"]

# The first convolution: wherever it stands, the backbone stands.
_ANCHORS: dict[Naming, str] = {"authors": "patch_embed.conv1.weight", "ours": "stem.conv1.weight"}
_TRANSFORMERS_SCALE = re.compile(r"\blayer_scale([12])$")
# A backbone in a larger model: the only one, or the first of a composite, in the authors' names or in ours.
_BACKBONE = re.compile(r"\bbackbone\.((cb_modules\.0|assist)\.)?$")
# What an objective of pretraining keeps beside the model, such as an average of the backbone to learn from.
_OBJECTIVE = "objective."
_BLOCK = re.compile(r"(?:levels|stages)\.(\d+)\.blocks\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a state dict.

    Args:
        naming: Whose names the keys are: the authors', those of their Hugging Face ports, or ours.
        prefix: What stands in front of the backbone's keys.
        backbone: Key relative to the backbone, without the renames of the ports -> key in the file.
        head: Key relative to the classifier (authors) or to its head (ours) -> key in the file. Empty without one.
        others: Other parts, for example `neck.*` -> number of tensors.
        names: Every key, without what wrappers put in front or inside -> key in the file.
    """

    naming: Naming
    prefix: str
    backbone: dict[str, str]
    head: dict[str, str]
    others: dict[str, int]
    names: dict[str, str]

    @property
    def root(self) -> str:
        """What stands in front of the keys of the model that the backbone is part of."""
        return _BACKBONE.sub("", self.prefix)

    @property
    def num_backbones(self) -> int:
        """2 in a composite, whose first backbone this layout describes."""
        return 2 if self.prefix != self.root and self.prefix != f"{self.root}backbone." else 1

    def model_keys(self) -> dict[str, str]:
        """Return the key in the model that the backbone is part of -> key in the file, without an average's copies."""
        inside = {key.removeprefix(self.root): name for key, name in self.names.items() if key.startswith(self.root)}
        return {key: name for key, name in inside.items() if not key.startswith(HOOK_PREFIX)}

    def official_keys(self, config: InternImageConfig) -> tuple[dict[str, str], dict[str, str]]:
        """Return the authors' key -> key in the file, of the backbone and of the head."""
        if self.naming != "ours":
            return dict(self.backbone), dict(self.head)
        return (
            {official_or_same(f"backbone.{key}", config): file_key for key, file_key in self.backbone.items()},
            {official_or_same(f"head.{key}", config): file_key for key, file_key in self.head.items()},
        )


@dataclass(frozen=True)
class Shape:
    """What tells one variant from another: the stem's width and the blocks per stage."""

    channels: int
    depths: tuple[int, ...]

    @property
    def variant(self) -> str | None:
        """T, S, B, L, XL, H or G, or None for another shape."""
        names = (name for name, config in CONFIGS.items() if self == Shape(config.channels, config.depths))
        return next(names, None)

    def __str__(self) -> str:
        name = f"InternImage-{self.variant}" if self.variant else "an InternImage"
        return f"{name} (channels {self.channels}, depths {'-'.join(map(str, self.depths))})"


def official_or_same(key: str, config: InternImageConfig) -> str:
    """Map our key to the authors'; a key that they have no counterpart of, as in a head of one's own, stays."""
    try:
        return ours_to_official(key, config)
    except KeyError:
        return key


def find_layout(file: WeightFile) -> Layout:
    """Find the backbone and the classification head in a file.

    Raises:
        CheckpointError: There is no InternImage, or more than one.
    """
    # DistributedDataParallel wraps the model, torch.compile any part of it.
    names = {key.removeprefix("module.").replace("_orig_mod.", ""): key for key in file.tensors}
    if len(names) < len(file.tensors):
        twice = next(key for key in file.tensors if key not in names.values())
        raise CheckpointError(
            f"{file.path} has {twice} twice, with and without the prefix of a wrapper. Save one of them."
        )
    found = [
        (naming, name.removesuffix(anchor))
        for name in names
        for naming, anchor in _ANCHORS.items()
        if (name == anchor or name.endswith(f".{anchor}")) and not name.startswith(_OBJECTIVE)
    ]
    if not found:
        raise CheckpointError(
            f"{file.path} has no InternImage: none of its {len(names)} keys ends in {' or '.join(_ANCHORS.values())}; "
            f"the first are {', '.join(sorted(names)[:3])}."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{file.path} has several InternImages, under {', '.join(repr(prefix) for _, prefix in found)}. Save the "
            "one that you mean to a file of its own."
        )
    naming, prefix = found[0]
    inside = {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}
    if naming == "ours":
        root = prefix.removesuffix("backbone.")
        head = {
            name.removeprefix(f"{root}head."): key for name, key in names.items() if name.startswith(f"{root}head.")
        }
        # Heads of other tasks bear the same name; only the classifier's ends in `fc`. A bare backbone has none.
        head = head if root != prefix and "fc.weight" in head else {}
    else:
        head = (
            {} if prefix.endswith("backbone.") else {name: key for name, key in inside.items() if name in head_keys()}
        )
        inside = {name: key for name, key in inside.items() if name not in head}
        if any(_TRANSFORMERS_SCALE.search(name) for name in inside) or prefix == "model.":
            naming = "transformers"
            inside = {_TRANSFORMERS_SCALE.sub(r"gamma\1", name): key for name, key in inside.items()}
    used = {*inside.values(), *head.values()}
    others = count_parts(name for name, key in names.items() if key not in used)
    return Layout(naming=naming, prefix=prefix, backbone=inside, head=head, others=others, names=names)


def count_parts(names: Iterable[str]) -> dict[str, int]:
    """Count keys by what they start with, for example `neck.*`."""
    # The copies of OpenMMLab's averaging hook are flat, `ema_backbone_levels_0_...`.
    return dict(
        Counter(f"{HOOK_PREFIX}*" if name.startswith(HOOK_PREFIX) else f"{name.partition('.')[0]}.*" for name in names)
    )


def shape_of(layout: Layout, file: WeightFile) -> Shape:
    """Read channels and depths off the tensors of the file that `layout` was found in.

    Raises:
        CheckpointError: The stem's second convolution is missing.
    """
    stem = layout.backbone.get("stem.conv2.weight", layout.backbone.get("patch_embed.conv2.weight"))
    if stem is None:
        raise CheckpointError(f"{file.path} lacks the stem's second convolution: it is incomplete.")
    depths = [0] * NUM_STAGES
    for key in layout.backbone:
        if (match := _BLOCK.match(key)) and int(match[1]) < NUM_STAGES:
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    return Shape(file.tensors[stem].shape[0], tuple(depths))
