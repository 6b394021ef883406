"""Make docs/performance.md from results files: python -m benchmarks.performance benchmarks/results/*.json

Later files replace the same case of earlier ones on the same machine.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

Record = dict  # as benchmarks.records prints it

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
HEADER = """# Performance

Made by `python -m benchmarks.performance`; do not edit. The numbers come from

```
export OMP_PROC_BIND=true OMP_PLACES=cores
{commands}
```

A ratio says how many times longer the other implementation took in the same run on the same inputs. `grid_sample` is a
formulation like the authors' PyTorch fallback (theirs fails in bfloat16, so the bfloat16 goals are against float32),
for deformable attention that of the PyTorch implementations in use; `torchvision` is its `deform_conv2d`, `reference`
this project's operator without a compiled kernel. Times are medians. A dash: that implementation does not run in this
dtype.
"""
COMMANDS = "python -m benchmarks.{name} --output benchmarks/results/{name}_<hardware>_<yyyymm>.json"
CASE_KEYS = ("benchmark", "name", "quick", "device", "shape", "dtype", "threads", "direction", "mode")
MACHINE_KEYS = ("name", "cores", "cpu_capability", "torch", "omp_proc_bind", "quick")
Goal = tuple[str, float, str, Callable[[Record], bool], Callable[[Record], float | None]]


def load(paths: Iterable[Path]) -> list[Record]:
    found = {}
    for path in paths:
        for record in json.loads(path.read_text()):
            found[tuple(record.get(key) for key in CASE_KEYS)] = record
    return list(found.values())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def operator_table(records: list[Record]) -> str:
    head = [
        "shape",
        "dtype",
        "threads",
        "direction",
        "kernel ms",
        "grid_sample",
        "torchvision",
        "reference",
        "of bound",
    ]
    rows = []
    for r in records:
        size = f"{r['shape']} {'x'.join(map(str, r['size']))} g{r['groups']}"
        bound = r.get("roofline")
        limit = f"{bound['fraction']:.0%} {bound['bound']}" if bound else "-"
        slower = [times(r["ratio"].get(name)) for name in ("grid_sample", "torchvision", "reference")]
        rows.append([size, r["dtype"], str(r["threads"]), r["direction"], f"{r['ms']['kernel']:.3f}", *slower, limit])
    return table(head, rows)


def memory_table(records: list[Record]) -> str:
    head = ["dtype", "direction", "results MiB", "kernel", "grid_sample", "torchvision", "reference"]
    rows = []
    for r in records:
        peaks = [r["times_results"].get(name) for name in head[3:]]
        cells = ["-" if peak is None else f"{peak:.2f}x" for peak in peaks]
        rows.append([r["dtype"], r["direction"], f"{r['results_mib']:.1f}", *cells])
    return table(head, rows)


def attention_table(records: list[Record]) -> str:
    head = ["case", "levels", "queries", "dtype", "threads", "direction", "kernel ms", "grid_sample", "reference"]
    rows = []
    for r in records:
        levels = " ".join("x".join(map(str, size)) for size in r["levels"])
        slower = [times(r["ratio"][name]) for name in head[-2:]]
        case = [r["shape"], levels, str(r["queries"]), r["dtype"], str(r["threads"]), r["direction"]]
        rows.append([*case, f"{r['ms']['kernel']:.2f}", *slower])
    return table(head, rows)


def scaling_table(records: list[Record]) -> str:
    by_case = {(r["shape"], r["dtype"], r["direction"], r["threads"]): r["ms"]["kernel"] for r in records}
    rows = [
        [shape, dtype, direction, f"{ms / by_case[shape, dtype, direction, 2]:.2f}x"]
        for (shape, dtype, direction, threads), ms in by_case.items()
        if threads == 1 and (shape, dtype, direction, 2) in by_case
    ]
    return table(["shape", "dtype", "direction", "1 to 2 threads"], rows) if rows else ""


def model_table(records: list[Record]) -> str:
    head = ["mode", "dtype", "threads", "ms", "images/s", "grid_sample"]
    rows = [
        [
            *(r["mode"], r["dtype"], str(r["threads"])),
            *(f"{r['ms']['kernel']:.0f}", f"{r['images_per_s']:.1f}", times(r["ratio"]["grid_sample"])),
        ]
        for r in records
    ]
    return table(head, rows)


def evaluation_table(records: list[Record]) -> str:
    head = ["average precision of", "images", "detections each", "classes", "seconds", "torchmetrics", "difference"]
    rows = []
    for r in records:
        seconds = f"{sum(r['seconds']['ours'].values()):.2f}"
        counts = [str(r[key]) for key in ("images", "detections", "classes")]
        rows.append([r["shape"], *counts, seconds, times(r["ratio"]["torchmetrics"]), f"{r['largest_difference']:.0e}"])
    return table(head, rows)


def step_table(records: list[Record]) -> str:
    parts = list(dict.fromkeys(part for r in records for part in r["ms"]))
    rows = []
    for part in parts:
        cells = [f"{r['ms'][part]:.0f} ms, {r['share'][part]:.0%}" if part in r["ms"] else "-" for r in records]
        rows.append([part, *cells])
    return table(["part", *(f"{r['model']} {'x'.join(map(str, r['size']))}" for r in records)], rows)


def loader_table(records: list[Record]) -> str:
    head = ["loader", "images per CPU-second", "ours, uint8", "ours, float32"]
    rows = []
    for r in records:
        for name, speed in r["images_per_cpu_s"].items():
            rows.append([name, f"{speed:.0f}", f"{r['ratio'][name]:.2f}x", f"{r['float32_ratio'][name]:.2f}x"])
        rows.append(["decoding alone", f"{1e6 / r['microseconds']['decode']:.0f}", f"{r['of_decoding']:.2f}x", "-"])
    return table(head, rows) + "".join(map(loader_parts, records))


def loader_parts(r: Record) -> str:
    us, first = r["microseconds"], r["first_batch_s"]
    rows = [
        ["decoding, augmentation and tokens alone", f"{us['decode_augment']:.0f} us an image"],
        ["loader above that", f"{r['overhead']:.0%}"],
        ["deterministic order, share of the whole", f"{r['order_share']:.1%}"],
        *([f"first batch after {name}", f"{seconds:.2f} s"] for name, seconds in first.items()),
    ]
    return "\n" + table(["ours", f"{r['images']} images of {r['shape']}, {r['mean_bytes'] / 1e3:.0f} kB"], rows)


def start_table(records: list[Record]) -> str:
    head = ["shards", "start", "memory", "resume", "memory"]
    rows = []
    for r in records:
        cells = [f(r[name]) for name in ("start", "resume") for f in (in_milliseconds, in_mib)]
        rows.append([r["shape"], *cells])
    return table(head, rows)


def in_milliseconds(measured: Record) -> str:
    return f"{measured['seconds'] * 1e3:.0f} ms"


def in_mib(measured: Record) -> str:
    return f"{measured['mib']:.1f} MiB"


def roofline_table(records: list[Record]) -> str:
    head = ["threads", "multiply-add GFLOP/s", "L1 GB/s", "L2 GB/s", "L3 GB/s", "copy GB/s"]
    rows = [[str(r["threads"]), *(f"{r[k]:.0f}" for k in ("multiply_add", "l1", "l2", "l3", "copy"))] for r in records]
    return table(head, rows)


def operator_is(dtype: str, direction: str, shapes: str) -> Callable[[Record], bool]:
    def accepts(r: Record) -> bool:
        case = (r["benchmark"], r.get("dtype"), r.get("direction"), r.get("threads"))
        return case == ("dcnv3", dtype, direction, 2) and r["shape"].startswith(shapes)

    return accepts


def attention_is(direction: str) -> Callable[[Record], bool]:
    case = ("deformable_attention", "float32", direction, 2)
    return lambda r: (r["benchmark"], r.get("dtype"), r.get("direction"), r.get("threads")) == case


def model_is(dtype: str, mode: str) -> Callable[[Record], bool]:
    return lambda r: (r["benchmark"], r.get("dtype"), r.get("mode"), r.get("threads")) == ("model", dtype, mode, 2)


def is_box_evaluation(r: Record) -> bool:
    return (r["benchmark"], r.get("shape")) == ("detection_evaluation", "box")


def is_loader(r: Record) -> bool:
    return bool(r["benchmark"] == "loader")


def against_loader(ratio: str, name: str) -> Callable[[Record], float | None]:
    return lambda r: r[ratio].get(name)


def against_torchmetrics(r: Record) -> float:
    return float(r["ratio"]["torchmetrics"])


def against_grid_sample(r: Record) -> float:
    return float(r["ratio"]["grid_sample"])


def goals_table(records: list[Record]) -> str:
    """Return the goals of this project for two threads, with the worst case measured."""
    single = {
        tuple(r[key] for key in ("shape", "dtype", "direction")): r["ms"]["kernel"]
        for r in records
        if r["benchmark"] == "dcnv3" and r["threads"] == 1
    }
    float32_rival = {r["mode"]: r["ms"]["grid_sample"] for r in records if model_is("float32", r.get("mode"))(r)}

    def against_one_thread(r: Record) -> float | None:
        other = single.get((r["shape"], r["dtype"], r["direction"]))
        return None if other is None else other / r["ms"]["kernel"]

    def against_float32_grid_sample(r: Record) -> float | None:
        other = float32_rival.get(r["mode"])
        return None if other is None else other / r["ms"]["kernel"]

    goals: list[Goal] = [
        ("operator forward, T stages", 12, "x", operator_is("float32", "forward", "T"), against_grid_sample),
        ("operator forward, detection", 30, "x", operator_is("float32", "forward", "detection"), against_grid_sample),
        ("operator f+b, T stages", 10, "x", operator_is("float32", "forward+backward", "T"), against_grid_sample),
        ("operator f+b, detection", 20, "x", operator_is("float32", "forward+backward", "det"), against_grid_sample),
        ("deformable attention forward", 3, "x", attention_is("forward"), against_grid_sample),
        ("deformable attention f+b", 3, "x", attention_is("forward+backward"), against_grid_sample),
        ("evaluation of boxes, against torchmetrics", 20, "x", is_box_evaluation, against_torchmetrics),
        ("loader, uint8, against open_clip's stages", 3, "x", is_loader, against_loader("ratio", "open_clip-like")),
        ("loader, float32, the same", 2, "x", is_loader, against_loader("float32_ratio", "open_clip-like")),
        ("loader, uint8, against litdata", 1.5, "x", is_loader, against_loader("ratio", "litdata")),
        ("InternImage-T eval, float32", 1.7, "x", model_is("float32", "eval"), against_grid_sample),
        ("InternImage-T train step, float32", 1.5, "x", model_is("float32", "train"), against_grid_sample),
        ("InternImage-T eval, bfloat16", 2.6, "x", model_is("bfloat16", "eval"), against_float32_grid_sample),
        ("InternImage-T train step, bfloat16", 2.3, "x", model_is("bfloat16", "train"), against_float32_grid_sample),
        ("the same eval, both bfloat16", 2.6, "x", model_is("bfloat16", "eval"), against_grid_sample),
        ("the same train step, both bfloat16", 2.3, "x", model_is("bfloat16", "train"), against_grid_sample),
        (
            "operator forward, T stages, over one thread",
            1.8,
            "x",
            operator_is("float32", "forward", "T"),
            against_one_thread,
        ),
        (
            "operator f+b, T stages, over one thread",
            1.8,
            "x",
            operator_is("float32", "forward+backward", "T"),
            against_one_thread,
        ),
    ]
    rows = []
    for name, goal, unit, accepts, value in goals:
        values = [found for r in records if accepts(r) and (found := value(r)) is not None]
        if values:
            rows.append([name, f"{goal:g}{unit}", f"{min(values):.2f}{unit}", "yes" if min(values) >= goal else "no"])
    for record in records:
        case = (record["benchmark"], record.get("dtype"), record.get("direction"))
        if case == ("dcnv3_memory", "float32", "forward"):
            peak = record["times_results"]["kernel"]
            rows.append(["extra memory, detection", "1.05x or less", f"{peak:.2f}x", "yes" if peak <= 1.05 else "no"])
        if record["benchmark"] == "loader":
            slowest = max(record["first_batch_s"].values())
            for name, limit, unit, value in (
                ("loader above decoding, augmentation, tokens", 15, " %", 100 * record["overhead"]),
                ("deterministic order of the loader", 3, " %", 100 * record["order_share"]),
                ("first batch after start and resume", 1, " s", slowest),
            ):
                reached = "yes" if value <= limit else "no"
                rows.append([name, f"{limit}{unit} or less", f"{value:.2f}{unit}", reached])
    return table(["goal, against grid_sample on two threads", "goal", "worst case", "reached"], rows)


SECTIONS = {
    "roofline": ("The machine's ceilings", roofline_table),
    "dcnv3": ("The operator", operator_table),
    "dcnv3_memory": ("Peak memory beyond the inputs, detection map, as a multiple of the results", memory_table),
    "deformable_attention": ("Deformable attention, 8 heads of 32 channels, 4 points per level", attention_table),
    "detection_evaluation": ("Evaluation, against torchmetrics with pycocotools in the same run", evaluation_table),
    "detection_step": ("Where a training step of a detector on InternImage-T goes, float32", step_table),
    "loader": ("Loading from shards, per CPU-second of one core, batches of 64 at 224 px", loader_table),
    "loader_start": ("Start and resume by the number of shards, to the samples of the first step", start_table),
    "model": ("InternImage-T, 4 images of 224 px, against the same model on grid_sample", model_table),
}


NAMES = ("roofline", "dcnv3", "deformable_attention", "detection_evaluation", "detection_step", "loader", "model")


def document(records: list[Record]) -> str:
    commands = "\n".join(COMMANDS.format(name=name) for name in NAMES)
    parts = [HEADER.format(commands=commands)]
    machines: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        machines.setdefault(tuple(record[key] for key in MACHINE_KEYS), []).append(record)
    for (name, cores, capability, torch, bind, quick), own in machines.items():
        pinned = "threads pinned" if bind else "threads not pinned"
        trial = " (quick trial on tiny shapes: no measurement)" if quick else ""
        parts.append(f"## {name}, {cores} cores, {capability}, torch {torch}, {pinned}{trial}\n")
        parts += ["### Goals\n", goals_table(own)]
        for benchmark, (title, make) in SECTIONS.items():
            if chosen := [r for r in own if r["benchmark"] == benchmark]:
                parts += [f"### {title}\n", make(chosen)]
                if benchmark == "dcnv3":
                    parts += [BOUND, scaling_table(chosen)]
    return "\n".join(part for part in parts if part)


BOUND = """The last column is the least time that the machine's ceilings allow, as a share of the time taken, and which
ceiling that is: multiply-adds, loads from the second cache level of the four corners of every point, or one pass over
inputs and results (from memory, or from the third cache level where they fit there).
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, nargs="+")
    options.add_argument("--output", type=Path, default=DOCUMENT)
    chosen = options.parse_args()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(document(load(chosen.results)))


if __name__ == "__main__":
    main()
