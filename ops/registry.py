"""What the operators share: their registration with PyTorch, autograd, and the choice between kernel and reference.

An operator has three tensors and options, and a gradient for each tensor. Of one with the name `<name>`

* `torch.ops.internimage.<name>_forward` and `_backward` are what `torch.compile` and `torch.export` see: schema, fake
  kernels, autograd. They work without a compiler too.
* `torch.ops.internimage_kernels.<name>_forward` and `_backward`, with the same schema, are the bare kernels. The
  libraries that `ops.build` loads register them for CPU and CUDA; only this module calls them.
* In eager mode the bare kernel is called from an `autograd.Function`: going through a registered autograd formula costs
  several times the kernel's own dispatch.
"""

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops import build, selfcheck
from ops.selfcheck import Truth

Gradients = tuple[Tensor, Tensor, Tensor]

# float16 on a CPU takes the reference, which computes in float32.
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}


class Operator:
    """An operator, registered when it is made: a compiled kernel where there is one, else `truth`.

    The first tensor decides device and dtype.

    Args:
        truth: Its name and reference.
        options: The schema of the arguments after the tensors.
        check: Raises ValueError where the operator's arguments do not fit each other.
        output_size: The output's size for arguments that fit.
    """

    def __init__(
        self, truth: Truth, options: str, check: Callable[..., None], output_size: Callable[..., Sequence[int]]
    ) -> None:
        self.truth = truth
        self._check = check
        self._output_size = output_size
        name = truth.name
        arguments = ", ".join([*(f"Tensor {tensor}" for tensor in truth.tensors), options])
        # Kept: a library that is collected takes its registrations with it.
        self._libraries = [
            self._define("internimage", arguments),
            self._define("internimage_kernels", arguments.replace("SymInt", "int")),
        ]
        # Any: torch.ops has no types.
        operators: Any = torch.ops.internimage
        kernels: Any = torch.ops.internimage_kernels
        self._registered_forward = getattr(operators, f"{name}_forward").default
        self._registered_backward = getattr(operators, f"{name}_backward").default
        self.kernel_forward = getattr(kernels, f"{name}_forward").default
        self.kernel_backward = getattr(kernels, f"{name}_backward").default
        library = self._libraries[0]
        library.impl(f"{name}_forward", self._checked_forward, "CompositeExplicitAutograd")
        library.impl(f"{name}_backward", self._checked_backward, "CompositeExplicitAutograd")
        torch.library.register_autograd(
            f"internimage::{name}_forward", self._differentiate, setup_context=_save, lib=library
        )
        torch.library.register_autograd(f"internimage::{name}_backward", self._refuse, lib=library)

    def run(self, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Tensor:
        """Run the operator on arguments that were checked.

        Raises:
            RuntimeError: Called under `torch.func` transforms.
        """
        out: Tensor
        if torch.compiler.is_compiling():
            out = self._registered_forward(a, b, c, *options)
        elif torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{self.truth.name}: torch.func transforms (vmap, grad, jacrev, ...) are not supported. Use the batch "
                f"dimension and torch.autograd, or {self.truth.reference}, which they can transform."
            )
        elif torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or c.requires_grad):
            out = _Differentiable.apply(self, a, b, c, *options)
        else:
            out = self.forward(a, b, c, *options)
        return out

    def forward(self, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Tensor:
        """Run the kernel or the reference, without autograd and checks."""
        if _has_kernel(self, a.device, a.dtype, os.environ.get("INTERNIMAGE_OPS")):
            out: Tensor = self.kernel_forward(a, b, c, *options)
            return out
        return self.truth.forward(a, b, c, *options).contiguous()

    def backward(self, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Gradients:
        """Run the kernel or the reference for the gradients, without autograd and checks."""
        if _has_kernel(self, a.device, a.dtype, os.environ.get("INTERNIMAGE_OPS")):
            if a.is_cuda and torch.are_deterministic_algorithms_enabled():
                _alert_not_deterministic(self.truth.name)
            grads: Gradients = self.kernel_backward(grad, a, b, c, *options)
            return grads
        return self.truth.backward(grad, a, b, c, *options)

    def registered_backward(self, grad: Tensor, *arguments: Any) -> Gradients:
        """Run the registered operator for the gradients, which refuses to be differentiated again."""
        grads: Gradients = self._registered_backward(grad, *arguments)
        return grads

    def _define(self, namespace: str, arguments: str) -> Any:
        library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types here
        name = self.truth.name
        library.define(f"{name}_forward({arguments}) -> Tensor")
        library.define(f"{name}_backward(Tensor grad, {arguments}) -> (Tensor, Tensor, Tensor)")
        torch.library.register_fake(f"{namespace}::{name}_forward", self._fake_forward, lib=library)
        torch.library.register_fake(f"{namespace}::{name}_backward", _fake_backward, lib=library)
        return library

    def _checked_forward(self, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Tensor:
        self._check(a, b, c, *options)
        return self.forward(a, b, c, *options)

    def _checked_backward(self, grad: Tensor, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Gradients:
        self._check(a, b, c, *options)
        expected = tuple(self._output_size(a, b, c, *options))
        if grad.shape != expected or grad.dtype != a.dtype or grad.device != a.device:
            raise ValueError(
                f"{self.truth.name}: `grad` has shape {tuple(grad.shape)} and is {grad.dtype} on {grad.device}, "
                f"expected {expected}, {a.dtype} on {a.device} as the output."
            )
        return self.backward(grad, a, b, c, *options)

    def _fake_forward(self, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Tensor:
        return a.new_empty(self._output_size(a, b, c, *options))

    def _differentiate(self, ctx: Any, grad: Tensor) -> Any:
        grads = self._registered_backward(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *(None,) * len(ctx.options)

    def _refuse(self, ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{self.truth.name}: double backward of {self.truth.name} is not implemented. Use {self.truth.reference} "
            "for second derivatives."
        )


class _Differentiable(torch.autograd.Function):
    # `forward(ctx, ...)`, not `setup_context`, which costs twice as much per call.
    @staticmethod
    def forward(ctx: Any, operator: Operator, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(a, b, c)
        ctx.operator = operator
        ctx.options = options
        return operator.forward(a, b, c, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Under create_graph the registered operator refuses a second derivative; the bare kernel would drop it.
        backward = ctx.operator.registered_backward if torch.is_grad_enabled() else ctx.operator.backward
        return None, *backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * len(ctx.options)


def autocasts(device: str) -> bool:
    """Say whether `torch.autocast` is on for a device type."""
    # Asking about a device without autocast, such as meta, raises.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@functools.cache
def _has_kernel(operator: Operator, device: torch.device, dtype: torch.dtype, choice: str | None) -> bool:
    """Say whether a compiled kernel serves `device` and `dtype`; build it and check it on first use.

    Args:
        operator: Whose kernel.
        device: Of the tensors.
        dtype: Of the tensors.
        choice: INTERNIMAGE_OPS. `ops.build` reads it too; here it makes a change of it seen.
    """
    if dtype not in _KERNEL_DTYPES.get(device.type, ()):
        return False
    if device.type == "cpu":
        return build.load("cpp")
    return build.load("cuda") and selfcheck.passes(
        operator.truth, operator.kernel_forward, operator.kernel_backward, device, dtype, demanded=choice == "cuda"
    )


def _alert_not_deterministic(name: str) -> None:
    message = (
        f"{name}: the CUDA backward adds with atomics and is not deterministic, but torch.use_deterministic_algorithms "
        "is on. Set INTERNIMAGE_OPS=reference for a slower one that is."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


def _fake_backward(grad: Tensor, a: Tensor, b: Tensor, c: Tensor, *options: Any) -> Gradients:
    return a.new_empty(a.shape), b.new_empty(b.shape), c.new_empty(c.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, c, *ctx.options = inputs
    ctx.save_for_backward(a, b, c)
