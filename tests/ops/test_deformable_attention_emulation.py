"""The CUDA source of deformable attention, run on the CPU by tests/ops/emulation, against the float64 reference."""

import ctypes
import zlib
from dataclasses import dataclass

import emulated_cuda
import pytest
import torch
from emulated_cuda import ELEMENT_TYPES, ORDERS, addresses

from ops.reference_attention import deformable_attention_reference

pytestmark = emulated_cuda.needs_compiler

NAMES = ("out", "grad_value", "grad_locations", "grad_weights")
MAX_LEVELS = 16


class Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("height", "width", "first")]


class Geometry(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "queries")),
        *((name, ctypes.c_int32) for name in ("heads", "depth", "points", "num_levels")),
        ("levels", Level * MAX_LEVELS),
    ]


class Call(ctypes.Structure):
    _fields_ = [("geometry", Geometry), ("type", ctypes.c_int32), ("order", ctypes.c_int32)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; shapes are (height, width)."""

    shapes: tuple[tuple[int, int], ...] = ((6, 7), (3, 4), (1, 2))
    batch: int = 2
    queries: int = 5
    heads: int = 2
    depth: int = 32
    points: int = 4
    far: bool = False  # some locations are far outside or not finite

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.shapes)

    @property
    def sampled(self) -> tuple[int, ...]:
        return self.batch, self.queries, self.heads, len(self.shapes), self.points


CASES = {
    "base": Case(),
    "one_lane": Case(depth=8),
    "three_vectors": Case(depth=24),
    "three_points": Case(points=3, depth=16),
    "many_points": Case(points=9, queries=2),
    "many_blocks": Case(heads=3, queries=47),
    "odd_channels": Case(depth=5),
    "one_channel": Case(depth=1, points=1),
    "more_channels_than_lanes": Case(depth=77, heads=1, queries=3),
    "more_vectors_than_lanes": Case(depth=264, heads=1, queries=2, shapes=((2, 2),)),
    "one_level": Case(shapes=((5, 6),), depth=16),
    "all_levels": Case(shapes=((2, 3),) * MAX_LEVELS, queries=2),
    "one_pixel": Case(shapes=((1, 1), (1, 9), (9, 1))),
    "one_query": Case(queries=1),
    "far": Case(far=True),
    "far_any_points": Case(far=True, points=3, depth=7),
    "no_queries": Case(queries=0),
    "no_images": Case(batch=0),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation")
    return emulated_cuda.load_driver(folder / "driver.so", "attention_driver.cpp", "-O1")


def make_inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return value, locations, weights and the output's gradient.

    Locations are odd multiples of 1/128, exact in every dtype and no whole number of pixels of levels this small.
    """
    random = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    value = torch.randn(case.batch, case.pixels, case.heads, case.depth, generator=random)
    weights = torch.randn(case.sampled, generator=random)
    grad = torch.randn(case.batch, case.queries, case.heads * case.depth, generator=random)
    shape = (*case.sampled, 2)
    locations = (2 * torch.randint(-16, 80, shape, generator=random) + 1) / 128
    if case.far:
        odd = torch.tensor([1e4, -1e4, 1e30, float("inf"), float("-inf"), float("nan")])
        choice = torch.randint(0, 3 * len(odd), shape, generator=random)
        locations = torch.where(choice < len(odd), odd[choice % len(odd)], locations)
    real = torch.promote_types(dtype, torch.float32)
    return [value.to(dtype), locations.to(real), weights.to(dtype), grad.to(dtype)]


def make_call(case: Case, dtype: torch.dtype, order: str) -> Call:
    levels, first = (Level * MAX_LEVELS)(), 0
    for index, (height, width) in enumerate(case.shapes):
        levels[index] = Level(height, width, first)
        first += height * width
    sizes = (case.batch, case.pixels, case.queries, case.heads, case.depth, case.points, len(case.shapes))
    return Call(Geometry(*sizes, levels), ELEMENT_TYPES[dtype], ORDERS[order])


def make_outputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return buffers for out and the three gradients, filled with NaN where the kernels must write."""
    real = torch.promote_types(dtype, torch.float32)
    return [
        torch.full((case.batch, case.queries, case.heads * case.depth), torch.nan, dtype=dtype),
        torch.zeros(case.batch, case.pixels, case.heads, case.depth, dtype=real),
        torch.full((*case.sampled, 2), torch.nan, dtype=real),
        torch.full(case.sampled, torch.nan, dtype=dtype),
    ]


def emulate(driver: ctypes.CDLL, case: Case, inputs: list[torch.Tensor], order: str) -> list[torch.Tensor]:
    outputs = make_outputs(case, inputs[0].dtype)
    call = make_call(case, inputs[0].dtype, order)
    error = driver.run_deformable_attention(ctypes.byref(call), addresses(inputs + outputs))
    assert error is None, error.decode()
    return outputs


def expected(case: Case, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    value, locations, weights = (tensor.double().requires_grad_() for tensor in inputs[:3])
    out = deformable_attention_reference(value, case.shapes, locations, weights)
    return [out.detach(), *torch.autograd.grad(out, (value, locations, weights), inputs[3].double())]


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference_in_any_thread_order(driver, name, dtype):
    case = CASES[name]
    inputs = make_inputs(case, dtype)
    truth = expected(case, inputs)
    for order in ORDERS:
        emulated_cuda.assert_close(NAMES, emulate(driver, case, inputs, order), truth)


@pytest.mark.parametrize("name", ["base", "odd_channels"])
def test_a_point_outside_contributes_nothing_even_with_an_infinite_weight(driver, name):
    inputs = make_inputs(CASES[name], torch.float32)
    inputs[1][0, 1, 1, 0, 2] = 1e4
    inputs[2][0, 1, 1, 0, 2] = torch.inf
    emulated_cuda.assert_close(NAMES, emulate(driver, CASES[name], inputs, "natural"), expected(CASES[name], inputs))


@pytest.mark.parametrize("shifted", range(4))
def test_unaligned_tensors_take_kernels_that_can_read_them(driver, shifted):
    case = CASES["base"]
    inputs = make_inputs(case, torch.float16)
    truth = expected(case, inputs)
    aligned = inputs[shifted]
    inputs[shifted] = torch.empty(aligned.numel() + 1, dtype=aligned.dtype)[1:].view(aligned.shape).copy_(aligned)
    assert inputs[shifted].data_ptr() % 16 == aligned.itemsize
    emulated_cuda.assert_close(NAMES, emulate(driver, case, inputs, "natural"), truth)


def test_images_too_large_for_32_bit_indices_are_refused(driver):
    call = make_call(Case(), torch.float32, "natural")
    call.geometry.pixels = 1 << 25
    error = driver.run_deformable_attention(ctypes.byref(call), (ctypes.c_void_p * 8)())
    assert b"33554432 pixels of 64 channels or 5 queries are too many" in error


def test_a_wrong_shuffle_mask_in_the_kernel_is_caught(tmp_path):
    ballot = "= __ballot_sync(0xffffffffu, thread < launch.num_threads)"
    file = "deformable_attention_cuda.cuh"
    include = emulated_cuda.changed_sources(tmp_path / "csrc", file, ballot, "= 0xffffffffu")
    library = emulated_cuda.load_driver(tmp_path / "driver.so", "attention_driver.cpp", include, "-O0")
    case = Case(queries=3, batch=1)
    with pytest.raises(AssertionError, match="names lane 24, which has exited"):
        emulate(library, case, make_inputs(case, torch.float16), "natural")


def test_kernels_are_clean_under_sanitizers_and_in_many_launches(tmp_path):
    program = emulated_cuda.compile_sanitized(tmp_path, "attention_driver.cpp")
    dtypes = list(ELEMENT_TYPES)
    # Neighbouring cases take different dtypes, so that every kind of kernel meets the sanitizers.
    problems = [(case, dtypes[i % 4]) for i, case in enumerate(CASES.values())]
    records = [
        (make_call(case, dtype, "reversed"), make_inputs(case, dtype), make_outputs(case, dtype))
        for case, dtype in problems
    ]
    results = emulated_cuda.run_program(program, records)
    for (case, _), (_, inputs, _), outputs in zip(problems, records, results, strict=True):
        emulated_cuda.assert_close(NAMES, outputs, expected(case, inputs))
