"""Deformable attention on a CUDA device: the built and loaded kernels against the float64 reference.

The kernels' arithmetic, indexing and shuffles are tested without a GPU by test_deformable_attention_emulation.py. What
is left for hardware: the binding, real memory and atomics, streams and devices.
"""

import pytest
import torch

from ops import deformable_attention
from ops.reference_attention import deformable_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Largest difference over the largest expected value: rounding of the arithmetic for the first two, half a unit in the
# last place of the stored type for the others. Atomics add in any order, which costs float32 a few more bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 4e-6}
SHAPES = ((12, 15), (6, 7), (3, 4), (1, 2))
PROBLEMS = {
    "as in detectors": {},
    "three points": {"points": 3, "depth": 16},
    "three vectors": {"depth": 24},
    "odd": {"points": 5, "depth": 5},
}


@pytest.fixture(autouse=True)
def _demand_kernel(monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "cuda")


def make_inputs(depth=32, points=4, heads=8, batch=3, queries=60, dtype=torch.float32):
    """Return value, locations, weights and the output's gradient; locations are exact and no whole number of pixels."""
    random = torch.Generator().manual_seed(depth)
    sampled = (batch, queries, heads, len(SHAPES), points)
    pixels = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, pixels, heads, depth, generator=random)
    locations = (2 * torch.randint(-16, 80, (*sampled, 2), generator=random) + 1) / 128
    weights, grad = torch.randn(sampled, generator=random), torch.randn(batch, queries, heads * depth, generator=random)
    real = torch.promote_types(dtype, torch.float32)
    return [value.to("cuda", dtype), locations.to("cuda", real), weights.to("cuda", dtype), grad.to("cuda", dtype)]


def run(function, inputs):
    """Return the output and the gradients of value, locations and weights."""
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    out = function(value, SHAPES, locations, weights)
    return [out.detach(), *torch.autograd.grad(out, (value, locations, weights), inputs[3])]


def expected(inputs):
    return run(deformable_attention_reference, [tensor.detach().cpu().double() for tensor in inputs])


def assert_close(found, truth):
    for ours, theirs in zip(found, truth, strict=True):
        difference = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert difference <= TOLERANCES[ours.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_the_reference(name, dtype):
    inputs = make_inputs(**PROBLEMS[name], dtype=dtype)
    assert_close(run(deformable_attention, inputs), expected(inputs))


def test_unaligned_and_transposed_inputs():
    inputs = make_inputs()
    value = torch.empty(inputs[0].numel() + 1, device="cuda")[1:].view(inputs[0].shape).copy_(inputs[0])
    others = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs[1:]]
    assert_close(run(deformable_attention, [value, *others]), expected(inputs))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}])
def test_empty(sizes):
    inputs = make_inputs(**sizes)
    found = run(deformable_attention, inputs)
    assert [result.shape for result in found] == [tensor.shape for tensor in (inputs[3], *inputs[:3])]
    assert not found[1].any()


def test_kernels_run_on_the_current_stream():
    inputs = make_inputs()
    truth = expected(inputs)
    stream = torch.cuda.Stream()
    late = [torch.empty_like(tensor) for tensor in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        # On another stream the kernels would read these before they are filled.
        for tensor, values in zip(late, inputs, strict=True):
            tensor.copy_(values)
        found = run(deformable_attention, late)
    stream.synchronize()
    assert_close(found, truth)


def test_autocast():
    value, locations, weights, _ = make_inputs()
    with torch.autocast("cuda", torch.float16):
        out = deformable_attention(value.half(), SHAPES, locations, weights)
    assert torch.equal(out, deformable_attention(value.half(), SHAPES, locations, weights.half()))


def test_deterministic_algorithms_refuse_the_kernel_and_take_the_reference(monkeypatch):
    inputs = make_inputs()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"deformable_attention: .*INTERNIMAGE_OPS=reference"):
            run(deformable_attention, inputs)
        monkeypatch.setenv("INTERNIMAGE_OPS", "reference")
        assert all(map(torch.equal, run(deformable_attention, inputs), run(deformable_attention, inputs)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_queries():
    """More blocks than a GPU holds at once; weights of 1 at the centres of pixels make it a sum of levels."""
    height, width, heads, depth = 64, 128, 8, 32
    value = torch.randn(4, 2 * height * width, heads, depth, device="cuda", dtype=torch.float16)
    rows, columns = torch.meshgrid((torch.arange(64) + 0.5) / 64, (torch.arange(128) + 0.5) / 128, indexing="ij")
    centres = torch.stack([columns, rows], -1).view(1, -1, 1, 1, 1, 2).cuda()
    locations = centres.expand(4, -1, heads, 2, 1, 2)
    out = deformable_attention(value, [(height, width)] * 2, locations, torch.ones_like(locations[..., 0]).half())
    total = value.float().unflatten(1, (2, -1)).sum(1).flatten(2)
    assert (out.float() - total).abs().max() <= 2**-11 * total.abs().max()
