import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.segmentation.folders import SegmentationFolders
from datamodules.segmentation.layouts import FolderLayout, Part, known_layout
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform

TRANSFORMS = {
    "train_transform": SegmentationTrainTransform(short_side=40, long_side=60, crop=(32, 32)),
    "eval_transform": SegmentationEvalTransform(short_side=40, long_side=60),
}


def write_pair(root, image, mask, values=None, size=(40, 60)):
    random = np.random.default_rng(len(image))
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    (root / mask).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / image)
    values = random.integers(0, 3, size, dtype=np.uint8) if values is None else np.asarray(values, np.uint8)
    Image.fromarray(values).save(root / mask)
    return values


@pytest.fixture
def own(tmp_path):
    """images/ and masks/ with train (a, b, sub/c) and val (d)."""
    for split, names in (("train", ("a", "b", "sub/c")), ("val", ("d",))):
        for name in names:
            write_pair(tmp_path, f"images/{split}/{name}.jpg", f"masks/{split}/{name}.png")
    return tmp_path


def opened(root, split="train", stage="fit", **options):
    datamodule = SegmentationFolders(root, **{"num_classes": 3, **TRANSFORMS, "num_workers": 0, **options})
    datamodule.setup(stage)
    return datamodule._sets[split]


class TestOwnFolders:
    def test_images_and_masks_are_found_by_name(self, own):
        source = opened(own).source
        assert [source.image_id(index) for index in range(3)] == [
            "images/train/a",
            "images/train/b",
            "images/train/sub/c",
        ]
        for index, name in enumerate(("a", "b", "sub/c")):
            expected = cv2.imread(str(own / f"masks/train/{name}.png"), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(source.mask(index), expected)
            pixels = np.asarray(source.read(index))[..., ::-1].astype(int)
            # Two decoders of JPEG differ by a few grey levels.
            assert np.abs(pixels - cv2.imread(str(own / f"images/train/{name}.jpg"))).max() <= 4
            assert source.name(index) == str(own / f"images/train/{name}.jpg")

    def test_zero_can_be_reduced(self, own):
        plain, reduced = opened(own).source, opened(own, dataset=FolderLayout(reduce_zero_label=True)).source
        values = plain.mask(0).astype(int)
        assert np.array_equal(reduced.mask(0), np.where(values == 0, 255, values - 1))

    def test_a_mask_without_image_and_an_image_without_mask_are_errors(self, own):
        (own / "images/train/b.jpg").rename(own / "images/train/e.jpg")
        with pytest.raises(ValueError, match=rf"1 masks have no image .* first is {own}/masks/train/b.png. Restore"):
            opened(own)
        (own / "masks/train/b.png").unlink()
        with pytest.raises(
            ValueError, match=rf"1 of 3 images .* have no mask.* {own}/images/train/e.jpg: .*/e.png does"
        ):
            opened(own)

    def test_a_file_made_from_a_mask_may_lie_beside_it(self, own):
        (own / "masks/train/a_colours.png").write_bytes((own / "masks/train/a.png").read_bytes())
        assert len(opened(own)) == 3

    def test_another_size_is_an_error(self, own):
        write_pair(own, "images/train/b.jpg", "x/b.png", size=(40, 50))
        dataset = opened(own)
        message = r"b.jpg has 40 x 50 pixels and its mask 40 x 60 \(height x width\). Give both the same size"
        with pytest.raises(ValueError, match=message):
            dataset[1]
        write_pair(own, "images/val/d.jpg", "x/d.png", size=(60, 40))
        with pytest.raises(ValueError, match=r"d.jpg has 60 x 40 pixels and its mask 40 x 60"):
            opened(own, "val")[0]

    def test_a_number_past_the_classes_is_an_error_with_file_and_value(self, own):
        write_pair(own, "images/train/b.jpg", "masks/train/b.png", np.full((40, 60), 7))
        with pytest.raises(ValueError, match=rf"{own}/masks/train/b.png has the value 7 at 2400 pixels, .* 0 to 2"):
            opened(own)[1]

    def test_a_mask_of_colours_is_an_error(self, own):
        Image.new("RGB", (60, 40)).save(own / "masks/val/d.png")
        with pytest.raises(ValueError, match=rf"{own}/masks/val/d.png is an image of mode RGB, expected one channel"):
            opened(own, "val")[0]

    def test_a_broken_mask_is_an_error_also_in_training(self, own):
        path = own / "masks/train/a.png"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=rf"mask {path} cannot be read"):
            opened(own)[0]

    def test_unreadable_images_are_replaced_with_their_mask_in_training_only(self, own):
        for name in ("train/a", "val/d"):
            (own / f"images/{name}.jpg").write_bytes(b"no image")
        dataset = opened(own, max_corrupt_share=0.5)
        with pytest.warns(UserWarning, match=r"a.jpg is unreadable"):
            replaced = dataset[(0, 0)]
        assert dataset.images.names() == [str(own / "images/train/a.jpg")]
        assert torch.equal(dataset[(0, 0)]["image"], replaced["image"])
        with pytest.raises(ValueError, match=r"evaluation: cannot use .*d.jpg"):
            opened(own, "val")[0]

    def test_missing_folders_say_where(self, own, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere/images/train does not exist. Check root"):
            opened(own / "nowhere")
        (own / "images/empty").mkdir()
        layout = FolderLayout(parts={"train": Part(images="images/empty", masks="masks/train"), "val": Part(**VAL)})
        with pytest.raises(FileNotFoundError, match=r"images/empty has no image\."):
            opened(own, dataset=layout)
        with pytest.raises(FileNotFoundError, match=re.escape("images/val has no *.tif.")):
            opened(own, "val", "validate", dataset=FolderLayout(image_suffix=".tif"))

    def test_two_images_of_one_name_are_an_error(self, own):
        Image.new("RGB", (60, 40)).save(own / "images/train/a.png")
        with pytest.raises(ValueError, match=r"a.jpg and .*a.png have one name. Set image_suffix"):
            opened(own)
        assert len(opened(own, dataset=FolderLayout(image_suffix=".jpg"))) == 3

    def test_a_listing_chooses_images(self, own):
        (own / "train.txt").write_text("b\n\nsub/c\n")
        parts = {"train": Part(images="images/train", masks="masks/train", listing="train.txt"), "val": Part(**VAL)}
        source = opened(own, dataset=FolderLayout(parts=parts)).source
        assert [source.image_id(index) for index in range(2)] == ["images/train/b", "images/train/sub/c"]
        (own / "train.txt").write_text("b.jpg\n")
        with pytest.raises(
            ValueError, match=r"1 of 1 images in .*train.txt do not exist .* first is b.jpg. .* without"
        ):
            opened(own, dataset=FolderLayout(parts=parts))
        (own / "train.txt").write_text("\n")
        with pytest.raises(ValueError, match=r"train.txt is empty"):
            opened(own, dataset=FolderLayout(parts=parts))

    @pytest.mark.parametrize("turned_mask", [False, True])
    def test_the_image_is_turned_as_exif_says_if_the_mask_is(self, own, turned_mask):
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[:, 30:] = 200
        Image.fromarray(pixels).save(own / "images/val/d.jpg", exif=exif, quality=95)
        shape = (60, 40) if turned_mask else (40, 60)
        Image.fromarray(np.zeros(shape, np.uint8)).save(own / "masks/val/d.png")
        sample = opened(own, "val")[0]
        assert sample["original_size"] == sample["truth"].shape == shape
        bright = np.asarray(opened(own, "val").source.read(0))[..., 0] > 100
        # Orientation 6: a quarter turn clockwise, so that what was at the right is below.
        assert bright[45:].all() if turned_mask else bright[:, 35:].all()
        assert not (bright[:15].any() if turned_mask else bright[:, :25].any())


VAL = {"images": "images/val", "masks": "masks/val"}


class TestPublicFolders:
    def test_cityscapes_with_extra_images_and_both_kinds_of_masks(self, tmp_path):
        ids = np.zeros((40, 60), np.uint8)
        ids[:20], ids[20:30], ids[30:] = 7, 26, 5
        labels = np.where(ids == 7, 0, np.where(ids == 26, 13, 255))
        for part, place, name in (
            ("train", "gtFine/train", "aachen/aachen_1"),
            ("train_extra", "refinement_final/train_extra", "bonn/bonn_2"),
            ("val", "gtFine/val", "ulm/ulm_3"),
        ):
            image = f"leftImg8bit/{part}/{name}_leftImg8bit.png"
            write_pair(tmp_path, image, f"{place}/{name}_gtFine_labelTrainIds.png", labels)
            write_pair(tmp_path, image, f"{place}/{name}_gtFine_labelIds.png", ids)
            write_pair(tmp_path, image, f"{place}/{name}_gtFine_instanceIds.png", ids)
        for dataset in ("cityscapes", "cityscapes_ids"):
            both = opened(tmp_path, dataset=dataset, num_classes=None, train_parts=("train", "train_extra")).source
            assert [both.image_id(index).split("/")[1] for index in range(2)] == ["train", "train_extra"]
            assert np.array_equal(both.mask(1), labels)
            assert np.array_equal(opened(tmp_path, "val", dataset=dataset, num_classes=None)[0]["truth"], labels)

    def test_mapillary_trains_and_cityscapes_validates(self, tmp_path):
        values = np.full((40, 60), 65)
        values[0, :4] = [13, 24, 21, 55]
        for part in ("training", "validation"):
            write_pair(tmp_path / "m", f"{part}/images/x.jpg", f"{part}/labels/x.png", values)
        write_pair(tmp_path / "c", "leftImg8bit/val/ulm/u_leftImg8bit.png", "gtFine/val/ulm/u_gtFine_labelTrainIds.png")
        datamodule = SegmentationFolders(
            tmp_path / "m",
            "mapillary_19",
            train_parts=("train", "val"),
            val_root=tmp_path / "c",
            val_dataset="cityscapes",
            **TRANSFORMS,
        )
        datamodule.setup("fit")
        source = datamodule._sets["train"].source
        assert len(source) == 2
        assert source.mask(0)[0, :5].tolist() == [0, 0, 12, 13, 255]
        assert datamodule._sets["val"].source.image_id(0) == "leftImg8bit/val/ulm/u_leftImg8bit"
        assert datamodule.class_names == list(known_layout("cityscapes").class_names)
        assert datamodule.palette[0] == (128, 64, 128)

    def test_other_classes_in_validation_are_an_error(self, own):
        other = FolderLayout(class_names=("x", "y", "w"))
        with pytest.raises(ValueError, match=r"the splits disagree about label 2: z and w"):
            opened(own, dataset=FolderLayout(class_names=("x", "y", "z")), val_dataset=other)

    def test_lists_without_the_background(self, tmp_path):
        values = np.zeros((40, 60), np.uint8)
        values[0, :3] = [1, 59, 0]
        for name in ("2008_1", "2008_2", "2008_3"):
            write_pair(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClassContext/{name}.png", values)
        lists = tmp_path / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("2008_3\n2008_1\n")
        (lists / "val.txt").write_text("2008_2\n")
        for name, expected in (("pascal_context_59", [0, 58, 255]), ("pascal_context_60", [1, 59, 0])):
            train = opened(tmp_path, dataset=name, num_classes=None).source
            assert [train.image_id(index) for index in range(2)] == ["JPEGImages/2008_1", "JPEGImages/2008_3"]
            assert train.mask(0)[0, :3].tolist() == expected

    def test_unused_outputs_have_names_and_do_not_allow_their_numbers_in_masks(self, tmp_path):
        folder = "leftImg8bit/val/ulm/u_leftImg8bit.png", "gtFine/val/ulm/u_gtFine_labelTrainIds.png"
        write_pair(tmp_path, *folder, np.full((40, 60), 19))
        datamodule = SegmentationFolders(tmp_path, "cityscapes", num_classes=150, **TRANSFORMS)
        datamodule.setup("validate")
        assert (len(datamodule.class_names), datamodule.class_names[149]) == (150, "unused_149")
        with pytest.raises(ValueError, match=r"has the value 19 at 2400 pixels, expected 0 to 18"):
            datamodule._sets["val"][0]
