"""The authors' published weight files, and fetching them from the Hugging Face hub by name.

Nothing here touches the network unless the user writes `hub:` in front of a name.
"""

import csv
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from internimage.weight_files import CheckpointError

SCHEME = "hub:"
REPOSITORY = "OpenGVLab/InternImage"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published file, as its row in `data/published.csv` says.

    Args:
        name: What follows `hub:`; the file's name without `.pth`.
        variant: T, S, B, L, XL, H or G; CB-H is a detector with two H in it.
        task: Data set, and the detector or segmentor if it is one.
        num_classes: Classes that the head scores.
        image_size: In px, one number for squares: of the training crop, for detectors of the test.
        result: What the authors report, single scale; empty where they report nothing.
        metric: What `result` is.
        port: Repository of the same weights for `transformers`, which `hub:` takes as well; empty without one.
    """

    name: str
    variant: str
    task: str
    num_classes: int
    image_size: str
    result: str
    metric: str
    port: str


@cache
def published() -> dict[str, Published]:
    """Return every published file by name."""
    with (files("internimage") / "data" / "published.csv").open(encoding="ascii") as file:
        return {
            row["name"]: Published(**{**row, "num_classes": int(row["num_classes"])})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        }


def markdown_table() -> str:
    """Return the table of published files that `docs/checkpoints.md` shows."""
    lines = ["| name | variant | trained on | classes | image size | result | port |", "| --- " * 7 + "|"]
    for entry in published().values():
        result = f"{entry.result} {entry.metric}".strip() or "-"
        numbers = f"{entry.num_classes} | {entry.image_size} | {result}"
        lines.append(f"| {entry.name} | {entry.variant} | {entry.task} | {numbers} | {entry.port or '-'} |")
    return "\n".join(lines)


def locate(source: str | Path) -> Path:
    """Return the local path of a checkpoint; downloads it first if `source` starts with `hub:`, and only then.

    Args:
        source: A path, or `hub:NAME` with a published name, `hub:OWNER/REPOSITORY/FILE`, or `hub:OWNER/REPOSITORY` for
            the safetensors of a repository.

    Raises:
        CheckpointError: The name is unknown, or the hub cannot be reached and has not been before.
    """
    if isinstance(source, str) and source.startswith(SCHEME):
        return _download(source.removeprefix(SCHEME))
    path = Path(source)
    if not path.exists() and (name := path.name.removesuffix(".pth")) in published():
        raise CheckpointError(f"{path}: no such file. To download the published one, say {SCHEME}{name}.")
    return path


def _download(name: str) -> Path:
    # Imported here since few runs need it, and it is slow to import.
    from huggingface_hub import hf_hub_download, snapshot_download

    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    if not rest and name not in published():
        close = get_close_matches(name, published(), n=1)
        raise CheckpointError(
            f"{SCHEME}{name}: no such published checkpoint"
            f"{f', did you mean {SCHEME}{close[0]}' if close else ''}. docs/checkpoints.md lists them; name others "
            f"{SCHEME}OWNER/REPOSITORY/FILE."
        )
    try:
        if not rest:
            return Path(hf_hub_download(REPOSITORY, f"{name}.pth"))
        if filename:
            return Path(hf_hub_download(f"{owner}/{repository}", filename))
        return Path(
            snapshot_download(f"{owner}/{repository}", allow_patterns=["*.safetensors", "*.safetensors.index.json"])
        )
    # Its errors for no network, no such file and no access are OSErrors; ValueError is a malformed name.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{SCHEME}{name} could not be downloaded ({str(error).splitlines()[0]}). Check the name and the network; "
            "where there is none, copy the file there and give its path, or set HF_HOME to a folder that has it."
        ) from error
