import json
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageFont
from torch.utils.data import DataLoader

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from tasks.detection.drawing import class_colour
from tasks.segmentation.drawing import draw_classes
from tasks.segmentation.writer import SegmentationWriter
from tasks.writing import output_name

NAMES = ["ground", "cat", "dog"]
PALETTE = [(0, 0, 0), (250, 10, 20), (30, 40, 240)]
SIZE = (120, 160)


class Scripted(LightningModule):
    """Finds what the batch says."""

    num_classes = 3

    def __init__(self, class_names=None, palette=None):
        super().__init__()
        self.class_names, self.palette = class_names, palette

    def predict_step(self, batch, batch_idx):
        return {key: batch[key] for key in ("path", "image_id", "original_size")} | {"maps": batch["found"]}


def halves(left=1, right=2, size=SIZE):
    labels = torch.full(size, left, dtype=torch.uint8)
    labels[:, size[1] // 4 :] = right
    return labels


def batch_of(path, image_id, found, colour=(0.25, 0.5, 0.75)):
    """One image of a single colour, at half its size, in zeros."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    image = torch.zeros(1, 3, 96, 96)
    height, width = (side // 2 for side in found.shape)
    image[:, :, :height, :width] = ((torch.tensor(colour) - mean) / std).view(3, 1, 1)
    return {
        "image": image,
        "valid": [(height, width)],
        "original_size": [tuple(found.shape)],
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
        ).predict(
            module or Scripted(NAMES, PALETTE), DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0])
        )


def read(path):
    return json.loads(path.read_text())


def text_width(text, letters=13):
    return round(ImageFont.load_default(letters).getlength(text))


def test_a_map_holds_class_numbers_and_shows_their_colours(tmp_path):
    random = torch.randint(0, 3, SIZE, dtype=torch.uint8)
    predict([batch_of("a.jpg", "a", random)], SegmentationWriter(tmp_path))
    written = Image.open(tmp_path / "maps" / "a.png")
    assert written.mode == "P"
    assert np.array_equal(np.asarray(written), random.numpy())
    assert np.array_equal(np.asarray(written.convert("RGB")), np.array(PALETTE)[random.numpy()])
    assert read(tmp_path / "classes.json") == [
        {"id": label, "name": name, "color": list(PALETTE[label])} for label, name in enumerate(NAMES)
    ]
    assert read(tmp_path / "images.json") == [
        {"id": "a", "file_name": "a.jpg", "height": 120, "width": 160, "map": "maps/a.png"}
    ]


def test_classes_past_the_first_hundreds_stay_what_they_are(tmp_path):
    module = Scripted()
    module.num_classes = 255
    every = torch.arange(255, dtype=torch.uint8).repeat(2, 1)
    predict([batch_of("a.jpg", "a", every)], SegmentationWriter(tmp_path), module)
    written = Image.open(tmp_path / "maps" / "a.png")
    assert np.array_equal(np.asarray(written), every.numpy())
    assert np.asarray(written.convert("RGB"))[0, 200].tolist() == list(class_colour(200))
    assert [entry["name"] for entry in read(tmp_path / "classes.json")] == [str(label) for label in range(255)]


def test_an_overlay_blends_the_file_with_the_colours_of_the_classes(tmp_path):
    Image.new("RGB", (160, 120), (200, 100, 50)).save(tmp_path / "a.png")
    predict([batch_of(tmp_path / "a.png", "a", halves())], SegmentationWriter(tmp_path / "out"))
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.jpg")).astype(int)
    assert overlay.shape[0] == 240  # twice the size, for the legend's sake
    for column, label in ((40, 1), (200, 2)):
        expected = 0.45 * np.array([200, 100, 50]) + 0.55 * np.array(PALETTE[label])
        assert np.abs(overlay[120, column] - expected).max() <= 3  # JPEG


def test_an_unreadable_file_is_replaced_by_what_the_segmentor_was_fed(tmp_path):
    predict([batch_of("absent.jpg", "absent", halves())], SegmentationWriter(tmp_path))
    overlay = np.asarray(Image.open(tmp_path / "overlays" / "absent.jpg")).astype(int)
    expected = 0.45 * 255 * np.array([0.25, 0.5, 0.75]) + 0.55 * np.array(PALETTE[1])
    assert np.abs(overlay[120, 40] - expected).max() <= 4  # JPEG, and the normalisation


def test_a_legend_lists_the_classes_in_the_image_the_largest_first():
    labels = halves(size=(320, 400)).numpy()
    sheet = np.asarray(draw_classes(Image.new("RGB", (400, 320)), labels, NAMES, PALETTE))
    legend = sheet[:, 400:]
    # Half a letter between image, swatch, share, name and edge.
    assert legend.shape == (320, 13 + 4 * 6 + text_width("75.0%") + text_width("dog"), 3)
    tops = [np.flatnonzero((legend[:, 12] == colour).all(1)) for colour in PALETTE]
    assert len(tops[0]) == 0
    assert tops[2].max() < tops[1].min()
    assert (legend[60:] == 255).all()


def test_more_classes_than_fit_are_counted():
    labels = np.arange(160, dtype=np.uint8).repeat(320 * 320 // 160).reshape(320, 320)
    names = [f"class {label}" for label in range(160)]
    few, many = (
        draw_classes(Image.new("RGB", (320, 320)), labels % count, names, [class_colour(label) for label in range(160)])
        for count in (16, 160)
    )
    assert few.height == many.height == 320
    # Three columns instead of one, and the text "112 more" instead of a name.
    assert 2.5 * (few.width - 320) < many.width - 320 < 3.5 * (few.width - 320)


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (7, 5)])
def test_any_image_gets_an_overlay(size):
    sheet = draw_classes(Image.new("RGB", size[::-1]), np.zeros(size, np.uint8), NAMES, PALETTE)
    assert max(sheet.size) >= 320


def test_a_class_of_a_few_pixels_is_not_said_to_be_absent():
    labels = np.zeros((400, 400), np.uint8)
    labels[0, 0] = 1
    wide = draw_classes(Image.new("RGB", (400, 400)), labels, ["a", "a", "a"], PALETTE)
    assert wide.width == 400 + 13 + 4 * 6 + max(text_width("<0.1%"), text_width("100.0%")) + text_width("a")


def test_without_names_and_colours_classes_are_numbered(tmp_path):
    predict([batch_of("a.jpg", "a", halves())], SegmentationWriter(tmp_path), Scripted())
    assert read(tmp_path / "classes.json") == [
        {"id": label, "name": str(label), "color": list(class_colour(label))} for label in range(3)
    ]


@pytest.mark.parametrize(
    ("path", "image_id", "expected"),
    [
        ("data/val/cat.jpg", "val/cat", "val/cat"),
        ("data/test/cat.jpg", "test/cat", "test/cat"),
        ("one/cat.jpg", 0, "0_cat"),
        ("two/cat.jpg", 1, "1_cat"),
        ("val/000000000139.jpg", 139, "000000000139"),
        ("/shards/a.tar/7", "a/7", "a/7"),
        ("../up.jpg", "../up", "up"),
        ("a?.jpg", "a?", "a_"),
    ],
)
def test_files_are_named_after_their_ids(path, image_id, expected):
    assert output_name(path, image_id) == expected


def test_two_ranks_write_one_list_in_the_order_of_the_data(tmp_path):
    class Ranked(Scripted):
        def predict_step(self, batch, batch_idx):
            torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
            (tmp_path / f"{batch['image_id'][0]}.rank").write_text(str(self.global_rank))
            return super().predict_step(batch, batch_idx)

    ids = [f"folder/{number}" for number in range(5)]
    (tmp_path / "folder").mkdir()
    batches = [batch_of(f"{id}.jpg", id, halves()) for id in ids]
    predict(batches, SegmentationWriter(tmp_path), Ranked(NAMES, PALETTE), devices=2, strategy="ddp_fork")
    assert [(tmp_path / f"{id}.rank").read_text() for id in ids] == ["0", "1", "0", "1", "0"]
    assert [entry["id"] for entry in read(tmp_path / "images.json")] == ids
    assert sorted(path.stem for path in (tmp_path / "maps" / "folder").iterdir()) == list("01234")
    assert len(read(tmp_path / "classes.json")) == 3
