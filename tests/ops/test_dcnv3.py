"""`dcnv3` does what its documentation says, by every implementation that runs on a CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import dcnv3
from ops.reference import dcnv3_reference

pytestmark = pytest.mark.usefixtures("implementation", "uninitialized_is_nan")

REALS = (torch.float32, torch.float64)
# Largest difference over the largest expected value: sums of products in float32 or float64, and half a unit in the
# last place of bfloat16's 8 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def inputs(size, groups, depth, *, batch=2, out_size=None, num_points=9, spread=1.5, seed=0):
    """Return x, offset, mask and the output's gradient, float32."""
    random = torch.Generator().manual_seed(seed)
    pixels = (batch, *(out_size or size))
    x = torch.randn(batch, *size, groups * depth, generator=random)
    offset = spread * torch.randn(*pixels, groups * num_points * 2, generator=random)
    mask = torch.randn(*pixels, groups * num_points, generator=random)
    return x, offset, mask, torch.randn(*pixels, groups * depth, generator=random)


def run(function, tensors, grad, **options):
    """Return the output and the gradients of x, offset and mask."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_like_float64_reference(tensors, grad, **options):
    found = run(dcnv3, tensors, grad, **options)
    truth = run(dcnv3_reference, [tensor.double() for tensor in tensors], grad.double(), **options)
    for name, ours, expected in zip(("output", "grad x", "grad offset", "grad mask"), found, truth, strict=True):
        assert ours.dtype == grad.dtype
        difference = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        assert difference < TOLERANCES[grad.dtype], name


def to_nchw(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (5, 2, 2, 1), (2, 1, 0, 1), ((3, 5), (2, 1), (0, 3), (1, 2)), ((1, 4), (3, 2), (1, 2), (2, 3))],
)
def test_without_offsets_it_is_a_depthwise_convolution(kernel_size, stride, padding, dilation):
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    groups, depth = 3, 4
    x, *_ = inputs((11, 13), groups, depth)
    x = x.double()
    # One weight per (group, point), the same at every pixel; points are ordered with columns outermost.
    weights = torch.randn(groups, width, height, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    filters = weights.transpose(1, 2).repeat_interleave(depth, 0).unsqueeze(1)
    expected = F.conv2d(to_nchw(x), filters, None, stride, padding, dilation, groups=groups * depth)
    pixels = (2, *expected.shape[2:])
    mask = weights.flatten().expand(*pixels, -1)
    offset = torch.zeros(*pixels, groups * width * height * 2, dtype=torch.float64)
    out = dcnv3(
        x, offset, mask, groups=groups, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
    )
    torch.testing.assert_close(to_nchw(out), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("softmax", [False, True])
def test_without_offsets_and_with_equal_weights_it_is_average_pooling(softmax):
    x, offset, mask, _ = inputs((8, 9), 2, 16, out_size=(4, 5))
    weights = torch.full_like(mask, 0.7 if softmax else 1 / 9)
    out = dcnv3(x, offset * 0, weights, groups=2, stride=2, softmax=softmax)
    expected = F.avg_pool2d(to_nchw(x), 3, stride=2, padding=1)
    torch.testing.assert_close(to_nchw(out), expected, rtol=0, atol=1e-6)  # float32, values of about 1


@pytest.mark.parametrize(("dx", "dy", "offset_scale"), [(2, -1, 1.0), (-3, 0, 1.0), (1, 2, 2.0), (100, -1, 1.0)])
def test_a_whole_number_offset_is_a_shift(dx, dy, offset_scale):
    x, *_ = inputs((6, 7), 2, 5)
    offset = torch.tensor([dx, dy]).float().expand(2, 6, 7, 2, 2).flatten(-2)
    out = dcnv3(x, offset, torch.ones(2, 6, 7, 2), groups=2, kernel_size=1, padding=0, offset_scale=offset_scale)
    expected = torch.zeros_like(x)
    for row, column in itertools.product(range(6), range(7)):
        source_row, source_column = row + int(dy * offset_scale), column + int(dx * offset_scale)
        if 0 <= source_row < 6 and 0 <= source_column < 7:
            expected[:, row, column] = x[:, source_row, source_column]
    assert torch.equal(out, expected)


def test_samples_of_a_plane_are_its_height_at_the_sampling_point():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(10.0), indexing="ij")
    plane = (2 * rows - 3 * columns).double().view(1, 9, 10, 1)
    random = torch.Generator().manual_seed(0)
    # Within half a pixel, so that every sample stays between pixels of the image once the border is cut off.
    offset = (torch.rand(1, 9, 10, 2, generator=random) - 0.5).double().requires_grad_()
    out = dcnv3(plane, offset, torch.ones(1, 9, 10, 1).double(), groups=1, kernel_size=1, padding=0)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    expected = plane[..., 0] + 2 * offset[..., 1] - 3 * offset[..., 0]
    torch.testing.assert_close(out[..., 0][inner], expected[inner], rtol=0, atol=1e-13)
    (grad,) = torch.autograd.grad(out.sum(), offset)
    torch.testing.assert_close(grad[inner], torch.tensor([-3.0, 2.0]).double().expand(1, 7, 8, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("remove_center", [False, True])
def test_gradients_are_those_of_finite_differences(softmax, remove_center):
    num_points = 9 - remove_center
    tensors = [t.double() for t in inputs((3, 4), 2, 3, batch=1, out_size=(2, 2), num_points=num_points)[:3]]
    # Finite differences must not cross a whole-number coordinate: fractions stay within 0.1 .. 0.9.
    tensors[1] = tensors[1].floor() + 0.1 + 0.8 * (tensors[1] - tensors[1].floor())

    def operator(x, offset, mask):
        return dcnv3(x, offset, mask, groups=2, stride=2, remove_center=remove_center, softmax=softmax)

    assert torch.autograd.gradcheck(operator, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 8, 12, 16, 25, 32, 40, 57])
def test_any_number_of_channels(depth, dtype):
    tensors = [tensor.to(dtype) for tensor in inputs((5, 6), 3, depth)]
    assert_like_float64_reference(tensors[:3], tensors[3], groups=3, softmax=True)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (17, 3)])
def test_any_image_size(size, dtype):
    tensors = [tensor.to(dtype) for tensor in inputs(size, 2, 16, spread=3)]
    assert_like_float64_reference(tensors[:3], tensors[3], groups=2)


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("spread", [30, 1e4, 1e30])
def test_offsets_far_outside(spread, dtype):
    # 40 rows of one image make several bands in the CPU's backward.
    tensors = [tensor.to(dtype) for tensor in inputs((40, 6), 2, 16, batch=1, spread=spread)]
    assert_like_float64_reference(tensors[:3], tensors[3], groups=2)


def test_points_at_minus_one_and_at_the_size_are_void():
    x, _, _, grad = inputs((4, 5), 1, 8, batch=1)
    # The only point of column 0 lies at -1 exactly, that of the last column at the size.
    offset = torch.zeros(1, 4, 5, 2)
    offset[:, :, 0, 0], offset[:, :, -1, 0] = -1, 1
    out, _, grad_offset, grad_mask = run(
        dcnv3, (x, offset, torch.ones(1, 4, 5, 1)), grad, groups=1, kernel_size=1, padding=0
    )
    for tensor in (out, grad_offset, grad_mask):
        assert tensor[:, :, [0, -1]].abs().max() == 0
        assert tensor[:, :, 1:-1].abs().min() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_point_that_is_not_finite_contributes_nothing(value):
    x, offset, mask, grad = inputs((6, 7), 2, 16)
    points = offset.view(2, 6, 7, 2, 9, 2)
    hit = torch.rand(points.shape[:-1], generator=torch.Generator().manual_seed(3)) < 0.3
    points[..., 0][hit] = value
    found = run(dcnv3, (x, offset, mask), grad, groups=2)
    assert all(tensor.isfinite().all() for tensor in found)
    # The same as points without weight, but for the gradient of that weight.
    harmless = torch.where(hit.unsqueeze(-1), 0.25, points).flatten(3)
    expected = run(dcnv3, (x, harmless, mask.masked_fill(hit.flatten(3), 0)), grad, groups=2)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[2].view_as(points)[hit].abs().max() == 0
    assert found[3].view_as(hit)[hit].abs().max() == 0
    torch.testing.assert_close(found[3].view_as(hit)[~hit], expected[3].view_as(hit)[~hit])


def test_an_empty_batch_gives_empty_results():
    tensors = inputs((4, 5), 2, 16, batch=0)
    shapes = [tuple(tensor.shape) for tensor in run(dcnv3, tensors[:3], tensors[3], groups=2)]
    assert shapes == [(0, 4, 5, 32), (0, 4, 5, 32), (0, 4, 5, 36), (0, 4, 5, 18)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_offset_and_mask_may_be_slices_of_one_tensor(dtype):
    x, offset, mask, grad = (tensor.to(dtype) for tensor in inputs((5, 6), 2, 16))
    fused = torch.cat([offset, mask, torch.full_like(mask, torch.nan)], -1).requires_grad_()
    out = dcnv3(x, fused[..., :36], fused[..., 36:54], groups=2)
    (grad_fused,) = torch.autograd.grad(out, fused, grad)
    expected = run(dcnv3, (x, offset, mask), grad, groups=2)
    assert torch.equal(out, expected[0])
    assert torch.equal(grad_fused[..., :54], torch.cat(expected[2:], -1))


def test_any_strides():
    x, offset, mask, grad = inputs((5, 6), 2, 16)
    expected = run(dcnv3, (x, offset, mask), grad, groups=2)
    by_channel = [to_nchw(tensor).contiguous().permute(0, 2, 3, 1) for tensor in (x, offset, mask, grad)]
    spaced = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (x, offset, mask, grad)]
    for tensors in (by_channel, spaced):
        found = run(dcnv3, tensors[:3], tensors[3], groups=2)
        assert found[0].is_contiguous()
        # The reference's float32 sums run in the order of the strides.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_strides_of_single_rows_and_columns_do_not_matter():
    x, offset, mask, grad = inputs((5, 1), 2, 8, batch=1)
    expected = run(dcnv3, (x, offset, mask), grad, groups=2)
    odd = [torch.as_strided(tensor, tensor.shape, (7, tensor.shape[-1], 3, 1)) for tensor in (x, offset, mask)]
    assert all(map(torch.equal, run(dcnv3, odd, grad, groups=2), expected))


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("batch", "spread"), [(1, 1.5), (1, 40.0), (3, 4.0)])
def test_the_same_bits_for_any_number_of_threads(batch, spread, dtype):
    tensors = [tensor.to(dtype) for tensor in inputs((41, 7), 3, 20, batch=batch, spread=spread)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(dcnv3, tensors[:3], tensors[3], groups=3, softmax=True))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_float16_is_computed_in_float32():
    tensors = [tensor.half() for tensor in inputs((5, 6), 2, 16)]
    found = run(dcnv3, tensors[:3], tensors[3], groups=2, softmax=True)
    truth = run(dcnv3_reference, [t.double() for t in tensors[:3]], tensors[3].double(), groups=2, softmax=True)
    for ours, expected in zip(found, truth, strict=True):
        assert ours.dtype == torch.float16
        assert (ours - expected).abs().max() < 2**-11 * expected.abs().max() + 1e-5  # float16 keeps 11 bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 5, 7)}, r"`x` is torch.float32 \(2, 5, 7\), expected floating-point \(B, H, W, C\)"),
        (
            {"mask": (2, 5, 7, 18)},
            r"`mask` has shape \(2, 5, 7, 18\), expected \(2, 5, 7, 27\) for x \(2, 5, 7, 48\), groups=3, kernel_size",
        ),
        ({"offset": (2, 5, 7, 27)}, r"`offset` has shape \(2, 5, 7, 27\), expected \(2, 5, 7, 54\)"),
        ({"offset": (1, 5, 7, 54)}, r"`offset` has shape \(1, 5, 7, 54\), expected \(2, 5, 7, 54\)"),
        ({"stride": 2}, r"`offset` has shape \(2, 5, 7, 54\), expected \(2, 3, 4, 54\) .*stride=2"),
        ({"groups": 5}, r"the 48 channels of `x` do not divide into groups=5"),
        ({"groups": 0}, r"must be at least 1 and `padding` at least 0, found groups=0"),
        ({"dilation": (0, 1)}, r"dilation=\(0, 1\)"),
        ({"padding": -1}, r"padding=-1"),
        ({"stride": (1, 1, 1)}, r"found \(1, 1, 1\) where one number or \(height, width\) was expected"),
        ({"kernel_size": 2, "remove_center": True}, r"`remove_center` needs an odd kernel .*kernel_size=2"),
        ({"kernel_size": 1, "remove_center": True}, r"`remove_center` needs an odd kernel with more than one point"),
        ({"kernel_size": 9}, r"5 x 7 pixels is too small for .*kernel_size=9.*the output would be -1 x 1"),
        ({"offset": torch.float64}, r"`offset` is torch.float64 and `mask` is torch.float32, expected torch.float32"),
        ({"x": torch.int64}, r"expected torch.int64 as `x`|expected floating-point"),
        ({"mask": "meta"}, r"`x` is on cpu, `offset` on cpu and `mask` on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    tensors = {"x": torch.zeros(2, 5, 7, 48), "offset": torch.zeros(2, 5, 7, 54), "mask": torch.zeros(2, 5, 7, 27)}
    options = {"groups": 3}
    for name, value in change.items():
        if isinstance(value, tuple) and name in tensors:
            tensors[name] = torch.zeros(value)
        elif name in tensors:
            tensors[name] = tensors[name].to(value)
        else:
            options[name] = value
    with pytest.raises(ValueError, match=r"^dcnv3: ") as caught:
        dcnv3(**tensors, **options)
    assert caught.match(message)
