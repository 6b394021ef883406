import csv
import io
import json
import pickle
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from datamodules.detection import rle
from datamodules.detection.coco import CocoDetection, CocoSource
from datamodules.detection.crowdhuman import CrowdHumanDetection, CrowdHumanSource
from datamodules.detection.flat import trainable
from datamodules.detection.lvis import LvisDetection
from datamodules.detection.objects365 import Objects365Detection
from datamodules.detection.openimages import OpenImagesDetection, OpenImagesSource
from datamodules.detection.synthetic import Shapes, SyntheticDetection
from datamodules.detection.voc import VocDetection, VocSource
from datamodules.synthetic import colour

SIZES = {7: (48, 64), 3: (64, 48), 12: (40, 40), 5: (20, 64)}  # by image id, in the file's order


def write_image(path, height, width, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(len(path.name)).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, **options)


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


class TestOpenImages:
    @pytest.fixture
    def files(self, tmp_path):
        for name, size in (("a1", (40, 80)), ("b2", (50, 50)), ("c3", (30, 60))):
            write_image(tmp_path / "images" / f"{name}.jpg", *size)
        self.write(tmp_path / "classes.csv", [["/m/0cat", "Cat"], ["/m/0dog", "Dog, large"], ["/m/0owl", "Owl"]])
        header = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"]
        boxes = [
            ["a1", "x", "/m/0dog", "1", "0.25", "0.5", "0.1", "0.6", "0"],
            ["b2", "x", "/m/0owl", "1", "0", "1", "0", "0.5", "1"],
            ["a1", "x", "/m/0cat", "1", "0.5", "1", "0.5", "1", "0"],
        ]
        self.write(tmp_path / "boxes.csv", [header, *boxes])
        labels = [["a1", "v", "/m/0owl", "0"], ["a1", "v", "/m/0dog", "1"], ["c3", "v", "/m/0cat", "0"]]
        labels.append(["c3", "v", "/m/0sky", "0"])  # a class without boxes
        self.write(tmp_path / "labels.csv", [["ImageID", "Source", "LabelName", "Confidence"], *labels])
        return tmp_path

    @staticmethod
    def write(path, rows):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    @staticmethod
    def open(folder, labels="labels.csv", **options):
        names = ("boxes.csv", "images", "classes.csv")
        return OpenImagesSource(*(folder / name for name in names), labels and folder / labels, **options)

    def test_boxes_are_in_pixels_groups_are_crowds_and_absent_classes_negative(self, files):
        source = self.open(files)
        assert source.categories.names == ("Cat", "Dog, large", "Owl")
        assert [source.image_id(index) for index in range(3)] == ["a1", "b2", "c3"]
        assert [source.size(index) for index in range(3)] == [(40, 80), (50, 50), (30, 60)]
        found = [source.objects(index) for index in range(3)]
        np.testing.assert_allclose(found[0].boxes, [[20, 4, 20, 20], [40, 20, 40, 20]], rtol=1e-12)  # decimal shares
        assert found[0].areas.tolist() == pytest.approx([400, 800])
        assert found[0].labels.tolist() == [1, 0]
        assert found[1].crowd.tolist() == [True]
        assert [part.negative for part in found] == [[2], [], [0]]
        assert len(found[2]) == 0
        assert len(self.open(files, labels=None)) == 2

    def test_sizes_are_read_once_and_again_when_the_list_changes(self, files):
        first = self.open(files)
        kept = files / "boxes.csv.sizes.npz"
        assert kept.is_file()
        write_image(files / "images" / "a1.jpg", 10, 10)
        assert self.open(files).size(0) == first.size(0)
        assert self.open(files, labels=None).size(0) == (10, 10)
        kept.write_bytes(b"broken")
        assert self.open(files).size(0) == (10, 10)

    def test_a_turned_photograph_has_the_size_that_is_seen(self, files):
        turn = Image.Exif()
        turn[0x0112] = 8
        Image.new("RGB", (80, 40)).save(files / "images" / "a1.jpg", exif=turn)
        source = self.open(files)
        assert source.size(0) == (80, 40)
        assert source.read(0).size == (40, 80)

    def test_broken_images_and_files_are_named(self, files):
        (files / "images" / "b2.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"1 images of .*boxes.csv cannot be read, the first is .*b2.jpg"):
            self.open(files)
        with pytest.warns(UserWarning, match="images that cannot be read: 1"):
            source = self.open(files, training=True)
        assert [source.image_id(index) for index in range(len(source))] == ["a1", "c3"]
        assert [source.objects(index).negative for index in range(2)] == [[2], [0]]
        self.write(files / "classes.csv", [["LabelName", "DisplayName"], ["/m/0cat", "Cat"]])
        with pytest.raises(ValueError, match=r"boxes.csv:2: class /m/0dog is not in the class descriptions"):
            self.open(files, training=True)
        self.write(files / "boxes.csv", [["ImageID", "LabelName"]])
        with pytest.raises(ValueError, match=r"boxes.csv has no column IsGroupOf, XMin, YMin, XMax, YMax"):
            self.open(files)

    def test_the_datamodule_uses_image_labels_in_evaluation_only(self, files):
        paths = [files / name for name in ("boxes.csv", "images", "boxes.csv", "images", "classes.csv", "labels.csv")]
        datamodule = OpenImagesDetection(*paths, num_classes=3)
        assert len(datamodule.open_split("train")) == 2
        assert len(datamodule.open_split("val")) == 3
        assert datamodule.find_categories() == datamodule.open_split("val").categories


def test_crowdhuman_has_full_boxes_and_crowds_for_masks_and_ignored_persons(tmp_path):
    def person(box, tag="person", **extra):
        return {"tag": tag, "fbox": box, "vbox": [0, 0, 1, 1], "hbox": [0, 0, 2, 2], "extra": extra}

    persons = [
        person([1, 2, 10, 20], occ=1),
        person([-5, 3, 9, 9], tag="mask", ignore=1),
        person([3, 3, 4, 5], ignore=1),
    ]
    lines = [
        {"ID": "27,c9", "gtboxes": [*persons, {"tag": "person", "fbox": [1, 2]}]},
        {"ID": "28,d0", "gtboxes": []},
    ]
    for line, size in zip(lines, ((40, 30), (20, 50)), strict=True):
        write_image(tmp_path / f"{line['ID']}.jpg", *size)
    path = tmp_path / "annotation.odgt"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    with pytest.warns(UserWarning, match="annotations without a box .*: 1"):
        source = CrowdHumanDetection(path, path, tmp_path, tmp_path).open_split("val")
    found = source.objects(0)
    assert found.boxes.tolist() == [[1, 2, 10, 20], [-5, 3, 9, 9], [3, 3, 4, 5]]
    assert found.crowd.tolist() == [False, True, True]
    assert found.areas.tolist() == [200, 81, 20]
    assert (source.image_id(0), source.size(1), len(source.objects(1))) == ("27,c9", (20, 50), 0)
    path.write_text(json.dumps(lines[0]) + "\n" + '{"ID": "x"}')
    with pytest.raises(ValueError, match=r"annotation.odgt:2: KeyError 'gtboxes'"):
        CrowdHumanSource(path, tmp_path)


class TestVoc:
    @pytest.fixture
    def root(self, tmp_path):
        self.write(tmp_path, "VOC2007", "000005", (40, 60), [("cat", [1, 1, 60, 40], 0), ("dog", [11, 6, 20, 25.5], 1)])
        self.write(tmp_path, "VOC2012", "2008_000008", (30, 30), [("person", [5, 5, 6, 6], 0)])
        return tmp_path

    @staticmethod
    def write(root, year, name, size, objects):
        folder = root / year
        for place in ("Annotations", "ImageSets/Main"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        write_image(folder / "JPEGImages" / f"{name}.jpg", *size)
        corners = ("xmin", "ymin", "xmax", "ymax")
        entries = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
            + "".join(f"<{key}>{value}</{key}>" for key, value in zip(corners, box, strict=True))
            + "</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
            for label, box, difficult in objects
        )
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{entries}</annotation>"
        )
        (folder / "ImageSets" / "Main" / "trainval.txt").write_text(f"{name}\n")

    def test_pixel_numbers_become_edges_and_difficult_objects_crowds(self, root):
        datamodule = VocDetection(root, train_sets=["VOC2007/trainval", "VOC2012/trainval"])
        source = datamodule.open_split("train")
        assert [source.image_id(index) for index in range(2)] == ["000005", "2008_000008"]
        found = source.objects(0)
        # The cat fills its image of 40 x 60: from pixel 1 to the last.
        assert found.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 10, 20.5]]
        assert [source.categories.names[label] for label in found.labels] == ["cat", "dog"]
        assert found.crowd.tolist() == [False, True]
        assert source.objects(1).boxes.tolist() == [[4, 4, 2, 2]]
        assert source.size(0) == (40, 60)
        assert source.read(0).size == (60, 40)

    def test_what_is_wrong_is_named(self, root):
        with pytest.raises(ValueError, match=r"000005.xml has an object of the unknown class 'dog'"):
            VocSource(root, ["VOC2007/trainval"], ["cat"])
        with pytest.raises(FileNotFoundError, match=r"test.txt does not exist"):
            VocSource(root, ["VOC2007/test"])
        xml = root / "VOC2007" / "Annotations" / "000005.xml"
        xml.write_text(xml.read_text().replace("<xmin>11</xmin>", ""))
        with pytest.warns(UserWarning, match="annotations without a box .*: 1"):
            assert len(VocSource(root, ["VOC2007/trainval"]).objects(0)) == 1
        xml.write_text("<annotation></annotation>")
        with pytest.raises(ValueError, match=r"000005.xml: .* expected VOC's XML with the size"):
            VocSource(root, ["VOC2007/trainval"])
        xml.unlink()
        with pytest.raises(FileNotFoundError, match=r"000005.xml does not exist"):
            VocSource(root, ["VOC2007/trainval"])


class TestSynthetic:
    def test_images_depend_on_seed_and_index_only(self):
        source, again, other = Shapes(4, 5, 64), Shapes(9, 5, 64, first=2), Shapes(4, 5, 64, seed=1)
        assert np.array_equal(np.asarray(source.read(3)), np.asarray(again.read(1)))
        assert source.objects(3).boxes.tolist() == again.objects(1).boxes.tolist()
        assert not np.array_equal(np.asarray(source.read(3)), np.asarray(other.read(3)))

    def test_boxes_enclose_their_masks_and_masks_have_the_colour_of_their_class(self):
        source = Shapes(12, 4, 96)
        seen = set()
        for index in range(len(source)):
            pixels, found = np.asarray(source.read(index)).astype(int), source.objects(index)
            assert pixels.shape[:2] == source.size(index)
            bitmaps = [rle.decode(mask).astype(bool) for mask in found.masks]
            assert np.sum(bitmaps, axis=0).max(initial=0) <= 1  # visible parts do not overlap
            for box, label, area, bitmap in zip(found.boxes, found.labels, found.areas, bitmaps, strict=True):
                rows, columns = np.nonzero(bitmap)
                left, top = columns.min(), rows.min()
                assert box.tolist() == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
                assert area == bitmap.sum()
                # The noise is at most 12, the classes lie 223 apart.
                assert np.abs(pixels[bitmap] - colour(int(label), 4)).max() <= 12
                seen.add(int(label))
        assert seen == {0, 1, 2, 3}

    def test_some_images_are_empty_and_both_shapes_occur(self):
        source = Shapes(16, 3, 64)
        assert [index for index in range(16) if len(source.objects(index)) == 0] == [7, 15]
        assert {source.size(index) for index in range(16)} == {(48, 64), (64, 48)}
        sets = source.label_sets()
        assert [set(sets[index]) for index in range(16)] == [set(source.objects(index).labels) for index in range(16)]

    def test_splits_share_no_image(self):
        datamodule = SyntheticDetection(num_samples=5, num_val_samples=3)
        ids = [{s.image_id(index) for index in range(len(s))} for s in map(datamodule.open_split, ("train", "val"))]
        assert [len(part) for part in ids] == [5, 3]
        assert not ids[0] & ids[1]
