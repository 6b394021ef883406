import contextlib
import io
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from detection_results import (
    NUM_CLASSES,
    SIZE,
    detections,
    empty_truth,
    no_detections,
    objects,
    random_images,
    updated,
)
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.detection.metrics import CocoAP, LvisAP
from tasks.detection.metrics.engines import Engine

STATS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
STATS += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]
# Sums of the same float64 numbers in another order.
EXACT = {"abs": 1e-12, "nan_ok": True}


@pytest.fixture(scope="module")
def images():
    return random_images()


def coco_json(images, kind):
    """Annotation file and results as anyone would write them."""
    annotations, results = [], []
    for name, (truth, found) in images.items():
        for index, label in enumerate(truth["labels"]):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": name,
                    "category_id": 10 * int(label) + 3,
                    "bbox": truth["boxes"][index].tolist(),
                    "area": float(truth["areas"][index]),
                    "iscrowd": int(truth["crowd"][index]),
                    "segmentation": truth["masks"][index],
                }
            )
        for index, label in enumerate(found["labels"]):
            left, top, right, bottom = found["boxes"][index].tolist()
            line = {"image_id": name, "category_id": 10 * int(label) + 3, "score": found["scores"][index].item()}
            if kind == "bbox":
                line["bbox"] = [left, top, right - left, bottom - top]
            else:
                line["segmentation"] = coco_mask.encode(np.asfortranarray(found["masks"][index].numpy(), np.uint8))
            results.append(line)
    files = [{"id": name, "height": SIZE[0], "width": SIZE[1]} for name in images]
    categories = [{"id": 10 * label + 3, "name": str(label)} for label in range(NUM_CLASSES)]
    return {"images": files, "annotations": annotations, "categories": categories}, results


def pycocotools(images, kind):
    annotations, results = coco_json(images, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = annotations
        data.createIndex()
        evaluator = COCOeval(data, data.loadRes(results), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


@pytest.fixture(scope="module")
def expected(images):
    numbers = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        stats = pycocotools(images, kind).stats
        numbers |= {
            f"{name}_{key}": math.nan if value == -1 else value for key, value in zip(STATS, stats, strict=True)
        }
    return numbers


@pytest.mark.parametrize("engine", Engine.__args__)
def test_numbers_are_those_of_pycocotools(images, expected, engine):
    metric = CocoAP(engine=engine)
    metric.prepare(class_names=list("abcde"))
    assert updated(metric, images).compute() == pytest.approx(expected, **EXACT)
    # The comparison has something to compare.
    assert all(0.05 < expected[key] < 0.95 for key in ("box_ap", "mask_ap", "box_ap_small", "mask_ap_large"))
    assert expected["box_ap_small"] != expected["mask_ap_small"]


@pytest.mark.parametrize("engine", Engine.__args__)
def test_first_object_of_all_counts_when_it_is_found(engine):
    # pycocotools would miss it if its id were 0.
    metric = CocoAP(engine=engine)
    metric.update([detections([[10, 10, 50, 50]], [0.9], [0])], [1], [objects([[10, 10, 50, 50]], [0])], [SIZE])
    assert metric.compute()["box_ap"] == pytest.approx(1, **EXACT)


@pytest.mark.parametrize("engine", Engine.__args__)
@pytest.mark.parametrize("missing", ["images", "detections", "objects", "objects and detections"])
def test_nothing_to_evaluate_is_nan_and_nothing_found_is_zero(images, engine, missing):
    found = {} if missing == "images" else dict(images)
    for name, (truth, detected) in found.items():
        found[name] = (
            empty_truth() if "objects" in missing else truth,
            no_detections() if "detections" in missing else detected,
        )
    metric = updated(CocoAP(engine=engine), found)
    if missing == "images":
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            numbers = metric.compute()
    else:
        numbers = metric.compute()
    assert {f"box_{key}" for key in STATS} <= set(numbers)
    assert ("mask_ap" in numbers) == (missing != "images")
    assert all(value == 0 if missing == "detections" else math.isnan(value) for value in numbers.values())


def test_image_counts_once_and_its_last_result_stays(images, expected):
    metric = updated(CocoAP(), {name: (truth, no_detections()) for name, (truth, _) in images.items()})
    assert metric.compute()["box_ap"] == 0
    updated(metric, images, batch=4)
    updated(metric, dict(list(images.items())[:3]))
    assert metric.compute() == pytest.approx(expected, **EXACT)


def test_ids_may_be_words(images, expected):
    named = {f"{name:03}.jpg": image for name, image in images.items()}
    assert updated(CocoAP(), named).compute() == pytest.approx(expected, **EXACT)


def test_reset_forgets_everything(images):
    metric = updated(CocoAP(), images)
    metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="there is no result to show"):
        metric.table()
    (name, (truth, found)), *_ = images.items()
    alone = updated(CocoAP(), {name: (truth, found)}).compute()
    assert updated(metric, {name: (truth, found)}).compute() == pytest.approx(alone, **EXACT)


def test_fewer_detections_for_each_image_lower_recall(images):
    numbers = updated(CocoAP(max_detections=[2, 3]), images).compute()
    limited = pycocotools(images, "bbox")
    limited.params.maxDets = [2, 3]
    with contextlib.redirect_stdout(io.StringIO()):
        limited.evaluate()
        limited.accumulate()
    precision, recall = limited.eval["precision"][..., 0, 1], limited.eval["recall"][..., 0, :]
    assert numbers["box_ap"] == pytest.approx(precision[precision > -1].mean(), **EXACT)
    for index, limit in enumerate((2, 3)):
        values = recall[..., index]
        assert numbers[f"box_ar{limit}"] == pytest.approx(values[values > -1].mean(), **EXACT)
    assert "box_ar100" not in numbers


def test_run_lengths_count_as_the_masks_that_they_encode(images, expected):
    encoded = {
        name: (truth, found | {"masks": [coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in found["masks"]]})
        for name, (truth, found) in images.items()
    }
    assert updated(CocoAP(), encoded).compute() == pytest.approx(expected, **EXACT)


def test_without_masks_of_the_detections_only_boxes_are_evaluated(images, expected):
    boxes_only = {
        name: (truth, {key: value for key, value in found.items() if key != "masks"})
        for name, (truth, found) in images.items()
    }
    numbers = updated(CocoAP(), boxes_only).compute()
    assert numbers == pytest.approx({k: v for k, v in expected.items() if k.startswith("box_")}, **EXACT)


def test_numbers_by_class_and_their_table(images):
    metric = CocoAP(per_class=True)
    metric.prepare(class_names=["a", "b|c", "d", "e", "absent"])
    numbers = updated(metric, images).compute()
    table = metric.table().splitlines()
    assert table[0] == "| class | objects | box AP | box AP50 | mask AP | mask AP50 |"
    evaluators = {name: pycocotools(images, kind) for name, kind in (("box", "bbox"), ("mask", "segm"))}
    for label, class_name in enumerate(metric.class_names[:4]):
        cells = []
        for name, evaluator in evaluators.items():
            precision = evaluator.eval["precision"][:, :, label, 0, 2]
            assert numbers[f"class/{class_name}/{name}_ap"] == pytest.approx(precision.mean(), **EXACT)
            assert numbers[f"class/{class_name}/{name}_ap50"] == pytest.approx(precision[0].mean(), **EXACT)
            cells += [f"{precision.mean():.3f}", f"{precision[0].mean():.3f}"]
        count = sum(int((truth["labels"][~truth["crowd"]] == label).sum()) for truth, _ in images.values())
        escaped = class_name.replace("|", "\\|")
        assert table[2 + label] == f"| {escaped} | {count} | {' | '.join(cells)} |"
    assert table[-1] == "| absent | 0 | - | - | - | - |"
    assert math.isnan(numbers["class/absent/box_ap"])


def test_category_ids_name_classes_without_names(images):
    metric = CocoAP(per_class=True)
    metric.prepare(category_ids=[3, 13, 23, 33, 43])
    assert "class/43/box_ap" in updated(metric, images).compute()


def test_mistakes_are_named(images, monkeypatch):
    with pytest.raises(ValueError, match=r"max_detections is \(10, 1\), expected ascending"):
        CocoAP(max_detections=(10, 1))
    with pytest.raises(ValueError, match="engine is 'fast', expected one of hotcoco, pycocotools"):
        CocoAP(engine="fast")
    with pytest.raises(ValueError, match="max_detections is 0, expected a positive number"):
        LvisAP(max_detections=0)
    with pytest.raises(NotImplementedError, match="not of a batch"):
        CocoAP()(images)
    small = detections([[0, 0, 9, 9]], [0.5], [0], np.ones((1, 28, 28), bool))
    with pytest.raises(ValueError, match=r"masks are \[\(28, 28\)\] pixels, expected \(160, 200\)"):
        CocoAP().update([small], [1], [empty_truth()], [SIZE])
    metric = CocoAP()
    metric.prepare(class_names=["a", "b"])
    with pytest.raises(ValueError, match="expected labels below 2"):
        updated(metric, images).compute()
    with pytest.raises(ValueError, match=r"have lengths \[2, 3\], expected one entry for each class"):
        metric.prepare(class_names=["a", "b"], category_ids=[1, 2, 3])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        CocoAP(engine="faster_coco_eval")


def test_metric_can_be_sent_with_its_images_and_adds_nothing_to_a_checkpoint(images, expected):
    metric = updated(CocoAP(), images)
    assert metric.state_dict() == {}
    assert pickle.loads(pickle.dumps(metric)).compute() == pytest.approx(expected, **EXACT)


def test_detections_may_change_after_the_update(images, expected):
    metric = CocoAP()
    for name, (truth, found) in images.items():
        lent = {key: value.clone() for key, value in found.items()}
        metric.update([lent], [name], [truth], [SIZE])
        for value in lent.values():
            value.zero_()
    assert metric.compute() == pytest.approx(expected, **EXACT)


def rank_compute(rank, images, folder):
    """Rank 0 has seven images, rank 1 five and two that rank 0 has as well."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    names = list(images)
    share = names[:7] if rank == 0 else names[5:]
    metric = updated(CocoAP(per_class=True), {name: images[name] for name in share}, batch=2)
    metric.prepare(class_names=list("abcde"))
    result = {"numbers": metric.compute(), "table": metric.table()}
    wrong = updated(CocoAP(), {name: images[name] for name in share}, batch=2)
    wrong.prepare(class_names=["a"])
    with pytest.raises(ValueError, match="expected labels below 1"):
        wrong.compute()
    torch.save(result, folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_processes_equal_one_and_both_hear_of_a_mistake(images, tmp_path):
    torch.multiprocessing.spawn(rank_compute, (images, tmp_path), nprocs=2)
    alone = CocoAP(per_class=True)
    alone.prepare(class_names=list("abcde"))
    numbers = updated(alone, images).compute()
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=False)
        # The same evaluation of the same images.
        assert found["numbers"] == pytest.approx(numbers, abs=0, nan_ok=True)
        assert found["table"] == alone.table()
