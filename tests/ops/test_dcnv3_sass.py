"""What nvcc makes of the DCNv3 kernels: registers, spills and instructions, without a GPU.

The budgets hold with nvcc 13.0. A kernel for the 3x3 window has no loop over points or channels, so a thread executes
an instruction at most once (with two lanes per group that holds for the loop over shuffle distances too). Divided by
the channels of a thread they are instructions per output element.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops.build.recipe import NVCC_FLAGS

SOURCES = Path(__file__).parents[2] / "ops/csrc"
ARCHITECTURES = ("sm_80", "sm_90")

FORWARD_INSTRUCTIONS = 180
# Before sm_90, channels are added to the gradient of x one by one.
BACKWARD_INSTRUCTIONS = {"sm_80": 330, "sm_90": 300}
FORWARD_REGISTERS = 64

KERNEL = re.compile(
    r"(?P<direction>forward|backward)_kernelI(?P<type>f|d|6__half|13__nv_bfloat16)Li(?P<channels>\d+)E"
    r"NS_9(?P<window>AnyWindow|Window3x3)(?:ILb(?P<remove_center>\d)ELb(?P<softmax>\d)E)?"
)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel in one architecture's binary."""

    direction: str
    type: str
    channels: int
    fixed: bool
    registers: int
    spilled_bytes: int
    opcodes: Counter[str]

    @property
    def instructions_per_element(self) -> float:
        return self.opcodes.total() / self.channels

    def count(self, prefix: str) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(prefix))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_nvdisasm() -> str | None:
    triton = importlib.util.find_spec("triton")
    packaged = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=str(packaged)) if packaged else None)


def usage_by_kernel(ptxas_log: str) -> dict[str, tuple[int, int]]:
    """Return (registers, spilled bytes) by mangled name."""
    usage = {}
    for entry in ptxas_log.split("Compiling entry function '")[1:]:
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
        usage[entry.partition("'")[0]] = int(re.search(r"Used (\d+) registers", entry)[1]), int(stores) + int(loads)
    return usage


def opcodes_by_kernel(sass: str) -> dict[str, Counter[str]]:
    """Return the instructions by mangled name; NOPs fill up the last line of code and are not counted."""
    opcodes = {}
    for section in sass.split("\n.text.")[1:]:
        name = section.partition(":")[0]
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section, flags=re.MULTILINE)
        opcodes[name] = Counter(opcode for opcode in found if opcode != "NOP")
    return opcodes


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> list[Kernel]:
    """All kernels, compiled for one architecture."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        pytest.skip("needs nvcc, which is not on PATH or in /usr/local/cuda")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm, of the CUDA toolkit or the triton package")
    number = request.param.removeprefix("sm_")
    target = tmp_path_factory.mktemp("sass") / f"{request.param}.cubin"
    command = [nvcc, *NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-Xptxas=-v", "-cubin"]
    done = subprocess.run([*command, SOURCES / "dcnv3_cuda.cu", "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    usage = usage_by_kernel(done.stdout + done.stderr)
    sass = subprocess.run([nvdisasm, "-c", target], capture_output=True, text=True, check=True).stdout
    opcodes = opcodes_by_kernel(sass)
    assert usage.keys() == opcodes.keys()
    found = []
    for name, (registers, spilled_bytes) in usage.items():
        parts = KERNEL.search(name)
        assert parts, name
        found.append(
            Kernel(
                direction=parts["direction"],
                type=parts["type"],
                channels=int(parts["channels"]),
                fixed=parts["window"] == "Window3x3",
                registers=registers,
                spilled_bytes=spilled_bytes,
                opcodes=opcodes[name],
            )
        )
    return found


def half_3x3(kernels: list[Kernel], direction: str) -> list[Kernel]:
    """The float16 kernels for 3x3 windows: with and without the centre, with and without softmax."""
    found = [k for k in kernels if k.fixed and k.direction == direction and k.type == "6__half"]
    assert len(found) == 4
    return found


def test_nothing_spills(kernels):
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []


def test_forward_keeps_its_budget(kernels):
    for kernel in half_3x3(kernels, "forward"):
        assert kernel.instructions_per_element <= FORWARD_INSTRUCTIONS
        assert kernel.registers <= FORWARD_REGISTERS


def test_backward_keeps_its_budget(kernels, request):
    architecture = request.node.callspec.params["kernels"]
    for kernel in half_3x3(kernels, "backward"):
        assert kernel.instructions_per_element <= BACKWARD_INSTRUCTIONS[architecture]
        if architecture == "sm_90":
            # Four corners of each point, 8 channels, 4 at a time.
            assert kernel.count("REDG.E.ADD.F32x4") in (4 * 8 * 2, 4 * 9 * 2)


def test_channels_move_128_bits_at_a_time(kernels):
    for kernel in kernels:
        if not kernel.fixed:
            continue
        points = kernel.count("LDG.E.128") // 4
        assert points in (8, 9)
        if kernel.direction == "forward":
            assert kernel.count("LDG.E.128") == 4 * points
            assert kernel.count("STG.E") == kernel.count("STG.E.EF.128") == 1
        else:
            assert kernel.count("LDG.E.128") == 4 * points + 1  # the output's gradient


def test_kernels_include_no_torch_header():
    """Such headers would cost more time than all kernels together."""
    device_code = [
        *SOURCES.glob("*.cu"),
        *SOURCES.glob("*.cuh"),
        *SOURCES.glob("*_cuda.h"),
        *SOURCES.glob("*_geometry.h"),
    ]
    assert len(device_code) >= 4
    for file in device_code:
        included = re.findall(r'#include [<"]([^>"]+)', file.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/")) or "torch" in name]
