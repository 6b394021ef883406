"""Time deformable attention: python -m benchmarks.deformable_attention --output FILE

OMP_PROC_BIND=true OMP_PLACES=cores keeps threads on cores of their own.

`kernel` is `ops.deformable_attention` with its compiled kernel, `reference` the same without, `grid_sample` the form of
the PyTorch implementations in use: `grid_sample` level by level in the layout it wants, weight and sum. All get the
same random inputs, all must agree before they are timed, and the times of a case are medians taken one after the other
in one process. 8 heads of 32 channels, 4 points per level. An encoder's queries are the pixels of all levels, and their
points lie around them with a standard deviation of 2 pixels of each level; a decoder's lie anywhere.
"""

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.records import Recorder, advise_pinning, milliseconds, parser, ratios
from benchmarks.rivals import Rival, operators
from ops import deformable_attention

HEADS, DEPTH, POINTS = 8, 32, 4
# float32 sums of 64 products, normalised coordinates in a rival; bfloat16 keeps 8 bits, of values up to 20.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Case:
    """One shape: (height, width) of each level, and the queries of a decoder or None for an encoder."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    queries: int | None = None

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.shapes)


# An image of 800 x 1216 pixels at strides 8 to 64, and one of 512 x 512 at 8 to 32.
DETECTION = ((100, 152), (50, 76), (25, 38), (13, 19))
SEGMENTATION = ((64, 64), (32, 32), (16, 16))
CASES = (
    Case("encoder", DETECTION),
    Case("decoder", DETECTION, 900),
    Case("segmentation encoder", SEGMENTATION),
)


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return value, locations and weights, which want gradients, and the output's gradient."""
    random = torch.Generator().manual_seed(0)
    queries = case.queries or case.pixels
    sampled = (1, queries, HEADS, len(case.shapes), POINTS)
    if case.queries:
        locations = torch.rand(*sampled, 2, generator=random)
    else:
        sizes = torch.tensor([(width, height) for height, width in case.shapes]).unsqueeze(1)
        locations = centres(case).view(1, -1, 1, 1, 1, 2) + 2 * torch.randn(*sampled, 2, generator=random) / sizes
    value = torch.randn(1, case.pixels, HEADS, DEPTH, generator=random)
    weights = torch.randn(*sampled[:3], len(case.shapes) * POINTS, generator=random).softmax(-1).view(sampled)
    grad = torch.randn(1, queries, HEADS * DEPTH, generator=random)
    tensors = [value.to(dtype), locations, weights.to(dtype), grad.to(dtype)]
    return [tensor.to(device).requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def centres(case: Case) -> Tensor:
    """Return (x, y) in [0, 1] of the centres of all pixels, `(S, 2)`."""
    found = []
    for height, width in case.shapes:
        rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        found.append(torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(found)


def implementations(case: Case, device: str) -> dict[str, Rival]:
    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, case.shapes, locations, weights)

    def grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return rivals.deformable_attention_grid_sample(value, case.shapes, locations, weights)

    return {
        "kernel": Rival(ours, choice="cuda" if device == "cuda" else "cpp"),
        "grid_sample": Rival(grid_sample),
        "reference": Rival(ours, choice="reference"),
    }


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError where an implementation's output is not the kernel's."""
    tensors = inputs(case, dtype, device)
    outputs = {}
    for name, rival in implementations(case, device).items():
        with operators(rival.choice):
            outputs[name] = rival.runs(tensors)[0]()
    for name, output in outputs.items():
        difference = float((output.float() - outputs["kernel"].float()).abs().max())
        assert difference <= TOLERANCES[dtype], f"{case.name} {dtype}: {name} differs by {difference}"


def time_case(case: Case, dtype: torch.dtype, threads: int, options: argparse.Namespace, recorder: Recorder) -> None:
    tensors = inputs(case, dtype, options.device)
    for index, direction in enumerate(("forward", "forward+backward")):
        times = {}
        for name, rival in implementations(case, options.device).items():
            with operators(rival.choice):
                run = rival.runs(tensors)[index]
                times[name] = milliseconds(run, threads=threads, seconds=options.seconds)
        recorder.add(
            benchmark="deformable_attention",
            shape=case.name,
            levels=case.shapes,
            queries=case.queries or case.pixels,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            direction=direction,
            ms=times,
            ratio=ratios(times),
        )


def _shrunk(case: Case) -> Case:
    small = tuple((max(height // 8, 1), max(width // 8, 1)) for height, width in case.shapes)
    return replace(case, shapes=small, queries=case.queries and 9)


def main() -> None:
    options = parser(__doc__).parse_args()
    advise_pinning(options.threads)
    recorder = Recorder(options)
    if options.device == "cuda":
        options.threads = [1]
    for case in map(_shrunk, CASES) if options.quick else CASES:
        for dtype in TOLERANCES:
            check(case, dtype, options.device)
            for threads in options.threads:
                time_case(case, dtype, threads, options, recorder)
    recorder.write(options.output)


if __name__ == "__main__":
    main()
