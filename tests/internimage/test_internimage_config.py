import pytest
from golden_models import config

from internimage import InternImageConfig
from internimage.variants import CONFIGS

GOOD = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}


@pytest.mark.parametrize("size", CONFIGS)
def test_released_configs_are_the_authors(size):
    assert CONFIGS[size] == config(size)


@pytest.mark.parametrize("size", CONFIGS)
def test_only_g_breaks_the_stacking_rules(size):
    assert bool(CONFIGS[size].broken_rules()) == (size == "G")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"groups": (2, 2, 4, 8)}, r"channels per group are \[8, 16, 16, 16\]"),
        ({"depths": (2, 2, 48, 4)}, r"depths are \(2, 2, 48, 4\), expected the same in stages 1, 2 and 4"),
        ({"depths": (1, 2, 2, 1)}, "expected the same in stages 1, 2 and 4"),
        ({"depths": (3, 3, 2, 3)}, "expected stage 3 to be at least as deep as stage 1"),
    ],
)
def test_a_shape_that_breaks_a_stacking_rule_is_refused_unless_asked_for(change, rule):
    with pytest.raises(ValueError, match=rule):
        InternImageConfig(**{**GOOD, **change})
    InternImageConfig(**{**GOOD, **change}, strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 17}, "channels is 17"),
        ({"channels": 0}, "channels is 0"),
        ({"depths": (1, 1, 1)}, r"depths is \(1, 1, 1\)"),
        ({"depths": (1, 1, 0, 1)}, "depths is"),
        ({"groups": (0, 2, 4, 8)}, "groups is"),
        ({"groups": (3, 6, 12, 24)}, r"stage 0 is 16 channels wide, which groups\[0\]=3 does not divide"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"dw_kernel_size": 2}, "dw_kernel_size is 2"),
        ({"kernel_size": 1, "remove_center": True}, "remove_center"),
        ({"post_norm_blocks": (2,)}, r"post_norm_blocks is \(2,\).*0 to 1"),
        ({"post_norm_blocks": (1, 0)}, "ascending"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"offset_scale": -1.0}, "offset_scale is -1.0"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0"),
        ({"norm": "GN"}, "norm is 'GN'"),
        ({"activation": "SiLU"}, "activation is 'SiLU'"),
        ({"res_post_norm": True, "post_norm": True}, "res_post_norm excludes post_norm"),
        ({"res_post_norm": True, "layer_scale": 1.0}, "res_post_norm excludes"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_value_is_refused_by_name(change, message, strict):
    with pytest.raises(ValueError, match=message):
        InternImageConfig(**{**GOOD, **change}, strict=strict)


def test_a_config_cannot_change_and_can_be_a_key():
    good = InternImageConfig(**GOOD)
    with pytest.raises(AttributeError):
        good.channels = 32
    assert {good: 1}[InternImageConfig(**GOOD)] == 1
    assert good.widths == (16, 32, 64, 128)
