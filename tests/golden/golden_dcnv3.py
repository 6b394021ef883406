"""The authors' DCNv3 operator on 36 geometries, computed in float64."""

import json
from typing import Any, NamedTuple

import golden
import numpy as np
import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((golden.FOLDER / "dcnv3/cases.json").read_text())
}
ENTRIES = {"output": "out", "gradient of x": "gx", "gradient of offset": "go", "gradient of mask": "gm"}


class Problem(NamedTuple):
    """Inputs in float64 and the options of `ops.dcnv3`; every pair is (height, width)."""

    x: Tensor
    offset: Tensor
    logits: Tensor  # their softmax is the mask
    grad: Tensor  # of the output
    options: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        return self.logits.unflatten(-1, (self.options["groups"], -1)).softmax(-1).flatten(-2)


def problem(name: str) -> Problem:
    """Return the inputs of one case."""
    case, prefix = CASES[name], f"dcnv3/{name}"
    points = case["g"] * (case["kh"] * case["kw"] - case["rc"])
    pixels, channels = (case["B"], case["Ho"], case["Wo"]), case["g"] * case["gc"]
    if case["integer"]:
        offset = golden.integers(f"{prefix}/offset", (*pixels, 2 * points), -2, 3).double()
    else:
        offset = case["amp"] * golden.noise(f"{prefix}/offset", (*pixels, 2 * points), torch.float64)
    return Problem(
        x=golden.noise(f"{prefix}/input", (case["B"], case["H"], case["W"], channels), torch.float64),
        offset=offset,
        logits=golden.noise(f"{prefix}/mask", (*pixels, points), torch.float64),
        grad=golden.noise(f"{prefix}/gradout", (*pixels, channels), torch.float64),
        options={
            "groups": case["g"],
            "kernel_size": (case["kh"], case["kw"]),
            "stride": (case["sh"], case["sw"]),
            "padding": (case["ph"], case["pw"]),
            "dilation": (case["dh"], case["dw"]),
            "offset_scale": case["os"],
            "remove_center": bool(case["rc"]),
        },
    )


def check(name: str, results: list[Tensor], tolerance: float) -> None:
    """Assert that output and gradients are the authors' within `tolerance` times their largest value."""
    with np.load(golden.FOLDER / "dcnv3/dcnv3_ops.npz") as numbers:
        for (title, entry), found in zip(ENTRIES.items(), results, strict=True):
            truth = numbers[f"{name}/{entry}"].reshape(-1)
            values = found.detach().cpu().double().numpy()
            difference = np.abs(golden.every(values, truth.size) - truth).max() / np.abs(truth).max()
            assert difference <= tolerance, f"{title} of {name} differs by {difference:.2e} of its largest value"
            # The stored elements are a sample of large results; the mean is of all.
            mean, std, _ = numbers[f"{name}/{entry}_stats"]
            assert abs(values.mean() - mean) <= tolerance * max(std, 1e-300), f"{title} of {name} has another mean"
