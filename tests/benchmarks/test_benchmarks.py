"""The benchmarks compare like with like, and the page made from them is current."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest
import simplejpeg
import torch
from PIL import Image

from benchmarks import (
    deformable_attention,
    detection_evaluation,
    detection_step,
    loader,
    loader_peers,
    performance,
    rivals,
    roofline,
)
from benchmarks.dcnv3 import CASES, Rival, implementations, inputs
from datamodules import DetectionTrainTransform, SyntheticDetection
from ops.reference import dcnv3_reference

RESULTS = sorted((Path(performance.__file__).parent / "results").glob("*.json"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": True},
        {"stride": 2},
        {"dilation": 2, "padding": 2, "offset_scale": 1.5},
        {"remove_center": True},
        {"kernel_size": 5, "padding": 2},
    ],
    ids=str,
)
def test_grid_sample_form_computes_dcnv3(options):
    random = torch.Generator().manual_seed(0)
    points = options.get("kernel_size", 3) ** 2 - options.get("remove_center", False)
    stride = options.get("stride", 1)
    size = (2, -(-7 // stride), -(-9 // stride))
    x = torch.randn(2, 7, 9, 32, generator=random)
    offset = torch.randn(*size, 2 * points * 2, generator=random)
    mask = torch.randn(*size, 2 * points, generator=random)
    found = rivals.dcnv3_grid_sample(x, offset, mask, groups=2, **options)
    truth = dcnv3_reference(x.double(), offset.double(), mask.double(), groups=2, **options)
    # Normalised float32 coordinates are off by 1e-6 pixels or so; values reach 20.
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=5e-5)


def test_all_rivals_agree_and_differentiate(monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "reference")
    case = CASES[0].__class__("tiny", 2, 5, 6, 32, 2)
    tensors = inputs(case, torch.float32, "cpu")
    found = implementations(case, torch.float32, "cpu")
    assert set(found) == {"kernel", "reference", "grid_sample", "torchvision"}
    outputs = {}
    for name, rival in found.items():
        assert isinstance(rival, Rival)
        forward, forward_backward = rival.runs(tensors)
        outputs[name] = rival.to_channels_last(forward())
        gradients = forward_backward()
        assert sum(gradient.numel() for gradient in gradients) == sum(tensor.numel() for tensor in tensors[:3])
    for output in outputs.values():
        # As above.
        torch.testing.assert_close(output, outputs["reference"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", deformable_attention.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", deformable_attention.TOLERANCES, ids=str)
def test_all_forms_of_deformable_attention_agree_and_differentiate(case, dtype, monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "reference")
    small = replace(case, shapes=((6, 9), (3, 5)), queries=case.queries and 7)
    deformable_attention.check(small, dtype, "cpu")
    tensors = deformable_attention.inputs(small, dtype, "cpu")
    found = {
        name: rival.runs(tensors)[1]() for name, rival in deformable_attention.implementations(small, "cpu").items()
    }
    if dtype == torch.float32:
        for gradients in found.values():
            # Gradients of locations are differences of values times sizes in pixels; a sum of 16 of those.
            torch.testing.assert_close(gradients, found["reference"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("masks", [False, True])
def test_detection_evaluation_gives_the_numbers_of_torchmetrics(masks):
    record = detection_evaluation.compare(detection_evaluation.Case(6, 10, 3, masks))
    assert record["largest_difference"] <= detection_evaluation.TOLERANCE
    assert 0 < record["mask_ap" if masks else "box_ap"] < 1


@pytest.mark.parametrize("name", detection_step.PARTS)
def test_parts_of_a_step_are_all_measured(name):
    data = SyntheticDetection(num_classes=detection_step.NUM_CLASSES, image_size=64, batch_size=2, num_samples=8)
    data.train_transform = DetectionTrainTransform(short_sides=(48,), long_side=64)
    data.setup("fit")
    parts = detection_step.measure(name, detection_step.detectors(quick=True)[name](), data, 1, "cpu")
    assert parts.keys() == {*detection_step.PARTS[name], detection_step.REST, "data", "backward", "optimizer"}
    assert all(milliseconds > 0 for milliseconds in parts.values())


@pytest.fixture(scope="module")
def photographs():
    real = [Image.open(loader.EXAMPLE).convert("RGB")]
    files = list(loader.photographs(real, 20))
    assert files == list(loader.photographs(real, 20))
    return files


def test_photographs_of_the_loader_are_as_said(photographs):
    headers = {simplejpeg.decode_jpeg_header(file) for file in photographs}
    assert headers == {(loader.HEIGHT, loader.WIDTH, "YCbCr", "420")}
    assert len(set(photographs)) == len(photographs)


@pytest.mark.parametrize("make", [loader_peers.open_clip_like, loader_peers.fluent])
def test_peers_of_the_loader_give_each_pair_once_per_pass(make, photographs, tmp_path):
    urls = loader.write_shards(photographs, tmp_path / "shards")
    batches = list(make(urls, 32, 8))
    assert sum(len(images) for images, _ in batches) == len(photographs)
    images, texts = batches[0]
    assert (images.shape, images.dtype, texts.shape) == ((8, 3, 32, 32), torch.float32, (8, 77))
    assert len(torch.cat([texts for _, texts in batches]).unique(dim=0)) == len(photographs)


def test_loader_is_measured_in_all_parts(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(loader_peers, "has_litdata", lambda: False)
    record = loader.compare(photographs, tmp_path, 4, (1, 2))
    assert record["images_per_cpu_s"].keys() == {"ours, uint8", "ours, float32", "open_clip-like", "webdataset"}
    # Of so few images the difference of two passes is noise, of any sign.
    assert all(isfinite(speed) for speed in record["images_per_cpu_s"].values())
    assert all(time > 0 for time in record["microseconds"].values())
    starts = loader.start_of(10, tmp_path / "index")
    machine = {"device": "cpu", "name": "CPU", "cores": 2, "cpu_capability": "AVX2", "torch": "2"}
    records = [{**machine, "omp_proc_bind": None, "quick": True, **r} for r in (record, starts)]
    page = performance.document(records)
    assert f"| open_clip-like | {record['images_per_cpu_s']['open_clip-like']:.0f} |" in page
    assert f"| 10 | {starts['start']['seconds'] * 1e3:.0f} ms |" in page


def test_work_counts_what_the_operator_does():
    # One pixel, one group, one channel: 9 points of 4 corners; x, out, 18 offsets and 9 weights.
    forward = roofline.Work.of((1, 1, 1, 1), 1, backward=False, bytes_per_value=4)
    assert (forward.flop, forward.cache_bytes, forward.memory_bytes) == (72, 144, 116)
    ceilings = roofline.Ceilings(multiply_add=1.0, l1=1.0, l2=1.0, l3=1.0, copy=1.0)
    assert forward.floor(ceilings) == (144e-6, "load")


def test_page_of_results_is_current():
    assert RESULTS
    assert performance.DOCUMENT.read_text() == performance.document(performance.load(RESULTS)), (
        "docs/performance.md is stale: python -m benchmarks.performance benchmarks/results/*.json"
    )


def test_page_shows_the_worst_case_of_a_goal():
    machine = {
        **{"device": "cpu", "name": "CPU", "cores": 2, "cpu_capability": "AVX2", "torch": "2", "omp_proc_bind": None},
        "quick": False,
    }
    case = {"benchmark": "dcnv3", "groups": 4, "dtype": "float32", "threads": 2, "direction": "forward"}
    records = [
        {
            **machine,
            **case,
            "shape": name,
            "size": [4, 1, 1, 64],
            "ms": {"kernel": 1.0},
            "ratio": {"grid_sample": ratio},
        }
        for name, ratio in (("T1", 15.0), ("T2", 11.0), ("detection", 31.0))
    ]
    text = performance.document(records)
    assert "| operator forward, T stages | 12x | 11.00x | no |" in text
    assert "| operator forward, detection | 30x | 31.00x | yes |" in text
    assert "threads not pinned" in text
