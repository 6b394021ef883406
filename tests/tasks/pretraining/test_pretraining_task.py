import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from toy_pairs import CONTEXT, VOCABULARY, ToyPairs

from internimage import ClipProjectorHead, ConvHead, internimage_debug
from internimage.checkpoints import CheckpointError
from tasks import EMA, Classification, InitCheckpoint, Pretraining
from tasks.pretraining import BertText, Clip, ClipText, Objective, SigLip

SMALL = {"width": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY, "context_length": CONTEXT}
HEAD = partial(ClipProjectorHead, hidden_dim=32, embed_dim=24, num_heads=2)


def build(objective=None, drop_path_rate=0.0, **options):
    torch.manual_seed(0)
    defaults = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05),
        "head": HEAD,
        "text": partial(ClipText, **SMALL),
        "embed_dim": 24,
    }
    return Pretraining(
        internimage_debug(drop_path_rate=drop_path_rate), objective=objective or Clip(), **(defaults | options)
    )


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
            "limit_val_batches": 0,
        }
        | options
    )


class Counting(Objective):
    """Moves one weight, and keeps what it was told."""

    def __init__(self, num_views=1):
        super().__init__()
        self.num_views = num_views
        self.steps, self.built = [], None

    def build(self, towers, num_classes):
        self.built = num_classes

    def losses(self, towers, batch):
        return {"first": towers.log_scale, "second": 2 * towers.log_scale}

    def after_step(self, towers, step, total_steps):
        self.steps.append((step, total_steps, towers.log_scale.item()))

    def meters(self):
        return {"depth": 3.0}


@pytest.mark.parametrize(
    ("objective", "text", "num_steps"),
    [
        (Clip(), ClipText, 30),
        (SigLip(), ClipText, 60),
        (Clip(label_smoothing=0.1), ClipText, 30),
        (Clip(), BertText, 60),
    ],
    ids=["clip", "siglip", "smoothed", "bert"],
)
def test_sixteen_pairs_are_learnt_by_heart(tmp_path, objective, text, num_steps):
    task, data = build(objective, text=partial(text, **SMALL), warmup_steps=10), ToyPairs()
    (before,) = trainer(tmp_path, limit_val_batches=1.0).validate(task, data)
    run = trainer(tmp_path, max_steps=num_steps)
    run.fit(task, data)
    (after,) = trainer(tmp_path, limit_val_batches=1.0).validate(task, data)
    assert before["val/retrieval_r1"] < 0.3  # chance is 1 / 16
    assert after["val/retrieval_r1"] > 0.9
    logged = run.callback_metrics
    assert logged["train/contrastive"] == logged["train/loss"]
    assert logged["train/scale"] > 1
    assert logged["train/image_norm"] > 0
    assert logged["train/text_norm"] > 0


def test_scale_and_bias_start_where_the_papers_start_them():
    assert build(Clip()).towers.scale().item() == pytest.approx(1 / 0.07)
    assert build(Clip()).towers.bias is None
    towers = build(SigLip()).towers
    assert (towers.scale().item(), towers.bias.item()) == pytest.approx((10, -10))


def test_scale_stays_at_100(tmp_path):
    task = build(Clip(initial_scale=99.9), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    task.towers.log_scale.data += 5
    assert task.towers.scale().item() == pytest.approx(100)
    trainer(tmp_path).fit(task, ToyPairs())
    # Back at the maximum, from where a gradient can lower it.
    assert task.towers.log_scale.item() == pytest.approx(math.log(100))
    task.towers.log_scale.grad = None
    task.towers.scale().backward()
    assert task.towers.log_scale.grad.item() == pytest.approx(100, rel=1e-5)


def test_objective_is_told_every_optimizer_step_once(tmp_path):
    objective = Counting()
    task = build(
        objective,
        num_classes=7,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        schedule=lambda step, total_steps: 1.0,
    )
    run = trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    run.fit(task, ToyPairs(num_samples=16, batch_size=4))
    assert objective.built == 7
    # Of a loss with slope 3, halved over two batches that are added up: after the step, not before it.
    assert objective.steps == [(step, 3, pytest.approx(-1.5 * step)) for step in (1, 2, 3)]
    logged = run.callback_metrics
    assert logged["train/loss"] == logged["train/first"] + logged["train/second"]
    assert logged["train/depth"] == 3


def test_objective_with_two_views_needs_them(tmp_path):
    with pytest.raises(ValueError, match="Counting: the batch has no `other_image`, expected two views"):
        trainer(tmp_path).fit(build(Counting(num_views=2)), ToyPairs())
    trainer(tmp_path).fit(build(Counting(num_views=2)), ToyPairs(views=2))


def test_only_matrices_are_decayed(tmp_path):
    task = build(SigLip())
    run = trainer(tmp_path)
    run.fit(task, ToyPairs())
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decayed, free = (
        {
            names[id(parameter)]
            for group in run.optimizers[0].param_groups
            if (group["weight_decay"] > 0) == kind
            for parameter in group["params"]
        }
        for kind in (True, False)
    )
    assert decayed | free == set(names.values())
    assert {"model.log_scale", "model.bias", "model.text.encoder.final_layer_norm.weight"} <= free
    assert {"model.text.encoder.embeddings.position_embedding.weight", "model.head.fc.weight"} <= decayed


def test_frozen_stages_compile_and_averages_work_as_in_other_tasks(tmp_path):
    task = build(frozen_stages=1, drop_path_rate=0.5)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    averages = EMA(decay=0.5)
    run = trainer(tmp_path, callbacks=[averages], limit_val_batches=1.0)
    run.fit(task, ToyPairs())
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if name.startswith(("model.backbone.stem.", "model.backbone.stages.0."))}
    assert {"model.log_scale", "model.head.fc.weight", "model.text.project.weight"} <= moved
    assert averages.average.keys() == before.keys()
    assert not torch.equal(averages.average["model.head.fc.weight"], task.model.head.fc.weight)
    compiled = build(compile=True)
    compiled.trainer = trainer(tmp_path)
    compiled.setup("fit")
    assert compiled.backbone._compiled_call_impl is not None
    assert compiled.state_dict().keys() == before.keys()


def save(task, tmp_path, name="first.ckpt", **options):
    run = trainer(tmp_path, **options)
    run.fit(task, ToyPairs())
    run.save_checkpoint(tmp_path / name)
    return str(tmp_path / name)


def started(task, tmp_path):
    trainer(tmp_path, limit_train_batches=0).fit(task, ToyPairs())
    return task


@pytest.mark.parametrize("averaged", [False, True])
def test_classifier_starts_from_both_parts_of_the_image_tower(tmp_path, averaged):
    source = build()
    callbacks = [EMA(decay=0.5)] if averaged else []
    path = save(source, tmp_path, callbacks=callbacks)
    weights = torch.load(path, weights_only=False)["state_dict"]
    torch.manual_seed(1)
    start = InitCheckpoint(source=path, head="new", new_head_scale=0.0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    classifier = Classification(internimage_debug(), 5, optimizer, head=HEAD, init_checkpoint=start)
    report = classifier.load_weights(start)
    kept = {"head.fc.weight", "head.fc.bias"}
    own = classifier.model.state_dict()
    assert report.taken.keys() == own.keys() - kept
    for key in report.taken:
        assert torch.equal(own[key], weights[f"model.{key}"]), key
    assert own["head.fc.weight"].shape == (5, 24)
    assert not own["head.fc.weight"].any()


def test_classifier_starts_from_a_run_whose_objective_keeps_a_backbone(tmp_path):
    class Keeping(Counting):
        def build(self, towers, num_classes):
            self.target = internimage_debug().requires_grad_(False)

    path = save(build(Keeping()), tmp_path)
    keys = torch.load(path, weights_only=False)["state_dict"].keys()
    assert {"objective.target.stem.conv1.weight", "model.backbone.stem.conv1.weight"} <= keys
    task = Classification(internimage_debug(), 5, partial(torch.optim.AdamW, lr=1e-3), head=HEAD)
    report = task.load_weights(InitCheckpoint(source=path, head="new"))
    assert {name.partition(".")[0] for name in report.taken.values()} == {"model"}


def test_pretraining_starts_from_an_earlier_run(tmp_path):
    source = build(SigLip())
    path = save(source, tmp_path)
    torch.manual_seed(1)
    same = started(build(SigLip(), init_checkpoint=InitCheckpoint(source=path)), tmp_path)
    for key, value in source.model.state_dict().items():
        assert torch.equal(same.model.state_dict()[key], value), key
    # Another objective has a scale of its own, and no bias.
    other = started(build(Clip(), init_checkpoint=InitCheckpoint(source=path)), tmp_path)
    assert torch.equal(other.model.text.project.weight, source.model.text.project.weight)
    assert other.towers.scale().item() == pytest.approx(1 / 0.07)
    # A new head keeps the text tower and the last layer.
    new = started(build(SigLip(), init_checkpoint=InitCheckpoint(source=path, head="new")), tmp_path)
    assert torch.equal(new.model.head.pool.q.weight, source.model.head.pool.q.weight)
    assert torch.equal(new.model.text.project.weight, build(SigLip()).model.text.project.weight)
    assert torch.equal(new.model.head.fc.weight, build(SigLip()).model.head.fc.weight)
    deeper = build(SigLip(), text=partial(ClipText, **SMALL | {"num_layers": 2}), init_checkpoint=same.init_checkpoint)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit two towers.*text\.encoder\.encoder\.layers\.1"):
        started(deeper, tmp_path)


def test_pretraining_starts_from_a_classifier(tmp_path):
    source = Classification(internimage_debug(), 4, partial(torch.optim.AdamW, lr=1e-3), head=HEAD)
    run = trainer(tmp_path, limit_train_batches=0)
    run.fit(source, ToyPairs(num_classes=4))
    run.save_checkpoint(tmp_path / "classifier.ckpt")
    path = str(tmp_path / "classifier.ckpt")
    task = started(build(init_checkpoint=InitCheckpoint(source=path, head="new")), tmp_path)
    assert torch.equal(task.model.head.pool.q.weight, source.model.head.pool.q.weight)
    assert torch.equal(task.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)
    with pytest.raises(CheckpointError, match="head='new'"):
        started(build(init_checkpoint=InitCheckpoint(source=path)), tmp_path)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, half, rest = build(), build(), build()
    trainer(tmp_path, max_steps=4).fit(whole, ToyPairs())
    first = trainer(tmp_path, max_steps=4, max_epochs=2)
    first.fit(half, ToyPairs())
    assert first.global_step == 2
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=4).fit(rest, ToyPairs(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert not torch.equal(half.model.log_scale, whole.model.log_scale)
    for key, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[key], value), key


def test_wrong_settings_say_what_to_do(tmp_path):
    for make, message in (
        (lambda: Clip(label_smoothing=2.0), "Clip: label_smoothing is 2.0, expected 0 to 1"),
        (lambda: SigLip(initial_scale=0.0), "SigLip: initial_scale is 0.0, expected a number above 0"),
        (lambda: build(embed_dim=0), "Towers: embed_dim is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=r"class_prompts of the data are \(3, 2, 8\) .* with 4 classes"):
        trainer(tmp_path, limit_val_batches=1.0).validate(build(num_classes=4), ToyPairs(num_classes=3))


def test_any_head_and_text_tower_can_be_put_in(tmp_path):
    class Bag(torch.nn.EmbeddingBag):
        def forward(self, text, length):
            return super().forward(text)

    task = build(head=ConvHead, text=lambda dim: Bag(VOCABULARY, dim), embed_dim=12)
    trainer(tmp_path).fit(task, ToyPairs())
    assert task.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 12)
