"""Where kernel libraries lie, and how processes and nodes share them.

Libraries are built in a private folder of the node and renamed into the cache, so that no reader sees half a file. One
lock per library, also on the node and released by the kernel when its holder dies, lets one process build while the
others wait. Nothing here needs the cache itself to support locks, or to be writable.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

BUILD_DIR = "INTERNIMAGE_BUILD_DIR"
MOUNTS = Path("/proc/self/mounts")
NETWORK_TYPES = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "beegfs_nodev", "panfs"),
    *("glusterfs", "orangefs", "wekafs", "fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs", "fuse.sshfs", "fuse.juicefs"),
}
POLL_S = 0.1
STALE_S = 24 * 3600


def node_dir() -> Path:
    """Return this user's folder on the node's own disk, for locks, private builds and logs.

    Raises:
        OSError: No temporary folder of the node is writable, or the folder there belongs to somebody else.
    """
    name = f"internimage-{os.getuid()}"
    candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/dev/shm")]
    local = next((folder for folder in candidates if not is_network(folder)), candidates[0])
    folder = local / name
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    # Libraries are loaded from here: nobody else may be able to place one.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} belongs to another user or is writable by others; remove it or set TMPDIR")
    return folder


def cache_dir() -> Path:
    """Return the cache folder, which need not exist or be writable where INTERNIMAGE_BUILD_DIR names it.

    Without that variable it is `internimage` in the user's cache folder if that is writable and not on a network
    (where every rank would read it through the same server, and where renames show late), else `node_dir()`.
    """
    if requested := os.environ.get(BUILD_DIR):
        return Path(requested).expanduser().absolute()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "internimage"
        if is_network(base):
            return node_dir()
        folder.mkdir(parents=True, exist_ok=True)
    # Path.home() raises RuntimeError for a user without a home.
    except (OSError, RuntimeError):
        return node_dir()
    return folder if os.access(folder, os.W_OK) else node_dir()


def is_network(path: Path) -> bool:
    """Say whether `path`, or its nearest existing parent, lies on a network filesystem; False where this is unknown."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return False
    resolved = path.resolve()
    kinds = {Path(point.replace("\\040", " ")): kind for point, kind in mounts}
    return next((kinds[p] in NETWORK_TYPES for p in (resolved, *resolved.parents) if p in kinds), False)


def find(name: str) -> Path | None:
    """Return the library `name` from the cache or the node's folder."""
    return next((path for folder in (cache_dir, node_dir) if (path := folder() / name).exists()), None)


def find_any(prefix: str, accepts: Callable[[str], bool]) -> Path | None:
    """Return a library whose name begins with `prefix` and is accepted."""
    for folder in (cache_dir, node_dir):
        for path in sorted(folder().glob(f"{prefix}*.so")):
            if accepts(path.name):
                return path
    return None


def publish(library: Path, name: str, *, replace: bool = False) -> Path:
    """Copy a private `library` into the cache as `name`; return the file to load.

    That is the private file itself when another node was faster, since the winner's file may not be visible yet on a
    network filesystem, and when no folder takes it.
    """
    for folder in (cache_dir(), node_dir()):
        target = folder / name
        if target.exists() and not replace:
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", delete=False) as partial:
                try:
                    shutil.copyfile(library, partial.name)
                    Path(partial.name).chmod(0o644)
                    os.replace(partial.name, target)  # noqa: PTH105 (the call whose atomicity this relies on)
                except OSError:
                    Path(partial.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            logger.warning("ops: %s does not take the kernel library (%s).", folder, error)
        else:
            return target
    return library


@contextlib.contextmanager
def lock(name: str, timeout_s: float, done: Callable[[], bool]) -> Iterator[None]:
    """Hold the node's lock for `name`, or go on without it once `done()` or after `timeout_s`.

    The caller looks for the library again inside, and builds privately if it is not there.
    """
    with (node_dir() / f"{name}.lock").open("w") as file:
        start = time.monotonic()
        waiting = False
        while not _try_lock(file.fileno()):
            if done():
                break
            if time.monotonic() - start > timeout_s:
                logger.warning(
                    "ops: waited %g s for another process that builds %s; building it here.", timeout_s, name
                )
                break
            if not waiting:
                logger.info("ops: waiting for another process of this node, which builds %s.", name)
            waiting = True
            time.sleep(POLL_S)
        try:
            yield
        finally:
            # Closing is not enough: a process forked meanwhile would keep the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def private_dir() -> Iterator[Path]:
    """Yield a fresh folder of the node and remove it afterwards, with those that killed builds left a day ago."""
    node = node_dir()
    for old in node.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_S:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=node, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def record_failure(name: str, text: str) -> None:
    """Leave the error of a build for the processes that wait for it."""
    (node_dir() / f"{name}.failed").write_text(text)


def failure_since(name: str, start: float) -> str | None:
    """Return the error of a build of `name` that failed after `start` (`time.time()`), for who waited for it."""
    path = node_dir() / f"{name}.failed"
    try:
        return path.read_text() if path.stat().st_mtime >= start else None
    except FileNotFoundError:
        return None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
