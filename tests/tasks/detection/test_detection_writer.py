import json
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageFont
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from tasks.detection.drawing import class_colour, draw_detections
from tasks.detection.writer import DetectionWriter, coco_results

NAMES, IDS = ["cat", "dog"], [17, 18]


def grey(height=120, width=160):
    return Image.new("RGB", (width, height), (128, 128, 128))


def make(boxes, scores=None, labels=None, masks=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    found = {
        "boxes": boxes,
        "scores": torch.tensor(scores or [0.9] * len(boxes)),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.long),
    }
    return found if masks is None else found | {"masks": masks}


def ellipse(height, width, box):
    y, x = np.mgrid[:height, :width] + 0.5
    (left, top, right, bottom) = box
    inside = ((x - (left + right) / 2) / (right - left)) ** 2 + ((y - (top + bottom) / 2) / (bottom - top)) ** 2 < 0.25
    return torch.from_numpy(inside)


def changed(before, after):
    return (np.asarray(before) != np.asarray(after)).any(-1)


class Scripted(LightningModule):
    """Finds what the batch says."""

    def __init__(self, class_names=None, category_ids=None):
        super().__init__()
        self.class_names, self.category_ids = class_names, category_ids

    def predict_step(self, batch, batch_idx):
        return {key: batch[key] for key in ("path", "image_id", "original_size")} | {"detections": batch["found"]}


def batch_of(path, image_id, found, size=(120, 160), colour=(0.25, 0.5, 0.75)):
    """One image of a single colour, at half its size, in zeros."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    image = torch.zeros(1, 3, 96, 96)
    height, width = size[0] // 2, size[1] // 2
    image[:, :, :height, :width] = ((torch.tensor(colour) - mean) / std).view(3, 1, 1)
    return {
        "image": image,
        "valid": [(height, width)],
        "original_size": [size],
        "image_id": [image_id],
        "path": [str(path)],
        "found": [found],
    }


def predict(batches, writer, module=None, **trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[writer],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        ).predict(module or Scripted(NAMES, IDS), DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]))


def read(path):
    return json.loads(path.read_text())


def test_a_box_changes_the_pixels_along_its_border_and_behind_its_label_only():
    left, top, right, bottom = 30, 50, 90, 100
    difference = changed(grey(), draw_detections(grey(), make([[left, top, right, bottom]]), NAMES))
    border = np.zeros_like(difference)
    border[top : bottom + 1, left : right + 1] = True
    border[top + 1 : bottom, left + 1 : right] = False  # lines of 1 px at this size
    assert difference[border].all()
    above = np.zeros_like(difference)
    above[top - 20 : top + 1, left : left + 70] = True
    assert not difference[~border & ~above].any()
    assert 200 < difference[above].sum() < above.sum()  # the label is there, and narrower


def test_a_mask_tints_its_pixels_and_no_others():
    box = (20, 30, 120, 110)
    mask = ellipse(120, 160, box)
    plain = draw_detections(grey(), make([box]), NAMES)
    difference = changed(plain, draw_detections(grey(), make([box], masks=mask[None]), NAMES))
    assert difference.any()
    assert not difference[~mask.numpy()].any()
    # All but what lies under the border.
    assert mask.numpy()[32:108, 22:118].sum() <= difference.sum() <= mask.sum()


def test_a_pixel_of_two_masks_has_the_colour_of_the_better_one():
    both = torch.ones(2, 120, 160, dtype=torch.bool)
    boxes, labels = [[0, 0, 159, 119]] * 2, [0, 1]
    drawn = np.asarray(draw_detections(grey(), make(boxes, [0.9, 0.8], labels, both), NAMES))
    alone = np.asarray(draw_detections(grey(), make(boxes[:1], [0.9], [0], both[:1]), NAMES))
    assert (drawn[60, 80] == alone[60, 80]).all()
    assert class_colour(0) != class_colour(1)


@pytest.mark.parametrize("box", [[0, 0, 20, 10], [150, 100, 160, 120], [0, 0, 30, 120], [40, 40, 40, 40]])
def test_labels_at_the_edges_are_drawn_whole(box):
    drawn = np.asarray(draw_detections(grey(), make([box]), NAMES))
    rows, columns = np.where((drawn == np.array(class_colour(0))).all(-1))
    # The background is wider than these boxes: the text in the smallest font, and 2 px at each end.
    assert columns.max() - columns.min() == round(ImageFont.load_default(11).getlength("cat 0.90")) + 4
    assert rows.max() - rows.min() >= 11 + 4


def test_a_box_that_reaches_out_of_the_image_is_drawn_at_its_edges():
    difference = changed(grey(), draw_detections(grey(), make([[-5, -5, 400, 400]]), NAMES))
    assert difference[[0, -1]].all()
    assert difference[:, [0, -1]].all()
    assert not difference[20:-1, 1:-1].any()


def test_an_image_smaller_than_a_label_is_drawn():
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    drawn = draw_detections(grey(8, 8), make([[1, 1, 6, 6]], masks=mask), NAMES)
    assert drawn.size == (8, 8)
    assert changed(grey(8, 8), drawn).all()


def test_lines_grow_with_the_image():
    def thickness(factor):
        box = [30 * factor, 40 * factor, 130 * factor, 100 * factor]
        difference = changed(
            grey(120 * factor, 160 * factor), draw_detections(grey(120 * factor, 160 * factor), make([box]))
        )
        return difference[80 * factor, : 80 * factor].sum()

    assert thickness(1) == 1
    assert thickness(16) == 7  # 2217 px / 320


def test_results_load_into_coco_and_masks_decode_to_the_same_pixels(tmp_path):
    boxes = [(20, 30, 120, 110), (5.123, 6.789, 60, 40)]
    masks = torch.stack([ellipse(120, 160, box) for box in boxes])
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (160, 120), colour).save(tmp_path / f"{name}.png")
    found = make(boxes, [0.9, 0.05], [1, 0], masks)
    batches = [batch_of(tmp_path / "a.png", 7, found), batch_of(tmp_path / "b.png", 3, make([], masks=masks[:0]))]
    predict(batches, DetectionWriter(tmp_path / "out"))
    images, categories = (read(tmp_path / "out" / f"{name}.json") for name in ("images", "categories"))
    assert images == [
        {"id": 7, "file_name": str(tmp_path / "a.png"), "height": 120, "width": 160},
        {"id": 3, "file_name": str(tmp_path / "b.png"), "height": 120, "width": 160},
    ]
    assert categories == [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    truth = COCO()
    truth.dataset = {"images": images, "categories": categories, "annotations": []}
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    entries = loaded.loadAnns(loaded.getAnnIds(imgIds=[7]))
    assert [entry["category_id"] for entry in entries] == [18, 17]
    assert [entry["score"] for entry in entries] == [0.9, 0.05]  # also those that are not drawn
    for entry, mask in zip(entries, masks, strict=True):
        assert np.array_equal(loaded.annToMask(entry).astype(bool), mask.numpy())
    raw = read(tmp_path / "out" / "predictions.json")
    assert [entry["bbox"] for entry in raw] == [[20, 30, 100, 80], [5.12, 6.79, 54.88, 33.21]]
    # The image without detections is written as it is.
    picture = np.asarray(Image.open(tmp_path / "out" / "images" / "3_b.jpg")).astype(int)
    assert np.abs(picture - [0, 0, 255]).max() <= 2  # JPEG


def test_only_good_detections_are_drawn(tmp_path):
    found = make([[10, 60, 60, 110], [90, 60, 150, 110]], [0.6, 0.5])
    predict([batch_of("absent.jpg", 1, found)], DetectionWriter(tmp_path, min_score=0.55))
    picture = np.asarray(Image.open(tmp_path / "images" / "1_absent.jpg")).astype(int)
    fed = np.array([0.25, 0.5, 0.75]) * 255
    assert np.abs(picture[60:111, 10] - fed).max(1).min() > 15
    assert np.abs(picture[:, 80:] - fed).max() <= 3  # JPEG, and the normalisation
    assert len(read(tmp_path / "predictions.json")) == 2


def test_an_unreadable_file_is_replaced_by_what_the_detector_was_fed(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (10, 10), "red").save(tmp_path / "other.png")  # not the image that was predicted
    Image.new("RGB", (160, 120), "red").save(tmp_path / "fine.png")
    names = ("broken.jpg", "other.png", "absent.png", "fine.png")
    batches = [batch_of(tmp_path / name, place, make([])) for place, name in enumerate(names)]
    predict(batches, DetectionWriter(tmp_path / "out"))
    for name in ("0_broken", "1_other", "2_absent", "3_fine"):
        picture = Image.open(tmp_path / "out" / "images" / f"{name}.jpg")
        assert picture.size == (160, 120)
        colour = (255, 0, 0) if name == "3_fine" else np.array([0.25, 0.5, 0.75]) * 255
        assert np.abs(np.asarray(picture) - np.array(colour)).max() <= 3  # JPEG, and the normalisation


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying = Image.new("RGB", (120, 160), "red")
    lying.paste("blue", (0, 0, 60, 160))
    lying.save(tmp_path / "photo.png", exif=exif)
    predict([batch_of(tmp_path / "photo.png", 0, make([]))], DetectionWriter(tmp_path))
    picture = Image.open(tmp_path / "images" / "0_photo.jpg")
    assert picture.size == (160, 120)
    assert (
        np.abs(np.array([picture.getpixel((80, 10)), picture.getpixel((80, 110))]) - [[0, 0, 255], [255, 0, 0]]).max()
        <= 2
    )


def test_without_names_and_ids_labels_are_written(tmp_path):
    predict([batch_of("x.jpg", "x", make([[0, 0, 9, 9]], labels=[1]))], DetectionWriter(tmp_path), Scripted())
    assert read(tmp_path / "predictions.json") == [
        {"image_id": "x", "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9}
    ]
    assert not (tmp_path / "categories.json").exists()
    assert (tmp_path / "images" / "x.jpg").exists()  # the file's name is the id already


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path):
    paths = ["one/cat.jpg", "two/cat.jpg", "val/000000000139.jpg"]
    batches = [batch_of(path, id, make([])) for path, id in zip(paths, (0, 1, 139), strict=True)]
    predict(batches, DetectionWriter(tmp_path))
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["000000000139.jpg", "0_cat.jpg", "1_cat.jpg"]


def test_results_do_not_hold_the_masks():
    masks = torch.zeros(1, 1000, 1000, dtype=torch.bool)
    masks[0, 100:200, 300:400] = True
    (result,) = coco_results(make([[300, 100, 400, 200]], masks=masks), 1, None)
    assert len(json.dumps(result)) < 1000


def test_a_score_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"min_score is 30, expected 0 to 1"):
        DetectionWriter(tmp_path, min_score=30)


def test_two_ranks_write_one_list_in_the_order_of_the_data(tmp_path):
    class Ranked(Scripted):
        def predict_step(self, batch, batch_idx):
            torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
            (tmp_path / f"{batch['image_id'][0]}.rank").write_text(str(self.global_rank))
            return super().predict_step(batch, batch_idx)

    batches = [batch_of(f"{id}.jpg", id, make([[0, 0, id, 9]] * (id % 3))) for id in range(1, 6)]
    predict(batches, DetectionWriter(tmp_path), Ranked(), devices=2, strategy="ddp_fork")
    assert [(tmp_path / f"{id}.rank").read_text() for id in range(1, 6)] == ["0", "1", "0", "1", "0"]
    assert [entry["id"] for entry in read(tmp_path / "images.json")] == [1, 2, 3, 4, 5]
    assert [entry["image_id"] for entry in read(tmp_path / "predictions.json")] == [1, 2, 2, 4, 5, 5]
    assert len(list((tmp_path / "images").iterdir())) == 5
