"""Look into weight files and change their format: `python -m internimage.convert inspect|convert|export`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from internimage.config import DEEP_STAGE, InternImageConfig
from internimage.detectors import detector_of
from internimage.hub import locate
from internimage.keys import official_to_ours, ours_to_official
from internimage.layouts import Layout, Shape, find_layout, shape_of
from internimage.segmentors import segmentor_of
from internimage.variants import CONFIGS
from internimage.weight_files import CheckpointError, WeightFile, read_weights, write_weights


def inspect(source: str | Path, *, ema: bool | None = None) -> str:
    """Describe a weight file: its container, keys, variant, detector or segmentor, classes, types, and the rest."""
    file = read_weights(locate(source), ema=ema)
    layout = find_layout(file)
    names = [*layout.backbone.values(), *layout.head.values()]
    tensors = [file.tensors[name] for name in names]
    classes = layout.head.get("head.weight", layout.head.get("fc.weight"))
    parts = [f"{part} ({count} tensors)" for part, count in layout.others.items()]
    rows = {
        "file": str(file.path),
        "entry": file.container or "none, a plain state dict",
        "keys": f"{layout.naming}, prefix {layout.prefix!r}",
        "variant": str(shape_of(layout, file)),
        "detector": str(detector_of(layout, file) or "none"),
        "segmentor": str(segmentor_of(layout, file) or "none"),
        "head": f"{file.tensors[classes].shape[0]} classes" if classes else "none",
        "tensors": f"{len(tensors)}, {sum(tensor.numel() for tensor in tensors):,} values, "
        + ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        "other parts": ", ".join(parts) or "none",
        "not weights": ", ".join(f"{name} ({why})" for name, why in file.skipped.items()) or "none",
    }
    return "\n".join(f"{title + ':':13}{text}" for title, text in rows.items())


def convert(source: str | Path, target: str | Path, *, ema: bool | None = None) -> Path:
    """Write the InternImage of a file under this project's keys: `backbone.` and, if the file has one, `head.`.

    Args:
        source: A path or `hub:NAME`.
        target: Ends in `.pth` or `.safetensors`.
        ema: As for `load_checkpoint`.

    Raises:
        CheckpointError: The file cannot be read, or has keys that no such model has.
    """
    config, official, file = _open(source, ema)
    tensors = {}
    for key, name in official.items():
        try:
            tensors[official_to_ours(key, config)] = file.tensors[name]
        except KeyError as error:
            raise _no_counterpart(file, name) from error
    return write_weights(target, tensors)


def export(source: str | Path, target: str | Path, *, dense: bool = False, ema: bool | None = None) -> Path:
    """Write the InternImage of a file under the authors' keys.

    Args:
        source: A path or `hub:NAME`; checkpoints of this project and any format that it reads.
        target: Ends in `.pth` (entry `model`, or `state_dict` if dense) or `.safetensors`.
        dense: As in the authors' detectors and segmentors: `backbone.` in front, no head.
        ema: As for `load_checkpoint`.

    Raises:
        CheckpointError: The file cannot be read, or has keys that no such model has.
    """
    config, official, file = _open(source, ema)
    tensors = {}
    for key, name in official.items():
        try:
            ours = official_to_ours(key, config)
        except KeyError as error:
            raise _no_counterpart(file, name) from error
        if not (dense and ours.startswith("head.")):
            tensors[ours_to_official(ours, config, dense=dense)] = file.tensors[name]
    return write_weights(target, tensors, container="state_dict" if dense else "model")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m internimage.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("inspect", "describe a weight file"),
        ("convert", "write its InternImage under this project's keys"),
        ("export", "write its InternImage under the authors' keys"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("source", help="a path, or hub:NAME to download a published file")
        if name != "inspect":
            command.add_argument("target", help="ends in .pth or .safetensors")
        if name == "export":
            command.add_argument(
                "--dense", action="store_true", help="as in detectors and segmentors: `backbone.` in front, no head"
            )
        command.add_argument(
            "--ema", action=argparse.BooleanOptionalAction, help="the averaged weights; --no-ema: as trained"
        )
    options = vars(parser.parse_args(args))
    actions: dict[str, Callable[..., object]] = {"inspect": inspect, "convert": convert, "export": export}
    try:
        sys.stdout.write(f"{actions[options.pop('command')](**options)}\n")
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _open(source: str | Path, ema: bool | None) -> tuple[InternImageConfig, dict[str, str], WeightFile]:
    file = read_weights(locate(source), ema=ema)
    layout = find_layout(file)
    config = _naming_config(file, layout, shape_of(layout, file))
    backbone, head = layout.official_keys(config)
    return config, backbone | head, file


def _naming_config(file: WeightFile, layout: Layout, shape: Shape) -> InternImageConfig:
    """Return a config of the file's depths, norm and inner post-norms, which is all that names depend on."""
    if shape.variant:
        return CONFIGS[shape.variant]
    start = f"stages.{DEEP_STAGE}.post_norms."
    blocks = {int(key.removeprefix(start).partition(".")[0]) for key in layout.backbone if key.startswith(start)}
    if any(key.startswith(f"levels.{DEEP_STAGE}.post_norms.") for key in layout.backbone):
        raise CheckpointError(
            f"{file.path} holds {shape} with inner post-norms, whose blocks the authors' keys do not tell. Load it "
            "into a model of that config with load_checkpoint, and export that."
        )
    batch_norm = {"stem.norm1.running_mean", "patch_embed.norm1.0.running_mean"} & layout.backbone.keys()
    first, second, third, last = shape.depths
    return InternImageConfig(
        channels=shape.channels,
        depths=(first, second, third, last),
        groups=(1, 1, 1, 1),
        post_norm_blocks=tuple(sorted(blocks)),
        norm="BN" if batch_norm else "LN",
        strict=False,
    )


def _no_counterpart(file: WeightFile, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file.path}: {name} has no counterpart. Load it with load_checkpoint and allow_unexpected."
    )


if __name__ == "__main__":
    sys.exit(main())
