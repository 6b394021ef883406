"""Multi-scale deformable attention (Deformable DETR, arXiv:2010.04159, eq. 3), on every device.

`deformable_attention` is the function to call. It checks its arguments and runs a compiled kernel where there is one,
else `ops.reference_attention`; `ops.registry` tells how.

Shapes: B batch, S pixels of all levels, Q queries, M heads, D channels per head, L levels, P points per level.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ops.reference_attention import deformable_attention_reference, deformable_attention_reference_backward
from ops.registry import Gradients, Operator, autocasts
from ops.selfcheck import Problem, Truth


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample each head of `value` at P points per level and query, and sum the samples weighted by `attention_weights`.

    A sample is bilinear and pixels outside of a level count as 0: `grid_sample` with `align_corners=False`. A point a
    pixel or more outside of its level, or not finite, contributes nothing and gets no gradient. At a pixel's centre the
    gradient of the location is the right-hand derivative. float16 and bfloat16 accumulate in float32.

    The gradients of all three tensors exist, once: differentiating them again raises. Under `torch.autocast`, the
    weights are cast to the dtype of `value` and the locations to float32.

    Args:
        value: Pixels of all levels, row by row, one level after the other, `(B, S, M, D)`, any real floating dtype.
        spatial_shapes: (height, width) of the L levels, Python integers; their products sum to S.
        sampling_locations: (x, y) in [0, 1] from the top left corner of a level to its bottom right,
            `(B, Q, M, L, P, 2)`. float32, or float64 if `value` is. float16 and bfloat16 are read too, but they
            miss by up to 1/4096 and 1/512 of a level's size.
        attention_weights: `(B, Q, M, L, P)`, dtype of `value`; they need not sum to 1.

    Returns:
        `(B, Q, M * D)`, dtype of `value`.

    Raises:
        ValueError: A shape, dtype or device does not fit the others.
        RuntimeError: Called under `torch.func` transforms.
    """
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    if sampling_locations.dtype in (torch.float16, torch.bfloat16):
        sampling_locations = sampling_locations.to(real)
    if not (attention_weights.dtype == value.dtype and sampling_locations.dtype == real) and autocasts(
        value.device.type
    ):
        sampling_locations, attention_weights = sampling_locations.to(real), attention_weights.to(value.dtype)
    if not all(isinstance(shape, (tuple, list)) and len(shape) == 2 for shape in spatial_shapes):
        raise ValueError(
            f"deformable_attention: `spatial_shapes` is {spatial_shapes}, expected (height, width) of each level as "
            "Python integers. Where a tensor holds them, keep the integers that it was made of: reading it makes the "
            "CPU wait for the GPU."
        )
    shapes = [size for shape in spatial_shapes for size in shape]
    _check(value, sampling_locations, attention_weights, shapes)
    return OPERATOR.run(value, sampling_locations, attention_weights, shapes)


def _check(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, shapes: Sequence[int]) -> None:
    if value.dim() != 4 or not value.is_floating_point() or min(value.shape[2:]) < 1:
        raise ValueError(
            f"deformable_attention: `value` is {value.dtype} {tuple(value.shape)}, expected floating-point "
            "(B, S, M, D) with at least one head and channel."
        )
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    if attention_weights.dtype != value.dtype or sampling_locations.dtype != real:
        raise ValueError(
            f"deformable_attention: `attention_weights` is {attention_weights.dtype} and `sampling_locations` is "
            f"{sampling_locations.dtype}, expected {value.dtype} as `value` and {real}. Cast them, or run under "
            "torch.autocast, where that is done for you."
        )
    if not sampling_locations.device == attention_weights.device == value.device:
        raise ValueError(
            f"deformable_attention: `value` is on {value.device}, `sampling_locations` on {sampling_locations.device} "
            f"and `attention_weights` on {attention_weights.device}. Move them to one."
        )
    levels = _pairs(shapes)
    pixels = sum(height * width for height, width in levels)
    if not levels or min(shapes) < 1 or pixels != value.shape[1]:
        raise ValueError(
            f"deformable_attention: `value` has {value.shape[1]} pixels, but the levels of `spatial_shapes` {levels} "
            f"have {pixels}. Expected at least one level, none empty, and the same number of pixels."
        )
    batch, _, heads, _ = value.shape
    if attention_weights.dim() != 5 or attention_weights.shape[4] < 1:
        raise ValueError(
            f"deformable_attention: `attention_weights` has shape {tuple(attention_weights.shape)}, expected "
            "(B, Q, M, L, P) with at least one point."
        )
    queries, points = attention_weights.shape[1], attention_weights.shape[4]
    expected = (batch, queries, heads, len(levels), points)
    for name, tensor, size in (
        ("attention_weights", attention_weights, expected),
        ("sampling_locations", sampling_locations, (*expected, 2)),
    ):
        if tensor.shape != size:
            raise ValueError(
                f"deformable_attention: `{name}` has shape {tuple(tensor.shape)}, expected {size} for value "
                f"{tuple(value.shape)}, {len(levels)} levels, {queries} queries and {points} points."
            )


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (height, width) of each level: the operator's schema has a flat list."""
    return list(zip(shapes[::2], shapes[1::2], strict=True))


def _output_size(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Sequence[int]:
    return value.shape[0], weights.shape[1], value.shape[2] * value.shape[3]


def _forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Tensor:
    return deformable_attention_reference(value, _pairs(shapes), locations, weights)


def _backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int]) -> Gradients:
    return deformable_attention_reference_backward(grad, value, _pairs(shapes), locations, weights)


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield what the detectors use, and what no special case of a kernel covers: two images of a few queries each."""
    for heads, depth, points, shapes in (
        (2, 32, 4, [(6, 7), (3, 4), (1, 2)]),
        (3, 5, 3, [(5, 6), (2, 1)]),
    ):
        random = torch.Generator("cpu").manual_seed(0)
        pixels, sampled = sum(height * width for height, width in shapes), (2, 5, heads, len(shapes), points)
        # The caller may have set another default device.
        grad, value, weights = (
            torch.randn(*shape, generator=random, device="cpu").to(dtype)
            for shape in ((2, 5, heads * depth), (2, pixels, heads, depth), sampled)
        )
        # Odd multiples of 1/128, to a quarter outside of the levels: none is a whole number of such small levels'
        # pixels, so that all dtypes sample between the same.
        steps = torch.randint(-16, 80, (*sampled, 2), generator=random, device="cpu")
        locations = ((2 * steps + 1) / 128).to(torch.promote_types(dtype, torch.float32))
        yield Problem(
            name=f"{len(shapes)} levels, {points} points and {depth} channels per head",
            tensors=(grad, value, locations, weights),
            options=([size for shape in shapes for size in shape],),
        )


OPERATOR = Operator(
    Truth(
        name="deformable_attention",
        reference="ops.reference_attention.deformable_attention_reference",
        tensors=("value", "sampling_locations", "attention_weights"),
        forward=_forward,
        backward=_backward,
        problems=_problems,
    ),
    options="SymInt[] spatial_shapes",
    check=_check,
    output_size=_output_size,
)
