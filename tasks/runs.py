"""Folders of runs: numbered, so that none overwrites another."""

import os
from itertools import count
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only


def claim_folder(parent: Path, prefix: str) -> Path:
    """Make `<parent>/<prefix>_<n>` with the first free number, and return it.

    Two runs that start at the same moment get two folders. Only the first rank of a run claims one; the others return a
    folder that they do not make and nothing may be written to.
    """
    first_rank = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
    for number in count():
        folder = parent / f"{prefix}_{number}"
        if not first_rank:
            return folder
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError
