"""What every benchmark shares: the machine's description, timing, and one JSON line per case."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

Record = dict[str, object]


class Recorder:
    """Print records as JSON lines, each with the machine's description, and keep them for a results file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.machine = {**machine(options.device), "quick": options.quick}
        self.records: list[Record] = []

    def add(self, **values: object) -> None:
        record = {**values, **self.machine}
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def write(self, path: Path | None) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.records, indent=1) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the CPU (default: 1 2)")
    options.add_argument("--seconds", type=float, default=2.0, help="least time per measurement")
    options.add_argument("--output", type=Path, help="results file for `python -m benchmarks.performance`")
    options.add_argument("--quick", action="store_true", help="tiny shapes: does it run, not how fast")
    return options


def machine(device: str) -> Record:
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": device,
        "name": name,
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND"),
    }


def milliseconds(run: Callable[[], object], *, threads: int, seconds: float) -> float:
    """Return the median time of `run`, after one call to warm up."""
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    timer.timeit(1)
    return round(timer.blocked_autorange(min_run_time=seconds).median * 1e3, 4)


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Return how many times slower than the kernel each other implementation is."""
    return {name: round(value / times["kernel"], 2) for name, value in times.items() if name != "kernel"}


def advise_pinning(threads: list[int]) -> None:
    if max(threads) > 1 and "OMP_PROC_BIND" not in os.environ:
        print("Unpinned threads often share a core: set OMP_PROC_BIND=true OMP_PLACES=cores.", file=sys.stderr)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
