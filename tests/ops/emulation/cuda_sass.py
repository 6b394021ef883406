"""What nvcc makes of a CUDA source: registers, spills and instructions of each kernel, without a GPU."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops.build.recipe import NVCC_FLAGS

SOURCES = Path(__file__).parents[3] / "ops/csrc"
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel in one architecture's binary."""

    name: str  # mangled
    registers: int
    spilled_bytes: int
    opcodes: Counter[str]

    def count(self, prefix: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefix))


def compile_kernels(source: str, architecture: str, folder: Path) -> list[Kernel]:
    """Compile a source of ops/csrc in `folder`; skip the test where a tool is missing."""
    nvcc, nvdisasm = _find_nvcc(), _find_nvdisasm()
    if nvcc is None:
        pytest.skip("needs nvcc, which is not on PATH or in /usr/local/cuda")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm, of the CUDA toolkit or the triton package")
    number = architecture.removeprefix("sm_")
    target = folder / f"{architecture}.cubin"
    command = [nvcc, *NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, SOURCES / source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    usage = _usage_by_kernel(done.stdout + done.stderr)
    sass = subprocess.run([nvdisasm, "-c", target], capture_output=True, text=True, check=True).stdout
    opcodes = _opcodes_by_kernel(sass)
    assert usage.keys() == opcodes.keys()
    return [
        Kernel(name=name, registers=registers, spilled_bytes=spilled_bytes, opcodes=opcodes[name])
        for name, (registers, spilled_bytes) in usage.items()
    ]


def _find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _find_nvdisasm() -> str | None:
    triton = importlib.util.find_spec("triton")
    packaged = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=str(packaged)) if packaged else None)


def _usage_by_kernel(ptxas_log: str) -> dict[str, tuple[int, int]]:
    """Return (registers, spilled bytes) by mangled name."""
    usage = {}
    for entry in ptxas_log.split("Compiling entry function '")[1:]:
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
        usage[entry.partition("'")[0]] = int(re.search(r"Used (\d+) registers", entry)[1]), int(stores) + int(loads)
    return usage


def _opcodes_by_kernel(sass: str) -> dict[str, Counter[str]]:
    """Return the instructions by mangled name; NOPs fill up the last line of code and are not counted."""
    opcodes = {}
    for section in sass.split("\n.text.")[1:]:
        name = section.partition(":")[0]
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section, flags=re.MULTILINE)
        opcodes[name] = Counter(opcode for opcode in found if opcode != "NOP")
    return opcodes
