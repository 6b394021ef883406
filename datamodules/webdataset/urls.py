"""Which shards a user means: folders, patterns, lists."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:")
_WILDCARD = re.compile(r"[*?\[]")
# User and password of a URL; what signs it in its query, of S3, Google, Azure, CloudFront and the like; and what a
# command sends in its place.
_USER = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_SIGNATURE = re.compile(
    r"([?&][^=&\s]*(?:sig|token|key|secret|passw|pwd|credential|policy|auth)[^=&\s]*=)[^&#\s'\"]+", re.IGNORECASE
)
_HEADER = re.compile(r"(\bauthorization:\s*(?:\w+\s+)?)[^\s'\"]+", re.IGNORECASE)


def expand_shards(spec: str | Path | Sequence[str]) -> list[str]:
    """Return the shards of a specification, in its order; those of folders and wildcards are sorted.

    A string is what webdataset takes, several of them joined by `::`, each with braces as `{00000..00331}`. A part may
    also be a local folder (all its `*.tar`), a local path with wildcards, or a text file of one part a line, as
    `@shards.txt` or `shards.txt`; empty lines and lines that begin with `#` are left out. A `pipe:` command is one part
    with its braces expanded.

    Raises:
        FileNotFoundError: A folder, a wildcard or a list has no shards.
        ValueError: There are none at all, or one is listed twice.
    """
    parts = [str(spec)] if isinstance(spec, str | Path) else [str(part) for part in spec]
    # A path is not taken apart: its name may have braces.
    shards = _expand(parts[0]) if isinstance(spec, Path) else [url for part in parts for url in _expand_text(part)]
    if not shards:
        raise ValueError("expand_shards: no shards are given, expected a folder, a pattern or a list.")
    seen: set[str] = set()
    for url in shards:
        if url in seen:
            raise ValueError(f"expand_shards: {hide_secrets(url)} is listed twice. Name each shard once.")
        seen.add(url)
    return shards


def is_local(url: str) -> bool:
    """Tell whether a shard is a local path or a `file://` URL."""
    return url.startswith("file://") or _SCHEME.match(url) is None


def is_pipe(url: str) -> bool:
    """Tell whether a shard is the output of a command."""
    return url.startswith("pipe:")


def local_path(url: str) -> str:
    """Return the path of a local shard."""
    return url.removeprefix("file://")


def hide_secrets(text: str) -> str:
    """Return a URL, or a text with URLs in it, as logs may show it: without users, passwords and signatures."""
    return _HEADER.sub(r"\1...", _SIGNATURE.sub(r"\1...", _USER.sub("", text)))


def _expand_text(text: str) -> list[str]:
    # What is there is not a pattern, whatever its name.
    if is_local(text) and Path(local_path(text)).exists():
        return _expand(text)
    return [shard for url in expand_urls(text) for shard in _expand(url)]


def _expand(url: str) -> list[str]:
    if not is_local(url):
        return [url]
    path = local_path(url)
    if path.startswith("@") or path.endswith(".txt"):
        return _read_list(Path(path.removeprefix("@")))
    if Path(path).is_dir():
        if not (found := sorted(str(shard) for shard in Path(path).glob("*.tar"))):
            raise FileNotFoundError(f"expand_shards: {path} has no *.tar, expected a folder of shards.")
        return found
    if _WILDCARD.search(path) and not Path(path).exists():
        # Path.glob takes no absolute patterns.
        if not (found := sorted(glob.glob(path, recursive=True))):  # noqa: PTH207
            raise FileNotFoundError(f"expand_shards: nothing matches {path}. Check the pattern.")
        return found
    return [url]


def _read_list(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expand_shards: there is no list {path}, expected a text file of URLs.") from error
    shards = [shard for line in lines if line and not line.startswith("#") for shard in _expand_text(line)]
    if not shards:
        raise FileNotFoundError(f"expand_shards: {path} lists no shards, expected one URL a line.")
    return shards
