"""Find the tools that compile the kernels, and say what to do when one is missing."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

CXX_NAMES = ("g++", "c++", "clang++")
CUDA_DEFAULT = Path("/usr/local/cuda")
ARCH_PATTERN = re.compile(r"\d+\.\d[af]?(\+PTX)?")


class BuildError(RuntimeError):
    """A kernel library could not be built or loaded; the text names the cause and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Cxx:
    """A C++ compiler: its command line and the first line of its `--version`."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True, kw_only=True)
class Nvcc:
    """A CUDA compiler with the folders of its own toolkit, whatever wrapper stands on PATH."""

    command: str
    version: str
    home: Path
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


def find_cxx() -> Cxx:
    """Return the C++ compiler: CXX where it is set, else the first of `CXX_NAMES` on PATH.

    Raises:
        BuildError: There is none, or CXX names something that does not run.
    """
    requested = shlex.split(os.environ.get("CXX", ""))
    if requested:
        if shutil.which(requested[0]) is None:
            raise BuildError(f"CXX is {requested[0]!r}, which is not an executable. Correct or unset CXX")
        command = tuple(requested)
    else:
        found = next(filter(None, map(shutil.which, CXX_NAMES)), None)
        if found is None:
            names = ", ".join(CXX_NAMES)
            raise BuildError(f"there is no C++ compiler ({names}) on PATH. Install one (environment.yml) or set CXX")
        command = (found,)
    return Cxx(command=command, version=_output([*command, "--version"]).partition("\n")[0])


def find_nvcc() -> Nvcc:
    """Return the nvcc of CUDA_HOME, CUDA_PATH, PATH or `CUDA_DEFAULT`, in this order.

    Raises:
        BuildError: There is none, or its major version is not that of the CUDA that torch was built for.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError(f"torch {torch.__version__} was built without CUDA. Install a CUDA build of torch")
    command = _nvcc_command(wanted)
    release = re.search(r"release (\d+\.\d+)", _output([command, "--version"]))
    version = release[1] if release else "of unknown version"
    # Within one major version the runtimes are compatible both ways.
    if version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"nvcc ({command}) is {version} and torch {torch.__version__} was built for {wanted}. "
            f"Install nvcc {wanted} (environment.yml)"
        )
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", _output([command, *_DRY_RUN]), flags=re.MULTILINE))
    if "TOP" not in settings:
        raise BuildError(f"`{command} --dryrun` does not name its toolkit. Set CUDA_HOME to a CUDA {wanted} toolkit")
    library_dirs = _flag_values("-L", settings.get("LIBRARIES", ""))
    return Nvcc(
        command=command,
        version=version,
        home=Path(settings["TOP"]).resolve(),
        include_dirs=_flag_values("-I", settings.get("INCLUDES", "")),
        library_dirs=tuple(folder for folder in library_dirs if Path(folder).name != "stubs"),
    )


def find_ninja() -> str:
    """Return ninja's path: the `ninja` package's (even when the environment is not on PATH), else PATH's.

    Raises:
        BuildError: There is neither.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        packaged = None
    else:
        packaged = shutil.which("ninja", path=BIN_DIR)
    found = packaged or shutil.which("ninja")
    if found is None:
        raise BuildError("there is no ninja. Install it (`pip install ninja`)")
    return found


def simd_flags(capability: str) -> tuple[str, ...]:
    """Return the flags for a CPU capability as torch names it; none where the baseline is all that is known.

    Spelled out instead of `-march=native`: nodes with different CPUs may share one cache.
    """
    avx2 = ("-mavx2", "-mfma")
    avx512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
    return {"AVX2": avx2, "AVX512": (*avx512, *avx2)}.get(capability, ())


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures to build for, sorted, such as `("8.0", "9.0")`.

    INTERNIMAGE_CUDA_ARCHS decides (such as `8.0;9.0` or `9.0+PTX`), else the visible devices.

    Raises:
        ValueError: INTERNIMAGE_CUDA_ARCHS has something that is not an architecture.
        BuildError: It is not set and no device is visible.
    """
    requested = os.environ.get("INTERNIMAGE_CUDA_ARCHS", "")
    archs: Iterable[str] = filter(None, re.split(r"[;,\s]+", requested))
    if not requested.strip():
        devices = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = [f"{major}.{minor}" for major, minor in devices]
        if not archs:
            raise BuildError("no CUDA device is visible. Set INTERNIMAGE_CUDA_ARCHS, such as 8.0;9.0")
    unique = sorted(set(archs))
    for arch in unique:
        if not ARCH_PATTERN.fullmatch(arch):
            raise ValueError(f"ops: INTERNIMAGE_CUDA_ARCHS has {arch!r}, expected a list such as 8.0;9.0 or 9.0+PTX.")
    return tuple(unique)


def arch_flags(archs: Iterable[str]) -> tuple[str, ...]:
    """Return nvcc's flags for architectures such as `9.0`, `9.0a` and `9.0+PTX`."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


_DRY_RUN = ("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)


def _nvcc_command(wanted: str) -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            command = shutil.which("nvcc", path=str(Path(home) / "bin"))
            if command is None:
                raise BuildError(f"{variable} is {home!r}, which has no bin/nvcc. Point it at a CUDA {wanted} toolkit")
            return command
    command = shutil.which("nvcc") or shutil.which("nvcc", path=str(CUDA_DEFAULT / "bin"))
    if command is None:
        raise BuildError(
            f"there is no nvcc on PATH or in {CUDA_DEFAULT}. Install nvcc {wanted} (environment.yml) or set CUDA_HOME"
        )
    return command


def _flag_values(flag: str, text: str) -> tuple[str, ...]:
    return tuple(str(Path(word[2:]).resolve()) for word in shlex.split(text) if word.startswith(flag))


def _output(command: list[str]) -> str:
    """Return what a command prints on both streams: nvcc's dry run writes to the second."""
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=60
        )
    except subprocess.CalledProcessError as error:
        last = error.output.strip().rpartition("\n")[2]
        raise BuildError(f"`{shlex.join(command)}` failed: {last}. Install a working compiler") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shlex.join(command)}` failed: {error}. Install a working compiler") from error
    return run.stdout
