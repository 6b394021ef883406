"""Open Images, CrowdHuman, Pascal VOC and drawn shapes."""

import csv
import json

import numpy as np
import pytest
from annotated_images import write_image
from PIL import Image

from datamodules.detection import rle
from datamodules.detection.crowdhuman import CrowdHumanDetection, CrowdHumanSource
from datamodules.detection.openimages import OpenImagesDetection, OpenImagesSource
from datamodules.detection.synthetic import Shapes, SyntheticDetection
from datamodules.detection.voc import VocDetection, VocSource
from datamodules.synthetic import colour


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
