"""Where the samples of detection shards lie, and what samplers need to know of them.

Shapes: I samples, M objects of all of them.
"""

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from datamodules.batch import Array, RunLengths
from datamodules.detection.flat import trainable
from datamodules.detection.images import write_whole
from datamodules.detection.records import Objects
from datamodules.sources import IMAGE_SUFFIXES

INDEX = "index.npz"


def find_shards(folder: Path) -> list[Path]:
    """Return the tar files of a folder, sorted by name."""
    return sorted(folder.glob("*.tar"))


def open_index(folder: Path) -> dict[str, Array]:
    """Return the index of a folder's shards: the stored one, or a new one if it is missing or a shard has changed.

    Arrays: `shards` (I,), number of the shard; `keys` (I,); `image` and `json` (I, 2), where the bytes start and how
    many they are; `image_ids` (I,); `sizes` (I, 2), height and width; `images`, `labels`, `crowd` and `trainable` (M,),
    of each object; `has_masks` ().

    Raises:
        ValueError: A shard is broken, or a sample lacks its image, its JSON or a part of that.
    """
    shards = find_shards(folder)
    states = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    state = json.dumps(states)
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(folder / INDEX) as kept:
        if str(kept["state"]) == state:
            return {name: kept[name] for name in kept.files}
    index = {"state": np.array(state), **_make_index(shards)}
    # A folder that cannot be written is read each time.
    with suppress(OSError):
        write_whole(folder / INDEX, **index)
    return index


def from_json(content: dict[str, Any], *, masks: bool) -> Objects:
    """Return the objects of a sample's JSON."""
    size = content["size"]
    return Objects(
        np.array(content["boxes"], dtype=np.float64).reshape(-1, 4),
        np.array(content["labels"], dtype=np.int64),
        np.array(content["areas"], dtype=np.float64),
        np.array(content["crowd"], dtype=bool),
        [RunLengths(size=size, counts=counts.encode()) for counts in content["masks"]] if masks else None,
        content["negative"],
        content["not_exhaustive"],
    )


def _make_index(shards: list[Path]) -> dict[str, Array]:
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    objects: list[Objects] = []
    for number, shard in enumerate(shards):
        for key, image, place, content in _samples(shard):
            try:
                found = from_json(content, masks=False)
                check_lengths(content)
                columns["has_masks"].append(content["masks"] is not None)
                columns["image_ids"].append(content["image_id"])
                height, width = content["size"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"ShardSource: {shard}/{key}.json: {type(error).__name__} {error}; expected what `write_shards` "
                    "writes."
                ) from error
            objects.append(found)
            columns["shards"].append(number)
            columns["keys"].append(key.encode())
            columns["image"].append(image)
            columns["json"].append(place)
            columns["sizes"].append((height, width))
    index = {name: np.array(values) for name, values in columns.items()}
    if not objects:
        raise ValueError(f"ShardSource: {shards[0].parent}: the shards are empty.")
    index["images"] = np.repeat(np.arange(len(objects)), [len(found) for found in objects])
    index["labels"] = np.concatenate([found.labels for found in objects])
    index["crowd"] = np.concatenate([found.crowd for found in objects])
    boxes, areas = (np.concatenate([getattr(found, part) for found in objects]) for part in ("boxes", "areas"))
    index["trainable"] = trainable(boxes, areas, index["sizes"][index["images"]])
    index["has_masks"] = np.array(index["has_masks"].all())
    return index


def check_lengths(content: dict[str, Any]) -> None:
    """Refuse a sample's JSON whose parts have different lengths.

    Raises:
        ValueError: They have.
        KeyError: A part is missing.
    """
    parts = ["boxes", "labels", "areas", "crowd"] + (["masks"] if content["masks"] is not None else [])
    lengths = {part: len(content[part]) for part in parts}
    if len(set(lengths.values())) > 1:
        raise ValueError("the parts have different lengths: " + ", ".join(f"{n} {part}" for part, n in lengths.items()))


def _samples(shard: Path) -> Iterator[tuple[str, tuple[int, int], tuple[int, int], dict[str, Any]]]:
    """Yield key, place of the image, place of the JSON, and the JSON."""
    places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    with shard.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # Only dots after the last slash end the key, as in webdataset.
                    folder, slash, file_name = member.name.rpartition("/")
                    key, _, suffix = file_name.partition(".")
                    key = f"{folder}{slash}{key}"
                    kind = "image" if f".{suffix}" in IMAGE_SUFFIXES else suffix
                    places[key][kind] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"ShardSource: {shard} is broken: {error}. Make it again.") from error
        for key, parts in places.items():
            if missing := {"image", "json"} - set(parts):
                raise ValueError(f"ShardSource: {shard}: sample {key} has no {' and no '.join(sorted(missing))}.")
            file.seek(parts["json"][0])
            try:
                content = json.loads(file.read(parts["json"][1]))
            except ValueError as error:
                raise ValueError(f"ShardSource: {shard}/{key}.json is not JSON: {error}") from error
            yield key, parts["image"], parts["json"], content
