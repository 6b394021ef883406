"""DCNv3: deformable aggregation over a neighbourhood (InternImage, arXiv:2211.05778, eq. 2), on every device.

`dcnv3` is the function to call. It checks its arguments and runs a compiled kernel where there is one, else
`ops.reference`; `ops.registry` tells how.

Shapes: B batch, H W input size, h w output size, G groups, D channels per group, K points per group.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.reference import IntPair, Taps, dcnv3_reference, dcnv3_reference_backward, pair
from ops.registry import Gradients, Operator, autocasts
from ops.selfcheck import Problem, Truth


def dcnv3(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    groups: int,
    kernel_size: IntPair = 3,
    stride: IntPair = 1,
    padding: IntPair = 1,
    dilation: IntPair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Sample each group of `x` at K learned points per output pixel and sum the samples weighted by `mask`.

    Points are ordered with the kernel's columns outermost. A sample is bilinear and pixels outside of `x` count as 0. A
    point with a coordinate <= -1, >= the size or not finite contributes nothing and gets no gradient. At whole-number
    coordinates the gradient of `offset` is the right-hand derivative. float16 and bfloat16 accumulate in float32.

    The gradients of all three tensors exist, once: differentiating them again raises. Under `torch.autocast`, `offset`
    and `mask` are cast to the dtype of `x`.

    Args:
        x: Channels-last features, `(B, H, W, G * D)`, any real floating dtype.
        offset: Displacements in input pixels before `offset_scale`, `(B, h, w, G * K * 2)`, innermost (dx, dy).
        mask: Weights, `(B, h, w, G * K)`; they need not sum to 1. `offset` and `mask` may be slices along the last
            dimension of one tensor: they are read in place. Other strides cost a copy.
        groups: G.
        kernel_size: Points along each axis; this and the next three are one number or (height, width).
        stride: Input pixels between output pixels.
        padding: Input pixels that the windows start before the first pixel.
        dilation: Distance of a window's points before `offset_scale`.
        offset_scale: Factor on the window's extent around its centre and on `offset`.
        remove_center: Leave out the central point (odd kernels): K is one less.
        softmax: `mask` holds logits; normalise them over K here, in float32 at least.

    Returns:
        `(B, h, w, G * D)`, dtype of `x`.

    Raises:
        ValueError: A shape, dtype, device or option does not fit the others.
        RuntimeError: Called under `torch.func` transforms.
    """
    if not offset.dtype == mask.dtype == x.dtype and autocasts(x.device.type):
        offset, mask = offset.to(x.dtype), mask.to(x.dtype)
    taps = Taps(
        pair(kernel_size), pair(stride), pair(padding), pair(dilation), groups, float(offset_scale), remove_center
    )
    _check(x, offset, mask, taps)
    return OPERATOR.run(x, offset, mask, *taps, softmax)


def _check(x: Tensor, offset: Tensor, mask: Tensor, taps: Taps) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"dcnv3: `x` is {x.dtype} {tuple(x.shape)}, expected floating-point (B, H, W, C).")
    if not offset.dtype == mask.dtype == x.dtype:
        raise ValueError(
            f"dcnv3: `offset` is {offset.dtype} and `mask` is {mask.dtype}, expected {x.dtype} as `x`. Cast them, or "
            "run under torch.autocast, where that is done for you."
        )
    if not offset.device == mask.device == x.device:
        raise ValueError(
            f"dcnv3: `x` is on {x.device}, `offset` on {offset.device} and `mask` on {mask.device}. Move them to one."
        )
    if min(*taps.kernel_size, *taps.stride, *taps.dilation, taps.groups) < 1 or min(taps.padding) < 0:
        raise ValueError(
            "dcnv3: `groups`, `kernel_size`, `stride` and `dilation` must be at least 1 and `padding` at least 0, "
            f"found {_settings(taps)}."
        )
    if taps.remove_center and (taps.kernel_size[0] % 2 == 0 or taps.kernel_size[1] % 2 == 0 or taps.num_points == 0):
        raise ValueError(
            f"dcnv3: `remove_center` needs an odd kernel with more than one point, found {_settings(taps)}."
        )
    batch, height, width, channels = x.shape
    if channels < 1 or channels % taps.groups != 0:
        raise ValueError(f"dcnv3: the {channels} channels of `x` do not divide into groups={taps.groups}.")
    out_height, out_width = taps.output_size(height, width)
    if min(height, width, out_height, out_width) < 1:
        raise ValueError(
            f"dcnv3: `x` of {height} x {width} pixels is too small for {_settings(taps)}: the output would be "
            f"{out_height} x {out_width}."
        )
    points = taps.groups * taps.num_points
    for name, tensor, size in (("offset", offset, points * 2), ("mask", mask, points)):
        expected = (batch, out_height, out_width, size)
        if tensor.shape != expected:
            raise ValueError(
                f"dcnv3: `{name}` has shape {tuple(tensor.shape)}, expected {expected} for x {tuple(x.shape)}, "
                f"{_settings(taps)}."
            )


def _settings(taps: Taps) -> str:
    """Name the options that decide shapes, pairs of equal numbers as one."""
    pairs = zip(taps._fields[:4], taps[:4], strict=True)
    shown = [f"{name}={value[0] if value[0] == value[1] else value}" for name, value in pairs]
    return ", ".join([f"groups={taps.groups}", *shown, *["remove_center=True"] * taps.remove_center])


def _taps(options: Sequence[Any]) -> Taps:
    """Read the operator's arguments after the tensors, whose pairs may be lists."""
    kernel_size, stride, padding, dilation = map(pair, options[:4])
    return Taps(kernel_size, stride, padding, dilation, *options[4:7])


def _check_operator(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> None:
    _check(x, offset, mask, _taps(options))


def _output_size(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Sequence[int]:
    return *mask.shape[:3], x.shape[3]


def _forward(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Tensor:
    return dcnv3_reference(x, offset, mask, **_taps(options)._asdict(), softmax=options[7])


def _backward(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Gradients:
    return dcnv3_reference_backward(grad, x, offset, mask, _taps(options), options[7])


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield what InternImage uses, and what no special case of a kernel covers: two small images each."""
    size = (5, 6)
    for depth, taps, softmax in (
        (16, Taps((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False), True),
        (32, Taps((3, 3), (1, 1), (1, 1), (1, 1), 1, 2.0, True), False),
        (5, Taps((2, 3), (1, 2), (0, 1), (1, 2), 3, 1.0, False), True),
    ):
        random = torch.Generator("cpu").manual_seed(0)
        channels, points = taps.groups * depth, taps.groups * taps.num_points
        pixels = (2, *taps.output_size(*size))
        # The caller may have set another default device.
        grad, x, mask = (
            torch.randn(*shape, generator=random, device="cpu").to(dtype)
            for shape in ((*pixels, channels), (2, *size, channels), (*pixels, points))
        )
        # Odd multiples of 1/64 are exact in every dtype, so that all of them sample between the same pixels.
        steps = torch.randint(-64, 64, (*pixels, 2 * points), generator=random, device="cpu")
        yield Problem(
            name=f"kernel {taps.kernel_size} and {depth} channels per group",
            tensors=(grad, x, ((2 * steps + 1) / 64).to(dtype), mask),
            options=(*taps, softmax),
        )


OPERATOR = Operator(
    Truth(
        name="dcnv3",
        reference="ops.reference.dcnv3_reference",
        tensors=("x", "offset", "mask"),
        forward=_forward,
        backward=_backward,
        problems=_problems,
    ),
    options=(
        "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, float offset_scale, "
        "bool remove_center, bool softmax"
    ),
    check=_check_operator,
    output_size=_output_size,
)
