"""The code, commands and YAML of the pages run."""

import csv
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import CocoDetection, FolderLayout, SegmentationFolders
from datamodules.batch import DetectionTarget
from datamodules.detection.coco import CocoSource
from datamodules.detection.synthetic import Shapes
from datamodules.segmentation.layouts import LAYOUTS
from datamodules.segmentation.synthetic import Scenes
from internimage import internimage_debug
from tasks.cli import main
from tasks.detection import MaskRCNN
from tasks.detection.checkpoints import CheckpointError, export_detector, load_detector
from tasks.segmentation import UPerNet
from tasks.segmentation.checkpoints import export_segmentor, load_segmentor

DOCS = Path(__file__).parents[1] / "docs"
OWN_TASK = DOCS / "own-task.md"
SECTIONS = re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", OWN_TASK.read_text(), re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def shrunk(text: str) -> str:
    """Put small parts in place of those that the page names."""
    text = re.sub(r"hub:(dino|mask_rcnn)\w+", "coco.pth", text)
    text = re.sub(r"hub:upernet\w+", "ade20k.pth", text)
    text = text.replace(
        "datamodules.detection.transforms import EVAL_800", "datamodules.detection.synthetic import SMALL_EVAL"
    )
    text = text.replace("segmentation.transforms import EVAL_512", "segmentation.synthetic import EVAL as EVAL_512")
    return text.replace("internimage_t", "internimage_debug").replace("EVAL_800", "SMALL_EVAL")


DETECTION, SEGMENTATION = ((DOCS / f"{page}.md").read_text() for page in ("detection", "segmentation"))
# Beside the first recipe of a page: a CPU, few steps of small images.
TRAINER = {"accelerator": "cpu", "max_steps": 2, "check_val_every_n_epoch": 2, "log_every_n_steps": 1}
SIGNS = {
    "train_transform": {"short_sides": [64], "long_side": 96},
    "eval_transform": {"short_side": 64, "long_side": 96},
}
SIZES = {"short_side": 48, "long_side": 64}
LEAVES = {"batch_size": 4, "train_transform": SIZES | {"crop": [48, 48]}, "eval_transform": SIZES}
# In the recipes too: the command line may have read the defaults before `small_heads` changed them.
NARROW, NARROW_MAPS = ({"init_args": {"channels": 32, name: 32}} for name in ("hidden_dim", "aux_channels"))
SMALL = {
    "signs": {
        "model": {"init_args": {"schedule": {"init_args": {"milestones": [1]}}, "warmup_steps": 1, "detector": NARROW}},
        "data": {"init_args": SIGNS | {"num_workers": 0}},
    },
    "leaves": {
        "global_batch_size": 4,
        "model": {"init_args": {"warmup_steps": 1, "segmentor": NARROW_MAPS}},
        "data": {"init_args": LEAVES | {"num_workers": 0}},
    },
}
LEAF_COLOURS = ((0, 0, 0), (0, 128, 0), (255, 0, 0))


def write_signs(folder: Path) -> None:
    """Write what the page supposes: images, annotations of two classes whose ids have a gap, and a table of boxes."""
    for split, length, first in (("train", 4, 0), ("val", 2, 100)):
        shapes = Shapes(length, 2, 96, first=first)
        (folder / split).mkdir(parents=True)
        images, annotations, rows = [], [], []
        for number in range(length):
            name, (height, width) = f"{number:04}.jpg", shapes.size(number)
            shapes.read(number).save(folder / split / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            objects = shapes.objects(number)
            for box, label, mask in zip(objects.boxes.tolist(), objects.labels.tolist(), objects.masks, strict=True):
                counts = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
                entry = {"image_id": number, "category_id": 2 * label + 1, "bbox": box, "segmentation": counts}
                annotations.append({"id": len(annotations) + 1, **entry})
                left, top, wide, high = box
                rows.append([name, left, top, left + wide, top + high, ("ring", "plate")[label]])
        categories = [{"id": 1, "name": "ring"}, {"id": 3, "name": "plate"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
        if split == "train":
            with (folder / "boxes.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["file", "xmin", "ymin", "xmax", "ymax", "label"], *rows])


def write_leaves(folder: Path) -> None:
    """Write what the page supposes: images and masks of three classes, with pixels to ignore, and masks of colours."""
    for split, length, first in (("train", 4, 0), ("val", 2, 100)):
        scenes = Scenes(length, 3, 64, first=first)
        for kind in ("images", "masks", "colours"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(length):
            scenes.read(number).save(folder / f"images/{split}/{number:04}.jpg")
            mask = scenes.mask(number).copy()
            mask[:2] = 255
            colours = np.array([*LEAF_COLOURS, *[(255, 255, 255)] * 253], np.uint8)[mask]
            for kind, pixels in (("masks", mask), ("colours", colours)):
                Image.fromarray(pixels).save(folder / f"{kind}/{split}/{number:04}.png")


def give_commands(page: str, run: str) -> None:
    """Give the commands of a page in their order, with what makes the run small beside its recipe."""
    Path("small.yaml").write_text(json.dumps({"trainer": TRAINER | {"enable_progress_bar": False}, **SMALL[run]}))
    for line in (line for block in blocks(page, "bash") for line in block.splitlines()):
        _, command, *words = shlex.split(line)
        main([command, *words, *(["-c", "small.yaml"] if command == "fit" else [])])


@pytest.fixture(scope="module", autouse=True)
def small_heads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("channels", "hidden_dim"):
            patch.setitem(MaskRCNN.__init__.__kwdefaults__, name, 32)
        for name in ("channels", "aux_channels"):
            patch.setitem(UPerNet.__init__.__kwdefaults__, name, 32)
        yield


@pytest.fixture(scope="module")
def signs(small_heads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the detection page were given in their order."""
    folder = tmp_path_factory.mktemp("signs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_signs(Path("data/signs"))
        export_detector(MaskRCNN(internimage_debug(layer_scale=1.0), num_classes=80), "coco.pth")
        Path("signs.yaml").write_text(shrunk(blocks("detection.md", "yaml")[0]))
        give_commands("detection.md", "signs")
    return folder


@pytest.fixture(scope="module")
def leaves(small_heads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the segmentation page were given in their order."""
    folder = tmp_path_factory.mktemp("leaves")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_leaves(Path("data/leaves"))
        export_segmentor(UPerNet(internimage_debug(layer_scale=1.0), num_classes=150), "ade20k.pth")
        for name, start in {"leaves": "# UPerNet", "large": "model: {init_args: {window"}.items():
            (text,) = (block for block in blocks("segmentation.md", "yaml") if block.startswith(start))
            Path(f"{name}.yaml").write_text(shrunk(text))
        give_commands("segmentation.md", "leaves")
    return folder


def test_every_section_has_code() -> None:
    assert len(SECTIONS) == OWN_TASK.read_text().count("\n## ")


@pytest.mark.parametrize("code", [code for _, code in SECTIONS], ids=[title for title, _ in SECTIONS])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(OWN_TASK), "exec"), {"__name__": "page"})


def test_yaml_of_the_first_run_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("first-run.md", "yaml")
    Path("flowers.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "-c", "flowers.yaml", "--print_config"])
    assert exit_info.value.code == 0


@pytest.mark.parametrize(
    ("page", "run", "of_a_class"),
    [("detection.md", "signs", ["plate/box_ap"]), ("segmentation.md", "leaves", ["spot/iou", "spot/acc"])],
)
def test_commands_of_a_page_write_what_it_promises(
    page: str, run: str, of_a_class: list[str], request: pytest.FixtureRequest
) -> None:
    folder, text = request.getfixturevalue(run) / "runs" / run, (DOCS / page).read_text()
    header = (folder / "version_0/metrics.csv").read_text().splitlines()[0].split(",")
    named = set(re.findall(r"`((?:train|val)/\w+)`", text)) - {"val/count_error"}
    assert len(named) >= 6
    assert named | {f"val/class/{name}" for name in of_a_class} <= set(header)
    assert (folder / "version_0/checkpoints/best.ckpt").is_file()
    found = {path.name for path in (folder / "predict_0").iterdir()}
    assert found == set(re.findall(r"^\| `([\w.]+)/?` \| [^|]+ \|$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "number"),
    [(page, number) for page in ("detection.md", "segmentation.md") for number in range(len(blocks(page, "yaml")))],
)
def test_yaml_of_a_page_parses(
    page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block is a whole recipe, or what is given beside the page's only one."""
    monkeypatch.chdir(tmp_path)
    texts = blocks(page, "yaml")
    (recipe,) = (place for place, text in enumerate(texts) if text.startswith("#"))
    words = ["fit"]
    for place in dict.fromkeys((recipe, number)):
        Path(f"{place}.yaml").write_text(texts[place])
        words += ["-c", f"{place}.yaml"]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--print_config"])
    assert exit_info.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "run"),
    [
        *((code, "signs") for code in blocks("detection.md", "python")),
        *((code, "leaves") for code in blocks("segmentation.md", "python")),
        *((code, "leaves" if "data/leaves" in code else "signs") for code in blocks("data.md", "python")),
    ],
)
def test_code_of_a_page_runs(
    code: str, run: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(request.getfixturevalue(run))
    exec(compile(shrunk(code), run, "exec"), {"__name__": "page"})


def test_table_of_boxes_becomes_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_signs(Path("data/signs"))
    code = next(block for block in blocks("detection.md", "python") if "csv" in block)
    exec(compile(code, "detection.md", "exec"), {})
    images = Path("data/signs/train")
    made, given = (CocoSource(Path(f"data/signs/{name}.json"), images, masks=False) for name in ("boxes", "train"))
    assert made.categories.names == given.categories.names
    # An image without objects has no row in the table.
    found = {Path(made.name(index)).name: made.objects(index) for index in range(len(made))}
    assert len(found) >= 3
    for index in range(len(given)):
        truth = given.objects(index)
        if len(truth):
            objects = found[Path(given.name(index)).name]
            assert (objects.boxes == truth.boxes).all()
            assert (objects.labels == truth.labels).all()


def _drop_category(train: dict, val: dict) -> None:
    train["categories"].pop()


def _cut_polygon(train: dict, val: dict) -> None:
    train["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]


def _drop_masks(train: dict, val: dict) -> None:
    for annotation in train["annotations"]:
        del annotation["segmentation"]


def _rename_val_image(train: dict, val: dict) -> None:
    val["images"][0]["file_name"] = "0099.jpg"


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(_drop_category, {}, id="category gap"),
        pytest.param(None, {"class_names": ["ring", "plates"]}, id="class name"),
        pytest.param(None, {"num_classes": 80}, id="number of classes"),
        pytest.param(None, {"train_images": Path("data/signs/images")}, id="folder"),
        pytest.param(_rename_val_image, {}, id="missing image"),
        pytest.param(_cut_polygon, {}, id="two points"),
        pytest.param(_drop_masks, {}, id="no masks"),
    ],
)
def test_messages_of_the_data_are_those_of_the_detection_page(
    change: Callable[[dict, dict], None] | None, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_signs(Path("data/signs"))
    paths = [Path(f"data/signs/{split}.json") for split in ("train", "val")]
    contents = [json.loads(path.read_text()) for path in paths]
    if change is not None:
        change(*contents)
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    images = {"train_images": Path("data/signs/train"), "val_images": Path("data/signs/val")}
    arguments = {"train_annotations": paths[0], "val_annotations": paths[1], "num_classes": 2, **images, **options}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            CocoDetection(**arguments).setup("fit")
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
        else:
            message = str(warned[0].message)
    assert message in DETECTION


def test_messages_of_the_model_are_those_of_the_detection_page(signs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(signs)
    model = MaskRCNN(internimage_debug(layer_scale=1.0), num_classes=2)
    with pytest.raises(CheckpointError) as of_the_file:
        load_detector(model, "coco.pth")
    target = [DetectionTarget(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([0]))]
    with pytest.raises(ValueError, match="masks") as of_the_target:
        model(torch.zeros(1, 3, 64, 64), [(64, 64)], target)
    for error in (of_the_file, of_the_target):
        assert str(error.value) in DETECTION


def test_masks_of_colours_become_the_same_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_leaves(Path("data/leaves"))
    code = next(block for block in blocks("segmentation.md", "python") if "colours" in block)
    exec(compile(code, "segmentation.md", "exec"), {})
    given = sorted(Path("data/leaves/masks").rglob("*.png"))
    assert len(given) == 6
    for path in given:
        made = Path("data/leaves/converted") / path.relative_to("data/leaves/masks")
        assert (np.asarray(Image.open(made)) == np.asarray(Image.open(path))).all()


def test_table_of_known_data_sets_is_complete() -> None:
    counts, folders = {}, {}
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\d, ]+) \| `([^`]+)`, `([^`]+)` \|", SEGMENTATION, re.MULTILINE)
    for names, numbers, *places in rows:
        known, classes = re.findall(r"\w+", names), [int(number) for number in numbers.split(", ")]
        for name, count in zip(known, classes * (len(known) // len(classes)), strict=True):
            counts[name], folders[name] = count, tuple(places)
    layouts = {name: make() for name, make in LAYOUTS.items()}
    assert counts == {name: len(layout.class_names) for name, layout in layouts.items()}
    train = {name: (layout.parts or {})["train"] for name, layout in layouts.items()}
    assert folders == {name: (part.images, part.masks) for name, part in train.items()}


def _change_mask(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def in_place(mask: Path) -> None:
        change(Image.open(mask)).save(mask)

    return in_place


def _draw_new_class(mask: Image.Image) -> Image.Image:
    mask.paste(3, (8, 8, 12, 11))
    return mask


def _lose_image(mask: Path) -> None:
    Path("data/leaves/images/train", mask.name).with_suffix(".jpg").unlink()


def _load_leaves(**options: Any) -> None:
    datamodule = SegmentationFolders(Path("data/leaves"), batch_size=1, num_workers=0, **options)
    datamodule.setup("fit")
    for _ in datamodule.train_dataloader():
        pass


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(None, {"dataset": FolderLayout()}, id="number of classes"),
        pytest.param(Path.unlink, {}, id="no mask"),
        pytest.param(_lose_image, {}, id="no image"),
        pytest.param(_change_mask(_draw_new_class), {}, id="value"),
        pytest.param(_change_mask(lambda mask: mask.convert("RGB")), {}, id="colours"),
        pytest.param(_change_mask(lambda mask: mask.resize((24, 32), Image.Resampling.NEAREST)), {}, id="size"),
    ],
)
def test_messages_of_the_data_are_those_of_the_segmentation_page(
    change: Callable[[Path], None] | None, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_leaves(Path("data/leaves"))
    if change is not None:
        change(Path("data/leaves/masks/train/0001.png"))
    layout = FolderLayout(class_names=("background", "leaf", "spot"))
    with pytest.raises(ValueError, match=r"[Mm]ask|num_classes") as error:
        _load_leaves(**{"dataset": layout, **options})
    assert str(error.value) in SEGMENTATION


def test_messages_of_the_model_are_those_of_the_segmentation_page(
    leaves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(leaves)
    model = UPerNet(internimage_debug(layer_scale=1.0), num_classes=3)
    with pytest.raises(CheckpointError) as of_the_file:
        load_segmentor(model, "ade20k.pth")
    with pytest.raises(ValueError, match="more than 1 value") as of_the_batch:
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64))
    assert str(of_the_file.value) in SEGMENTATION
    # The heads of this test are narrow.
    assert str(of_the_batch.value).replace("[1, 32, ", "[1, 512, ") in SEGMENTATION
