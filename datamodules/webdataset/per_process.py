"""What each process makes for itself: connections, threads, locks and counts survive neither fork nor pickle."""

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value that each process makes when it first asks for it.

    Args:
        make: Returns it; picklable.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._pid = make, -1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._make,)

    def get(self) -> T:
        """Return this process's value."""
        if self._pid != os.getpid():
            self._value, self._pid = self._make(), os.getpid()
        return self._value
