"""What became of every tensor when a checkpoint was loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internimage.layouts import Naming

_NAMINGS: dict[Naming, str] = {
    "authors": "the authors' keys",
    "transformers": "the keys of the Hugging Face ports",
    "ours": "this project's keys",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every tensor of a file and of a model; `str()` of it is a summary.

    Args:
        path: The file, or the index of a sharded one.
        container: The entry of the file that was used; empty for a plain state dict.
        naming: Whose keys the file has.
        prefix: What stands in front of the backbone's keys in the file.
        model: The model's variant.
        taken: Key in the model -> key in the file, for every tensor that was copied.
        adapted: Key in the model -> how the file's tensor was changed to fit.
        missing: Key in the model -> why it may keep its own value.
        unexpected: Key of the file's InternImage that the model lacks -> why it may be left out.
        ignored: Other part of the file -> why it is not used.
        dtypes: Types in the file that were converted to the model's, for example `torch.float16`.
    """

    path: Path
    container: str
    naming: Naming
    prefix: str
    model: str
    taken: dict[str, str]
    adapted: dict[str, str]
    missing: dict[str, str]
    unexpected: dict[str, str]
    ignored: dict[str, str]
    dtypes: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """The part of `taken` whose keys differ."""
        return {ours: theirs for ours, theirs in self.taken.items() if ours != theirs}

    def __str__(self) -> str:
        where = f", entry `{self.container}`" if self.container else ""
        lines = [f"{self.path.name}{where}, in {_NAMINGS[self.naming]}, into {self.model}"]
        converted = f", converted from {' and '.join(self.dtypes)}" if self.dtypes else ""
        lines.append(f"  taken: {len(self.taken)} tensors, {len(self.renamed)} of them renamed{converted}")
        for title in ("adapted", "missing", "unexpected", "ignored"):
            lines += [f"  {title}: {line}" for line in _by_reason(getattr(self, title))]
        return "\n".join(lines)


def listed(keys: list[str], limit: int = 3) -> str:
    """Name the first few keys and count the others."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        groups.setdefault(reason, []).append(key)
    return [f"{listed(keys)} ({reason})" for reason, keys in groups.items()]
