"""Time loading of images with texts from shards: python -m benchmarks.loader --output FILE

Images per CPU-second of one core, which is what loading costs: CPU time of this process and its one worker, in batches
of 64, random resized crop (0.08 to 1 of the area, bicubic, antialiased) to 224 pixels, flip, tokenized text. All
loaders read the same shards in one run; see `benchmarks.loader_peers`. Start-up cancels: a loader runs through few and
through many passes, each with a fresh worker, and the difference counts. Ours with float32 out normalises in this
process, on the CPU.

The photographs, 500 x 375 pixels at quality 90 with 4:2:0, are crops, flips and gains of a few real ones with noise of
sigma 3: those in scikit-image and scikit-learn where both are installed, or those in `--photos`.
"""

import argparse
import gc
import io
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image

from benchmarks import loader_peers
from benchmarks.records import Record, Recorder
from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from datamodules.webdataset.formats import normalize
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.loader import StepKey
from datamodules.webdataset.manifest import ShardEntry, write_manifest
from datamodules.webdataset.plan import Plan, SourceSize
from datamodules.webdataset.records import Draw, RawSample
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.transforms import FastTrain

HEIGHT, WIDTH = 375, 500
IMAGE_SIZE = 224
NUM_SHARDS = 10
TRANSFORM = FastTrain(scale=loader_peers.SCALE)
EXAMPLE = Path(__file__).parent.parent / "docs" / "images" / "trees.jpg"


def real_photographs(folder: Path | None) -> list[Image.Image]:
    """Return those in a folder, or those that come with scikit-image and scikit-learn."""
    if folder is not None:
        return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
    arrays = [*load_sample_images().images, *(getattr(data, name)() for name in names)]
    return [Image.fromarray(array) for array in arrays]


def photographs(real: list[Image.Image], count: int) -> Iterator[bytes]:
    """Yield JPEG files, always the same."""
    random = np.random.default_rng(0)
    for number in range(count):
        photo = real[number % len(real)]
        # The largest crop of the aspect, and down to 0.6 of its sides.
        side = min(photo.width / WIDTH, photo.height / HEIGHT) * random.uniform(0.6, 1)
        left = random.uniform(0, photo.width - side * WIDTH)
        top = random.uniform(0, photo.height - side * HEIGHT)
        box = (left, top, left + side * WIDTH, top + side * HEIGHT)
        pixels = np.asarray(photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box), dtype=np.float64)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = pixels * random.uniform(0.8, 1.2) + random.normal(0, 3, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
        yield file.getvalue()


def caption(number: int) -> str:
    return f"photograph number {number} of a set"


def write_shards(files: list[bytes], folder: Path) -> list[str]:
    """Write pairs to tar files and return their paths."""
    folder.mkdir(parents=True)
    urls = [str(folder / f"{shard:05}.tar") for shard in range(NUM_SHARDS)]
    for shard, url in enumerate(urls):
        with webdataset.TarWriter(url) as writer:
            for number in range(shard, len(files), NUM_SHARDS):
                writer.write({"__key__": f"{number:08}", "jpg": files[number], "txt": caption(number)})
    return urls


def ours(shards: Shards, batch_size: int, num_workers: int = 1) -> ImageTextShards:
    """Return this project's datamodule, ready to train."""
    data = ImageTextShards(
        train=shards,
        image_size=IMAGE_SIZE,
        train_transform=TRANSFORM,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    data.setup("fit")
    return data


def images_per_cpu_second(make: Callable[[], Any], count: Callable[[Any], int], passes: tuple[int, int]) -> float:
    """Return how many images a loader gives per second of CPU time, without its start.

    Args:
        make: Returns a new loader.
        count: Takes a batch and returns its number of images.
        passes: Few and many.
    """
    found = []
    for number in passes:
        before, loader, images = cpu_seconds(), make(), 0
        for _ in range(number):
            images += sum(count(batch) for batch in loader)
        del loader
        # The worker ends with the loader; only then does its time count.
        gc.collect()
        found.append((images, cpu_seconds() - before))
    (few, short), (many, long) = found
    return (many - few) / (long - short)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def length(batch: Any) -> int:
    return len(batch[0])


def uint8_out(batch: Any) -> int:
    return len(batch["image"])


def float32_out(batch: Any) -> int:
    return len(normalize(batch, IMAGENET_MEAN, IMAGENET_STD)["image"])


def throughput(urls: list[str], folder: Path, batch_size: int, passes: tuple[int, int]) -> dict[str, float]:
    """Return images per CPU-second of each loader."""
    shards = Shards(urls=urls)
    own = lambda: ours(shards, batch_size).train_dataloader()  # noqa: E731
    loaders: dict[str, tuple[Callable[[], Any], Callable[[Any], int]]] = {
        "ours, uint8": (own, uint8_out),
        "ours, float32": (own, float32_out),
        "open_clip-like": (partial(loader_peers.open_clip_like, urls, IMAGE_SIZE, batch_size), length),
        "webdataset": (partial(loader_peers.fluent, urls, IMAGE_SIZE, batch_size), length),
    }
    if loader_peers.has_litdata():
        loader_peers.copy_to_litdata(urls, folder / "litdata")
        make = partial(loader_peers.litdata_loader, folder / "litdata", IMAGE_SIZE, batch_size)
        loaders["litdata"] = (make, length)
    return {name: images_per_cpu_second(make, count, passes) for name, (make, count) in loaders.items()}


def per_item(run: Callable[[int], object], count: int, repeats: int = 5) -> float:
    """Return the median CPU time of this process for one of `count` items, microseconds."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        for number in range(count):
            run(number)
        found.append((time.process_time() - started) / count * 1e6)
    return statistics.median(found)


def kernels(files: list[bytes], data: ImageTextShards) -> dict[str, float]:
    """Return CPU microseconds per image of decoding alone, and of all that makes a batch of bytes in memory.

    The latter decodes, crops, resizes, flips and tokenizes, and writes into new batches: what is left for the loader is
    to find the samples, to read them, to count, and to hand the batch to the training process.
    """
    form, batch_size = data.form("train"), data.batch_size
    samples = [
        RawSample(str(i), {"jpg": memoryview(file), "txt": memoryview(caption(i).encode())})
        for i, file in enumerate(files)
    ]
    valid = torch.ones(batch_size, dtype=torch.bool)

    def one_batch(number: int) -> Any:
        builder = form.builder(batch_size)
        for row in range(batch_size):
            i = (number * batch_size + row) % len(samples)
            builder.write(row, samples[i], Draw(0, 0, 0, i), 0, samples[i].key)
        return builder.finish(valid)

    return {
        "decode": per_item(lambda i: simplejpeg.decode_jpeg(files[i]), len(files)),
        "decode_augment": per_item(one_batch, -(-len(files) // batch_size)) / batch_size,
    }


def order_microseconds(counts: np.ndarray, batch_size: int) -> float:
    """Return CPU microseconds per sample of finding its place and its random numbers."""
    plan = Plan([SourceSize(name="order", counts=counts)], global_batch=batch_size, seed=0)

    def one_batch(step: int) -> None:
        places = plan.rows(0, step % plan.num_steps, 0, batch_size)
        for position in places.position.tolist():
            Draw(0, 0, 0, position).uniform(8)

    return per_item(one_batch, max(plan.num_steps, 20)) / batch_size


def reading_microseconds(data: ImageTextShards) -> dict[str, float]:
    """Return CPU microseconds per sample of reading without decoding, in training order and one after the other."""
    dataset = data.train_dataloader().dataset
    reader, plan, batch_size = dataset.reader, dataset.plan, data.batch_size
    steps = [plan.rows(0, step, 0, batch_size) for step in range(plan.num_steps)]
    mixed = [pair for places in steps for pair in zip(places.shard.tolist(), places.sample.tolist(), strict=True)]
    in_turn = sorted(mixed)
    return {
        "read_shuffled": per_item(lambda i: reader.read(0, *mixed[i]), len(mixed)),
        "read_sequential": per_item(lambda i: reader.read(0, *in_turn[i]), len(in_turn)),
    }


def first_batch(shards: Shards, batch_size: int, *, resume: bool) -> float:
    """Return seconds from nothing to the first batch, at the start or in the middle of an epoch."""
    started = time.perf_counter()
    loader = ours(shards, batch_size).train_dataloader()
    if resume:
        loader.steps.place = StepKey(0, len(loader) // 2, 0)
        state = loader.state_dict()
        loader = ours(shards, batch_size).train_dataloader()
        started = time.perf_counter()
        loader.load_state_dict(state)
    next(iter(loader))
    return time.perf_counter() - started


def make_index(folder: Path, num_shards: int) -> None:
    """Write the manifest of shards of 10,000 samples that are nowhere."""
    folder.mkdir()
    urls = [f"http://localhost/{shard:05}.tar" for shard in range(num_shards)]
    write_manifest(folder, "index", [ShardEntry(url, 10_000, 500_000_000, None, Counter()) for url in urls])


def start(folder: Path, resume: bool, answers: Any) -> None:
    """Put seconds and MiB that it takes to find the samples of the first step, in a fresh process."""
    shards = Shards(index=folder)
    resident = Path("/proc/self/statm")
    pages, started = int(resident.read_text().split()[1]), time.perf_counter()
    loader = ours(shards, batch_size=64, num_workers=0).train_dataloader()
    if resume:
        loader.steps.place = StepKey(0, loader.plan.num_steps // 2, 0)
        loader.load_state_dict(loader.state_dict())
    key = next(iter(loader.sampler))
    loader.plan.rows(key.epoch, key.step, 0, 64)
    seconds = time.perf_counter() - started
    grown = int(resident.read_text().split()[1]) - pages
    answers.put({"seconds": seconds, "mib": grown * resource.getpagesize() / 2**20})


def start_of(num_shards: int, folder: Path) -> Record:
    """Return what a start and a resume take on an index of so many shards."""
    make_index(folder, num_shards)
    spawn = get_context("spawn")
    found: Record = {}
    for name, resume in (("start", False), ("resume", True)):
        answers = spawn.SimpleQueue()
        process = spawn.Process(target=start, args=(folder, resume, answers))
        process.start()
        process.join()
        assert process.exitcode == 0, f"start on {num_shards} shards failed"
        found[name] = answers.get()
    return {"benchmark": "loader_start", "shape": str(num_shards), **found}


def compare(files: list[bytes], folder: Path, batch_size: int, passes: tuple[int, int]) -> Record:
    """Return all figures of one set of photographs."""
    urls = write_shards(files, folder / "shards")
    shards = Shards(urls=urls)
    # Before the peers, which leave threads and imports behind in this process.
    first = {
        name: round(first_batch(shards, batch_size, resume=resume), 3)
        for name, resume in (("start", False), ("resume", True))
    }
    speed = throughput(urls, folder, batch_size, passes)
    counts = np.full(NUM_SHARDS, len(files) // NUM_SHARDS)
    data = ours(shards, batch_size)
    parts = kernels(files, data) | {"order": order_microseconds(counts, batch_size)}
    parts |= reading_microseconds(data)
    end_to_end = 1e6 / speed["ours, uint8"]
    ordered = parts["order"] + parts["read_shuffled"] - parts["read_sequential"]
    return {
        "benchmark": "loader",
        "shape": f"{WIDTH}x{HEIGHT}",
        "images": len(files),
        "mean_bytes": round(statistics.mean(map(len, files))),
        "batch_size": batch_size,
        "images_per_cpu_s": {name: round(value, 1) for name, value in speed.items()},
        "microseconds": {name: round(value, 1) for name, value in parts.items()},
        "ratio": {name: round(speed["ours, uint8"] / value, 2) for name, value in speed.items()},
        "float32_ratio": {name: round(speed["ours, float32"] / value, 2) for name, value in speed.items()},
        "of_decoding": round(parts["decode"] / end_to_end, 3),
        "overhead": round(end_to_end / parts["decode_augment"] - 1, 3),
        "order_share": round(ordered / end_to_end, 4),
        "first_batch_s": first,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=1000, help="photographs (default: 1000)")
    options.add_argument("--photos", type=Path, help="folder of photographs to start from")
    options.add_argument("--passes", type=int, nargs=2, default=(1, 6), help="few and many (default: 1 6)")
    options.add_argument("--shards", type=int, nargs="*", default=[10, 1000, 43000], help="of the index for start-up")
    options.add_argument("--output", type=Path, help="results file")
    options.add_argument("--quick", action="store_true", help="few images of one photograph: does it run, not how fast")
    options.set_defaults(device="cpu")
    options = options.parse_args()
    torch.set_num_threads(1)
    batch_size = 64
    real = [Image.open(EXAMPLE).convert("RGB")] if options.quick else real_photographs(options.photos)
    if options.quick:
        options.images, options.passes, options.shards, batch_size = 40, (1, 3), [10], 8
    recorder = Recorder(options)
    with tempfile.TemporaryDirectory() as folder:
        files = list(photographs(real, options.images))
        recorder.add(**compare(files, Path(folder), batch_size, tuple(options.passes)))
        for num_shards in options.shards:
            recorder.add(**start_of(num_shards, Path(folder) / f"index_{num_shards}"))
    recorder.write(options.output)


if __name__ == "__main__":
    main()
