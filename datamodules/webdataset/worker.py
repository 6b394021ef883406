"""What a loader's worker process does first."""

import ctypes
import signal
import sys

from datamodules.loading import one_thread

# Linux: <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


def start_worker(worker: int) -> None:
    """Take one thread, and on Linux end with the process that trains: `worker_init_fn` of loaders.

    Torch's workers notice that their parent was killed only between batches. One that waits for somebody to read the
    batches before would stay for ever, with its memory.
    """
    one_thread(worker)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
