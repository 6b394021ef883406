import io
import json
import pickle
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from annotated_images import write_image
from PIL import Image
from pycocotools.coco import COCO

from datamodules.detection import rle
from datamodules.detection.coco import CocoDetection, CocoSource
from datamodules.detection.flat import trainable
from datamodules.detection.lvis import LvisDetection
from datamodules.detection.objects365 import Objects365Detection

SIZES = {7: (48, 64), 3: (64, 48), 12: (40, 40), 5: (20, 64)}  # by image id, in the file's order


def square(left, top, side):
    return [left, top, left + side, top, left + side, top + side, left, top + side]


def annotation(number, image, category, box, **parts):
    default = {"area": box[2] * box[3] - 0.5, "iscrowd": 0, "segmentation": [square(box[0], box[1], box[2])]}
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, **default, **parts}


@pytest.fixture
def coco(tmp_path):
    """A COCO file with gaps in its ids, and its images; changed by tests before they write it."""
    crowd = np.zeros((64, 48), bool)
    crowd[10:20, 5:30] = True
    runs = rle.decompressed(rle.encode(crowd)["counts"])
    content = {
        "info": {"year": 2017},
        "images": [
            {"id": number, "file_name": f"{number:03}.jpg", "height": height, "width": width}
            for number, (height, width) in SIZES.items()
        ],
        "annotations": [
            annotation(1, 3, 90, [4.25, 6.5, 20.0, 20.0]),
            annotation(2, 7, 4, [1.0, 2.0, 30.5, 30.5], segmentation=[square(1, 2, 9), square(20, 20, 10)]),
            annotation(3, 3, 4, [5, 10, 25, 10], iscrowd=1, segmentation={"size": [64, 48], "counts": runs}),
            annotation(4, 7, 90, [10.1, 10.2, 5.3, 5.3]),
            annotation(5, 5, 13, [2.0, 2.0, 9.0, 9.0]),
        ],
        "categories": [{"id": 90, "name": "owl"}, {"id": 4, "name": "cat"}, {"id": 13, "name": "dog"}],
    }
    for number, (height, width) in SIZES.items():
        write_image(tmp_path / "images" / f"{number:03}.jpg", height, width)
    return content


def open_coco(content, folder, *arguments, **options):
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return CocoSource(path, folder / "images", *arguments, **options)


class TestCoco:
    def test_what_is_read_is_what_pycocotools_reads(self, coco, tmp_path):
        source = open_coco(coco, tmp_path)
        with redirect_stdout(io.StringIO()):
            truth = COCO(tmp_path / "annotations.json")
        assert [source.image_id(index) for index in range(len(source))] == truth.getImgIds() == list(SIZES)
        assert source.categories.names == ("cat", "dog", "owl")
        assert source.categories.ids == (4, 13, 90)
        assert source.categories.frequency is None
        assert source.skipped == {}
        for index in range(len(source)):
            number = source.image_id(index)
            assert source.size(index) == SIZES[number]
            assert Path(source.name(index)) == tmp_path / "images" / f"{number:03}.jpg"
            found, expected = source.objects(index), truth.loadAnns(truth.getAnnIds(number))
            assert found.boxes.dtype == found.areas.dtype == np.float64
            assert found.boxes.tolist() == [entry["bbox"] for entry in expected]
            assert found.areas.tolist() == [entry["area"] for entry in expected]
            assert found.crowd.tolist() == [bool(entry["iscrowd"]) for entry in expected]
            assert [source.categories.ids[label] for label in found.labels] == [e["category_id"] for e in expected]
            assert found.masks == [truth.annToRLE(entry) for entry in expected]

    def test_an_image_is_read_as_it_is_seen(self, coco, tmp_path):
        """A photograph that was stored lying, with the turn in EXIF, and one whose annotations ignore the turn."""
        stored = Image.new("RGB", (64, 48), "white")
        stored.paste("black", (0, 0, 20, 10))
        turn = Image.Exif()
        turn[0x0112] = 6  # to be turned clockwise by 90 degrees
        for name in ("003.png", "007.png"):
            stored.save(tmp_path / "images" / name, exif=turn)
        for entry in coco["images"]:
            if entry["id"] in (3, 7):
                entry["file_name"] = entry["file_name"].replace("jpg", "png")
        source = open_coco(coco, tmp_path)
        as_stored, turned = np.asarray(source.read(0)), np.asarray(source.read(1))
        assert as_stored.shape[:2] == source.size(0)
        assert np.array_equal(as_stored, np.asarray(stored))
        assert turned.shape[:2] == source.size(1)
        assert np.array_equal(turned, np.rot90(as_stored, k=-1))

    def test_label_sets_are_the_labels_without_crowds(self, coco, tmp_path):
        sets = open_coco(coco, tmp_path).label_sets()
        assert [sets[index].tolist() for index in range(len(sets))] == [[0, 2], [2], [], [1]]

    def test_chosen_classes_are_labelled_in_their_order_and_others_left_out(self, coco, tmp_path):
        source = open_coco(coco, tmp_path, ["owl", "cat"])
        assert source.categories.ids == (90, 4)
        assert [source.objects(index).labels.tolist() for index in range(4)] == [[1, 0], [0, 1], [], []]
        with pytest.raises(ValueError, match=r"has no class catt, fish. Did you mean cat"):
            open_coco(coco, tmp_path, ["owl", "catt", "fish"])
        with pytest.raises(ValueError, match=r"class_names has cat more than once"):
            open_coco(coco, tmp_path, ["cat", "owl", "cat"])

    def test_training_leaves_out_what_cannot_be_learned_and_evaluation_keeps_it(self, coco, tmp_path):
        bad = {
            "outside": [64.0, 2.0, 5.0, 5.0],
            "thin": [2.0, 2.0, 0.9, 5.0],
            "flat": [2.0, 2.0, 5.0, 0.0],
            "before": [-6.0, 2.0, 6.0, 5.0],
        }
        triangle = [[1, 1, 9, 1, 9, 9]]
        coco["annotations"] += [annotation(10, 7, 4, box, segmentation=triangle) for box in bad.values()]
        coco["annotations"].append(annotation(11, 7, 4, [2.0, 2.0, 5.0, 5.0], area=0))
        coco["annotations"].append(annotation(12, 7, 4, [-1.0, 2.0, 5.0, 5.0], ignore=1, segmentation=triangle))
        evaluated = open_coco(coco, tmp_path).objects(0)
        assert evaluated.boxes[2:].tolist() == [*bad.values(), [2.0, 2.0, 5.0, 5.0], [-1.0, 2.0, 5.0, 5.0]]
        assert not evaluated.crowd.any()
        with pytest.warns(UserWarning, match="objects outside of their image, .* thinner than a pixel: 5"):
            trained = open_coco(coco, tmp_path, training=True).objects(0)
        assert trained.boxes.tolist() == [[1.0, 2.0, 30.5, 30.5], [10.1, 10.2, 5.3, 5.3], [-1.0, 2.0, 5.0, 5.0]]
        assert trained.crowd.tolist() == [False, False, True]
        # Each mask is still that of its box.
        assert trained.masks == [evaluated.masks[place] for place in (0, 1, -1)]
        assert [rle.area(mask) for mask in trained.masks] == [9 * 9 + 10 * 10, 30, 28]

    def test_broken_annotations_are_left_out_counted_and_reported(self, coco, tmp_path):
        good = [1.0, 1.0, 9.0, 9.0]
        wrong_size = {"size": [48, 65], "counts": [48 * 65]}
        broken = [
            annotation(20, 7, 4, [1.0, 1.0, 9.0, 9.0], bbox=[1.0, float("nan"), 9.0, 9.0]),
            annotation(21, 7, 4, good, bbox=[1.0, 1.0, 9.0]),
            annotation(22, 7, 4, good, bbox=None),
            annotation(23, 7, 4, good, segmentation=[[1, 1, 5, 5]]),
            annotation(24, 7, 4, good, segmentation=wrong_size),
            annotation(25, 7, 4, good, segmentation={"size": [48, 64], "counts": [1, 2]}),
            annotation(26, 7, 4, good, segmentation=[]),
            annotation(27, 8, 4, good),
        ]
        expected = open_coco(coco, tmp_path).objects(0)
        coco["annotations"] = broken + coco["annotations"]
        with pytest.warns(UserWarning, match=r"annotations\.json: left out .*annotations without a box.*: 3"):
            source = open_coco(coco, tmp_path)
        assert sorted(source.skipped.values()) == [1, 1, 1, 1, 1, 3]
        found = source.objects(0)
        assert found.boxes.tolist() == expected.boxes.tolist()
        assert found.masks == expected.masks
        # Without masks, only boxes and images can be broken.
        with pytest.warns(UserWarning, match=r"left out"):
            source = open_coco(coco, tmp_path, masks=False)
        assert sorted(source.skipped.values()) == [1, 3]
        assert len(source.objects(0)) == 2 + 4
        assert not source.has_masks

    def test_what_is_wrong_with_the_file_is_an_error(self, coco, tmp_path):
        def broken(**parts):
            return open_coco({**coco, **parts}, tmp_path)

        with pytest.raises(ValueError, match=r"annotations have category_id 5, which `categories` does not list"):
            broken(annotations=[annotation(1, 3, 5, [1, 1, 9, 9])])
        with pytest.raises(ValueError, match=r"annotations\[0\] has no `image_id`"):
            broken(annotations=[{"bbox": [1, 1, 2, 2], "category_id": 4}])
        with pytest.raises(ValueError, match=r"`category_id` or `area` is no number"):
            broken(annotations=[annotation(1, 3, "cat", [1, 1, 9, 9])])
        with pytest.raises(ValueError, match=r"only 4 of 5 image ids are different; given twice: 7"):
            broken(images=[*coco["images"], coco["images"][0]])
        with pytest.raises(ValueError, match=r"KeyError 'height'; expected `images` with"):
            broken(images=[{"id": 1, "file_name": "a.jpg"}])
        with pytest.raises(ValueError, match=r"more than one category is called cat"):
            broken(categories=[*coco["categories"], {"id": 1, "name": "cat"}])
        with pytest.raises(ValueError, match=r"lists no images"):
            broken(images=[])
        with pytest.raises(ValueError, match=r"no list `annotations`"):
            broken(annotations=None)
        (tmp_path / "annotations.json").write_text("{")
        with pytest.raises(ValueError, match=r"is not JSON"):
            CocoSource(tmp_path / "annotations.json", tmp_path / "images")
        with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
            CocoSource(tmp_path / "none.json", tmp_path / "images")

    def test_a_missing_image_is_left_out_of_training_and_an_error_in_evaluation(self, coco, tmp_path):
        (tmp_path / "images" / "003.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 4 images of .* do not exist, the first is .*003.jpg"):
            open_coco(coco, tmp_path)
        with pytest.warns(UserWarning, match="images whose file is missing: 1"):
            source = open_coco(coco, tmp_path, training=True)
        assert [source.image_id(index) for index in range(len(source))] == [7, 12, 5]
        assert [len(source.objects(index)) for index in range(3)] == [2, 0, 1]
        assert source.objects(2).labels.tolist() == [1]
        with pytest.raises(FileNotFoundError, match=r"4 of 4 images .* Check the folder of the images"):
            CocoSource(tmp_path / "annotations.json", tmp_path / "elsewhere", training=True)

    def test_missing_parts_get_their_defaults_and_ids_may_be_text(self, coco, tmp_path):
        for entry in coco["images"]:
            entry["id"] = f"image {entry['id']}"
        entry = {"image_id": "image 7", "category_id": 4, "bbox": [1, 2, 3, 4]}
        source = open_coco({**coco, "annotations": [entry]}, tmp_path)
        assert source.image_id(0) == "image 7"
        assert not source.has_masks
        found = source.objects(0)
        assert (found.areas.tolist(), found.crowd.tolist(), found.masks) == ([12.0], [False], None)

    def test_a_source_reaches_worker_processes_whole(self, coco, tmp_path):
        source = open_coco(coco, tmp_path)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.objects(1).masks == source.objects(1).masks
        assert copy.name(3) == source.name(3)

    def test_the_datamodule_opens_both_splits_and_checks_the_classes(self, coco, tmp_path):
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(coco))
        places = (path, tmp_path / "images", path, tmp_path / "images")
        datamodule = CocoDetection(*places, num_classes=3, class_names=["dog", "cat", "owl"], num_workers=0)
        assert datamodule.open_split("val").categories.ids == (13, 4, 90)
        assert datamodule.open_split("train").has_masks
        assert not CocoDetection(*places, num_classes=3, masks=False).open_split("train").has_masks
        assert datamodule.find_categories() == datamodule.open_split("val").categories
        assert CocoDetection(*[tmp_path / "none"] * 4).find_categories() is None
        with pytest.raises(ValueError, match=r"class_names has 2 names, num_classes=3"):
            CocoDetection(*places, num_classes=3, class_names=["dog", "cat"])
        with pytest.raises(ValueError, match=r"3 classes, num_classes=80"):
            CocoDetection(*places).setup("validate")


def test_training_objects_overlap_the_image_and_have_an_extent():
    boxes = np.array([[0, 0, 1, 1], [9, 0, 5, 5], [10, 0, 5, 5], [0, -5, 5, 5], [0, -5, 5, 5.5], [2, 2, 0.99, 5]])
    assert trainable(boxes, np.ones(6), np.array([[20, 10]])).tolist() == [True, True, False, False, True, False]
    assert not trainable(boxes, np.zeros(6), np.array([[20, 10]])).any()


def test_lvis_knows_what_was_looked_for_and_finds_images_by_their_address(coco, tmp_path):
    for entry in coco["images"]:
        folder = "train2017" if entry["id"] == 7 else "val2017"
        write_image(tmp_path / "images" / folder / entry["file_name"], entry["height"], entry["width"])
        entry["coco_url"] = f"http://images.cocodataset.org/{folder}/{entry.pop('file_name')}"
        entry["neg_category_ids"] = [13, 90] if entry["id"] == 3 else []
        entry["not_exhaustive_category_ids"] = [4] if entry["id"] == 7 else []
    for entry, frequency in zip(coco["categories"], "rcf", strict=True):
        entry["frequency"] = frequency
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(coco))
    source = LvisDetection(path, path, tmp_path / "images", num_classes=3).open_split("val")
    assert source.categories.frequency == ("c", "f", "r")  # cat, dog, owl
    assert [source.objects(index).negative for index in range(4)] == [[], [1, 2], [], []]
    assert [source.objects(index).not_exhaustive for index in range(4)] == [[0], [], [], []]
    assert Path(source.name(0)) == tmp_path / "images" / "train2017" / "007.jpg"
    assert source.read(2).size == (40, 40)


def test_objects365_images_lie_in_patch_folders_and_labels_follow_ids(coco, tmp_path):
    for entry in coco["images"]:
        write_image(tmp_path / "images" / "patch8" / entry["file_name"], entry["height"], entry["width"])
        entry["file_name"] = f"images/v1/patch8/{entry['file_name']}"
    for entry in coco["annotations"]:
        del entry["segmentation"]
    (tmp_path / "images" / "patch8" / "012.jpg").unlink()
    path = tmp_path / "objects365.json"
    path.write_text(json.dumps(coco))
    images = tmp_path / "images"
    with pytest.warns(UserWarning, match="images whose file is missing: 1"):
        source = Objects365Detection(path, images, path, images, num_classes=3).open_split("train")
    assert source.categories.ids == (4, 13, 90)
    assert [source.image_id(index) for index in range(3)] == [7, 3, 5]
    assert Path(source.name(0)) == images / "patch8" / "007.jpg"
