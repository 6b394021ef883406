"""The arguments of `internimage shards`, and what each of its commands prints."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from datamodules.webdataset.commands.entries import CaptionEntries, Entries, FolderEntries, ListEntries
from datamodules.webdataset.manifest import Manifest, make_manifest
from datamodules.webdataset.sources import INDEX, Shards, index_folder
from datamodules.webdataset.urls import expand_shards, hide_secrets, is_local, local_path

EPILOG = (
    "SHARDS: a folder, a pattern as 'data/{00000..00331}.tar', a text file @shards.txt of one URL a line, or several."
)
# Told apart from the 1 of bad samples.
FAILED = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if `verify` found bad samples, 2 if a command failed."""
    options = _parser().parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="internimage shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "make shards from image files"
    _add_make(commands.add_parser("make", help=about, description=about))
    for name, about, run in (
        ("index", "list the samples of shards, so that they can be read in any order", _index),
        ("verify", "read every sample and say what is wrong with which; status 1 if anything is", _verify),
        ("stats", "say how many samples, bytes, parts, and of which sizes, from the index alone", _stats),
    ):
        command = commands.add_parser(name, help=about, description=about, epilog=EPILOG)
        command.set_defaults(run=run)
        command.add_argument("shards", metavar="SHARDS", nargs="+" if name == "index" else "*")
        command.add_argument("--workers", type=_count, default=0, help="processes (default: 0, this one)")
        if name == "index":
            command.add_argument("--out", type=Path, help="folder of the index (default: `index` beside local shards)")
            command.add_argument("--name", help="of the data set, in logs (default: that of the shards' folder)")
            command.add_argument("--checksums", action="store_true", help="of whole shards, which are read for it")
        else:
            command.add_argument("--index", type=Path, help="folder of the index (default: `index` beside the shards)")
        if name == "verify":
            command.add_argument("--decode", action="store_true", help="decode each image as well")
            command.add_argument(
                "--parts", nargs="+", default=[], help="what each sample has beside its image: txt cls"
            )
            command.add_argument(
                "--max-listed", type=_count, default=20, help="bad samples that are named (default: 20)"
            )
        if name == "stats":
            command.add_argument("--json", action="store_true", help="for programs")
    return parser


def _add_make(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, about, build in (
        ("folder", "class folders: IMAGES/<class>/<image>", lambda o: FolderEntries(o.images)),
        ("list", "a .csv, .tsv, .jsonl or text list of paths with captions, labels or both", _list_entries),
        ("coco-captions", "COCO captions", lambda o: CaptionEntries(o.annotations, o.images)),
        ("coco-detection", "COCO boxes and masks, for DetectionShards", _box_entries),
    ):
        command = kinds.add_parser(kind, help=about, description=about)
        command.set_defaults(run=_make, build=build)
        if kind == "list":
            command.add_argument("list", type=Path, help="the list")
            command.add_argument("--root", type=Path, help="what its paths are relative to (default: its folder)")
            for column in ("path", "caption", "label"):
                command.add_argument(f"--{column}-column", default=column, help=f"(default: {column})")
        elif kind != "folder":
            command.add_argument("annotations", type=Path, help="the JSON file")
        if kind != "list":
            command.add_argument("images", type=Path, help="folder of the images")
        _add_layout(command)
    about = "the stamps of Tux Paint: OUT/train and OUT/val, images with captions and categories"
    command = kinds.add_parser("tuxpaint", help=about, description=about)
    command.set_defaults(run=_make_tuxpaint)
    command.add_argument("--stamps", type=Path, help="folder of the stamps (default: where Debian's package puts them)")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")


def _add_layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="folder to write to; go on with one begun before")
    command.add_argument("--samples-per-shard", type=_count, default=10_000, help="at most (default: 10000)")
    command.add_argument("--max-bytes", type=_count, help="of a shard (default: no limit)")
    command.add_argument("--max-side", type=_count, help="shrink larger images to it (default: copy byte for byte)")
    command.add_argument("--quality", type=int, help="of the JPEGs that --max-side makes (default: 95)")
    command.add_argument("--no-decode", dest="decode", action="store_false", help="read only the images' headers")
    command.add_argument("--no-checksums", dest="checksums", action="store_false", help="leave them out of the index")
    command.add_argument("--workers", type=_count, default=0, help="processes (default: 0, this one)")


def _make(options: argparse.Namespace) -> int:
    from datamodules.webdataset.commands.make import Layout, make

    if options.quality is not None and options.max_side is None:
        raise ValueError("shards make: --quality has no effect without --max-side, since images are copied.")
    layout = Layout(
        samples_per_shard=options.samples_per_shard,
        max_bytes=options.max_bytes,
        max_side=options.max_side,
        decode=options.decode,
        **({} if options.quality is None else {"quality": options.quality}),
    )
    entries: Entries = options.build(options)
    made = make(entries, options.out, layout, num_workers=options.workers)
    _index_folder(options.out, checksums=options.checksums, num_workers=options.workers)
    skipped = f", {made.skipped} images skipped (listed in {options.out}/skipped)" if made.skipped else ""
    kept = f", {made.kept} of them from before" if made.kept else ""
    sys.stdout.write(f"{options.out}: {made.samples} samples in {made.shards} shards{kept}{skipped}\n")
    return 0


def _make_tuxpaint(options: argparse.Namespace) -> int:
    from datamodules.webdataset.tuxpaint import STAMPS, write_tuxpaint

    train, val = write_tuxpaint(options.out, stamps=options.stamps or STAMPS)
    for split in ("train", "val"):
        _index_folder(options.out / split, checksums=True, num_workers=0)
    sys.stdout.write(f"{options.out}: {train} samples in train, {val} in val\n")
    return 0


def _index(options: argparse.Namespace) -> int:
    urls = expand_shards(options.shards if len(options.shards) > 1 else options.shards[0])
    folder, name = options.out, options.name
    if is_local(urls[0]):
        folder, name = folder or index_folder(urls), name or Path(local_path(urls[0])).absolute().parent.name
    if folder is None:
        raise ValueError(
            f"shards index: {hide_secrets(urls[0])} is not local. Name the folder of the index with --out."
        )
    manifest = make_manifest(
        urls,
        folder,
        name=name or folder.absolute().name,
        num_workers=options.workers,
        checksums=options.checksums,
    )
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(manifest.rejects.items()))
    lost = f"; {sum(manifest.rejects.values())} rejects ({causes}), which `verify` names" if causes else ""
    sys.stdout.write(f"{folder}: {manifest.num_samples} samples in {len(manifest.counts)} shards{lost}\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from datamodules.webdataset.commands.verify import Checks, verify

    found = verify(_open(options), Checks(options.decode, tuple(options.parts)), num_workers=options.workers)
    for name, cause, message in found.bad[: options.max_listed]:
        sys.stdout.write(f"{name}: {cause}: {message}\n")
    if (more := len(found.bad) - options.max_listed) > 0:
        sys.stdout.write(f"... and {more} more (--max-listed)\n")
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(found.causes.items()))
    sys.stdout.write(f"{found.good} samples are good, {found.causes.total()} bad{causes and f': {causes}'}\n")
    return 1 if found.causes else 0


def _stats(options: argparse.Namespace) -> int:
    from datamodules.webdataset.commands.stats import as_dict, as_text, count

    statistics = count(_open(options), num_workers=options.workers)
    text = json.dumps(as_dict(statistics), indent=1) if options.json else as_text(statistics)
    sys.stdout.write(f"{text}\n")
    return 0


def _open(options: argparse.Namespace) -> Manifest:
    if not options.shards and options.index is None:
        raise ValueError(f"shards {options.command}: name the shards, or the folder of their index with --index.")
    urls = options.shards[0] if len(options.shards) == 1 else options.shards or None
    shards = Shards(urls=urls, index=options.index)
    shards.prepare()
    return shards.open()


def _index_folder(folder: Path, *, checksums: bool, num_workers: int) -> None:
    make_manifest(
        expand_shards(folder),
        folder / INDEX,
        name=folder.absolute().name,
        checksums=checksums,
        num_workers=num_workers,
    )


def _list_entries(options: argparse.Namespace) -> Entries:
    columns = (options.path_column, options.caption_column, options.label_column)
    return ListEntries(options.list, options.root, columns)


def _box_entries(options: argparse.Namespace) -> Entries:
    from datamodules.webdataset.commands.boxes import BoxEntries

    return BoxEntries(options.annotations, options.images)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value
