"""Build the kernels ahead of their first use, test them, and report: `python -m ops.build [--cpp] [--cuda]`."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from ops import build, selfcheck
from ops.build.recipe import Kind

# Where no device tells: the oldest and the newest data-centre generations that the kernels are tuned for.
DEFAULT_ARCHS = "8.0;9.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ops.build", description=__doc__)
    parser.add_argument(
        "--cpp", action="store_true", help="build the C++ kernels (default, with CUDA's if a GPU is there)"
    )
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels; needs no GPU")
    parser.add_argument("--archs", help=f"CUDA architectures (default: the visible devices', else {DEFAULT_ARCHS})")
    parser.add_argument("--force", action="store_true", help="build even if the cache has them")
    options = parser.parse_args(arguments)
    visible = torch.cuda.is_available()
    if options.archs:
        os.environ["INTERNIMAGE_CUDA_ARCHS"] = options.archs
    elif not visible:
        os.environ.setdefault("INTERNIMAGE_CUDA_ARCHS", DEFAULT_ARCHS)
    chosen: dict[Kind, bool] = {"cpp": options.cpp, "cuda": options.cuda}
    if not any(chosen.values()):
        chosen = {"cpp": True, "cuda": visible}
    # Every kind is tried: one failure should not hide another.
    passed = [_report(kind, force=options.force) for kind, wanted in chosen.items() if wanted]
    return 0 if all(passed) else 1


def _report(kind: Kind, *, force: bool) -> bool:
    try:
        report = build.prepare(kind, force=force)
    except (build.BuildError, ValueError) as error:
        _line(f"{kind}: {error}")
        return False
    _line(f"{kind}: {'built' if report.built else 'found in the cache'}")
    _line(f"  compiler   {report.compilers}")
    _line(f"  flags      {' '.join(report.flags)}")
    _line(f"  path       {report.path} ({report.path.stat().st_size / 1024:.0f} KiB)")
    if report.built:
        _line(f"  build      {report.wall_s:.1f} s, {report.cpu_s:.1f} s of CPU time")
    if kind == "cuda" and not torch.cuda.is_available():
        _line("  self-test  not run: no CUDA device is visible")
        return True
    differences = _self_test(kind)
    passed = all(value <= selfcheck.TOLERANCES[torch.float32] for value in differences.values())
    listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    _line(f"  self-test  {'passed' if passed else 'FAILED'}: {listed} (largest difference from the reference)")
    return passed


def _self_test(kind: Kind) -> dict[str, float]:
    """Return the float32 kernels' largest differences from the float64 reference, relative to the largest value."""
    from ops.dcnv3 import OPERATOR as DCNV3
    from ops.deformable_attention import OPERATOR as DEFORMABLE_ATTENTION

    device = torch.device("cuda" if kind == "cuda" else "cpu")
    found: dict[str, list[float]] = {}
    for operator in (DCNV3, DEFORMABLE_ATTENTION):
        kernels = (operator.kernel_forward, operator.kernel_backward)
        for _, result, value in selfcheck.differences(operator.truth, *kernels, device, torch.float32):
            found.setdefault(f"{operator.truth.name} {result}", []).append(value)
    # Unlike Python's, this maximum of NaN is NaN.
    return {name: float(torch.tensor(values).max()) for name, values in found.items()}


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
