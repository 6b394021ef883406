"""Where a training step goes: OMP_PROC_BIND=true OMP_PLACES=cores python -m benchmarks.detection_step --output FILE

Mask R-CNN and DINO on InternImage-T, float32, batches of synthetic images with boxes and masks. Each part is the time
inside its modules; what is left of the forward pass is matching, sampling, pooling and losses. No rival: this is for
finding out what to make faster.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.records import Recorder, advise_pinning, parser
from datamodules import DetectionTrainTransform, SyntheticDetection
from internimage import InternImage, internimage_debug, internimage_t
from tasks.detection import DINO, MaskRCNN

NUM_CLASSES = 80
# Part -> names of the modules whose forward pass it is.
PARTS = {
    "mask_rcnn": {
        "backbone": ("backbone",),
        "neck": ("neck",),
        "proposals": ("rpn",),
        "box and mask heads": ("roi.box_heads.0", "roi.mask_heads.0"),
    },
    "dino": {
        "backbone": ("backbone",),
        "neck": ("neck",),
        "encoder": ("transformer.encoder.*",),
        "decoder": ("transformer.decoder.*",),
        "denoising": ("denoising",),
    },
}
REST = "matching, pooling and losses"


class Clock:
    """Adds up wall time by name; on a GPU it waits for the device first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def watch(self, name: str, module: nn.Module) -> None:
        """Add the time of a module's forward passes."""
        starts: list[float] = []

        def before(module: nn.Module, inputs: tuple[object, ...]) -> None:
            starts.append(self.now())

        def after(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            self.seconds[name] += self.now() - starts.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def detectors(quick: bool) -> dict[str, Callable[[], nn.Module]]:
    def backbone(stages: tuple[int, ...]) -> InternImage:
        return internimage_debug(out_indices=stages) if quick else internimage_t(out_indices=stages, layer_scale=1.0)

    small = {"num_queries": 20, "dim": 32, "hidden_dim": 32, "num_layers": 1} if quick else {}
    return {
        "mask_rcnn": lambda: MaskRCNN(backbone((0, 1, 2, 3)), NUM_CLASSES, channels=32 if quick else 256),
        "dino": lambda: DINO(backbone((1, 2, 3)), NUM_CLASSES, **small),
    }


def modules(model: nn.Module, pattern: str) -> list[nn.Module]:
    """Return the module of a name, or with `.*` at its end its children."""
    found = model.get_submodule(pattern.removesuffix(".*"))
    return list(found.children()) if pattern.endswith(".*") else [found]


def measure(name: str, model: nn.Module, data: SyntheticDetection, steps: int, device: str) -> dict[str, float]:
    """Return the milliseconds of each part of a training step, the mean over `steps` after one to warm up."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock = Clock(device)
    for part, patterns in PARTS[name].items():
        for pattern in patterns:
            for module in modules(model, pattern):
                clock.watch(part, module)
    batches = iter(data.train_dataloader())
    for step in range(steps + 1):
        if step == 1:
            clock.seconds.clear()
        with clock.part("data"):
            batch = next(batches)
        image = batch["image"].to(device)
        target = [{key: value.to(device) for key, value in one.items()} for one in batch["target"]]
        with clock.part("forward"):
            losses: dict[str, Tensor] = model(image, batch["valid"], target)
            loss = torch.stack(list(losses.values())).sum()
        with clock.part("backward"):
            loss.backward()
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    seconds = dict(clock.seconds)
    inside = sum(seconds[part] for part in PARTS[name])
    seconds[REST] = seconds.pop("forward") - inside
    return {part: round(value / steps * 1e3, 2) for part, value in seconds.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=4, help="to average over (default: 4)")
    options = options.parse_args()
    threads = max(options.threads)
    advise_pinning([threads])
    torch.set_num_threads(threads)
    side, batch_size, steps = (96, 2, 1) if options.quick else (640, 2, options.steps)
    recorder = Recorder(options)
    for name, build in detectors(options.quick).items():
        torch.manual_seed(0)
        data = SyntheticDetection(
            num_classes=NUM_CLASSES,
            image_size=side,
            batch_size=batch_size,
            num_samples=4 * batch_size * (steps + 1),
            train_transform=DetectionTrainTransform(short_sides=(side * 3 // 4,), long_side=side),
        )
        data.setup("fit")
        ms = measure(name, build(), data, steps, options.device)
        recorder.add(
            benchmark="detection_step",
            model=name,
            shape=name,
            size=(batch_size, 3, side * 3 // 4, side),
            dtype="float32",
            threads=threads,
            ms=ms,
            share={part: round(value / sum(ms.values()), 4) for part, value in ms.items()},
        )
    recorder.write(options.output)


if __name__ == "__main__":
    main()
