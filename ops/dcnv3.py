"""DCNv3: deformable aggregation over a neighbourhood (InternImage, arXiv:2211.05778, eq. 2), on every device.

`dcnv3` is the function to call. It checks its arguments and runs a compiled kernel where there is one, else
`ops.reference`. Below it:

* `torch.ops.internimage.dcnv3_forward` and `dcnv3_backward` are what `torch.compile` and `torch.export` see: schema,
  fake kernels, autograd. They work without a compiler too.
* `torch.ops.internimage_kernels.dcnv3_forward` and `dcnv3_backward`, with the same schema, are the bare kernels. The
  libraries that `ops.build` loads register them for CPU and CUDA; only this module calls them.
* In eager mode `dcnv3` calls the bare kernel from an `autograd.Function`: going through a registered autograd formula
  costs several times the kernel's own dispatch.

Shapes: B batch, H W input size, h w output size, G groups, D channels per group, K points per group.
"""

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from ops import build, selfcheck
from ops.reference import IntPair, Taps, dcnv3_reference, dcnv3_reference_backward, pair

Gradients = tuple[Tensor, Tensor, Tensor]

# float16 on a CPU takes the reference, which computes in float32.
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}
# Any: torch.ops has no types.
_OPERATORS: Any = torch.ops.internimage
_KERNELS: Any = torch.ops.internimage_kernels


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
    if not offset.dtype == mask.dtype == x.dtype and _autocasts(x.device.type):
        offset, mask = offset.to(x.dtype), mask.to(x.dtype)
    taps = Taps(
        pair(kernel_size), pair(stride), pair(padding), pair(dilation), groups, float(offset_scale), remove_center
    )
    _check(x, offset, mask, taps)
    options = (*taps, softmax)
    run: Any
    if torch.compiler.is_compiling():
        run = _OPERATORS.dcnv3_forward
    elif torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "dcnv3: torch.func transforms (vmap, grad, jacrev, ...) are not supported. Use the batch dimension and "
            "torch.autograd, or ops.reference.dcnv3_reference, which they can transform."
        )
    elif torch.is_grad_enabled() and (x.requires_grad or offset.requires_grad or mask.requires_grad):
        run = _Dcnv3.apply
    else:
        run = _forward
    out: Tensor = run(x, offset, mask, *options)
    return out


class _Dcnv3(torch.autograd.Function):
    # `forward(ctx, ...)`, not `setup_context`, which costs twice as much per call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.options = options
        return _forward(x, offset, mask, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Under create_graph the registered operator refuses a second derivative; the bare kernel would drop it.
        backward = _OPERATORS.dcnv3_backward if torch.is_grad_enabled() else _backward
        return *backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * len(ctx.options)


def _forward(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Tensor:
    if _has_kernel(x.device, x.dtype, os.environ.get("INTERNIMAGE_OPS")):
        out: Tensor = _KERNELS.dcnv3_forward(x, offset, mask, *options)
        return out
    return dcnv3_reference(x, offset, mask, **_taps(options)._asdict(), softmax=options[-1]).contiguous()


def _backward(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Gradients:
    if _has_kernel(x.device, x.dtype, os.environ.get("INTERNIMAGE_OPS")):
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            _alert_not_deterministic()
        grads: Gradients = _KERNELS.dcnv3_backward(grad, x, offset, mask, *options)
        return grads
    return dcnv3_reference_backward(grad, x, offset, mask, _taps(options), options[-1])


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype, choice: str | None) -> bool:
    """Say whether a compiled kernel serves `device` and `dtype`; build it and check it on first use.

    Args:
        device: Of the tensors.
        dtype: Of the tensors.
        choice: INTERNIMAGE_OPS. `ops.build` reads it too; here it makes a change of it seen.
    """
    if dtype not in _KERNEL_DTYPES.get(device.type, ()):
        return False
    if device.type == "cpu":
        return build.load("cpp")
    return build.load("cuda") and selfcheck.passes(
        _KERNELS.dcnv3_forward, _KERNELS.dcnv3_backward, device, dtype, demanded=choice == "cuda"
    )


def _autocasts(device: str) -> bool:
    # Asking about a device without autocast, such as meta, raises.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _alert_not_deterministic() -> None:
    message = (
        "dcnv3: the CUDA backward adds with atomics and is not deterministic, but torch.use_deterministic_algorithms "
        "is on. Set INTERNIMAGE_OPS=reference for a slower one that is."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


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


def _forward_operator(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Tensor:
    _check(x, offset, mask, _taps(options))
    return _forward(x, offset, mask, *options)


def _backward_operator(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Gradients:
    _check(x, offset, mask, _taps(options))
    expected = (*mask.shape[:3], x.shape[3])
    if grad.shape != expected or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"dcnv3: `grad` has shape {tuple(grad.shape)} and is {grad.dtype} on {grad.device}, expected {expected}, "
            f"{x.dtype} on {x.device} as the output."
        )
    return _backward(grad, x, offset, mask, *options)


def _taps(options: tuple[Any, ...]) -> Taps:
    """Read the operators' arguments after the tensors, whose pairs may be lists."""
    kernel_size, stride, padding, dilation = map(pair, options[:4])
    return Taps(kernel_size, stride, padding, dilation, *options[4:7])


def _forward_fake(x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Tensor:
    return x.new_empty((*mask.shape[:3], x.shape[3]))


def _backward_fake(grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, *options: Any) -> Gradients:
    return x.new_empty(x.shape), offset.new_empty(offset.shape), mask.new_empty(mask.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, mask, *ctx.options = inputs
    ctx.save_for_backward(x, offset, mask)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *_OPERATORS.dcnv3_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * len(ctx.options)


def _refuse(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "dcnv3: double backward of dcnv3 is not implemented. Use ops.reference.dcnv3_reference for second derivatives."
    )


def _register() -> list[torch.library.Library]:
    arguments = (
        "Tensor x, Tensor offset, Tensor mask, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "int groups, float offset_scale, bool remove_center, bool softmax"
    )
    libraries = []
    for name in ("internimage", "internimage_kernels"):
        library: Any = torch.library.Library(name, "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types here
        library.define(f"dcnv3_forward({arguments}) -> Tensor")
        library.define(f"dcnv3_backward(Tensor grad, {arguments}) -> (Tensor, Tensor, Tensor)")
        torch.library.register_fake(f"{name}::dcnv3_forward", _forward_fake, lib=library)
        torch.library.register_fake(f"{name}::dcnv3_backward", _backward_fake, lib=library)
        libraries.append(library)
    operators = libraries[0]
    operators.impl("dcnv3_forward", _forward_operator, "CompositeExplicitAutograd")
    operators.impl("dcnv3_backward", _backward_operator, "CompositeExplicitAutograd")
    torch.library.register_autograd("internimage::dcnv3_forward", _differentiate, setup_context=_save, lib=operators)
    torch.library.register_autograd("internimage::dcnv3_backward", _refuse, lib=operators)
    return libraries


# Kept: a library that is collected takes its registrations with it.
_LIBRARIES = _register()
