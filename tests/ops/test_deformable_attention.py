"""`deformable_attention` does what its documentation says, by every implementation that runs on a CPU."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import deformable_attention, selfcheck
from ops.deformable_attention import OPERATOR
from ops.reference_attention import deformable_attention_reference

pytestmark = pytest.mark.usefixtures("implementation", "uninitialized_is_nan")

SHAPES = ((6, 7), (3, 4), (1, 2))
REALS = (torch.float32, torch.float64)
# Largest difference over the largest expected value: sums of products in float32 or float64, and half a unit in the
# last place of bfloat16's 8 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def inputs(shapes=SHAPES, heads=2, depth=8, *, batch=2, queries=9, points=4, spread=0.25, seed=0, dtype=torch.float32):
    """Return value, locations, weights and the output's gradient.

    Locations are odd multiples of 1/128, up to `spread` outside of the levels. Whatever the dtype, such points are
    exact, and none is a whole number of pixels of levels with less than 64.
    """
    random = torch.Generator().manual_seed(seed)
    pixels, sampled = sum(height * width for height, width in shapes), (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, pixels, heads, depth, generator=random).to(dtype)
    weights = torch.randn(sampled, generator=random).to(dtype)
    steps = torch.randint(int(-64 * spread), int(64 * (1 + spread)), (*sampled, 2), generator=random)
    grad = torch.randn(batch, queries, heads * depth, generator=random).to(dtype)
    return value, ((2 * steps + 1) / 128).to(real(dtype)), weights, grad


def run(function, shapes, tensors):
    """Return the output and the gradients of value, locations and weights."""
    *tensors, grad = tensors
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in tensors)
    out = function(value, shapes, locations, weights)
    return out.detach(), *torch.autograd.grad(out, (value, locations, weights), grad)


def grid_sample_form(value, shapes, locations, weights):
    """The same by `grid_sample`, level by level."""
    batch, _, heads, depth = value.shape
    queries, points = weights.shape[1], weights.shape[-1]
    parts = value.flatten(2).transpose(1, 2).unflatten(1, (heads, depth)).flatten(0, 1)
    out = 0
    for level, part in enumerate(parts.split([height * width for height, width in shapes], -1)):
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples = F.grid_sample(part.unflatten(-1, shapes[level]), grid, align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        out = out + (samples * weight).sum(-1)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def assert_close(found, truth, dtype):
    names = ("output", "grad value", "grad locations", "grad weights")
    for name, ours, expected in zip(names, found, truth, strict=True):
        assert ours.dtype == (real(dtype) if name == "grad locations" else dtype)
        if expected.numel():
            difference = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            # The gradient of the locations stays in the type of the arithmetic.
            assert difference < TOLERANCES[ours.dtype], name


def assert_like_float64_reference(shapes, tensors):
    truth = run(deformable_attention_reference, shapes, [tensor.double() for tensor in tensors])
    assert_close(run(deformable_attention, shapes, tensors), truth, tensors[0].dtype)


def test_it_is_grid_sample_of_each_level():
    tensors = inputs(dtype=torch.float64)
    found = run(deformable_attention, SHAPES, tensors)
    assert_close(found, run(grid_sample_form, SHAPES, tensors), torch.float64)


def test_at_the_centres_of_pixels_it_reads_them():
    height, width = 5, 8
    value, *_ = inputs([(height, width)], 3, 5)
    rows, columns = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(8) + 0.5) / 8, indexing="ij")
    locations = torch.stack([columns, rows], -1).view(1, 40, 1, 1, 1, 2).expand(2, 40, 3, 1, 1, 2)
    out = deformable_attention(value, [(height, width)], locations, torch.ones(2, 40, 3, 1, 1))
    # 1/5 is not exact: coordinates are off by a millionth of a pixel.
    torch.testing.assert_close(out.view_as(value), value, rtol=0, atol=1e-5)


def test_equal_weights_at_the_corners_between_pixels_are_average_pooling():
    value, *_ = inputs([(4, 6)], 2, 16)
    rows, columns = torch.meshgrid(torch.arange(1, 4) / 4, torch.arange(1, 6) / 6, indexing="ij")
    locations = torch.stack([columns, rows], -1).view(1, 15, 1, 1, 1, 2).expand(2, 15, 2, 1, 1, 2)
    out = deformable_attention(value, [(4, 6)], locations, torch.ones(2, 15, 2, 1, 1))
    image = value.flatten(2).transpose(1, 2).unflatten(-1, (4, 6))
    expected = F.avg_pool2d(image, 2, stride=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # as above


def test_levels_and_points_add_up():
    value, locations, weights, _ = inputs(dtype=torch.float64)
    out = deformable_attention(value, SHAPES, locations, weights)
    total = torch.zeros_like(out)
    for level, point in itertools.product(range(3), range(4)):
        alone = torch.zeros_like(weights)
        alone[..., level, point] = weights[..., level, point]
        total += deformable_attention(value, SHAPES, locations, alone)
    torch.testing.assert_close(out, total, rtol=0, atol=1e-13)


def test_samples_of_a_plane_are_its_height_at_the_location():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(10.0), indexing="ij")
    plane = (2 * rows - 3 * columns).double().view(1, 90, 1, 1)
    random = torch.Generator().manual_seed(0)
    # At least half a pixel from the border.
    locations = (0.1 + 0.8 * torch.rand(1, 20, 1, 1, 1, 2, generator=random)).double().requires_grad_()
    out = deformable_attention(plane, [(9, 10)], locations, torch.ones(1, 20, 1, 1, 1).double())
    x, y = locations.view(20, 2).unbind(-1)
    torch.testing.assert_close(out.flatten(), 2 * (9 * y - 0.5) - 3 * (10 * x - 0.5), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), locations)
    torch.testing.assert_close(grad.view(20, 2), torch.tensor([-30.0, 18.0]).double().expand(20, 2), rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    # The locations are 1/128 of a level or more from whole-number coordinates.
    *tensors, _ = inputs(((3, 4), (2, 1)), 2, 3, batch=1, queries=2, points=2, dtype=torch.float64)

    def operator(value, locations, weights):
        return deformable_attention(value, ((3, 4), (2, 1)), locations, weights)

    assert torch.autograd.gradcheck(operator, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 8, 12, 16, 25, 32, 40, 57])
def test_any_number_of_channels(depth, dtype):
    assert_like_float64_reference(SHAPES, inputs(heads=3, depth=depth, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("queries", "points"), [(1, 4), (140, 4), (129, 1), (33, 3), (66, 9), (2, 130)])
def test_any_number_of_points_and_queries(queries, points, dtype):
    assert_like_float64_reference(SHAPES[1:], inputs(SHAPES[1:], 2, 16, queries=queries, points=points, dtype=dtype))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("shapes", [[(1, 1)], [(1, 9), (9, 1)], [(2, 2)] * 16, [(17, 3), (40, 2)]], ids=str)
def test_any_levels(shapes, dtype):
    assert_like_float64_reference(shapes, inputs(shapes, 2, 16, spread=1.0, dtype=dtype))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("far", [30.0, 1e6, 1e30, float("inf"), -float("inf"), float("nan")])
def test_a_point_far_outside_or_not_finite_contributes_nothing(far, dtype):
    value, locations, weights, grad = inputs(dtype=dtype)
    hit = torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    locations[..., 0][hit] = far
    found = run(deformable_attention, SHAPES, (value, locations, weights, grad))
    # The same as points without weight, but for the gradient of that weight.
    harmless = torch.where(hit.unsqueeze(-1), 0.4, locations)
    expected = run(deformable_attention, SHAPES, (value, harmless, weights.masked_fill(hit, 0), grad))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert found[2][hit].abs().max() == 0
    assert found[3][hit].abs().max() == 0
    assert torch.equal(found[3][~hit], expected[3][~hit])


def test_a_point_one_pixel_outside_is_void():
    value, *_ = inputs([(4, 8)], 1, 8, batch=1)
    # Columns -1, -0.5, 7.5 and 8.
    x = torch.tensor([-0.5, 0.0, 8.0, 8.5]) / 8
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).view(1, 4, 1, 1, 1, 2)
    tensors = (value, locations, torch.ones(1, 4, 1, 1, 1), torch.ones(1, 4, 8))
    out, _, *grads = run(deformable_attention, [(4, 8)], tensors)
    for tensor in (out, *grads):
        assert tensor[0, [0, 3]].abs().max() == 0
        assert tensor[0, 1:3].flatten(1).abs().amax(1).min() > 0


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0), (0, 0)])
def test_no_images_or_queries_give_empty_results_and_zero_gradients(batch, queries):
    found = run(deformable_attention, SHAPES, inputs(batch=batch, queries=queries))
    sampled = (batch, queries, 2, 3, 4)
    assert [tuple(t.shape) for t in found] == [(batch, queries, 16), (batch, 56, 2, 8), (*sampled, 2), sampled]
    assert torch.equal(found[1], torch.zeros(batch, 56, 2, 8))


def test_any_strides():
    tensors = inputs()
    expected = run(deformable_attention, SHAPES, tensors)
    transposed = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    spaced = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in tensors]
    for others in (transposed, spaced):
        found = run(deformable_attention, SHAPES, others)
        assert found[0].is_contiguous()
        # The reference's float32 sums run in the order of the strides.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_for_any_number_of_threads(batch, dtype):
    tensors = inputs(heads=3, depth=20, batch=batch, queries=101, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(deformable_attention, SHAPES, tensors))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_float16_is_computed_in_float32():
    tensors = inputs(dtype=torch.float16)
    found = run(deformable_attention, SHAPES, tensors)
    truth = run(deformable_attention_reference, SHAPES, [tensor.double() for tensor in tensors])
    assert [tensor.dtype for tensor in found] == [torch.float16, torch.float16, torch.float32, torch.float16]
    for ours, expected in zip(found, truth, strict=True):
        assert (ours - expected).abs().max() < 2**-11 * expected.abs().max() + 1e-5  # float16 keeps 11 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_locations_of_16_bits_are_read_exactly(dtype):
    value, locations, weights, _ = inputs(dtype=dtype)
    low = (0.9 * locations).to(dtype).requires_grad_()
    out = deformable_attention(value, SHAPES, low, weights)
    assert torch.equal(out, deformable_attention(value, SHAPES, low.float(), weights))
    assert torch.autograd.grad(out.float().sum(), low)[0].dtype == dtype


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kernels_pass_the_self_check(dtype):
    deformable_attention(*_arguments({}))  # loads them
    assert selfcheck.passes(
        OPERATOR.truth, OPERATOR.kernel_forward, OPERATOR.kernel_backward, torch.device("cpu"), dtype, demanded=True
    )


def _arguments(change: dict[str, object]) -> tuple[Tensor, object, Tensor, Tensor]:
    arguments = {
        "value": torch.zeros(2, 56, 2, 8),
        "spatial_shapes": SHAPES,
        "sampling_locations": torch.zeros(2, 9, 2, 3, 4, 2),
        "attention_weights": torch.zeros(2, 9, 2, 3, 4),
    }
    for name, new in change.items():
        old = arguments[name]
        if not isinstance(old, Tensor):
            arguments[name] = new
        else:
            arguments[name] = torch.zeros(new) if isinstance(new, tuple) else old.to(new)
    value, shapes, locations, weights = arguments.values()
    return value, shapes, locations, weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (2, 56, 16)}, r"`value` is torch.float32 \(2, 56, 16\), expected floating-point \(B, S, M, D\)"),
        ({"value": (2, 56, 2, 0)}, r"with at least one head and channel"),
        ({"value": torch.int64}, r"`value` is torch.int64"),
        ({"value": (2, 55, 2, 8)}, r"`value` has 55 pixels, but the levels of .*\(1, 2\)\] have 56"),
        ({"spatial_shapes": ((6, 7), (14, 1), (0, 2))}, r"have 56. Expected at least one level, none empty"),
        ({"spatial_shapes": ()}, r"levels of `spatial_shapes` \[\] have 0"),
        ({"spatial_shapes": ((8, 7),)}, r"`attention_weights` has shape \(2, 9, 2, 3, 4\), expected \(2, 9, 2, 1, 4\)"),
        ({"spatial_shapes": torch.tensor(SHAPES)}, r"expected \(height, width\) of each level as Python integers"),
        ({"spatial_shapes": (6, 7)}, r"`spatial_shapes` is \(6, 7\), expected \(height, width\) of each level"),
        ({"spatial_shapes": ((6, 7, 1),)}, r"`spatial_shapes` is \(\(6, 7, 1\),\), expected \(height, width\)"),
        ({"attention_weights": (2, 9, 2, 12)}, r"`attention_weights` has shape \(2, 9, 2, 12\), expected \(B, Q, M, L"),
        ({"attention_weights": (2, 9, 3, 3, 4)}, r"expected \(2, 9, 2, 3, 4\) for value \(2, 56, 2, 8\), 3 levels"),
        ({"attention_weights": (2, 9, 2, 3, 0)}, r"with at least one point"),
        (
            {"sampling_locations": (2, 9, 2, 3, 4, 3)},
            r"`sampling_locations` has shape .* expected \(2, 9, 2, 3, 4, 2\)",
        ),
        ({"sampling_locations": (1, 9, 2, 3, 4, 2)}, r"`sampling_locations` has shape \(1, 9, 2, 3, 4, 2\)"),
        ({"sampling_locations": torch.float64}, r"`sampling_locations` is torch.float64, expected torch.float32 as"),
        ({"attention_weights": torch.bfloat16}, r"`attention_weights` is torch.bfloat16 .* expected torch.float32 as"),
        ({"value": torch.float64}, r"expected torch.float64 as `value` and torch.float64"),
        ({"attention_weights": "meta"}, r"`sampling_locations` on cpu and `attention_weights` on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=r"^deformable_attention: ") as caught:
        deformable_attention(*_arguments(change))
    assert caught.match(message)


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
def test_more_levels_than_the_kernels_take_are_named():
    tensors = inputs([(1, 1)] * 17)
    with pytest.raises(RuntimeError, match=r"found 17 levels, and the kernels take at most 16"):
        deformable_attention(tensors[0], [(1, 1)] * 17, *tensors[1:3])
