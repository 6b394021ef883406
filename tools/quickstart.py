"""Train a small InternImage on real digits, validate it, predict, and check the result: what `make quickstart` runs.

The three steps are the commands of the README, called in one process so that PyTorch is imported once. The folder
`runs/quickstart/version_<n>`, then holds `checkpoints/best.ckpt`, `predictions/predictions.png` and `summary.json`.
"""

import json
import sys
import time
from pathlib import Path

from tasks.cli import main

REQUIRED_TOP1 = 0.97
EXPERIMENT = Path(__file__).parents[1] / "experiments" / "quickstart.yaml"


def quickstart(*overrides: str) -> int:
    """Run the steps; return 0 if the accuracy on held-out digits is at least `REQUIRED_TOP1`, else 1.

    Args:
        overrides: Words added to the `fit` command, for example `--trainer.max_steps=10`.
    """
    start = time.perf_counter()
    fit = _run("fit", "-c", str(EXPERIMENT), "--name", "quickstart", *overrides)
    seconds = time.perf_counter() - start
    folder = Path(fit.trainer.default_root_dir)
    checkpoint = folder / "checkpoints" / "best.ckpt"
    from_run = "-c", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)

    validate = _run("validate", *from_run)
    top1 = float(validate.trainer.callback_metrics["val/top1"])
    _run("predict", *from_run, "--output", str(folder / "predictions"))

    passed = top1 >= REQUIRED_TOP1
    summary = {
        "val/top1": round(top1, 4),
        "required": REQUIRED_TOP1,
        "optimizer_steps": fit.trainer.global_step,
        "fit_seconds": round(seconds),
        "checkpoint": str(checkpoint),
        "picture": str(folder / "predictions" / "predictions.png"),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"quickstart: summary   {folder / 'summary.json'}")  # noqa: T201 - this is a command
    print(f"quickstart: picture   {summary['picture']}")  # noqa: T201
    print(f"quickstart: again     internimage validate {' '.join(from_run)}")  # noqa: T201
    verdict = "passed" if passed else "FAILED"
    print(f"quickstart: val/top1 {top1:.4f}, at least {REQUIRED_TOP1} expected: {verdict}")  # noqa: T201
    return 0 if passed else 1


def _run(command: str, *arguments: str):  # noqa: ANN202 - LightningCLI, whose attributes are untyped
    words = [command, *arguments]
    print(f"\n$ internimage {' '.join(words)}", flush=True)  # noqa: T201
    return main(words)


if __name__ == "__main__":
    sys.exit(quickstart(*sys.argv[1:]))
