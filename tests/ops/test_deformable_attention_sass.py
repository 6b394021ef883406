"""What nvcc makes of the deformable attention kernels: registers, spills and instructions, without a GPU.

The budgets hold with nvcc 13.0. A kernel for four points per level has no loop over points or channels, only over
levels: divided by the four points of its eight channels, its size bounds the instructions per sampled element.
"""

import re

import pytest
from cuda_sass import ARCHITECTURES, Kernel, compile_kernels

FORWARD_INSTRUCTIONS = 650
# Before sm_90, channels are added to the gradient of the values one by one.
BACKWARD_INSTRUCTIONS = {"sm_80": 1200, "sm_90": 1150}
FORWARD_REGISTERS = 64

FOUR_POINTS = re.compile(r"(?P<direction>forward|backward)_kernelI(?P<type>f|6__half|13__nv_bfloat16)Li[48]ELi4E")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> list[Kernel]:
    """All kernels, compiled for one architecture."""
    return compile_kernels("deformable_attention_cuda.cu", request.param, tmp_path_factory.mktemp("sass"))


def four_points(kernels: list[Kernel], direction: str) -> list[Kernel]:
    matches = [(FOUR_POINTS.search(kernel.name), kernel) for kernel in kernels]
    found = [kernel for match, kernel in matches if match and match["direction"] == direction]
    assert len(found) == 3
    return found


def test_nothing_spills(kernels):
    assert [kernel for kernel in kernels if kernel.spilled_bytes] == []


def test_kernels_keep_their_budgets(kernels, request):
    for kernel in four_points(kernels, "forward"):
        assert kernel.opcodes.total() <= FORWARD_INSTRUCTIONS
        assert kernel.registers <= FORWARD_REGISTERS
    for kernel in four_points(kernels, "backward"):
        assert kernel.opcodes.total() <= BACKWARD_INSTRUCTIONS[request.node.callspec.params["kernels"]]


def test_channels_move_128_bits_at_a_time(kernels, request):
    for kernel in four_points(kernels, "forward"):
        assert kernel.count("LDG.E.128") == 4 * 4
        assert kernel.count("STG.E") == kernel.count("STG.E.EF.128") == 1
    for kernel in four_points(kernels, "backward"):
        assert kernel.count("LDG.E.128") == 4 * 4 + 1  # the output's gradient
        if request.node.callspec.params["kernels"] == "sm_90":
            vectors = 1 if "kernelIf" in kernel.name else 2
            assert kernel.count("REDG.E.ADD.F32x4") == 4 * 4 * vectors
