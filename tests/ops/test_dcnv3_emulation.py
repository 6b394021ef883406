"""The CUDA source of DCNv3, run on the CPU by tests/ops/emulation, against the float64 reference and golden cases."""

import ctypes
import zlib
from dataclasses import dataclass, replace

import emulated_cuda
import golden_dcnv3
import numpy as np
import pytest
import torch
from emulated_cuda import ELEMENT_TYPES, ORDERS, TOLERANCES, addresses

from ops.reference import Taps, dcnv3_reference

pytestmark = emulated_cuda.needs_compiler

NAMES = ("out", "grad_x", "grad_offset", "grad_mask")


class Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("input", "output", "kernel", "stride", "padding", "dilation")]


class Geometry(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("y", Axis),
        ("x", Axis),
        *((name, ctypes.c_int32) for name in ("groups", "depth", "points")),
        *((name, ctypes.c_int64) for name in ("offset_stride", "mask_stride")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_bool) for name in ("remove_center", "softmax")),
    ]


class Call(ctypes.Structure):
    _fields_ = [("geometry", Geometry), ("type", ctypes.c_int32), ("order", ctypes.c_int32)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; pairs are (height, width)."""

    size: tuple[int, int] = (5, 6)
    batch: int = 2
    groups: int = 2
    depth: int = 16
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False
    fused: bool = False  # offset and mask are slices of one tensor
    whole_offsets: bool = False
    far_offsets: bool = False

    @property
    def taps(self) -> Taps:
        pairs = (self.kernel_size, self.stride, self.padding, self.dilation)
        return Taps(*pairs, self.groups, self.offset_scale, self.remove_center)

    @property
    def output_size(self) -> tuple[int, int]:
        return self.taps.output_size(*self.size)

    @property
    def offset_channels(self) -> int:
        return 2 * self.groups * self.taps.num_points

    @property
    def mask_channels(self) -> int:
        return self.groups * self.taps.num_points


CASES = {
    "base": Case(),
    "softmax": Case(softmax=True),
    "remove_center": Case(remove_center=True),
    "remove_center_softmax": Case(remove_center=True, softmax=True),
    "one_lane": Case(depth=8),
    "four_lanes_softmax": Case(depth=32, softmax=True),
    "three_vectors": Case(depth=24, softmax=True),
    "many_blocks": Case(size=(9, 7), groups=3, fused=True),
    "odd_channels": Case(depth=5),
    "odd_channels_softmax": Case(depth=7, groups=3, softmax=True, remove_center=True),
    "one_channel": Case(depth=1),
    "more_channels_than_lanes": Case(size=(3, 2), depth=77, groups=1),
    "k5": Case(kernel_size=(5, 5), padding=(2, 2), softmax=True),
    "k5_remove_center": Case(kernel_size=(5, 5), padding=(2, 2), remove_center=True, size=(4, 4)),
    "k1x3": Case(kernel_size=(1, 3), padding=(0, 1)),
    "k4x2": Case(kernel_size=(4, 2), padding=(2, 0), softmax=True),
    "stride2": Case(stride=(2, 2)),
    "dilation2": Case(dilation=(2, 2), padding=(2, 2)),
    "asymmetric": Case(stride=(1, 2), padding=(0, 2), dilation=(1, 2), softmax=True),
    "no_padding": Case(padding=(0, 0)),
    "offset_scale2": Case(offset_scale=2.0),
    "offset_scale_half": Case(offset_scale=0.5, softmax=True),
    "height1": Case(size=(1, 6)),
    "width1": Case(size=(6, 1), softmax=True),
    "whole_offsets": Case(whole_offsets=True),
    "far_offsets": Case(far_offsets=True),
    "far_offsets_any_window": Case(far_offsets=True, kernel_size=(2, 3), depth=3, softmax=True),
    "fused": Case(fused=True, groups=1, softmax=True),  # odd pixel stride
    "empty_batch": Case(batch=0),
    "empty_output": Case(size=(4, 5), kernel_size=(5, 5), padding=(0, 0)),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    library = emulated_cuda.load_driver(tmp_path_factory.mktemp("emulation") / "driver.so", "driver.cpp", "-O1")
    library.divide.argtypes, library.divide.restype = [ctypes.c_uint32, ctypes.c_uint32], ctypes.c_uint32
    library.widen_half.argtypes, library.widen_half.restype = [ctypes.c_uint16], ctypes.c_float
    for narrow in (library.narrow_half, library.narrow_bfloat16):
        narrow.argtypes, narrow.restype = [ctypes.c_float], ctypes.c_uint16
    return library


def make_inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return x, offset, mask and the output's gradient.

    Coordinates are exact in every dtype, so that all choose the same cell of the bilinear interpolation.
    """
    random = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    height, width = case.output_size
    x = torch.randn(case.batch, *case.size, case.groups * case.depth, generator=random)
    mask = torch.randn(case.batch, height, width, case.mask_channels, generator=random)
    grad = torch.randn(case.batch, height, width, case.groups * case.depth, generator=random)
    shape = (case.batch, height, width, case.offset_channels)
    if case.whole_offsets:
        offset = torch.randint(-2, 3, shape, generator=random).float()
    else:
        offset = (2 * torch.randint(-64, 64, shape, generator=random) + 1).float() / 64
    if case.far_offsets:
        odd = torch.tensor([1e4, -1e4, float("inf"), float("-inf"), float("nan"), 6.0, -3.0])
        choice = torch.randint(0, 3 * len(odd), shape, generator=random)
        offset = torch.where(choice < len(odd), odd[choice % len(odd)], offset)
    if case.fused:
        offset, mask = torch.cat((offset, mask), -1).to(dtype).split((case.offset_channels, case.mask_channels), -1)
    return [tensor.to(dtype) for tensor in (x, offset, mask, grad)]


def make_call(case: Case, offset: torch.Tensor, mask: torch.Tensor, order: str) -> Call:
    axes = [Axis(*(pair[i] for pair in (case.size, case.output_size, *case.taps[:4]))) for i in (0, 1)]
    geometry = Geometry(
        case.batch,
        *axes,
        case.groups,
        case.depth,
        case.taps.num_points,
        offset.stride(2),
        mask.stride(2),
        case.offset_scale,
        case.remove_center,
        case.softmax,
    )
    return Call(geometry, ELEMENT_TYPES[offset.dtype], ORDERS[order])


def make_outputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return buffers for out and the three gradients, filled with NaN where the kernels must write."""
    height, width = case.output_size
    real = torch.promote_types(dtype, torch.float32)
    return [
        torch.full((case.batch, height, width, case.groups * case.depth), torch.nan, dtype=dtype),
        torch.zeros(case.batch, *case.size, case.groups * case.depth, dtype=real),
        torch.full((case.batch, height, width, case.offset_channels), torch.nan, dtype=dtype),
        torch.full((case.batch, height, width, case.mask_channels), torch.nan, dtype=dtype),
    ]


def emulate(driver: ctypes.CDLL, case: Case, inputs: list[torch.Tensor], order: str) -> list[torch.Tensor]:
    outputs = make_outputs(case, inputs[0].dtype)
    call = make_call(case, inputs[1], inputs[2], order)
    error = driver.run_dcnv3(ctypes.byref(call), addresses(inputs + outputs))
    assert error is None, error.decode()
    return outputs


def expected(case: Case, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    x, offset, mask = (tensor.double().requires_grad_() for tensor in inputs[:3])
    options = case.taps._asdict()
    out = dcnv3_reference(x, offset, mask, **options, softmax=case.softmax)
    return [out.detach(), *torch.autograd.grad(out, (x, offset, mask), inputs[3].double())]


def assert_close(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    emulated_cuda.assert_close(NAMES, found, truth)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_in_any_thread_order(driver, name, dtype):
    case = CASES[name]
    inputs = make_inputs(case, dtype)
    truth = expected(case, inputs)
    for order in ORDERS:
        assert_close(emulate(driver, case, inputs, order), truth)


@pytest.mark.parametrize("name", ["base", "odd_channels"])
def test_a_point_outside_contributes_nothing_even_with_an_infinite_weight(driver, name):
    inputs = make_inputs(CASES[name], torch.float32)
    inputs[1][0, 1, 2, :2] = 1e4
    inputs[2][0, 1, 2, 0] = torch.inf
    assert_close(emulate(driver, CASES[name], inputs, "natural"), expected(CASES[name], inputs))


def test_unaligned_tensors_take_the_scalar_kernels(driver):
    case = CASES["softmax"]
    inputs = make_inputs(case, torch.float16)
    truth = expected(case, inputs)
    shifted = torch.empty(inputs[0].numel() + 1, dtype=torch.float16)[1:].view(inputs[0].shape).copy_(inputs[0])
    assert shifted.data_ptr() % 16 == 2
    assert_close(emulate(driver, case, [shifted, *inputs[1:]], "natural"), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", golden_dcnv3.CASES)
def test_kernels_equal_the_authors_numbers(driver, name, dtype):
    problem = golden_dcnv3.problem(name)
    batch, *size, channels = problem.x.shape
    case = Case(batch=batch, size=tuple(size), depth=channels // problem.options["groups"], **problem.options)
    inputs = [tensor.to(dtype) for tensor in (problem.x, problem.offset, problem.mask, problem.grad)]
    golden_dcnv3.check(name, emulate(driver, case, inputs, "natural"), TOLERANCES[dtype])


def test_image_too_large_for_32_bit_indices_is_refused(driver):
    call = make_call(Case(), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), "natural")
    call.geometry.y.input = call.geometry.x.input = 1 << 13
    error = driver.run_dcnv3(ctypes.byref(call), (ctypes.c_void_p * 8)())
    assert b"8192 x 8192 x 32 elements" in error
    assert b"Split the image" in error


def test_division_by_multiplication_is_exact_below_two_to_the_31(driver):
    random = np.random.default_rng(0)
    divisors = [1, 2, 3, 5, 7, 56, 641, 65535, 65536, 2**31 - 257, *(int(2**e) for e in random.uniform(1, 31, 40))]
    for divisor in divisors:
        multiples = divisor * random.integers(0, 2**31 // divisor, 20, endpoint=True)
        for dividend in {0, 2**31 - 1, *(int(m) + d for m in multiples for d in (-1, 0, 1))}:
            if 0 <= dividend < 2**31:
                assert driver.divide(dividend, divisor) == dividend // divisor, (dividend, divisor)


def test_half_precision_conversions_of_the_emulation_equal_torch(driver):
    every_half = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    widened = torch.tensor([driver.widen_half(bits) for bits in range(1 << 16)])
    assert torch.equal(widened.nan_to_num(), every_half.float().nan_to_num())
    assert torch.equal(widened.isnan(), every_half.isnan())
    random = torch.Generator().manual_seed(0)
    values = torch.randn(4000, generator=random) * torch.exp2(torch.randint(-27, 18, (4000,), generator=random))
    # Halfway between two halves, to either side of it, at the overflow threshold, and no number at all.
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 2.0**-25, 65519.0, 65520.0, float("inf"), -0.0])
    for value in torch.cat((values, ties, ties.nextafter(torch.tensor(0.0)))):
        for dtype, narrow in ((torch.float16, driver.narrow_half), (torch.bfloat16, driver.narrow_bfloat16)):
            assert narrow(value.item()) == value.to(dtype).view(torch.uint16).item(), (value.item(), dtype)


SEEDED_FAULTS = {
    "mask_names_exited_lane": b"which has exited",
    "mask_excludes_caller": b"which leaves it out",
    "masks_differ": b"with mask",
    "reads_outside_mask": b"outside mask",
    "lane_never_comes": b"for lanes that never come",
    "barrier_after_exit": b"exited before a barrier",
    "misaligned_load": b"not aligned",
    "misaligned_store": b"not aligned",
}


@pytest.fixture(scope="module")
def misuse(tmp_path_factory):
    """Run a kernel with a seeded fault: (index of the fault, thread order) -> its error and its output."""
    library = emulated_cuda.load_driver(tmp_path_factory.mktemp("misuse") / "misuse.so", "misuse.cpp", "-O1")
    library.run_misuse.restype = ctypes.c_char_p
    # torch aligns its tensors.
    numbers = torch.arange(64, dtype=torch.int32)

    def run(fault: int, order: str) -> tuple[bytes | None, torch.Tensor]:
        output = torch.zeros(64, dtype=torch.int32)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, output))
        return library.run_misuse(fault, ORDERS[order], *pointers), output

    return run


def test_a_race_shows_as_results_that_depend_on_the_thread_order(misuse):
    correct, missing_barrier = 0, 1
    neighbours = (torch.arange(64).view(2, 32)[:, :16] + 1).sum(1, keepdim=True)
    truth = torch.zeros(2, 32).index_fill_(1, torch.arange(16), 1) * neighbours
    for order in ORDERS:
        error, output = misuse(correct, order)
        assert error is None
        assert torch.equal(output.view(2, 32), truth.int())
    outputs = [misuse(missing_barrier, order)[1] for order in ORDERS]
    assert not all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("fault", SEEDED_FAULTS)
def test_misuse_is_an_error(misuse, fault):
    error, _ = misuse(2 + list(SEEDED_FAULTS).index(fault), "natural")
    assert error is not None
    assert SEEDED_FAULTS[fault] in error


def test_a_wrong_shuffle_mask_in_the_kernel_is_caught(tmp_path):
    ballot = "= __ballot_sync(0xffffffffu, thread < launch.num_threads)"
    include = emulated_cuda.changed_sources(tmp_path / "csrc", "dcnv3_cuda.cuh", ballot, "= 0xffffffffu")
    library = emulated_cuda.load_driver(tmp_path / "driver.so", "driver.cpp", include, "-O0")
    with pytest.raises(AssertionError, match="names lane 16, which has exited"):
        emulate(library, Case(size=(2, 3)), make_inputs(Case(size=(2, 3)), torch.float16), "natural")


def test_kernels_are_clean_under_sanitizers_and_in_many_launches(tmp_path):
    program = emulated_cuda.compile_sanitized(tmp_path, "driver.cpp")
    dtypes = list(ELEMENT_TYPES)
    # Neighbouring cases take different dtypes, so that every kind of kernel meets the sanitizers.
    problems = [(replace(case, fused=False), dtypes[i % 4]) for i, case in enumerate(CASES.values())]
    records = []
    for case, dtype in problems:
        inputs = make_inputs(case, dtype)
        records.append((make_call(case, inputs[1], inputs[2], "reversed"), inputs, make_outputs(case, dtype)))
    results = emulated_cuda.run_program(program, records)
    for (case, _), (_, inputs, _), outputs in zip(problems, records, results, strict=True):
        assert_close(list(outputs), expected(case, inputs))
