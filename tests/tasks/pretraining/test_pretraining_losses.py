"""Contrastive losses against their definitions in float64, in one process and in several that share a batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.pretraining import contrastive
from tasks.pretraining.contrastive import clip_loss, gather, siglip_loss
from tasks.pretraining.retrieval import Retrieval

NUM_PAIRS, DIM = 12, 5
LOSSES = ("clip", "smoothed", "siglip")
# Of 12 pairs, unevenly over 2 and over 4 processes.
INVALID = [1, 2, 3, 4]


class Pair(nn.Module):
    """Two linear towers with a scale and a bias, and a loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.image, self.text = nn.Linear(7, DIM).double(), nn.Linear(6, DIM).double()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        if kind == "siglip":
            self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def vectors(self, image, text):
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)

    def forward(self, image, text, valid):
        x, y = self.vectors(image, text)
        if self.kind == "siglip":
            return siglip_loss(x, y, self.log_scale.exp(), self.bias, valid)
        smoothing = 0.2 if self.kind == "smoothed" else 0.0
        return clip_loss(x, y, self.log_scale.exp(), valid, label_smoothing=smoothing)

    def definition(self, image, text, valid):
        # Pairs that do not count are not there.
        x, y = self.vectors(image[valid], text[valid])
        logits = self.log_scale.exp() * x @ y.T
        if self.kind == "siglip":
            logits = logits + self.bias
            z = 2 * torch.eye(len(x), dtype=torch.float64) - 1
            return -torch.log(1 / (1 + torch.exp(-z * logits))).sum() / len(x)
        target = torch.arange(len(x))
        smoothing = 0.2 if self.kind == "smoothed" else 0.0
        both = (F.cross_entropy(side, target, label_smoothing=smoothing) for side in (logits, logits.T))
        return sum(both) / 2


def batch(some_invalid):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(NUM_PAIRS, n, generator=generator, dtype=torch.float64) for n in (7, 6))
    valid = torch.ones(NUM_PAIRS, dtype=torch.bool)
    if some_invalid:
        valid[INVALID] = False
    return image, text, valid


def model(kind):
    torch.manual_seed(1)
    return Pair(kind)


def expected(kind, some_invalid):
    net = model(kind)
    loss = net.definition(*batch(some_invalid))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in net.named_parameters()}


def check(kind, some_invalid, loss, gradients):
    true_loss, true_gradients = expected(kind, some_invalid)
    # Float64 sums in another order.
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss, true_loss, **close)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, true_gradients[name], **close, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("some_invalid", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_of_one_process_is_its_definition(kind, some_invalid):
    net = model(kind)
    loss = net(*batch(some_invalid))
    loss.backward()
    check(kind, some_invalid, loss.detach(), {name: parameter.grad for name, parameter in net.named_parameters()})


@pytest.mark.parametrize("kind", LOSSES)
def test_batch_without_a_valid_pair_has_no_loss_and_no_gradient(kind):
    net = model(kind)
    image, text, valid = batch(False)
    loss = net(image, text, torch.zeros_like(valid))
    loss.backward()
    assert loss == 0
    assert not any(parameter.grad.any() for parameter in net.parameters())


def test_losses_are_float32_under_autocast():
    x = F.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    y = F.normalize(x + 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    scale, bias, valid = torch.tensor(100.0), torch.tensor(-10.0), torch.ones(4, dtype=torch.bool)
    plain = clip_loss(x, y, scale, valid), siglip_loss(x, y, scale, bias, valid)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = clip_loss(x, y, scale, valid), siglip_loss(x, y, scale, bias, valid)
    assert mixed == plain  # bfloat16 similarities, 100 times, would be half a unit off


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_gradients_are_float32_under_autocast(kind):
    net = model(kind).float()
    image, text, valid = batch(False)
    with torch.no_grad():
        x, y = net.vectors(image.float(), text.float())

    def gradients(enabled):
        inputs = [part.clone().requires_grad_() for part in (x, y, torch.tensor(100.0), torch.tensor(-10.0))]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = siglip_loss(*inputs, valid) if kind == "siglip" else clip_loss(*inputs[:3], valid)
        loss.backward()
        return [part.grad for part in inputs if part.grad is not None]

    # SigLIP makes its similarities again for them, outside the context of the step.
    for mixed, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mixed, plain)


class Sizes(TorchDispatchMode):
    """Keep the number of elements of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [part for part in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(part, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return made


@pytest.mark.parametrize(("loss", "columns"), [(clip_loss, 16 * 24), (siglip_loss, 24)])
def test_siglip_holds_the_similarities_of_one_process_at_a_time(monkeypatch, loss, columns):
    num_ranks, rows, dim = 16, 24, 2
    # As if 15 other processes had the same pairs.
    monkeypatch.setattr(contrastive, "gather", lambda part: torch.cat([part] * num_ranks))
    monkeypatch.setattr(contrastive, "num_processes", lambda: num_ranks)
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    x, y = (torch.randn(rows, dim).requires_grad_() for _ in range(2))
    numbers = [torch.tensor(10.0), torch.tensor(-10.0)][: 1 if loss is clip_loss else 2]
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(x, y, *numbers, torch.ones(rows, dtype=torch.bool)).backward()
    assert x.grad.any()
    assert y.grad.any()
    # Beside the vectors of all, (B, D).
    assert sizes.largest == max(rows * columns, num_ranks * rows * dim)
    # What waits for the backward pass: of SigLIP no similarity, of the softmax all.
    assert (max(saved) >= rows * columns) == (loss is clip_loss)


def compare_ranks(rank, world_size, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    share = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    for kind in LOSSES:
        for some_invalid in (False, True):
            net = DistributedDataParallel(model(kind))
            loss = net(*(part[share] for part in batch(some_invalid)))
            loss.backward()
            total = loss.detach().clone()
            distributed.all_reduce(total)
            gradients = {name: parameter.grad for name, parameter in net.module.named_parameters()}
            check(kind, some_invalid, total / world_size, gradients)

    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather(rows)
    assert gathered[:, 0].tolist() == [rank for rank in range(world_size) for _ in range(2)]
    (gathered * (rank + 1)).sum().backward()
    assert (rows.grad == sum(range(1, world_size + 1))).all()

    # Ranks with different numbers of valid pairs.
    image, text, valid = batch(True)
    x, y = (F.normalize(part[:, :6], dim=-1) for part in (image, text))
    shared, alone = Retrieval(), Retrieval(sync_on_compute=False)
    shared.update(x[share], y[share], valid[share])
    alone.update(x, y, valid)
    assert shared.compute() == alone.compute()
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_with_a_share_each_equal_one_with_the_whole_batch(tmp_path, world_size):
    torch.multiprocessing.spawn(compare_ranks, (world_size, tmp_path), nprocs=world_size)
