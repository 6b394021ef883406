"""Time DCNv3 against its rivals: OMP_PROC_BIND=true OMP_PLACES=cores python -m benchmarks.dcnv3 --output FILE

`kernel` is `ops.dcnv3` with its compiled kernel, `reference` the same without, `grid_sample` a formulation like the
authors' fallback, `torchvision` its `deform_conv2d`, depthwise with weights of 1. All get the same random inputs
(offsets of standard deviation 1 pixel) in the layout they like, all must agree before they are timed, and the times of
a case are medians taken one after the other in one process. Memory is the high-water mark of a process of its own, less
what it held before the call.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rivals
from benchmarks.records import Recorder, advise_pinning, milliseconds, parser, ratios
from benchmarks.rivals import Rival, operators
from benchmarks.roofline import Work, ceilings
from ops import dcnv3

# float32 sums of 36 products, normalised coordinates in two rivals; bfloat16 keeps 8 bits, of values up to 20.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Case:
    """One shape: x is `(batch, height, width, channels)`."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    groups: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.channels


DETECTION = Case("detection", 1, 200, 304, 64, 4)
CASES = (
    *(Case(f"T{stage + 1}", 4, 56 >> stage, 56 >> stage, 64 << stage, 4 << stage) for stage in range(4)),
    *(Case(f"H{stage + 1}", 1, 96 >> stage, 96 >> stage, 320 << stage, 10 << stage) for stage in range(4)),
    DETECTION,
)


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return x, offset and mask, which want gradients, and the output's gradient."""
    random = torch.Generator().manual_seed(0)
    pixels, points = case.size[:3], case.groups * 9
    channels = (case.channels, points * 2, points, case.channels)
    tensors = [torch.randn(*pixels, count, generator=random).to(device, dtype) for count in channels]
    return [tensor.requires_grad_(index < 3) for index, tensor in enumerate(tensors)]


def implementations(case: Case, dtype: torch.dtype, device: str) -> dict[str, Rival]:
    def ours(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return dcnv3(x, offset, mask, groups=case.groups)

    def grid_sample(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return rivals.dcnv3_grid_sample(x, offset, mask, groups=case.groups)

    def arrange(tensors: list[Tensor]) -> list[Tensor]:
        x, offset, mask, grad = (tensor.detach() for tensor in tensors)
        arranged = rivals.torchvision_inputs(x, offset, mask, case.groups)
        return [*(tensor.requires_grad_() for tensor in arranged), grad.permute(0, 3, 1, 2).contiguous()]

    found = {
        "kernel": Rival(ours, choice="cuda" if device == "cuda" else "cpp"),
        "reference": Rival(ours, choice="reference"),
        "grid_sample": Rival(grid_sample),
    }
    # Its CPU kernel has no bfloat16.
    if dtype != torch.bfloat16:
        found["torchvision"] = Rival(rivals.dcnv3_torchvision, arrange, lambda output: output.permute(0, 2, 3, 1))
    return found


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError where an implementation's output is not the kernel's."""
    tensors = inputs(case, dtype, device)
    outputs = {}
    for name, rival in implementations(case, dtype, device).items():
        with operators(rival.choice):
            outputs[name] = rival.to_channels_last(rival.runs(tensors)[0]())
    for name, output in outputs.items():
        difference = float((output.float() - outputs["kernel"].float()).abs().max())
        assert difference <= TOLERANCES[dtype], f"{case.name} {dtype}: {name} differs by {difference}"


def time_case(case: Case, dtype: torch.dtype, threads: int, options: argparse.Namespace, recorder: Recorder) -> None:
    tensors = inputs(case, dtype, options.device)
    for index, direction in enumerate(("forward", "forward+backward")):
        times = {}
        for name, rival in implementations(case, dtype, options.device).items():
            with operators(rival.choice):
                run = rival.runs(tensors)[index]
                times[name] = milliseconds(run, threads=threads, seconds=options.seconds)
        extra = {}
        if options.device == "cpu":
            work = Work.of(case.size, case.groups, backward=bool(index), bytes_per_value=dtype.itemsize)
            floor_ms, bound = work.floor(ceilings(threads, quick=options.quick))
            extra["roofline"] = {
                "floor_ms": round(floor_ms, 4),
                "bound": bound,
                "fraction": round(floor_ms / times["kernel"], 3),
            }
        recorder.add(
            benchmark="dcnv3",
            shape=case.name,
            size=case.size,
            groups=case.groups,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            direction=direction,
            ms=times,
            ratio=ratios(times),
            **extra,
        )


def peak_bytes(case: Case, dtype: torch.dtype, device: str, name: str, backward: bool) -> int:
    """Return what one call needs beyond its inputs, in this process: outputs and gradients included."""
    rival = implementations(case, dtype, device)[name]
    with operators(rival.choice):
        # Threads, libraries and allocator pools come into being here, not in the measured call.
        small = replace(case, batch=1, height=4, width=4)
        for run in rival.runs(small, inputs(small, dtype, device)):
            run()
        run = rival.runs(inputs(case, dtype, device))[int(backward)]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = run()
            after = torch.cuda.max_memory_allocated()
        else:
            # Resets the high-water mark (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            kept = run()
            after = _status_bytes("VmHWM")
    del kept
    return after - before


def record_memory(case: Case, dtype: torch.dtype, options: argparse.Namespace, recorder: Recorder) -> None:
    threads = max(options.threads)
    x, offset, mask, grad = inputs(case, dtype, "cpu")
    for backward in (False, True):
        results = grad.nbytes + (x.nbytes + offset.nbytes + mask.nbytes if backward else 0)
        peaks = {}
        for name in implementations(case, dtype, options.device):
            arguments = [json.dumps([options.device, options.quick, str(dtype), name, backward])]
            command = [sys.executable, "-m", "benchmarks.dcnv3", "--threads", str(threads), "--peak", *arguments]
            # Every array is then pages of its own: none hides in memory that an earlier one left resident.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            peaks[name] = int(run.stdout)
        recorder.add(
            benchmark="dcnv3_memory",
            shape=case.name,
            size=case.size,
            groups=case.groups,
            dtype=str(dtype).removeprefix("torch."),
            threads=threads,
            direction="forward+backward" if backward else "forward",
            results_mib=round(results / 2**20, 2),
            mib={name: round(peak / 2**20, 2) for name, peak in peaks.items()},
            times_results={name: round(peak / results, 3) for name, peak in peaks.items()},
        )


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _shrunk(case: Case) -> Case:
    return replace(case, batch=min(case.batch, 2), height=max(case.height // 8, 2), width=max(case.width // 8, 2))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peak", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.peak:
        torch.set_num_threads(chosen.threads[0])
        device, quick, dtype, name, backward = json.loads(chosen.peak)
        case = _shrunk(DETECTION) if quick else DETECTION
        print(peak_bytes(case, getattr(torch, dtype.removeprefix("torch.")), device, name, backward))
        return
    advise_pinning(chosen.threads)
    recorder = Recorder(chosen)
    if chosen.device == "cuda":
        chosen.threads = [1]
    for case in (_shrunk(CASES[0]), _shrunk(DETECTION)) if chosen.quick else CASES:
        for dtype in TOLERANCES:
            check(case, dtype, chosen.device)
            for threads in chosen.threads:
                time_case(case, dtype, threads, chosen, recorder)
    for dtype in TOLERANCES:
        record_memory(_shrunk(DETECTION) if chosen.quick else DETECTION, dtype, chosen, recorder)
    recorder.write(chosen.output)


if __name__ == "__main__":
    main()
