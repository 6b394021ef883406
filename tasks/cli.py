"""The command `internimage`: join the task and the datamodule that a YAML names, and give the run a folder."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from tasks.banner import StartBanner
from tasks.base import Task
from tasks.callbacks import FiniteLoss, LastCheckpoint, StepSeed
from tasks.errors import Parser, constructor_error
from tasks.runs import claim_folder

# `best` watches the task's headline metric unless the configuration names another.
_BEST: Mapping[str, Any] = {"filename": "best", "mode": "max", "enable_version_counter": False}
_LAST: Mapping[str, Any] = {"filename": "last", "enable_version_counter": False}


class SaveConfig(SaveConfigCallback):
    """Write the whole configuration of a `fit` to `config.yaml` in its run folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        self.parser.save(self.config, folder / self.config_filename, skip_unset=False, overwrite=True)


class CLI(LightningCLI):
    """LightningCLI in which every `fit` has a folder of its own, and the number of classes comes from the data.

    Each `fit` gets `<trainer.default_root_dir>/<name>/version_<n>`, with `config.yaml`, the logs, and `checkpoints/` in
    it; `predict` gets `predict_<n>` there, or `--output`.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run and its folder (default: that of the first configuration file).",
        )
        parser.add_argument(
            "--global_batch_size",
            type=int | None,
            default=None,
            help="Images per optimizer step, over all devices, that the recipe was tuned for; another one warns.",
        )
        for key, kind, defaults in (
            ("checkpoint_best", ModelCheckpoint, _BEST),
            ("checkpoint_last", LastCheckpoint, _LAST),
        ):
            parser.add_class_arguments(kind, key, fail_untyped=False)
            parser.set_defaults({f"{key}.{name}": value for name, value in defaults.items()})
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--images",
                type=Path,
                nargs="+",
                default=[],
                help="Image files, and folders that are searched with their subfolders (default: the validation split)",
            )
            parser.add_argument("--output", type=Path | None, default=None, help="Folder to write to.")
        return parser

    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options["name"] is None:
            files = _as_list(options["config"])
            options["name"] = Path(str(files[0])).stem if files else "run"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what the command needs to what the configuration asks for: callbacks, loggers, a folder."""
        config = self._get(self.config_init, "trainer")
        callbacks = list(_as_list(config["callbacks"]))
        run = Path(config["default_root_dir"]) / self._get(self.config, "name")
        loggers: bool | list[Logger] = False
        if self.subcommand == "fit":
            callbacks += [StepSeed(), FiniteLoss(), StartBanner(self._get(self.config, "global_batch_size"))]
            if config["enable_checkpointing"] is not False and not any(
                isinstance(c, ModelCheckpoint) for c in callbacks
            ):
                best, last = (self._get(self.config_init, key) for key in ("checkpoint_best", "checkpoint_last"))
                best.monitor = best.monitor or self.model.headline
                callbacks += [best, last]
            if not config["fast_dev_run"]:
                kwargs["default_root_dir"] = folder = claim_folder(run, "version")
                loggers = _loggers(folder)
                for callback in callbacks:
                    if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                        callback.dirpath = str(folder / "checkpoints")
        else:
            kwargs["enable_checkpointing"] = False
            # A checkpoint also holds the state of the callbacks of `fit`, which other commands have no use for.
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be.*")
        if self.subcommand == "predict":
            output = self._get(self.config, "output")
            if output or not any(isinstance(c, BasePredictionWriter) for c in callbacks):
                callbacks.append(self.model.prediction_writer(output or claim_folder(run, "predict")))
        if config["logger"] in (None, True):
            kwargs["logger"] = loggers
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse lists what the constructor raised among the types that the value might have had.
            raise ValueError(constructor_error(str(error))) from None

    def after_instantiate_classes(self) -> None:
        self._check_num_classes()
        if self.subcommand == "predict" and (images := self._get(self.config_init, "images")):
            if not hasattr(self.datamodule, "predict_paths"):
                raise ValueError(f"--images: {type(self.datamodule).__name__} has no `predict_paths` to put them in.")
            self.datamodule.predict_paths = images
        if self.subcommand == "fit" and (path := self._get(self.config, "ckpt_path")) and Path(path).exists():
            # The checkpoint brings its own weights, and those it once started from may be gone.
            self.model.init_checkpoint = None

    def _check_num_classes(self) -> None:
        """Refuse a number of classes for the model that the data overrules."""
        options = self._get(self.config, "model").get("init_args") or {}
        given, used = options.get("num_classes"), getattr(self.datamodule, "num_classes", None)
        if None not in (given, used) and given != used:
            raise ValueError(
                f"model.num_classes is {given}, and {type(self.datamodule).__name__} has num_classes={used}, which is "
                "what the model is built with. Leave it out of the model's options, or change the data's."
            )

    def after_fit(self) -> None:
        for saved in self.trainer.checkpoint_callbacks:
            if isinstance(saved, ModelCheckpoint) and saved.monitor and saved.best_model_score is not None:
                rank_zero_info(f"best {saved.monitor} {saved.best_model_score:.4f}: {_relative(saved.best_model_path)}")

    def predict(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        # The task's writer has them on disk; a large folder's need not stay in memory.
        self.trainer.predict(model, datamodule=datamodule, **kwargs | {"return_predictions": False})


def main(args: ArgsType = None) -> CLI:
    """Run the command line; `args` takes a list of words in place of `sys.argv`."""
    _quieten()
    # DeepSpeed's launcher numbers the nodes under another name than the one Lightning reads.
    if "CROSS_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["CROSS_RANK"])
    strict = {"allow_abbrev": False}
    about = {
        "prog": "internimage",
        "description": "Train, evaluate and use InternImage. A YAML names the model and data.",
    }
    return CLI(
        Task,
        LightningDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={"default_root_dir": "runs", "enable_model_summary": False, "enable_autolog_hparams": False},
        seed_everything_default=0,
        parser_kwargs={**strict, **about, **{command: dict(strict) for command in CLI.subcommands()}},
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=args,
    )


def command() -> int | None:
    """Run the command line as an installed script, whose exit status is what this returns."""
    if sys.argv[1:2] == ["shards"]:
        # Needs neither a task nor a trainer.
        from datamodules.webdataset.commands import main as shards

        return shards(sys.argv[2:])
    main()
    return None


def _loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard, both into the run folder itself."""
    root, name, version = folder.parent.parent, folder.parent.name, int(folder.name.rpartition("_")[2])
    return [CSVLogger(root, name, version), TensorBoardLogger(root, name, version)]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _relative(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _quieten() -> None:
    """Silence what a user of this command can do nothing about."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    for message in (
        ".*does not have many workers.*",  # a choice of the YAML
        ".*LeafSpec.*",  # a deprecation in Lightning's use of torch
        "Grad strides do not match bucket view strides.*",  # a layout that the backend chose
    ):
        warnings.filterwarnings("ignore", message=message)
    advertisements = re.compile("litlogger|litmodels")
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not advertisements.search(record.getMessage()))


if __name__ == "__main__":
    sys.exit(command())
