"""The machine's ceilings, and how near DCNv3 comes: OMP_PROC_BIND=true OMP_PLACES=cores python -m benchmarks.roofline

A small C++ program, compiled with the kernels' flags, measures float32 multiply-adds and vector loads from buffers that
fit the first, second and third cache level; a copy of 256 MiB by torch measures memory. Best of five each.
"""

import ctypes
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.records import Recorder, milliseconds, parser
from ops.build import toolchain
from ops.build.recipe import CXX_FLAGS, OPENMP_FLAGS

SOURCE = Path(__file__).with_name("roofline.cpp")
REPEATS = 5
BUFFER_KIB = {"l1": 16, "l2": 512, "l3": 8192}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """GFLOP/s of float32 multiply-adds; GB/s of loads by cache level, and of a copy (bytes read plus written)."""

    multiply_add: float
    l1: float
    l2: float
    l3: float
    copy: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What DCNv3 has to do: floating-point operations, bytes between cache and registers, bytes of memory.

    Per output channel and point, forward is 4 corner loads and multiply-adds. Backward loads the 4 corners again for
    the dot products and loads and stores 4 corners of the gradient.
    """

    flop: float
    cache_bytes: float
    memory_bytes: float

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], groups: int, *, backward: bool, bytes_per_value: int) -> "Work":
        batch, height, width, channels = shape
        outputs = batch * height * width * channels
        corners = outputs * 9 * 4
        arrays = outputs * 2 + batch * height * width * groups * 9 * 3
        return cls(
            flop=corners * (6 if backward else 2),
            cache_bytes=corners * bytes_per_value * (4 if backward else 1),
            memory_bytes=arrays * bytes_per_value * (3 if backward else 1),
        )

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Return the least time in ms and which ceiling sets it. Corners are taken to come from the second level."""
        # Repeated on the same arrays, a small case never leaves the last cache level.
        memory = ceilings.copy if self.memory_bytes > last_cache_bytes() else ceilings.l3
        times = {
            "multiply-add": self.flop / ceilings.multiply_add,
            "load": self.cache_bytes / ceilings.l2,
            "memory": self.memory_bytes / memory,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound] * 1e-6, bound


@cache
def last_cache_bytes() -> int:
    """Return the size of the third cache level as Linux tells it, else 32 MiB."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(path.read_text().strip().removesuffix("K")) * 1024 if path.exists() else 32 * 2**20


@cache
def ceilings(threads: int, *, quick: bool = False) -> Ceilings:
    """Measure the machine with `threads` threads, once per process."""
    repeats = 1 if quick else REPEATS
    library = _library()
    loads = {level: library.load_rate(threads, repeats, kib * 1024) for level, kib in BUFFER_KIB.items()}
    source = torch.zeros((4 if quick else 256) * 2**18)
    target = torch.empty_like(source)
    copy_ms = min(
        milliseconds(lambda: target.copy_(source), threads=threads, seconds=0.2 / REPEATS) for _ in range(repeats)
    )
    return Ceilings(
        multiply_add=library.multiply_add_rate(threads, repeats),
        copy=2 * source.nbytes / copy_ms * 1e-6,
        **loads,
    )


@cache
def _library() -> ctypes.CDLL:
    flags = (*CXX_FLAGS, *OPENMP_FLAGS, *toolchain.simd_flags(torch.backends.cpu.get_cpu_capability()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roofline.so"
        command = [
            *toolchain.find_cxx().command,
            *flags,
            "-fvisibility=default",
            "-shared",
            str(SOURCE),
            "-o",
            str(path),
        ]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path))
    library.load_rate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t)
    library.load_rate.restype = library.multiply_add_rate.restype = ctypes.c_double
    return library


def main() -> None:
    options = parser(__doc__).parse_args()
    recorder = Recorder(options)
    for threads in options.threads:
        measured = {name: round(value, 1) for name, value in asdict(ceilings(threads, quick=options.quick)).items()}
        recorder.add(benchmark="roofline", threads=threads, **measured)
    recorder.write(options.output)


if __name__ == "__main__":
    main()
