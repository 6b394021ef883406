import json
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from tasks.cli import main
from tasks.predictions import contact_sheet

EXPERIMENT = str(Path(__file__).parents[2] / "experiments" / "debug" / "classification.yaml")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])


def fit(*words):
    return main(["fit", "-c", EXPERIMENT, "--trainer.enable_progress_bar=false", "--trainer.max_steps=4", *words])


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "key", "proposal"),
    [
        (["--trainer.max_step=3"], "trainer.max_step", "trainer.max_steps"),  # would be an abbreviation to argparse
        (["--model.label_smothing=0.1"], "label_smothing", "label_smoothing"),
        (["--model.warmup_step=3"], "warmup_step", "warmup_steps"),  # of the base class
        (["--model.backbone.drop_path=0.1"], "drop_path", "drop_path_rate"),
        (["--model.optimizer.init_args.weigth_decay=1"], "weigth_decay", "weight_decay"),
        (["--data.seeed=4"], "seeed", "seed"),
        (["--globl_batch_size=4"], "globl_batch_size", "global_batch_size"),
        ({"modle": {"x": 1}}, "modle.x", "model"),
        ({"trainer": {"max_step": 3}}, "trainer.max_step", "trainer.max_steps"),
        ({"model": {"init_args": {"labell_smoothing": 0.1}}}, "labell_smoothing", "label_smoothing"),
        ({"data": {"init_args": {"train_transform": {"flipp": 0.1}}}}, "flipp", "train_transform.flip"),
    ],
)
def test_unknown_key_is_named_with_the_one_it_was_meant_to_be(words, key, proposal, capsys):
    if isinstance(words, dict):
        Path("overlay.yaml").write_text(yaml.safe_dump(words))
        words = ["-c", "overlay.yaml"]
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"unknown key `{key}`. Did you mean `{proposal}`?" in error
    assert error.startswith("internimage fit: error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("recipe", ["imagenet1k/internimage_t_224", "coco/internimage_t_dino_1x"])
def test_a_recipe_whose_backbone_is_a_function_can_be_changed(recipe, capsys):
    path = Path(EXPERIMENT).parents[1] / f"{recipe}.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(path), "--model.warmup_steps=3", "--model.optimizer.lr=0.5", "--print_config"])
    output = capsys.readouterr()
    assert not stop.value.code, output.err
    options = yaml.safe_load(output.out)["model"]["init_args"]
    assert (options["warmup_steps"], options["optimizer"]["init_args"]["lr"]) == (3, 0.5)
    assert options["backbone"]["init_args"]["drop_path_rate"] > 0  # not lost on the way


def test_a_number_of_classes_that_the_data_overrules_is_refused():
    with pytest.raises(ValueError, match=r"model\.num_classes is 5, and SyntheticClassification has num_classes=4"):
        fit("--model.init_args.num_classes=5")


def test_the_words_of_a_constructor_come_first():
    with pytest.raises(ValueError, match=r"^SyntheticClassification: num_classes=0, expected at least 1"):
        fit("--data.num_classes=0")


def test_wrong_value_is_named(capsys):
    with pytest.raises(SystemExit):
        fit("--model.label_smoothing=much")
    assert "Parser key \"label_smoothing\": Expected a <class 'float'>. Got value: much" in capsys.readouterr().err


def test_later_words_win_over_later_files_over_earlier_files(capsys):
    Path("a.yaml").write_text("trainer: {max_steps: 5, log_every_n_steps: 3}\n")
    Path("b.yaml").write_text("trainer: {max_steps: 6, num_sanity_val_steps: 0}\n")
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                "-c",
                EXPERIMENT,
                "-c",
                "a.yaml",
                "-c",
                "b.yaml",
                "--trainer.num_sanity_val_steps=1",
                "--print_config",
            ]
        )
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["max_steps"], trainer["log_every_n_steps"], trainer["num_sanity_val_steps"]) == (6, 3, 1)


def test_each_fit_has_a_folder_with_everything_that_it_leaves(caplog):
    with caplog.at_level(logging.INFO):
        cli = fit("--data.num_classes=3", "--trainer.check_val_every_n_epoch=1")
    assert cli.model.model.head.fc.out_features == 3  # from the data
    folder = Path("runs/classification/version_0")
    assert Path(cli.trainer.default_root_dir) == folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    for line in (
        "model         Classification with InternImage (channels 16, depths 1-1-2-1)",
        "global batch  16 = 1 x 1 x 1 x 16 (devices x nodes x accumulation x batch_size, tuned for 16)",
        "length        4 optimizer steps = 1 epochs of 4 batches",
        f"folder        {folder} (logs: CSVLogger, TensorBoardLogger; checkpoints: checkpoints/)",
    ):
        assert line in caplog.text
    assert f"{folder}/checkpoints/best.ckpt" in caplog.text.splitlines()[-1]

    fit("--trainer.logger=false", "--trainer.enable_checkpointing=false")
    assert [path.name for path in Path("runs/classification/version_1").iterdir()] == ["config.yaml"]
    fit(
        "--name",
        "other",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.filename=mine",
    )
    assert [path.name for path in Path("runs/other/version_0/checkpoints").iterdir()] == ["mine.ckpt"]


def test_another_global_batch_than_the_tuned_one_warns():
    with pytest.warns(
        UserWarning, match=r"global batch is 8 .* tuned for 16.*learning rate by 0\.5 and .*max_steps by 2"
    ):
        fit("--data.batch_size=8", "--trainer.logger=false", "--trainer.enable_checkpointing=false")


def test_validate_and_predict_from_a_run_folder():
    cli = fit("--trainer.check_val_every_n_epoch=1", "--data.num_val_samples=10")
    folder = Path(cli.trainer.default_root_dir)
    run = ["-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "best.ckpt")]
    best = next(c for c in cli.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    metrics = main(["validate", *run]).trainer.callback_metrics
    assert metrics["val/top1"] == best.best_model_score
    assert metrics["val/loss"] == cli.trainer.callback_metrics["val/loss"]
    assert main(["test", *run]).trainer.callback_metrics["test/top1"] == best.best_model_score
    assert [path.name for path in Path("runs/classification").iterdir()] == ["version_0"]

    main(["predict", *run])
    lines = read("runs/classification/predict_0/predictions.jsonl")
    top1 = sum(line["labels"][0] == str((64 + place) % 4) for place, line in enumerate(lines)) / len(lines)
    assert len(lines) == 10
    assert top1 == pytest.approx(best.best_model_score.item())


def test_predict_takes_images_and_folders():
    folder = Path(fit().trainer.default_root_dir)
    # The run ended between two validations, and its last steps are not lost.
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    Path("shots/deep").mkdir(parents=True)
    for name in ("one.png", "shots/two.png", "shots/deep/three.jpg"):
        Image.new("RGB", (32, 32), "red").save(name)
    run = ["-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    main(["predict", *run, "--images", "one.png", "shots", "--output", "out"])
    lines = read("out/predictions.jsonl")
    assert {line["path"] for line in lines} == {"one.png", "shots/two.png", "shots/deep/three.jpg"}
    for line in lines:
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)  # all four classes, six decimals
        assert line["probabilities"] == sorted(line["probabilities"], reverse=True)
    assert Image.open("out/predictions.png").size[0] > 900  # three columns
    with pytest.raises(FileNotFoundError, match=r"absent\.png does not exist"):
        main(["predict", *run, "--images", "absent.png", "--output", "out"])


def test_contact_sheet_draws_bars_as_wide_as_the_probabilities():
    line = {"path": "x", "labels": ["cat", "dog"], "probabilities": [0.75, 0.25]}
    sheet = contact_sheet([Image.new("RGB", (32, 32), "red")], [line])
    assert sheet.getpixel((20, 20)) == (255, 0, 0)
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    # The row right below the top of each bar, above its text, right of the image: where it is not white.
    widths = [int((pixels[12 + 28 * rank, 160:] != 255).any(-1).sum()) for rank in range(2)]
    assert widths[0] / widths[1] == pytest.approx(3, rel=0.05)


def test_the_installed_script_exits_with_success(monkeypatch):
    (script,) = entry_points(group="console_scripts", name="internimage")
    words = ["fit", "-c", EXPERIMENT, "--trainer.enable_progress_bar=false", "--trainer.max_steps=4"]
    monkeypatch.setattr(sys, "argv", ["internimage", *words])
    # A script ends in `sys.exit(function())`: anything but None would be printed and count as a failure.
    assert script.load()() is None
