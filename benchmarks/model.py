"""Time InternImage-T: OMP_PROC_BIND=true OMP_PLACES=cores python -m benchmarks.model --output FILE

Four images of 224 px: an evaluation (forward without gradients) and a training step (forward, cross-entropy, backward),
in float32 and under bfloat16 autocast. `grid_sample` is the same model with the operator swapped for the formulation of
the authors' fallback.
"""

import copy
import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from benchmarks import rivals
from benchmarks.records import Recorder, advise_pinning, milliseconds, parser, ratios
from internimage import Classifier, internimage_debug, internimage_t

BATCH = 4
# Of the logits' largest value; 30 blocks deep, bfloat16 keeps 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


def evaluate(model: nn.Module, image: Tensor, label: Tensor, autocast: torch.autocast) -> Tensor:
    with torch.no_grad(), autocast:
        return model(image)


def train(model: nn.Module, image: Tensor, label: Tensor, autocast: torch.autocast) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast:
        loss = F.cross_entropy(model(image), label)
    loss.backward()
    return loss.detach()


def spread_offsets(model: nn.Module) -> None:
    """Give the offset and mask layers weights: at their start, zero, all points lie on pixels, which is not typical."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith((".offset.weight", ".mask.weight")):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=random)


def main() -> None:
    options = parser(__doc__).parse_args()
    advise_pinning(options.threads)
    recorder = Recorder(options)
    torch.manual_seed(0)
    backbone = internimage_debug() if options.quick else internimage_t(drop_path_rate=0.0)
    model = Classifier(backbone, num_classes=1000).to(options.device)
    spread_offsets(model)
    pixels = 64 if options.quick else 224
    image = torch.randn(BATCH, 3, pixels, pixels, device=options.device)
    label = torch.arange(BATCH, device=options.device)
    operators = {"kernel": ops.dcnv3, "grid_sample": rivals.dcnv3_grid_sample}
    steps: dict[str, Callable[..., Tensor]] = {"eval": evaluate, "train": train}
    for dtype, tolerance in TOLERANCES.items():
        autocast = torch.autocast(options.device, dtype, enabled=dtype != torch.float32)
        for threads in options.threads if options.device == "cpu" else [1]:
            for mode, step in steps.items():
                times, results = {}, {}
                for name, operator in operators.items():
                    timed = copy.deepcopy(model).train(mode == "train")
                    run = functools.partial(step, timed, image, label, autocast)
                    with mock.patch.object(ops, "dcnv3", operator):
                        results[name] = run().float()
                        times[name] = milliseconds(run, threads=threads, seconds=options.seconds)
                difference = (results["kernel"] - results["grid_sample"]).abs().max() / results["kernel"].abs().max()
                assert difference <= tolerance, f"{mode} {dtype}: grid_sample differs by {difference}"
                recorder.add(
                    benchmark="model",
                    model="debug" if options.quick else "InternImage-T",
                    size=tuple(image.shape),
                    dtype=str(dtype).removeprefix("torch."),
                    threads=threads,
                    mode=mode,
                    ms=times,
                    ratio=ratios(times),
                    images_per_s=round(BATCH * 1e3 / times["kernel"], 1),
                )
    recorder.write(options.output)


if __name__ == "__main__":
    main()
