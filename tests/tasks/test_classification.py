import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from internimage import ClipProjectorHead
from internimage.checkpoints import CheckpointError
from tasks import InitCheckpoint
from tasks.callbacks import FiniteLoss, StepSeed


class Data(LightningDataModule):
    """Random images and labels that stay the same."""

    def __init__(self, size: int = 8, batch_size: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = scale * torch.randn(size, 3, 32, 32, generator=generator)
        labels = torch.randint(4, (size,), generator=generator)
        self.samples = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.samples, self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def trainer(tmp_path, **options):
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 2,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        | options
    )


def test_smoothed_loss_is_its_definition(tiny_task):
    task = tiny_task(label_smoothing=0.1)
    logits = torch.randn(6, 4)
    label = torch.arange(6) % 4
    target = torch.full((6, 4), 0.1 / 4).scatter(1, label[:, None], 0.9 + 0.1 / 4)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task._cross_entropy(logits, label), expected)
    # Mixed labels are smoothed alike.
    one_hot = torch.nn.functional.one_hot(label, 4).float()
    torch.testing.assert_close(task._cross_entropy(logits, one_hot), expected)


def test_loss_is_float32_under_bfloat16(tiny_task):
    logits = torch.tensor([[8.0, 0.01]]).bfloat16()
    loss = tiny_task(num_classes=2)._cross_entropy(logits, torch.tensor([0]))
    # log(1 + e^-8); bfloat16's log_softmax gives 0.
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3.4e-4, rel=0.05)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_follow_the_mixed_pixels(tiny_task, mixup, cutmix):
    task = tiny_task(mixup_alpha=mixup, cutmix_alpha=cutmix)
    torch.manual_seed(0)
    # Image i is the colour i, so that the mean of a mixed image is its mean label.
    label = torch.tensor([0, 1, 2, 3])
    image = label.float()[:, None, None, None].expand(4, 3, 32, 32)
    kinds = set()
    for _ in range(20):
        mixed, target = task.mix(image, label)
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        # Pixels count in cutmix, whose area torchvision's labels follow exactly.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), target @ torch.arange(4.0), rtol=0, atol=1e-5)
        if 0.05 < target[1].max() < 0.95:
            kinds.add("cutmix" if set(mixed[1].unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())


def test_top1_and_top5_count_every_sample_once(tiny_task, tmp_path):
    task = tiny_task(num_classes=4)
    data = Data(size=7, batch_size=3)
    (result,) = trainer(tmp_path).validate(task, data)
    with torch.no_grad():
        logits = task.eval()(torch.stack([sample["image"] for sample in data.samples]))
    labels = torch.stack([sample["label"] for sample in data.samples])
    assert result["val/top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result["val/top5"] == 1  # four classes
    # The mean over batches of 3, 3 and 1 would be another number.
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert result["val/loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer(tmp_path).test(task, data)[0]["test/top1"] == result["val/top1"]


def test_a_batch_that_only_fills_up_counts_nowhere(tiny_task, tmp_path):
    task, data = tiny_task(num_classes=4), Data(size=4, batch_size=4)
    (expected,) = trainer(tmp_path).validate(task, data)
    filled = Data(size=8, batch_size=4)  # the first four images are others
    valid = [{**sample, "valid": True} for sample in data.samples]
    filled.samples = [*valid, *({**sample, "valid": False} for sample in filled.samples[4:])]
    # Its last batch, as that of a rank which has none of the last samples, and its first.
    for samples in (filled.samples, filled.samples[::-1]):
        filled.samples = samples
        (result,) = trainer(tmp_path).validate(task, filled)
        assert result == pytest.approx(expected, rel=1e-6)  # float32 sums in another order


def test_frozen_stages_do_not_move_and_are_not_given_to_the_optimizer(tiny_task, tmp_path):
    task = tiny_task(frozen_stages=2, drop_path_rate=0.5)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    run = trainer(tmp_path)
    run.fit(task, Data())
    frozen = ("model.backbone.stem.", "model.backbone.stages.0.", "model.backbone.stages.1.")
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith(frozen)}
    assert {"model.backbone.stages.2.downsample.conv.weight", "model.head.fc.weight"} <= moved
    optimized = {id(parameter) for group in run.optimizers[0].param_groups for parameter in group["params"]}
    trainable = {id(p) for name, p in task.named_parameters() if not name.startswith(frozen)}
    assert optimized == trainable
    assert not task.backbone.stages[1].training  # no drop path either
    assert task.backbone.stages[2].training


def test_options_out_of_range(tiny_task):
    for options, message in (
        ({"frozen_stages": 5}, r"frozen_stages is 5, expected 0 \(train all\) to 4"),
        ({"warmup_lr_ratio": 40.0}, "warmup_lr_ratio is 40.0, expected a share of lr"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0, expected 0 to 1"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0, expected a positive number"),
        ({"cutmix_probability": 1.5}, "cutmix_probability is 1.5, expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_task(**options)
    with pytest.raises(TypeError, match="warmup_step"):
        tiny_task(warmup_step=3)


def test_initial_weights_are_loaded_with_a_new_head(tiny_task, tmp_path):
    source = tiny_task()
    first = trainer(tmp_path)
    first.fit(source, Data())
    path = str(tmp_path / "first.ckpt")
    first.save_checkpoint(path)

    start = InitCheckpoint(source=path, head="new", new_head_scale=0.0)
    task = tiny_task(num_classes=7, init_checkpoint=start)
    trainer(tmp_path, limit_train_batches=0).fit(task, Data())
    assert torch.equal(task.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)
    assert task.model.head.fc.weight.shape[0] == 7
    assert not task.model.head.fc.weight.any()
    with pytest.raises(CheckpointError, match="head='new'"):
        trainer(tmp_path).fit(tiny_task(num_classes=7, init_checkpoint=InitCheckpoint(source=path)), Data())

    # A resumed run has the weights of its checkpoint.
    resumed = tiny_task(init_checkpoint=InitCheckpoint(source=path))
    second = trainer(tmp_path, max_steps=4)
    second.fit(source, Data(), ckpt_path=path)
    second.save_checkpoint(tmp_path / "second.ckpt")
    trainer(tmp_path, max_steps=4).fit(resumed, Data(), ckpt_path=tmp_path / "second.ckpt")
    assert torch.equal(resumed.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)


def test_loss_that_is_no_number_stops_the_run_and_names_the_step(tiny_task, tmp_path):
    run = trainer(tmp_path, max_steps=6, callbacks=[FiniteLoss()], log_every_n_steps=2)
    with pytest.raises(FloatingPointError, match=r"train/loss is nan at step 2 \(epoch 0, batch 1, rank 0\)"):
        run.fit(tiny_task(), Data(size=16, batch_size=4, scale=float("nan")))


def test_randomness_of_a_step_depends_on_seed_and_step_alone(monkeypatch):
    def draw(seed, batch_idx, epoch=0, rank=0):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        run = type("Run", (), {"global_rank": rank, "current_epoch": epoch})()
        StepSeed().on_train_batch_start(run, None, None, batch_idx)
        return torch.rand(1).item()

    first = draw("1", 5)
    torch.rand(3)
    assert draw("1", 5) == first
    others = [draw("2", 5), draw("1", 6), draw("1", 5, epoch=1), draw("1", 5, rank=1)]
    assert len({first, *others}) == 5


def test_head_is_injected(tiny_task):
    task = tiny_task(head=ClipProjectorHead)
    assert isinstance(task.model.head, ClipProjectorHead)
    assert task(torch.zeros(2, 3, 64, 64)).shape == (2, 4)


def test_compile_is_of_the_backbone_and_keeps_keys(tiny_task):
    task = tiny_task(compile=True)
    task.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    task.setup("fit")
    assert task.backbone._compiled_call_impl is not None
    assert task.model._compiled_call_impl is None
    assert task.state_dict().keys() == tiny_task().state_dict().keys()


@pytest.mark.slow
def test_compiled_backbone_trains_alike(tiny_task, tmp_path):
    plain, compiled = tiny_task(), tiny_task(compile=True)
    trainer(tmp_path).fit(plain, Data())
    trainer(tmp_path).fit(compiled, Data())
    for a, b in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        # Two AdamW steps of 1e-3; the compiler reorders sums, which turns the sign of a gradient near zero.
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3)
