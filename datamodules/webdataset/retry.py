"""Trying again: what is worth it, how long to wait, and what to say in the end."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from typing import TypeVar

from datamodules.webdataset.urls import hide_secrets

T = TypeVar("T")

# A server that asks for more patience is not obeyed to the end, nor is the doubling.
MAX_WAIT = 60.0


class TransportError(OSError):
    """A shard, or a part of it, could not be read: not after all retries, or not worth one."""


class PermanentError(OSError):
    """A failed attempt that another one would not mend."""


class BusyError(OSError):
    """A failed attempt after which the server asks to wait.

    Args:
        message: What it answered.
        seconds: To wait at least.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and when to try again.

    Args:
        retries: After the first attempt.
        backoff: Before the first retry, seconds; doubled for each further one, up to a minute.
    """

    retries: int = 5
    backoff: float = 0.5

    def over(self, places: Sequence[str], attempt: Callable[[str], T], what: str, on_retry: Callable[[], None]) -> T:
        """Return what `attempt` returns for the first place that works; each is tried again before the next is.

        Args:
            places: URLs; at least one.
            attempt: Called at most `1 + retries` times for each.
            what: Named in the error, and decides the jitter of the waits.
            on_retry: Called before each wait.

        Raises:
            TransportError: None works.
        """
        failures: list[str] = []
        for place in places:
            try:
                return self._run(partial(attempt, place), f"{hide_secrets(place)}, {what}", on_retry)
            except TransportError as error:
                failures.append(str(error))
                cause = error
        raise TransportError(hide_secrets(" Then ".join(failures))) from cause

    def wait(self, what: str, number: int, error: Exception) -> float:
        """Return the seconds before retry `number`, counted from 1: half of them fixed, half as `what` decides."""
        # Readers that failed together must not come back together. Nothing is drawn from a generator for that.
        jitter = zlib.crc32(f"{what} {number}".encode()) / 2**32
        seconds = min(MAX_WAIT, self.backoff * 2.0 ** (number - 1)) * (0.5 + 0.5 * jitter)
        return min(MAX_WAIT, max(seconds, error.seconds)) if isinstance(error, BusyError) else seconds

    def _run(self, attempt: Callable[[], T], what: str, on_retry: Callable[[], None]) -> T:
        number = 0
        while True:
            number += 1
            try:
                return attempt()
            except PermanentError as error:
                raise TransportError(f"{what}: {error}.") from error
            except (OSError, HTTPException) as error:
                if number > self.retries:
                    reason = f"{type(error).__name__}: {error}"
                    raise TransportError(f"{what}: failed {number} times, lastly with {reason}.") from error
                on_retry()
                time.sleep(self.wait(what, number, error))
