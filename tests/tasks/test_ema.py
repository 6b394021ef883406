"""EMA against the same average computed apart, in float64."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from tasks import EMA

DECAY = 0.8


class Net(LightningModule):
    """A linear layer behind a batch norm, on fixed data; validation keeps the weights that it ran with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3, dtype=dtype)
        self.linear = nn.Linear(3, 2, dtype=dtype)
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        return self.linear(self.norm(batch.to(self.linear.weight.dtype))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.linear.weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        return DataLoader(torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 3))


class Recorder(Callback):
    """Keeps the weights after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.means: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module, None, None, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.weights):
            self.weights.append(pl_module.linear.weight.detach().double().clone())
            self.means.append(pl_module.norm.running_mean.double().clone())


def fit(net, tmp_path, *callbacks, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_steps": 6} | options),
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    return trainer


def average(values):
    result = values[0]
    for value in values[1:]:
        result = DECAY * result + (1 - DECAY) * value
    return result


@pytest.mark.parametrize("accumulate", [1, 3])
def test_average_has_one_update_for_each_optimizer_step(tmp_path, accumulate):
    ema, recorder = EMA(DECAY), Recorder()
    fit(Net(), tmp_path, ema, recorder, max_steps=6 // accumulate, accumulate_grad_batches=accumulate)
    assert len(recorder.weights) == 6 // accumulate + 1
    # float32 arithmetic on values near 1.
    torch.testing.assert_close(ema.average["linear.weight"].double(), average(recorder.weights), rtol=0, atol=1e-6)
    if accumulate == 1:  # running statistics change with each batch, not each step
        torch.testing.assert_close(
            ema.average["norm.running_mean"].double(), average(recorder.means), rtol=0, atol=1e-6
        )
    assert ema.average["norm.num_batches_tracked"] == 6


def test_ramp_forgets_the_first_weights_sooner(tmp_path):
    ema, recorder = EMA(DECAY, ramp_steps=4), Recorder()
    fit(Net(), tmp_path, ema, recorder)
    expected = recorder.weights[0]
    for step, weights in enumerate(recorder.weights[1:], start=1):
        new = (1 - DECAY) + DECAY * 2.718281828459045 ** (-step / 4)
        expected = (1 - new) * expected + new * weights
    torch.testing.assert_close(ema.average["linear.weight"].double(), expected, rtol=0, atol=1e-6)


def test_average_stays_float32_where_the_weights_are_bfloat16(tmp_path):
    net, ema, recorder = Net(torch.bfloat16), EMA(DECAY), Recorder()
    fit(net, tmp_path, ema, recorder, precision="bf16-true", limit_val_batches=1, check_val_every_n_epoch=1)
    assert net.linear.weight.dtype == torch.bfloat16
    assert ema.average["linear.weight"].dtype == torch.float32
    # A bfloat16 average, or one that went through the model for validation, would be off by 4e-3.
    torch.testing.assert_close(ema.average["linear.weight"].double(), average(recorder.weights), rtol=0, atol=1e-6)


def test_validation_runs_on_the_average_and_training_goes_on_from_its_own_weights(tmp_path):
    net, ema, recorder = Net(), EMA(DECAY), Recorder()
    fit(net, tmp_path, ema, recorder, max_steps=12)
    with_ema = recorder.weights
    assert len(net.validated) == 2
    torch.testing.assert_close(net.validated[0].double(), average(with_ema[:7]), rtol=0, atol=1e-6)
    recorder = Recorder()
    fit(Net(), tmp_path, recorder, max_steps=12)
    assert all(torch.equal(a, b) for a, b in zip(with_ema, recorder.weights, strict=True))


def test_checkpoint_holds_the_average_and_resumes_both(tmp_path):
    whole, recorder = EMA(DECAY), Recorder()
    fit(Net(), tmp_path, whole, recorder, max_steps=12)
    first = EMA(DECAY)
    trainer = fit(Net(), tmp_path, first, max_steps=6)
    path = tmp_path / "middle.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    torch.testing.assert_close(
        saved["state_dict"]["linear.weight"].double(), average(recorder.weights[:7]), rtol=0, atol=1e-6
    )
    assert torch.equal(saved["current_state_dict"]["linear.weight"].double(), recorder.weights[6])
    second, rest = EMA(DECAY), Net()
    fit(rest, tmp_path, second, max_steps=12, ckpt_path=path)
    assert torch.equal(rest.linear.weight.double(), recorder.weights[12])
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value), name


def test_average_starts_from_a_checkpoint_without_one(tmp_path):
    trainer = fit(Net(), tmp_path, max_steps=6)
    path = tmp_path / "plain.ckpt"
    trainer.save_checkpoint(path)
    ema, recorder = EMA(DECAY), Recorder()
    recorder.weights = [torch.empty(0)] * 6
    fit(Net(), tmp_path, ema, recorder, max_steps=12, ckpt_path=path)
    torch.testing.assert_close(ema.average["linear.weight"].double(), average(recorder.weights[6:]), rtol=0, atol=1e-6)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"decay is 1.0, expected a number in \[0, 1\)"):
        EMA(1.0)
    with pytest.raises(ValueError, match="ramp_steps is -1, expected a number of steps"):
        EMA(0.9, ramp_steps=-1)
