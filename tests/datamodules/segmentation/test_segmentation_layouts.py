import pytest
from jsonargparse import ArgumentParser

from datamodules.segmentation.folders import SegmentationFolders
from datamodules.segmentation.layouts import LAYOUTS, FolderLayout, known_layout, read_table
from datamodules.segmentation.masks import label_table
from datamodules.segmentation.records import IGNORE, Classes, generated_palette

# Classes, and three of them with their labels, as the data sets' own lists have them.
FACTS = {
    "ade20k": (150, {0: "wall", 12: "person", 127: "bicycle", 149: "flag"}),
    "cityscapes": (19, {0: "road", 11: "person", 18: "bicycle"}),
    "cityscapes_ids": (19, {0: "road", 11: "person", 18: "bicycle"}),
    "mapillary": (66, {13: "Road", 55: "Car", 65: "Unlabeled"}),
    "mapillary_19": (19, {0: "road", 13: "car", 16: "train"}),
    "coco_stuff164k": (171, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "coco_stuff164k_ids": (171, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "coco_stuff10k": (171, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
    "nyu_depth_v2": (40, {0: "wall", 31: "night stand", 39: "otherprop"}),
    "pascal_context_59": (59, {0: "aeroplane", 14: "person", 58: "wood"}),
    "pascal_context_60": (60, {0: "background", 15: "person", 59: "wood"}),
}
REDUCED = {"ade20k", "coco_stuff10k", "nyu_depth_v2", "pascal_context_59"}


def test_every_public_data_set_is_checked_here():
    assert set(LAYOUTS) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_the_classes_are_those_of_the_data_set(name):
    layout, (count, known) = known_layout(name), FACTS[name]
    assert len(layout.class_names) == len(set(layout.class_names)) == count
    assert {label: layout.class_names[label] for label in known} == known
    assert all(text == text.strip() != "" for text in layout.class_names)
    assert layout.reduce_zero_label == (name in REDUCED)
    classes = layout.classes(count)
    assert len(classes.palette) == count
    assert all(0 <= value <= 255 for colour in classes.palette for value in colour)
    assert set(layout.parts) >= {"train", "val"}


def test_colours_differ_where_the_data_sets_do():
    unlike = {name: len(set(known_layout(name).classes(count).palette)) for name, (count, _) in FACTS.items()}
    # ADE20K itself gives road and skyscraper one colour.
    assert unlike == {**{name: count for name, (count, _) in FACTS.items()}, "ade20k": 149}
    ade = known_layout("ade20k").palette
    assert (ade[0], ade[12], ade[149]) == ((120, 120, 120), (150, 5, 61), (92, 0, 255))
    assert known_layout("cityscapes").palette[13] == (0, 0, 142)


def test_generated_colours_are_the_voc_colour_map_without_black():
    # https://host.robots.ox.ac.uk/pascal/VOC: aeroplane, bicycle, bird, boat, ... person (15), void (255) aside.
    first = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]
    palette = generated_palette(255)
    assert list(palette[:7]) == first
    assert palette[14] == (192, 128, 128)
    assert palette[254] == (224, 224, 192)
    assert len(set(palette)) == 255


def test_cityscapes_ids_become_training_ids():
    # cityscapesscripts/helpers/labels.py: id and trainId, those of 255 left out.
    expected = dict(zip([7, 8, 11, 12, 13, *range(17, 18), *range(19, 29), 31, 32, 33], range(19), strict=True))
    table = label_table(19, class_ids=known_layout("cityscapes_ids").class_ids)
    assert {value: int(label) for value, label in enumerate(table) if label != IGNORE} == expected


def test_mapillary_is_folded_by_meaning():
    vistas, layout = [row["name"] for row in read_table("mapillary_vistas")], known_layout("mapillary_19")
    folded = {
        name: {vistas[value] for value in ids} for name, ids in zip(layout.class_names, layout.class_ids, strict=True)
    }
    assert folded["road"] == {"Road", "Lane Marking - General", "Manhole"}
    assert folded["rider"] == {"Bicyclist", "Motorcyclist", "Other Rider"}
    assert folded["train"] == {"On Rails"}
    values = [value for ids in layout.class_ids for value in ids]
    assert len(values) == len(set(values)) == 25
    assert layout.class_names == known_layout("cityscapes").class_names


def test_coco_ids_leave_out_the_eleven_classes_without_images():
    ids = [ids[0] for ids in known_layout("coco_stuff164k_ids").class_ids]
    assert ids == sorted(ids)
    assert (ids[0], ids[79], ids[80], ids[170]) == (0, 89, 91, 181)
    assert set(range(182)) - set(ids) == {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def test_an_unknown_data_set_is_an_error_that_helps():
    with pytest.raises(ValueError, match=r"no data set is called cityscape. Did you mean cityscapes"):
        known_layout("cityscape")
    with pytest.raises(ValueError, match=r"Known are ade20k, cityscapes"):
        SegmentationFolders("data", dataset="zzz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ("a", "b", "a")}, r"class_names has a more than once"),
        ({"class_names": ("a", "b"), "palette": ((1, 2, 3),)}, r"2 class_names and 1 palette"),
        ({"class_names": ("a", "b"), "class_ids": ((1,),)}, r"2 class_names and 1 class_ids"),
        ({"class_names": ("a",), "class_ids": ((1,),), "reduce_zero_label": True}, r"exclude each other"),
        ({"class_names": ("a",), "class_ids": ((256,),)}, r"expected 0 to 255"),
        ({"ignore_value": -1}, r"expected 0 to 255"),
    ],
)
def test_wrong_layouts_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FolderLayout(**options)


class TestNumClasses:
    def test_it_is_that_of_the_data_set_unless_given(self):
        assert SegmentationFolders("data", dataset="ade20k").num_classes == 150
        assert SegmentationFolders("data", dataset=FolderLayout(class_names=("a", "b"))).num_classes == 2
        assert SegmentationFolders("data", num_classes=3).num_classes == 3

    def test_more_are_unused(self):
        datamodule = SegmentationFolders("data", dataset="cityscapes", num_classes=150)
        classes = datamodule.find_classes()
        assert (datamodule.num_classes, len(classes), len(classes.palette)) == (150, 150, 150)
        assert classes.names[18:20] == ("bicycle", "unused_19")

    def test_less_or_none_are_errors(self):
        with pytest.raises(ValueError, match=r"num_classes=18, but the data set has 19 classes"):
            SegmentationFolders("data", dataset="cityscapes", num_classes=18)
        with pytest.raises(ValueError, match=r"num_classes is missing"):
            SegmentationFolders("data")

    def test_parts_are_checked(self):
        with pytest.raises(ValueError, match=r"the train data has no part extra, only train, train_extra, val"):
            SegmentationFolders("data", dataset="cityscapes", train_parts=("train", "extra"))

    def test_names_follow_the_number_where_there_are_none(self):
        assert FolderLayout().classes(2) == Classes(("class_0", "class_1"), ((128, 0, 0), (0, 128, 0)))


def test_yaml_names_a_public_data_set_or_describes_your_own():
    parser = ArgumentParser()
    parser.add_class_arguments(SegmentationFolders, "data", fail_untyped=False)
    public = parser.instantiate(
        parser.parse_args(["--data.root=x", "--data.dataset=mapillary_19", "--data.train_parts=[train,val]"])
    ).data
    assert public.num_classes == 19
    assert public.parts == {"train": ("train", "val"), "val": ("val",)}
    own = parser.instantiate(
        parser.parse_object(
            {
                "data": {
                    "root": "x",
                    "dataset": {
                        "class_names": ["sky", "sea"],
                        "image_suffix": ".tif",
                        "parts": {"train": {"images": "a", "masks": "b"}, "val": {"images": "c", "masks": "d"}},
                    },
                    "train_transform": {"crop": [64, 96], "ratio": [1.0, 1.5]},
                }
            }
        )
    ).data
    assert own.num_classes == 2
    assert own.layouts["val"].parts["val"].masks == "d"
    assert own.train_transform.crop == (64, 96)


@pytest.mark.parametrize("ids", [((0,), (255,)), ((0,), (7,))])
def test_a_class_of_an_ignored_value_is_refused(ids):
    with pytest.raises(ValueError, match=r"class_ids has (255|7), which is ignored"):
        FolderLayout(class_names=("ground", "leaf"), class_ids=ids, ignore_value=7)
