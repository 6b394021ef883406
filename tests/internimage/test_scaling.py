import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internimage import InternImage
from internimage.scaling import scaled, stacked, table
from internimage.variants import CONFIGS

ROOT = Path(__file__).parents[2]


def shape(config):
    return config.channels, config.depths, config.groups


def num_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in InternImage(config).parameters())


def test_the_origin_of_scaling_is_t():
    assert scaled(0) == CONFIGS["T"]


# phi = log2 of the paper's sizes over T's: 97 M, 335 M and 30 M.
@pytest.mark.parametrize(("size", "phi"), [("B", 1.69), ("XL", 3.48)])
def test_two_released_sizes_fall_out_exactly(size, phi):
    assert shape(scaled(phi)) == shape(CONFIGS[size])


@pytest.mark.parametrize("phi", [step / 4 for step in range(-8, 29)])
@pytest.mark.parametrize("channels_per_group", [16, 32])
def test_any_phi_gives_a_config_within_the_rules(phi, channels_per_group):
    config = scaled(phi, channels_per_group=channels_per_group)
    assert config.strict
    assert config.broken_rules() == []
    assert config.channels // config.groups[0] == channels_per_group


def test_each_unit_of_phi_doubles_the_parameters():
    # 1.09 x 1.36^1.99 = 2.01 for one unit; rounding to whole groups and blocks moves a size by up to 20 %.
    for phi in (3, 5, 7):
        assert num_parameters(scaled(phi)) / num_parameters(scaled(0)) == pytest.approx(2.01**phi, rel=0.2)


def test_scaling_keeps_the_options_of_its_origin():
    base = CONFIGS["L"]
    config = scaled(1, base=base)
    assert (config.post_norm, config.offset_scale, config.layer_scale) == (True, 2.0, 1e-5)
    assert config.channels > base.channels


def test_four_numbers_make_a_shape():
    config = stacked(channels=112, channels_per_group=16, depth=4, deep_depth=21, base=CONFIGS["B"])
    assert config == CONFIGS["B"]


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="channels=100 is no multiple of channels_per_group=16"):
        stacked(channels=100, channels_per_group=16, depth=4, deep_depth=18)
    with pytest.raises(ValueError, match="at least as deep"):
        stacked(channels=64, channels_per_group=16, depth=4, deep_depth=3)
    with pytest.raises(ValueError, match="Take a larger phi"):
        scaled(-30)
    with pytest.raises(ValueError, match="the origin breaks the stacking rules"):
        scaled(1, base=CONFIGS["G"])


def test_the_table_in_the_docs_is_what_the_command_prints():
    command = [sys.executable, "-m", "internimage.scaling"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stderr == ""
    assert printed.stdout == table()
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if line.startswith("|")) == printed.stdout
