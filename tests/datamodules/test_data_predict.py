import shutil
import warnings

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from datamodules import EvalTransform, ImageFolders, MNIST5k, SyntheticClassification, TrainTransform
from datamodules.classification import ClassificationData


class Paths(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return list(zip(batch["path"], batch["image"].mean((1, 2, 3)).tolist(), strict=True))


def predict(datamodule):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        return [row for batch in trainer.predict(Paths(), datamodule=datamodule) for row in batch]


def test_predict_takes_images_and_folders_without_the_training_data(class_folders, tmp_path):
    images = tmp_path / "mine"
    shutil.copytree(class_folders / "val", images)
    (images / "notes.txt").write_text("not an image")
    alone = class_folders / "train" / "cat" / "000.jpg"
    shutil.rmtree(class_folders / "val")
    datamodule = ImageFolders(
        class_folders / "gone", num_classes=3, image_size=24, batch_size=4, num_workers=0, predict_paths=[alone, images]
    )
    rows = predict(datamodule)
    expected = [alone, *sorted(images.rglob("*.jpg"))]
    assert [path for path, _ in rows] == [str(path) for path in expected]
    assert len(rows) == 10


def test_predict_without_paths_takes_the_validation_images():
    datamodule = SyntheticClassification(image_size=8, num_samples=10, num_val_samples=5)
    assert [path for path, _ in predict(datamodule)] == [f"synthetic[{index}]" for index in range(10, 15)]


def test_predict_names_what_it_cannot_use(class_folders, tmp_path):
    def run(*paths):
        predict(SyntheticClassification(image_size=8, predict_paths=list(paths), eval_transform=EvalTransform()))

    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"predict_paths: .*empty has no image file \(.jpg"):
        run(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"predict_paths: .*none.jpg does not exist"):
        run(tmp_path / "none.jpg")
    (tmp_path / "broken.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"predict: cannot use .*broken.jpg"):
        run(tmp_path / "broken.jpg")


def test_every_argument_is_reachable_from_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassificationData, "data")
    config = tmp_path / "data.yaml"
    config.write_text(
        """
data:
  class_path: datamodules.ImageFolders
  init_args:
    root: /data/imagenet
    batch_size: 128
    train_transform: {erasing: 0.0, rand_augment: null, scale: [0.5, 1.0]}
    eval_transform: {crop_pct: 0.875}
    predict_paths: [a.jpg, folder]
"""
    )
    datamodule = parser.instantiate(parser.parse_path(config)).data
    assert datamodule.train_transform == TrainTransform(erasing=0.0, rand_augment=None, scale=(0.5, 1.0))
    assert datamodule.eval_transform == EvalTransform(crop_pct=0.875)
    assert datamodule.batch_size == 128
    assert [str(path) for path in datamodule.predict_paths] == ["a.jpg", "folder"]

    arguments = ["--data=datamodules.MNIST5k", "--data.train_transform.flip=0.5", "--data.seed=3"]
    digits = parser.instantiate(parser.parse_args(arguments)).data
    assert isinstance(digits, MNIST5k)
    # What is not named keeps the default of this datamodule.
    assert digits.train_transform == TrainTransform(fit="pad", flip=0.5, rand_augment=None, erasing=0.0)
    assert digits.seed == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--data=datamodules.MNIST5k", "--data.flop=1"])
