"""DCNv3 on a CUDA device: the built and loaded kernels against the float64 reference and the authors' numbers.

The kernels' arithmetic, indexing and shuffles are tested without a GPU by test_dcnv3_emulation.py. What is left for
hardware: the binding, real memory and atomics, streams and devices.
"""

import golden_dcnv3
import pytest
import torch

from ops import dcnv3
from ops.reference import dcnv3_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Largest difference over the largest expected value: rounding of the arithmetic for the first two, half a unit in the
# last place of the stored type for the others. Atomics add in any order, which costs float32 a few more bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 4e-6}
PROBLEMS = {
    "3x3 softmax": {"depth": 16, "softmax": True},
    "3x3": {"depth": 32},
    "without centre": {"depth": 8, "remove_center": True, "softmax": True},
    "offset scale": {"depth": 16, "offset_scale": 2.0},
    "three vectors": {"depth": 24, "softmax": True},
    "5x5": {"depth": 16, "kernel_size": 5, "padding": 2, "softmax": True},
    "odd": {"depth": 5, "kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (1, 2)},
}


@pytest.fixture(autouse=True)
def _demand_kernel(monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "cuda")


def make_inputs(depth, kernel_size=3, stride=1, padding=1, dilation=1, remove_center=False, groups=4, batch=3, **_):
    """Return x, offset, mask and the output's gradient, exact in every dtype where they decide a cell."""
    random = torch.Generator().manual_seed(depth)
    size = (13, 11)
    kernel, step, pad, spread = ((n, n) if isinstance(n, int) else n for n in (kernel_size, stride, padding, dilation))
    out = [(size[i] + 2 * pad[i] - spread[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1)]
    points = groups * (kernel[0] * kernel[1] - remove_center)
    x, grad = (torch.randn(batch, *pixels, groups * depth, generator=random) for pixels in (size, out))
    mask = torch.randn(batch, *out, points, generator=random)
    offset = (2 * torch.randint(-128, 128, (batch, *out, 2 * points), generator=random) + 1) / 64
    return x, offset, mask, grad


def run(inputs, groups=4, **options):
    """Return the output and the gradients of x, offset and mask."""
    x, offset, mask, grad = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (x, offset, mask)]
    out = dcnv3(*leaves, groups=groups, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(inputs, **options):
    x, offset, mask, grad = (tensor.detach().cpu().double() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (x, offset, mask)]
    out = dcnv3_reference(*leaves, groups=4, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found, truth):
    for ours, theirs in zip(found, truth, strict=True):
        difference = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert difference <= TOLERANCES[ours.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_the_reference(name, dtype):
    options = dict(PROBLEMS[name])
    inputs = [tensor.to("cuda", dtype) for tensor in make_inputs(**options)]
    del options["depth"]
    assert_close(run(inputs, **options), expected(inputs, **options))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", golden_dcnv3.CASES)
def test_kernels_equal_the_authors_numbers(name, dtype):
    problem = golden_dcnv3.problem(name)
    inputs = [tensor.to("cuda", dtype) for tensor in (problem.x, problem.offset, problem.mask, problem.grad)]
    golden_dcnv3.check(name, run(inputs, **problem.options), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset_and_mask_may_be_slices_of_one_tensor(dtype):
    x, offset, mask, grad = (tensor.to("cuda", dtype) for tensor in make_inputs(16))
    slices = torch.cat((offset, mask), -1).split((offset.shape[-1], mask.shape[-1]), -1)
    assert_close(run((x, *slices, grad), softmax=True), expected((x, offset, mask, grad), softmax=True))


def test_unaligned_and_transposed_inputs():
    inputs = [tensor.cuda() for tensor in make_inputs(16)]
    x = torch.empty(inputs[0].numel() + 1, device="cuda")[1:].view(inputs[0].shape).copy_(inputs[0])
    grad = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(run((x, *inputs[1:3], grad), softmax=True), expected(inputs, softmax=True))


def test_empty_batch():
    inputs = [tensor[:0].cuda() for tensor in make_inputs(16)]
    assert [result.shape for result in run(inputs)] == [tensor.shape for tensor in (inputs[3], *inputs[:3])]


def test_kernels_run_on_the_current_stream():
    inputs = [tensor.cuda() for tensor in make_inputs(16)]
    truth = expected(inputs, softmax=True)
    stream = torch.cuda.Stream()
    late = [torch.empty_like(tensor) for tensor in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        # On another stream the kernels would read these before they are filled.
        for tensor, values in zip(late, inputs, strict=True):
            tensor.copy_(values)
        found = run(late, softmax=True)
    stream.synchronize()
    assert_close(found, truth)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_inputs():
    inputs = [tensor.to("cuda:1") for tensor in make_inputs(16)]
    with torch.cuda.device(0):
        found = run(inputs, softmax=True)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert_close(found, expected(inputs, softmax=True))


def test_many_pixels():
    """More blocks than a GPU holds at once; zero offsets and equal weights make the operator an average."""
    x = torch.randn(16, 56, 56, 64, device="cuda", dtype=torch.float16)
    offset = torch.zeros(16, 56, 56, 72, device="cuda", dtype=torch.float16)
    mask = torch.zeros(16, 56, 56, 36, device="cuda", dtype=torch.float16)
    out = dcnv3(x, offset, mask, groups=4, softmax=True)
    average = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2).float(), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    assert (out.float() - average).abs().max() <= 2**-10 * average.abs().max()
