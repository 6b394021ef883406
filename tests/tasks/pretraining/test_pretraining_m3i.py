from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from internimage import ClipProjectorHead, ConvHead, internimage_debug
from tasks.pretraining import M3I, Pretraining, Towers
from tasks.pretraining.m3i_category import Categories
from tasks.pretraining.m3i_dense import dense_loss, spread
from tasks.pretraining.m3i_mixing import mix, of_partner
from tasks.pretraining.m3i_positions import grid_positions, relative_positions

TERMS = ("same_view", "other_view", "text", "category")
HEAD = partial(ClipProjectorHead, hidden_dim=32, embed_dim=24, num_heads=4)


class Words(nn.Module):
    """The mean of the vectors of a text's tokens, whatever the length."""

    def __init__(self, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(50, embed_dim)

    def forward(self, text, length):
        return self.embedding(text).mean(1)


def objective(*terms, **options):
    weights = {f"{term}_weight": float(term in terms) for term in TERMS}
    return M3I(**(weights | {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4} | options))


def build(*terms, head=HEAD, num_classes=5, **options):
    torch.manual_seed(0)
    towers = Towers(internimage_debug(), 16, head, Words)
    m3i = objective(*terms, **options)
    m3i.build(towers, num_classes)
    return towers, m3i


def make_batch(size=4, height=64, width=64):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(size, 2, 2, generator=generator) * 0.4
    side = torch.rand(size, 2, 2, generator=generator) * 0.3 + 0.3
    flip = torch.randint(2, (size, 2, 1), generator=generator)
    return {
        "image": torch.randn(size, 3, height, width, generator=generator),
        "other_image": torch.randn(size, 3, height, width, generator=generator),
        "view": torch.cat([corner, side, flip], -1),
        "text": torch.randint(50, (size, 6), generator=generator),
        "text_length": torch.full((size,), 6),
        "label": torch.tensor([row % 5 if row % 3 else -1 for row in range(size)]),
        "source": torch.zeros(size, dtype=torch.int64),
        "valid": torch.ones(size, dtype=torch.bool),
        "key": [str(row) for row in range(size)],
    }


def losses(towers, m3i, batch, seed=7):
    torch.manual_seed(seed)
    return m3i.losses(towers, batch)


def mixed_of(batch, seed=7):
    torch.manual_seed(seed)
    return mix(batch["image"], 0.5, 16)


def test_the_token_terms_are_those_of_the_two_images_of_a_mixed_one():
    towers, m3i = build("same_view", "other_view")
    batch = make_batch(size=3, height=96, width=64)
    terms, mixed = losses(towers, m3i, batch), mixed_of(batch)
    tokens = towers.head.tokens(towers.backbone(mixed.image)).flatten(2).transpose(1, 2)
    grid = grid_positions(6, 4)
    same, other = [], []
    for row in range(3):  # one image at a time
        before = (row - 1) % 3
        own, partner = mixed.own[row], mixed.partner[row]
        itself = torch.cat([grid, torch.zeros(24, 2)], 1)[None]
        there = relative_positions(*batch["view"][before].split(1), 6, 4)
        same.append(m3i.decoder(tokens[row : row + 1, own], grid[own][None], itself))
        other.append(m3i.decoder(tokens[row : row + 1, partner], grid[partner][None], there))

    def target(image):
        tokens = towers.head.tokens(towers.backbone(image)).flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, (32,)).detach()

    everywhere = torch.ones(3)
    expected = {
        "same_view": dense_loss(torch.cat(same), target(batch["image"]), everywhere, decorrelation=0.02),
        "other_view": dense_loss(
            torch.cat(other), target(batch["other_image"])[[2, 0, 1]], everywhere, decorrelation=0.02
        ),
    }
    # Float32 through two networks, one image at a time or three.
    torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)


def test_the_text_term_is_the_cross_entropy_with_both_texts_in_their_shares():
    towers, m3i = build("text")
    batch = make_batch(size=5, width=96)  # 6 cells, of which 3 are the partner's
    terms, mixed = losses(towers, m3i, batch), mixed_of(batch)
    image = towers.encode_image(mixed.image)
    text = towers.encode_text(batch["text"], batch["text_length"])
    logits = towers.scale() * image @ text.T
    # Mixed image i shows texts i and i - 1, each half.
    share = torch.zeros(5, 5)
    for row in range(5):
        share[row, row] += 0.5
        share[row, (row - 1) % 5] += 0.5
    find_text = -(share * logits.log_softmax(1)).sum(1).mean()
    find_image = -(share * logits.log_softmax(0)).sum(0).mean()
    torch.testing.assert_close(terms["text"], (find_text + find_image) / 2)
    assert terms.keys() == {"text"}


def test_the_category_term_counts_labels_by_the_share_of_their_image():
    towers, m3i = build("category", mix_ratio=0.25)
    batch = make_batch(size=4)
    batch["label"] = torch.tensor([3, -1, 1, -1])
    torch.manual_seed(7)
    mixed = mix(batch["image"], 0.25, 16)
    terms = losses(towers, m3i, batch)
    cosines = towers.encode_image(mixed.image) @ F.normalize(m3i.categories.table, dim=-1).T
    log_probability = (towers.scale() * cosines).log_softmax(1)
    total = 0.75 * (log_probability[0, 3] + log_probability[2, 1])
    total += 0.25 * (log_probability[1, 3] + log_probability[3, 1])
    torch.testing.assert_close(terms["category"], -total / 2)


def test_weights_multiply_terms():
    batch = make_batch()
    plain = losses(*build(*TERMS), batch)
    weighted = losses(*build(*TERMS, text_weight=0.5, same_view_weight=3.0), batch)
    assert set(plain) == set(TERMS)
    for name, factor in (("text", 0.5), ("same_view", 3.0), ("other_view", 1.0), ("category", 1.0)):
        torch.testing.assert_close(weighted[name], factor * plain[name], msg=name)


@pytest.mark.parametrize("terms", [("same_view",), ("other_view",), ("text",), ("category",), ("text", "other_view")])
def test_a_term_that_is_off_costs_nothing_and_leaves_nothing_untrained(terms):
    towers, m3i = build(*terms)
    calls = Counter()

    def count(name, module):
        if module is not None:
            module.register_forward_hook(lambda *_: calls.update([name]))

    parts = {"online": towers.backbone, "text": towers.text, "pool": towers.head.pool}
    for name, module in (parts | {"decoder": m3i.decoder, "target": m3i.target, "table": m3i.categories}).items():
        count(name, module)
    sum(losses(towers, m3i, make_batch()).values()).backward()
    tokens = len({"same_view", "other_view"}.intersection(terms))
    expected = {
        "online": 1,
        "decoder": tokens,
        "target": tokens,
        "text": int("text" in terms),
        "table": int("category" in terms),
        "pool": int(bool({"text", "category"}.intersection(terms))),
    }
    assert calls == {name: number for name, number in expected.items() if number}
    assert m3i.num_views == 1 + ("other_view" in terms)
    # DistributedDataParallel would wait for a gradient that does not come.
    for name, parameter in [*towers.named_parameters(), *m3i.named_parameters()]:
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not any(parameter.requires_grad for parameter in (m3i.target.parameters() if m3i.target else ()))


@pytest.mark.parametrize(("size", "height", "width"), [(1, 64, 64), (3, 96, 160), (5, 32, 64), (2, 224, 224)])
def test_any_batch_and_image_of_whole_cells(size, height, width):
    towers, m3i = build(*TERMS)
    for name, term in losses(towers, m3i, make_batch(size, height, width)).items():
        assert term.isfinite(), name
        assert term.ndim == 0, name


def test_losses_are_float32_under_autocast():
    towers, m3i = build(*TERMS)
    with torch.autocast("cpu", torch.bfloat16):
        terms = losses(towers, m3i, make_batch())
    plain = losses(towers, m3i, make_batch())
    for name in TERMS:
        assert terms[name].dtype == torch.float32, name
        # The networks before the losses do round to bfloat16's 8 bits.
        torch.testing.assert_close(terms[name], plain[name], rtol=0.05, atol=0, msg=name)


def test_rows_that_are_not_valid_count_nowhere():
    towers, m3i = build(*TERMS)
    batch = make_batch(size=5)
    batch["valid"][3] = False
    before = losses(towers, m3i, batch)
    for key in ("image", "other_image"):
        batch[key][3] = 100.0
    batch["text"][3], batch["label"][3] = 1, 4
    changed = losses(towers, m3i, batch)
    for name in TERMS:
        assert changed[name] == before[name], name
        assert before[name] > 0, name
    batch["valid"][:] = False
    assert all(term == 0 for term in losses(towers, m3i, batch).values())


def test_the_momentum_is_that_of_the_step_and_is_logged():
    towers, m3i = build("same_view", momentum=0.9)
    batch = make_batch()
    losses(towers, m3i, batch)
    assert m3i.meters().keys() == {"momentum", "target_std"}
    name = "backbone.stem.conv1.weight"
    old = m3i.target.get_parameter(name).clone()
    with torch.no_grad():
        towers.get_parameter(name).add_(1.0)
    m3i.after_step(towers, 50, 100)
    torch.testing.assert_close(m3i.target.get_parameter(name), old + 0.05)
    losses(towers, m3i, batch)
    assert m3i.meters()["momentum"] == pytest.approx(0.95)
    expected = spread(m3i.target(batch["image"]), torch.ones(4))
    torch.testing.assert_close(m3i.meters()["target_std"], expected)
    m3i.after_step(towers, 100, 100)
    torch.testing.assert_close(m3i.target.get_parameter(name), old + 0.05)


def test_a_resumed_run_logs_the_momentum_of_the_last_update():
    (towers, m3i), (_, resumed) = (build("same_view", momentum=0.9) for _ in range(2))
    m3i.after_step(towers, 50, 100)
    resumed.load_state_dict(m3i.state_dict())
    losses(towers, resumed, make_batch())
    assert resumed.meters()["momentum"] == pytest.approx(0.95)


def test_thirty_steps_reduce_every_term_and_targets_stay_different():
    towers, m3i = build(*TERMS, initial_scale=10.0)
    batch = make_batch(size=6)
    parameters = [p for p in (*towers.parameters(), *m3i.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    def mean_terms():
        with torch.no_grad():  # over several mixtures, since one alone is easier or harder
            runs = [losses(towers, m3i, batch, seed) for seed in range(100, 104)]
        return {name: sum(run[name].item() for run in runs) / len(runs) for name in TERMS}

    before, start = mean_terms(), m3i.meters()["target_std"]
    for step in range(1, 31):
        optimizer.zero_grad()
        sum(losses(towers, m3i, batch, step).values()).backward()
        optimizer.step()
        m3i.after_step(towers, step, 30)
    after, end = mean_terms(), m3i.meters()["target_std"]
    for name in TERMS:
        assert after[name] < 0.9 * before[name], (name, before, after)
    assert end > 0.5 * start > 0.05


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="expected at least 0, and one of them above"):
        objective()
    with pytest.raises(ValueError, match=r"mix_ratio is 1\.0"):
        objective("text", mix_ratio=1.0)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        objective("text", momentum=1.5)
    with pytest.raises(ValueError, match=r"category_weight is 1\.0 and the data has no classes"):
        build("category", num_classes=None)
    with pytest.raises(ValueError, match="head is a ConvHead, expected a ClipProjectorHead"):
        build("text", head=ConvHead)
    towers, m3i = build("other_view")
    batch = make_batch()
    del batch["view"]
    with pytest.raises(ValueError, match="lacks `other_image` or `view`"):
        m3i.losses(towers, batch)


def test_the_task_gives_targets_neither_steps_nor_gradients():
    task = Pretraining(
        internimage_debug(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        objective=objective(*TERMS),
        head=HEAD,
        text=Words,
        embed_dim=16,
        num_classes=5,
    )
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("objective.target.") for name in trained)
    assert {"objective.decoder.mask_token", "objective.categories.table", "model.text.embedding.weight"} <= trained
    assert "objective.target.started" in task.state_dict()


class Terms(nn.Module):
    """A small network with the two losses that need all processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.predict = nn.Linear(8, 8)
        self.categories = Categories(3, 8)

    def forward(self, tokens, target, label, weight):
        prediction = self.predict(tokens)
        dense = dense_loss(prediction, target, weight, decorrelation=0.5)
        unit = F.normalize(prediction[:, 0], dim=-1)
        return dense + self.categories(unit, label, weight, torch.tensor(5.0))


def whole():
    generator = torch.Generator().manual_seed(3)
    tokens, target = torch.randn(2, 8, 5, 8, generator=generator)
    # Processes with different numbers of images that count, and of labels.
    weight = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.25])
    return tokens, target, torch.tensor([0, 1, -1, 2, 1, 2, -1, 0]), weight


def compare_two(rank, folder):
    torch.set_num_threads(1)
    net = Terms()
    expected = net(*whole())
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared = DistributedDataParallel(Terms())
    part = shared(*(tensor[4 * rank : 4 * rank + 4] for tensor in whole()))
    part.backward()
    total = part.detach().clone()
    distributed.all_reduce(total)
    # The same float32 sums in another order.
    torch.testing.assert_close(total / 2, expected.detach())
    for name, parameter in shared.module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    distributed.destroy_process_group()


def test_two_processes_share_second_moments_and_means(tmp_path):
    torch.multiprocessing.spawn(compare_two, (tmp_path,), nprocs=2)


def test_partners_are_the_rows_before():
    assert of_partner(torch.arange(3)).tolist() == [2, 0, 1]
