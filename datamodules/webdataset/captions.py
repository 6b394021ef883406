"""Which part of a sample is its text."""

import json
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from datamodules.webdataset.records import BadSample, Draw, RawSample, mix


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Where a text stands; several places may hold one each.

    Args:
        keys: Extensions of text parts.
        json_keys: Fields of the part `json`, as img2dataset writes it.
        weights: One for each of `keys` and then of `json_keys`: a text is drawn among those that a sample has. None:
            the first that it has.

    Raises:
        ValueError: No place, or weights that are not one positive number a place.
    """

    keys: tuple[str, ...] = ("txt",)
    json_keys: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.keys) + len(self.json_keys)
        if count == 0:
            raise ValueError("Captions: neither keys nor json_keys names a place.")
        if self.weights is not None and (len(self.weights) != count or min(self.weights) <= 0):
            raise ValueError(f"Captions: weights={self.weights}, expected {count} positive numbers, one for each key.")

    def find(self, sample: RawSample, draw: Draw) -> str:
        """Return the text.

        Raises:
            BadSample: There is none, or it is empty or not UTF-8.
        """
        texts = self._texts(sample)
        found = [number for number, text in enumerate(texts) if text]
        if not found:
            raise BadSample("text", f"no text in {', '.join((*self.keys, *self.json_keys))}")
        return texts[found[0] if self.weights is None else self._choose(found, self.weights, draw)]

    def _choose(self, found: list[int], weights: tuple[float, ...], draw: Draw) -> int:
        ends = list(accumulate(weights[number] for number in found))
        # Numbers of its own: those of the draw itself decide the crop, which must not depend on the text.
        number = replace(draw, seed=mix(draw.seed)).uniform(1)[0] * ends[-1]
        return next(place for place, end in zip(found, ends, strict=True) if number < end or end == ends[-1])

    def _texts(self, sample: RawSample) -> list[str]:
        try:
            texts = [str(sample.parts.get(key, b""), "utf-8").strip() for key in self.keys]
            fields: Any = {}
            if self.json_keys and (data := sample.parts.get("json")) is not None:
                fields = json.loads(str(data, "utf-8"))
            values = [fields.get(key) for key in self.json_keys]
            texts += [value.strip() if isinstance(value, str) else "" for value in values]
            # JSON can spell half of a character, at which tokenizers fail.
            "".join(texts).encode()
        # Nested too deeply, JSON is a RecursionError.
        except (ValueError, AttributeError, RecursionError) as error:
            raise BadSample("text", f"{type(error).__name__}: {error}") from error
        return texts
