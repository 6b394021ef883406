"""Build the kernel libraries just in time, on first use and never at import. `python -m ops.build` builds ahead.

All `csrc/*_cpu.cpp` make one library and all `csrc/*_cuda.{cpp,cu}` another. A library's name is the digest of all that
decides its content, so a change of sources, flags, torch, CUDA, compiler, architectures or CPU makes a new one.

Environment:
    INTERNIMAGE_OPS: `auto` (default: kernels where they can be had, else the reference with one warning), `reference`,
        or `cpp` or `cuda` (an error instead of the reference).
    INTERNIMAGE_BUILD_DIR: The cache folder, see `ops.build.cache`.
    INTERNIMAGE_CUDA_ARCHS: CUDA architectures such as `8.0;9.0`; default: those of the visible devices.
    CXX, CUDA_HOME: The compilers, where not those of PATH.
"""

import logging
import os
import resource
import subprocess
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from ops.build import cache, toolchain
from ops.build.recipe import Kind, Recipe, Tools, ninja_file, recipe_for
from ops.build.toolchain import BuildError

__all__ = ["BuildError", "Choice", "Kind", "Report", "choice", "load", "prepare"]

Choice = Literal["auto", "reference", "cpp", "cuda"]
CSRC = Path(__file__).resolve().parent.parent / "csrc"
# A cold build takes seconds; these bound a stuck compiler or disk.
LOCK_TIMEOUT_S = 300.0
BUILD_TIMEOUT_S = 900.0
REMEDY = "or set INTERNIMAGE_OPS=reference to run without them."

logger = logging.getLogger(__name__)
_lock = threading.Lock()
_outcomes: dict[Kind, BuildError | None] = {}
_warned: set[Kind] = set()


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a library was obtained.

    Args:
        path: The file that was loaded.
        built: False when the cache had it.
        compilers: Their versions.
        flags: Of the C++ compiler, then of nvcc.
        wall_s: Of the compilation.
        cpu_s: Of the compilation, all processes.
    """

    path: Path
    built: bool
    compilers: str
    flags: tuple[str, ...]
    wall_s: float = 0.0
    cpu_s: float = 0.0


def choice() -> Choice:
    """Return INTERNIMAGE_OPS.

    Raises:
        ValueError: It is set to something else than the four choices.
    """
    value = os.environ.get("INTERNIMAGE_OPS") or "auto"
    if value not in get_args(Choice):
        raise ValueError(f"ops: INTERNIMAGE_OPS is {value!r}, expected one of {', '.join(get_args(Choice))}.")
    return cast(Choice, value)


def load(kind: Kind) -> bool:
    """Load the kernels of `kind`, after building them if the cache lacks them; say whether they are there.

    The outcome is kept for the process. On failure the first call warns.

    Raises:
        BuildError: INTERNIMAGE_OPS demands this kind and it cannot be had.
        ValueError: INTERNIMAGE_OPS or INTERNIMAGE_CUDA_ARCHS is not valid.
    """
    chosen = choice()
    if chosen == "reference":
        return False
    with _lock:
        if kind not in _outcomes:
            try:
                prepare(kind)
            except BuildError as error:
                _outcomes[kind] = error
        failure = _outcomes[kind]
        if failure is None:
            return True
        if chosen == kind:
            raise BuildError(str(failure)) from failure
        if kind not in _warned:
            _warned.add(kind)
            warnings.warn(f"{failure} Until then the slower PyTorch reference runs.", RuntimeWarning, stacklevel=2)
        return False


def prepare(kind: Kind, *, force: bool = False) -> Report:
    """Load the kernels of `kind` whatever INTERNIMAGE_OPS says, and report how they were obtained.

    Args:
        kind: Which library.
        force: Build even if the cache has it.

    Raises:
        BuildError: They could not be built or loaded.
    """
    try:
        report = _obtain(recipe_for(kind, CSRC), force=force)
    except (BuildError, OSError) as error:
        hint = "" if isinstance(error, BuildError) else ". Set INTERNIMAGE_BUILD_DIR or TMPDIR to a writable folder"
        raise BuildError(f"ops: building the {kind} kernels failed: {error}{hint}, {REMEDY}") from error
    _outcomes[kind] = None
    return report


def _obtain(wanted: Recipe, *, force: bool) -> Report:
    try:
        tools = _tools(wanted.kind)
    except BuildError:
        # Images carry prebuilt libraries and no compiler.
        prebuilt = None if force else cache.find_any(wanted.prefix, wanted.serves)
        if prebuilt is None:
            raise
        _open(prebuilt)
        return Report(path=prebuilt, built=False, compilers="none here", flags=wanted.all_flags)
    name = wanted.name(tools)
    report = Report(path=Path(name), built=False, compilers=tools.describe(), flags=wanted.all_flags)
    if not force and (found := cache.find(name)):
        try:
            _open(found)
        except BuildError as error:
            logger.warning("ops: %s; building it again.", error)
            force = True
        else:
            return replace(report, path=found)
    start = time.time()
    with cache.lock(name, LOCK_TIMEOUT_S, lambda: not force and cache.find(name) is not None):
        if not force and (found := cache.find(name)):
            _open(found)
            return replace(report, path=found)
        if text := cache.failure_since(name, start):
            raise BuildError(text)
        with cache.private_dir() as folder:
            try:
                wall_s, cpu_s = _compile(wanted, tools, folder / name)
                path = cache.publish(folder / name, name, replace=force)
                try:
                    _open(path)
                except BuildError:
                    path.unlink(missing_ok=True)
                    raise
            except BuildError as error:
                cache.record_failure(name, str(error))
                raise
    return replace(report, path=path, built=True, wall_s=wall_s, cpu_s=cpu_s)


def _tools(kind: Kind) -> Tools:
    nvcc = toolchain.find_nvcc() if kind == "cuda" else None
    return Tools(cxx=toolchain.find_cxx(), nvcc=nvcc)


def _open(library: Path) -> None:
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]  # torch 2.14 leaves it untyped
    except OSError as error:
        raise BuildError(
            f"{library} does not load: {error.__cause__ or error}. Run `python -m ops.build --force`"
        ) from error


def _compile(wanted: Recipe, tools: Tools, library: Path) -> tuple[float, float]:
    """Build `library` in its folder; return wall and CPU seconds."""
    ninja = toolchain.find_ninja()
    (library.parent / "build.ninja").write_text(ninja_file(wanted, tools, library.name))
    log = cache.node_dir() / f"{library.name}.log"
    logger.info("ops: building the %s kernels, once for this machine. Compiler output: %s", wanted.kind, log)
    wall, cpu = time.perf_counter(), _children_cpu_s()
    with log.open("w") as output:
        status = _run([ninja, "-v", "-k", "0"], library.parent, output.fileno())
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()
        raise BuildError(f"{_cause(lines, status)}\nRead the compiler output in {log}")
    return time.perf_counter() - wall, _children_cpu_s() - cpu


def _run(command: list[str], folder: Path, output: int) -> int:
    environment = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            return process.wait(timeout=BUILD_TIMEOUT_S)
        except BaseException as error:
            # Not SIGKILL: on SIGTERM ninja ends the compilers that it started.
            process.terminate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"the compiler did not finish in {BUILD_TIMEOUT_S:g} s. Look for its cause") from error
            raise


def _cause(lines: list[str], status: int) -> str:
    """Return the lines that name a failed build's cause: the compiler's first errors, else its last words."""
    errors = [line for line in lines if "error:" in line or "error :" in line or "fatal" in line][:4]
    last = [line for line in lines if line.strip() and not line.startswith(("[", "FAILED:", "ninja:"))][-4:]
    return "\n".join(errors or last) or f"ninja ended with status {status}"


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
