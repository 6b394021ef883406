"""Compare compiled kernels with the reference before they are trusted.

No test covers the user's GPU, driver and compiler: only running the kernels there does. It takes milliseconds.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Forward = Callable[..., Tensor]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]

# Largest difference, relative to a result's largest value: sums of up to 64 terms in any order in float32, and rounding
# to the stored type.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Arguments for an operator and its backward.

    Args:
        name: What is special about it, in words.
        tensors: The output's gradient, then the operator's tensors, on the CPU.
        options: The operator's arguments after the tensors.
    """

    name: str
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    options: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """An operator in PyTorch, and problems that tell a wrong kernel from a right one.

    Args:
        name: Of the operator.
        reference: Where users find `forward`, as an import path.
        tensors: Names of the operator's first three arguments.
        forward: The operator.
        backward: Its gradients for the three tensors: takes the output's gradient, then the operator's arguments.
        problems: Small ones, for tensors of a dtype.
    """

    name: str
    reference: str
    tensors: tuple[str, str, str]
    forward: Forward
    backward: Backward
    problems: Callable[[torch.dtype], Iterable[Problem]]


class Difference(NamedTuple):
    """How far a kernel's result is from the truth, relative to its largest value; NaN where it holds NaN."""

    problem: str
    result: str
    value: float


def passes(
    truth: Truth,
    forward: Forward,
    backward: Backward,
    device: torch.device,
    dtype: torch.dtype,
    *,
    demanded: bool = False,
) -> bool:
    """Say whether two kernels give the reference's output and gradients on small problems; warn if not.

    Callers keep the answer: each call runs the kernels and may warn.

    Args:
        truth: What they should compute.
        forward: With the signature of `truth.forward`.
        backward: With that of `truth.backward`.
        device: Where to run them.
        dtype: One of `TOLERANCES`.
        demanded: Raise instead of warning.

    Raises:
        RuntimeError: They differ, or fail, and `demanded` is set.
    """
    found = _disagreement(truth, forward, backward, device, dtype)
    if found is None:
        return True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    message = (
        f"{truth.name}: the compiled kernel failed its self-check on {name} in {dtype}: {found}. "
        "Rebuild it (python -m ops.build --cuda --force) and report this if it stays."
    )
    if demanded:
        raise RuntimeError(message + " To run without it, set INTERNIMAGE_OPS=reference.")
    warnings.warn(message + " Until then the slower PyTorch reference runs.", RuntimeWarning, stacklevel=2)
    return False


@torch.no_grad()
def differences(
    truth: Truth, forward: Forward, backward: Backward, device: torch.device, dtype: torch.dtype
) -> Iterator[Difference]:
    """Run two kernels on the problems of `truth` and compare each result with the float64 reference's."""
    names = ("output", *(f"gradient of {name}" for name in truth.tensors))
    for problem in truth.problems(dtype):
        tensors = [tensor.to(device) for tensor in problem.tensors]
        found = (forward(*tensors[1:], *problem.options), *backward(*tensors, *problem.options))
        # The kernels' inputs, which may have been rounded, but nothing else of that device.
        exact = [tensor.double() for tensor in problem.tensors]
        expected = (truth.forward(*exact[1:], *problem.options), *truth.backward(*exact, *problem.options))
        for name, ours, theirs in zip(names, found, expected, strict=True):
            difference = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
            yield Difference(problem.name, name, difference)


def _disagreement(
    truth: Truth, forward: Forward, backward: Backward, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Name, in words, the first result that is not the reference's."""
    try:
        for problem, result, value in differences(truth, forward, backward, device, dtype):
            # Written so that NaN is a disagreement.
            if not value <= TOLERANCES[dtype]:
                return (
                    f"with {problem} the {result} is off by {value:.1e} of its largest value, expected at most "
                    f"{TOLERANCES[dtype]:.0e}"
                )
    except RuntimeError as error:
        return f"it raised {error}"
    return None
