import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import internimage
from internimage import (
    Classifier,
    ClipProjectorHead,
    ConvHead,
    InternImage,
    InternImageConfig,
    init_weights,
    materialise,
)
from internimage.layers import Block, DCNv3, LayerScale
from internimage.variants import CONFIGS

TINY = InternImageConfig(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8))
OPTIONS = {
    "pre-norm": TINY,
    "post-norm with layer scale": replace(TINY, post_norm=True, layer_scale=1e-5, offset_scale=2.0),
    "options of H": replace(
        TINY, res_post_norm=True, center_feature_scale=True, dw_kernel_size=5, post_norm_blocks=(0, 1)
    ),
    "options of G": replace(TINY, post_norm=True, center_feature_scale=True, dw_kernel_size=5, post_norm_blocks=(1,)),
    "batch norm and ReLU": replace(TINY, norm="BN", activation="ReLU"),
    "5x5 without center": replace(TINY, kernel_size=5, remove_center=True),
}
every_option = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)


def image(batch=2, height=64, width=96, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def scattered(model, seed=0):
    """Move every parameter off its start value, so that no branch is silent and samples move."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


# Counted on the authors' models.
PARAMETERS = {
    "t": (29_918_424, 28_754_672),
    "s": (50_079_880, 48_502_560),
    "b": (97_461_832, 94_909_920),
    "l": (223_334_810, 218_952_370),
    "xl": (334_819_780, 328_971_228),
    "h": (1_089_636_760, 1_073_122_480),
    "g": (3_076_373_352, 3_052_781_184),
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_variants_have_the_authors_parameter_counts(size):
    with torch.device("meta"):
        backbone = getattr(internimage, f"internimage_{size}")()
        model = Classifier(backbone, 1000, ClipProjectorHead if size in ("h", "g") else ConvHead)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (model, backbone)]
    assert counts == list(PARAMETERS[size])


def test_layer_scale_switches_by_argument():
    with torch.device("meta"):
        plain, dense = internimage.internimage_t(), internimage.internimage_t(layer_scale=1.0)
    added = set(dense.state_dict()) - set(plain.state_dict())
    assert added == {
        f"stages.{stage}.blocks.{block}.scale{number}.weight"
        for stage, depth in enumerate((4, 4, 18, 4))
        for block in range(depth)
        for number in (1, 2)
    }


def test_h_refuses_layer_scale():
    with pytest.raises(ValueError, match="res_post_norm excludes"):
        internimage.internimage_h(layer_scale=1.0)


@every_option
@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 71), (1, 40)])
def test_features_follow_widths_and_strides_for_any_size(config, height, width):
    model = InternImage(config).eval()
    features = model(image(2, height, width))
    assert model.widths == (16, 32, 64, 128)
    assert model.strides == (4, 8, 16, 32)
    for feature, channels, stride in zip(features, model.widths, model.strides, strict=True):
        assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))
        assert feature.isfinite().all()


def test_features_are_channels_last_in_memory():
    features = internimage.internimage_debug()(image())
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


@every_option
def test_an_image_does_not_depend_on_the_others_of_its_batch(config):
    model = scattered(InternImage(config)).double().eval()
    batch = image(3, 40, 56, torch.float64)
    for together, alone in zip(model(batch), model(batch[1:2]), strict=True):
        # Float64 rounding of sums in another order, times a few layers.
        torch.testing.assert_close(together[1:2], alone, rtol=1e-10, atol=1e-10)


def test_out_indices_choose_features_and_spare_the_stages_behind_them():
    whole, part = InternImage(TINY).eval(), InternImage(TINY, out_indices=[0, 2]).eval()
    part.load_state_dict(whole.state_dict())
    part.stages[3] = nn.Identity()  # never reached
    assert (part.widths, part.strides) == ((16, 64), (4, 16))
    found, expected = part(image()), whole(image())
    torch.testing.assert_close(found, [expected[0], expected[2]], rtol=0, atol=0)


@every_option
def test_every_parameter_gets_a_gradient(config):
    model = scattered(InternImage(config))
    sum(feature.square().mean() for feature in model(image())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@every_option
def test_layer_groups_hold_every_parameter_once_from_stem_to_last_block(config):
    model = InternImage(config)
    groups = model.layer_groups()
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 1 + sum(config.depths)
    assert all(name.startswith("stem.") for name in groups[0])
    blocks = [(stage, block) for stage, depth in enumerate(config.depths) for block in range(depth)]
    for group, (stage, block) in zip(groups[1:], blocks, strict=True):
        assert f"stages.{stage}.blocks.{block}.dcn.offset.weight" in group


def test_norms_and_downsamples_stand_in_the_documented_layer_group():
    groups = InternImage(OPTIONS["options of H"]).layer_groups()
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    block = {
        re.match(r"stages\.(\d)\.blocks\.(\d)", name).groups(): number
        for name, number in group_of.items()
        if "blocks" in name
    }
    for stage in (0, 1, 2):
        first_of_next = block[str(stage + 1), "0"]
        assert group_of[f"stages.{stage}.norm.weight"] == first_of_next
        assert group_of[f"stages.{stage + 1}.downsample.conv.weight"] == first_of_next
    assert group_of["stages.2.post_norms.0.weight"] == block["2", "0"]
    assert group_of["stages.2.post_norms.1.weight"] == block["2", "1"]
    assert group_of["stages.3.norm.weight"] == block["3", "0"] == len(groups) - 1


def test_drop_path_grows_linearly_over_the_blocks():
    model = InternImage(TINY, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "p", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_skips_both_branches_of_an_image_or_scales_them():
    block = scattered(Block(16, 1, 0.5, TINY)).double()
    x = torch.randn(64, 4, 4, 16, dtype=torch.float64)
    torch.manual_seed(0)
    y = block(x)
    unchanged = (y == x).flatten(1).all(1)
    # Each branch is dropped with probability 1/2: a quarter of the images pass unchanged, 16 +- 3.5 of 64.
    assert 4 <= unchanged.sum() <= 28
    branch = block.dcn(block.norm1(x))
    once = x + 2 * branch  # kept branches are divided by the probability of keeping them
    assert torch.isclose(y, once).flatten(1).all(1).any()
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize("config", [config for config in OPTIONS.values() if config.norm == "LN"])
def test_activation_checkpointing_changes_no_number_and_runs_blocks_twice(config):
    plain = scattered(InternImage(config, drop_path_rate=0.3)).double()
    saving = InternImage(config, drop_path_rate=0.3, activation_checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    results, calls = [], []
    for model in (plain, saving):
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
        torch.manual_seed(3)
        x = image(dtype=torch.float64).requires_grad_()
        sum(feature.sin().sum() for feature in model(x)).backward()
        results.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert len(calls) == 5 + 2 * 5


def test_activation_checkpointing_refuses_batch_norm():
    with pytest.raises(ValueError, match="running statistics"):
        InternImage(OPTIONS["batch norm and ReLU"], activation_checkpointing=True)


@pytest.mark.parametrize(("kernel_size", "remove_center"), [(3, False), (3, True), (5, False)])
@pytest.mark.parametrize("gated", [False, True])
def test_a_fresh_dcnv3_averages_its_neighbourhood(kernel_size, remove_center, gated):
    config = replace(
        TINY, kernel_size=kernel_size, remove_center=remove_center, center_feature_scale=gated, dw_kernel_size=5
    )
    layer = DCNv3(16, 4, config).double()
    x = torch.randn(2, 7, 9, 16, dtype=torch.float64)
    value = layer.input_proj(x)
    points = kernel_size**2
    mean = F.avg_pool2d(value.permute(0, 3, 1, 2), kernel_size, 1, kernel_size // 2).permute(0, 2, 3, 1)
    if remove_center:
        mean = (points * mean - value) / (points - 1)
    expected = layer.output_proj((mean + value) / 2 if gated else mean)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_weights_start_as_the_authors_do():
    torch.manual_seed(0)
    model = InternImage(replace(CONFIGS["T"], depths=(1, 1, 1, 1), layer_scale=0.3))
    block = model.stages[2].blocks[0]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert module.weight.eq(1).all()
            assert not module.bias.any()
        if isinstance(module, LayerScale):
            assert module.weight.eq(0.3).all()
    # 2.6e5 samples: the standard deviation is known to 0.14 %, five times that allowed.
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=7e-3)
    # Xavier: uniform within sqrt(6 / (256 + 256)), standard deviation 1/16.
    assert block.dcn.input_proj.weight.std().item() == pytest.approx(1 / 16, rel=1e-2)
    assert block.dcn.input_proj.weight.abs().max().item() <= (6 / 512) ** 0.5
    assert not block.dcn.offset.weight.any()
    assert not block.dcn.mask.weight.any()


@every_option
def test_init_weights_overwrites_everything(config):
    model = Classifier(InternImage(config), 5)
    fresh = [tensor.clone() for tensor in model.state_dict().values()]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    init_weights(model)
    for (name, tensor), start in zip(model.state_dict().items(), fresh, strict=True):
        assert tensor.isfinite().all(), name
        # Constant at the start means a fixed start value; the others are random.
        if start.numel() > 1 and start.unique().numel() == 1:
            assert torch.equal(tensor, start), name


def test_a_model_from_the_meta_device_starts_like_any_other():
    with torch.device("meta"):
        late = Classifier(internimage.internimage_debug(), 10)
    early = Classifier(internimage.internimage_debug(), 10)
    torch.manual_seed(1)
    assert materialise(late) is late
    torch.manual_seed(1)
    init_weights(early)
    torch.testing.assert_close(late.state_dict(), early.state_dict(), rtol=0, atol=0)
    assert late(image()).shape == (2, 10)


def test_materialise_refuses_a_layer_that_cannot_start_itself():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Stubborn())
    with pytest.raises(TypeError, match="1 is a Stubborn"):
        materialise(model)


@every_option
def test_bfloat16_autocast_trains(config):
    model = InternImage(config)
    with torch.no_grad():
        expected = model(image())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image())
        loss = sum(feature.float().square().mean() for feature in found)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    for feature, reference in zip(found, expected, strict=True):
        # bfloat16 keeps 8 bits (0.4 %); a dozen layers of it stay within a few percent of the spread.
        assert (feature.float() - reference).abs().mean() < 0.05 * reference.std()


@pytest.mark.slow
@pytest.mark.parametrize("config", [OPTIONS["post-norm with layer scale"], OPTIONS["options of H"]], ids=["L", "H"])
def test_the_backbone_compiles_into_one_graph(config):
    torch.compiler.reset()
    model = InternImage(config).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        # Float32 rounding of fused kernels.
        torch.testing.assert_close(compiled(image()), model(image()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 64, 64, 3), (1, 3, 0, 64)])
def test_a_wrong_image_is_named(shape):
    with pytest.raises(ValueError, match=re.escape(f"image has shape {shape}, expected (B, 3, H, W)")):
        internimage.internimage_debug()(torch.zeros(shape))


@pytest.mark.parametrize("indices", [(), (0, 4), (1, 0), (2, 2), (-1,)])
def test_wrong_out_indices_are_named(indices):
    with pytest.raises(ValueError, match=re.escape(f"out_indices is {indices}")):
        InternImage(TINY, out_indices=indices)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_wrong_drop_path_rate_is_named(rate):
    with pytest.raises(ValueError, match=f"drop_path_rate is {rate}"):
        InternImage(TINY, drop_path_rate=rate)


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_importing_internimage_imports_no_lightning():
    code = "import sys, internimage, internimage.scaling; print([m for m in sys.modules if 'lightning' in m])"
    assert run_python(code).stdout.strip() == "[]"


def test_a_foreign_package_named_ops_is_refused(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").write_text("class CharmBase: ...\n")
    result = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import internimage")
    assert result.returncode != 0
    assert f"found {tmp_path}/ops/__init__.py, not the `ops` package of this project" in result.stderr


@pytest.mark.slow
def test_the_whole_h_is_built_once_in_memory_and_runs():
    code = """
import resource, torch
from internimage import Classifier, ClipProjectorHead, internimage_h, materialise
with torch.device("meta"):
    model = Classifier(internimage_h(), 1000, ClipProjectorHead)
materialise(model).eval()
with torch.no_grad():
    logits = model(torch.randn(1, 3, 64, 64))
assert logits.shape == (1, 1000) and logits.isfinite().all() and logits.std() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    # KiB. The parameters are 4.06 GiB; twice that would already be 8.1.
    assert int(result.stdout) < 6 * 2**20
