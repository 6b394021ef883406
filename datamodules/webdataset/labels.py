"""Which part of a sample is its label."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datamodules.webdataset.records import BadSample, RawSample


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Where a label stands, and what it means.

    Args:
        key: Extension of the part: text, or with a dot a field of JSON, as `json.label`.
        label_map: Label by what stands there, or a JSON file of that: an object, or a list of names in the order of
            their labels. None: labels stand there as numbers.
    """

    key: str = "cls"
    label_map: dict[str, int] | Path | None = None

    def find(self, sample: RawSample, num_classes: int) -> int | None:
        """Return the label in [0, num_classes), or None if there is no such part or field.

        Raises:
            BadSample: It is not a number, not known, or out of range.
        """
        extension, _, name = self.key.partition(".")
        if (data := sample.parts.get(extension)) is None:
            return None
        try:
            found = str(data, "utf-8").strip()
            if name:
                if (value := json.loads(found).get(name)) is None:
                    return None
                found = str(value)
            label = int(found) if self.label_map is None else self._map()[found]
        # Nested too deeply, JSON is a RecursionError.
        except (ValueError, AttributeError, KeyError, RecursionError) as error:
            raise BadSample("label", f"{self.key} is no label ({type(error).__name__}: {error})") from error
        if not 0 <= label < num_classes:
            raise BadSample("label", f"label {label}, expected 0 to {num_classes - 1}")
        return label

    def _map(self) -> dict[str, int]:
        assert self.label_map is not None
        return self.label_map if isinstance(self.label_map, dict) else _read_map(Path(self.label_map))


@lru_cache
def _read_map(path: Path) -> dict[str, int]:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, list):
        return {str(name): label for label, name in enumerate(content)}
    return {str(name): int(label) for name, label in content.items()}
