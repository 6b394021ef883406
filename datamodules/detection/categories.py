"""From the classes that an annotation file knows to labels."""

import difflib
from collections.abc import Mapping, Sequence

from datamodules.detection.records import Categories


def choose_categories(
    origin: str,
    known: Mapping[int, str],
    class_names: Sequence[str] | None = None,
    frequency: Mapping[int, str | None] | None = None,
) -> Categories:
    """Return the classes by label.

    Args:
        origin: Where the classes come from, for messages.
        known: Name of each category id of the file; ids may have gaps.
        class_names: Classes in the order of their labels; None takes all of `known`, by id.
        frequency: LVIS's r, c or f of each category id.

    Raises:
        ValueError: A name is unknown, or stands for two categories.
    """
    ids = {name: number for number, name in sorted(known.items(), reverse=True)}
    if len(ids) < len(known):
        twice = sorted({name for number, name in known.items() if ids[name] != number})
        raise ValueError(f"{origin}: more than one category is called {', '.join(twice[:5])}.")
    names = [known[number] for number in sorted(known)] if class_names is None else list(class_names)
    if unknown := [name for name in names if name not in ids]:
        similar = difflib.get_close_matches(unknown[0], ids, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else f"It has {', '.join(list(ids)[::-1][:5])}, ..."
        raise ValueError(f"{origin} has no class {', '.join(unknown[:5])}. {hint}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{origin}: class_names has {', '.join(twice[:5])} more than once.")
    chosen = tuple(ids[name] for name in names)
    frequencies = [(frequency or {}).get(number) for number in chosen]
    all_known = [value for value in frequencies if value is not None]
    return Categories(tuple(names), chosen, tuple(all_known) if chosen and len(all_known) == len(chosen) else None)


def number_categories(origin: str, class_names: Sequence[str]) -> Categories:
    """Return classes by label with ids from 1, for formats that have no ids.

    Raises:
        ValueError: A name stands there twice.
    """
    return choose_categories(origin, dict(enumerate(class_names, start=1)))
