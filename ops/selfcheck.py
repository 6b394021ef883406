"""Compare compiled kernels with the reference before they are trusted.

No test covers the user's GPU, driver and compiler: only running the kernels there does. It takes milliseconds.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ops.reference import Taps, dcnv3_reference, dcnv3_reference_backward

Forward = Callable[..., Tensor]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]

# Largest difference, relative to a result's largest value: sums of up to 36 terms in any order in float32, and rounding
# to the stored type.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_NAMES = ("output", "gradient of x", "gradient of offset", "gradient of mask")
# Channels per group and the rest: what InternImage uses, and what no special case of a kernel covers.
_PROBLEMS: tuple[tuple[int, Taps, bool], ...] = (
    (16, Taps((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False), True),
    (32, Taps((3, 3), (1, 1), (1, 1), (1, 1), 1, 2.0, True), False),
    (5, Taps((2, 3), (1, 2), (0, 1), (1, 2), 3, 1.0, False), True),
)
_SIZE = (5, 6)


def passes(
    forward: Forward, backward: Backward, device: torch.device, dtype: torch.dtype, *, demanded: bool = False
) -> bool:
    """Say whether two kernels give the reference's output and gradients on a few pixels; warn if not.

    Callers keep the answer: each call runs the kernels and may warn.

    Args:
        forward: With the signature of `torch.ops.internimage.dcnv3_forward`.
        backward: With that of `torch.ops.internimage.dcnv3_backward`.
        device: Where to run them.
        dtype: One of `TOLERANCES`.
        demanded: Raise instead of warning.

    Raises:
        RuntimeError: They differ, or fail, and `demanded` is set.
    """
    found = next(_disagreements(forward, backward, device, dtype), None)
    if found is None:
        return True
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    message = (
        f"dcnv3: the compiled kernel failed its self-check on {name} in {dtype}: {found}. "
        "Rebuild it (python -m ops.build --cuda --force) and report this if it stays."
    )
    if demanded:
        raise RuntimeError(message + " To run without it, set INTERNIMAGE_OPS=reference.")
    warnings.warn(message + " Until then the slower PyTorch reference runs.", RuntimeWarning, stacklevel=2)
    return False


@torch.no_grad()
def _disagreements(forward: Forward, backward: Backward, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Name, in words, each result that is not the reference's."""
    for depth, taps, softmax in _PROBLEMS:
        inputs = _inputs(depth, taps)
        grad, x, offset, mask = (tensor.to(device, dtype) for tensor in inputs)
        options = (*taps, softmax)
        try:
            found = (forward(x, offset, mask, *options), *backward(grad, x, offset, mask, *options))
        except RuntimeError as error:
            yield f"it raised {error}"
            continue
        # The kernels' inputs, which may have been rounded, but nothing else of that device.
        grad, x, offset, mask = (tensor.cpu().double() for tensor in (grad, x, offset, mask))
        truth = (
            dcnv3_reference(x, offset, mask, **taps._asdict(), softmax=softmax),
            *dcnv3_reference_backward(grad, x, offset, mask, taps, softmax),
        )
        for name, ours, theirs in zip(_NAMES, found, truth, strict=True):
            difference = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
            # Written so that NaN is a disagreement.
            if not difference <= TOLERANCES[dtype]:
                yield (
                    f"with kernel {taps.kernel_size} and {depth} channels per group the {name} is off by "
                    f"{difference:.1e} of its largest value, expected at most {TOLERANCES[dtype]:.0e}"
                )


def _inputs(depth: int, taps: Taps) -> Sequence[Tensor]:
    """Return grad, x, offset and mask for two small images, on the CPU."""
    random = torch.Generator("cpu").manual_seed(0)
    channels, points = taps.groups * depth, taps.groups * taps.num_points
    pixels = (2, *taps.output_size(*_SIZE))
    # The caller may have set another default device.
    grad, x, mask = (
        torch.randn(*shape, generator=random, device="cpu")
        for shape in ((*pixels, channels), (2, *_SIZE, channels), (*pixels, points))
    )
    # Odd multiples of 1/64 are exact in every dtype, so that all of them sample between the same pixels.
    steps = torch.randint(-64, 64, (*pixels, 2 * points), generator=random, device="cpu")
    return grad, x, (2 * steps + 1) / 64, mask
