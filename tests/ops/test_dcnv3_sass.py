"""What nvcc makes of the DCNv3 kernels: registers, spills and instructions, without a GPU.

The budgets hold with nvcc 13.0. A kernel for the 3x3 window has no loop over points or channels, so a thread executes
an instruction at most once (with two lanes per group that holds for the loop over shuffle distances too). Divided by
the channels of a thread they are instructions per output element.
"""

import re

import pytest
from cuda_sass import ARCHITECTURES, SOURCES, Kernel, compile_kernels

FORWARD_INSTRUCTIONS = 180
# Before sm_90, channels are added to the gradient of x one by one.
BACKWARD_INSTRUCTIONS = {"sm_80": 330, "sm_90": 300}
FORWARD_REGISTERS = 64

FIXED = re.compile(r"(?P<direction>forward|backward)_kernelI(?P<type>f|6__half|13__nv_bfloat16)Li[48]ENS_9Window3x3")
HALF_CHANNELS = 8  # of a thread


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> list[Kernel]:
    """All kernels, compiled for one architecture."""
    return compile_kernels("dcnv3_cuda.cu", request.param, tmp_path_factory.mktemp("sass"))


def fixed(kernels: list[Kernel]) -> list[tuple[str, str, Kernel]]:
    """(direction, element type, kernel) of those for 3x3 windows: with and without the centre and softmax."""
    matches = [(FIXED.search(kernel.name), kernel) for kernel in kernels]
    found = [(match["direction"], match["type"], kernel) for match, kernel in matches if match]
    assert len(found) == 2 * 3 * 4
    return found


def half_3x3(kernels: list[Kernel], direction: str) -> list[Kernel]:
    found = [kernel for found, element, kernel in fixed(kernels) if (found, element) == (direction, "6__half")]
    assert len(found) == 4
    return found


def test_nothing_spills(kernels):
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []


def test_forward_keeps_its_budget(kernels):
    for kernel in half_3x3(kernels, "forward"):
        assert kernel.opcodes.total() / HALF_CHANNELS <= FORWARD_INSTRUCTIONS
        assert kernel.registers <= FORWARD_REGISTERS


def test_backward_keeps_its_budget(kernels, request):
    architecture = request.node.callspec.params["kernels"]
    for kernel in half_3x3(kernels, "backward"):
        assert kernel.opcodes.total() / HALF_CHANNELS <= BACKWARD_INSTRUCTIONS[architecture]
        if architecture == "sm_90":
            # Four corners of each point, 8 channels, 4 at a time.
            assert kernel.count("REDG.E.ADD.F32x4") in (4 * 8 * 2, 4 * 9 * 2)


def test_channels_move_128_bits_at_a_time(kernels):
    for direction, _, kernel in fixed(kernels):
        points = kernel.count("LDG.E.128") // 4
        assert points in (8, 9)
        if direction == "forward":
            assert kernel.count("LDG.E.128") == 4 * points
            assert kernel.count("STG.E") == kernel.count("STG.E.EF.128") == 1
        else:
            assert kernel.count("LDG.E.128") == 4 * points + 1  # the output's gradient


def test_kernels_include_no_torch_header():
    """Such headers would cost more time than all kernels together."""
    patterns = ("*.cu", "*.cuh", "*_cuda.h", "*_geometry.h", "sampling.h", "cuda_types.h")
    device_code = [file for pattern in patterns for file in SOURCES.glob(pattern)]
    assert len(device_code) >= 10
    for file in device_code:
        included = re.findall(r'#include [<"]([^>"]+)', file.read_text())
        assert not [name for name in included if re.search("^ATen/|^c10/|torch|binding", name)]
