"""How InternImage grows: stacking rules and compound scaling (arXiv:2211.05778, section 3.2).

Four numbers make a shape: width C1, channels per group C', and depths L1 and L3. The rest follows from
C_i = 2^(i-1) C1, G_i = C_i / C' and L1 = L2 = L4 <= L3. Scaling by phi multiplies the total depth D = 3 L1 + L3 by
1.09^phi and the width C1 by 1.36^phi, so that each unit of phi doubles the parameters (1.09 x 1.36^1.99 = 2.01).

`python -m internimage.scaling` prints the table of docs/scaling.md.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from internimage.config import DEEP_STAGE, InternImageConfig
from internimage.model import InternImage
from internimage.variants import CONFIGS

DEPTH_FACTOR = 1.09
WIDTH_FACTOR = 1.36


def stacked(
    *,
    channels: int,
    channels_per_group: int,
    depth: int,
    deep_depth: int,
    base: InternImageConfig = CONFIGS["T"],
) -> InternImageConfig:
    """Build a config from the four free numbers of the stacking rules.

    Args:
        channels: C1.
        channels_per_group: C', in every stage; divides `channels`.
        depth: Blocks of stages 1, 2 and 4 (L1).
        deep_depth: Blocks of stage 3 (L3), at least `depth`.
        base: Gives all options but the shape.

    Raises:
        ValueError: The numbers break a rule.
    """
    if channels_per_group < 1 or channels % channels_per_group:
        raise ValueError(f"stacked: channels={channels} is no multiple of channels_per_group={channels_per_group}.")
    groups = channels // channels_per_group
    return replace(
        base,
        channels=channels,
        depths=(depth, depth, deep_depth, depth),
        groups=(groups, 2 * groups, 4 * groups, 8 * groups),
        strict=True,
    )


def scaled(
    phi: float, *, channels_per_group: int | None = None, base: InternImageConfig = CONFIGS["T"]
) -> InternImageConfig:
    """Scale a config by phi, with about 2^phi times its parameters.

    L1 and L3 grow by 1.09^phi, which multiplies D = 3 L1 + L3 by just that. Rounding, chosen to meet the released
    sizes most often: C1 to the nearest multiple of C', L3 to the nearest whole number, L1 down.

    Args:
        phi: Any real number; below 0 shrinks.
        channels_per_group: C'; by default that of `base`. The authors take 16 up to XL, and 32 for H and G.
        base: The origin; follows the stacking rules. Options but the shape are kept as they are.

    Returns:
        A config that follows the stacking rules.

    Raises:
        ValueError: `base` does not follow the rules, or phi is so small that no block or group is left.
    """
    if broken := base.broken_rules():
        raise ValueError(f"scaled: the origin breaks the stacking rules: {'; '.join(broken)}.")
    per_group = channels_per_group or base.channels // base.groups[0]
    channels, depth, deep_depth = _targets(phi, base)
    groups = round(channels / per_group)
    if groups < 1 or depth < 1:
        raise ValueError(
            f"scaled: phi={phi} leaves {channels:.1f} channels and {depth:.1f} blocks per stage, expected at least "
            f"half a group of {per_group} channels and one block. Take a larger phi."
        )
    return stacked(
        channels=groups * per_group,
        channels_per_group=per_group,
        depth=math.floor(depth),
        deep_depth=round(deep_depth),
        base=base,
    )


def table() -> str:
    """Return the markdown table of docs/scaling.md: the released sizes beside what `scaled` gives at their size."""
    columns = ["Size", "Parameters", "phi", "C'"]
    columns += [f"{number} {what}" for number in ("C1", "L1", "L3") for what in ("rule", "scaled", "released")]
    columns.append("Scaled parameters")
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *_rows()]) + "\n"


def _targets(phi: float, base: InternImageConfig) -> tuple[float, float, float]:
    """Return C1, L1 and L3 before rounding."""
    longer = DEPTH_FACTOR**phi
    return base.channels * WIDTH_FACTOR**phi, base.depths[0] * longer, base.depths[DEEP_STAGE] * longer


def _rows() -> Iterator[str]:
    origin = CONFIGS["T"]
    for name, released in CONFIGS.items():
        parameters = _num_parameters(released)
        phi = math.log2(parameters / _num_parameters(origin))
        per_group = released.channels // released.groups[0]
        found = scaled(phi, channels_per_group=per_group)
        cells = [name, _millions(parameters), f"{phi:.2f}", str(per_group)]
        shallow = {released.depths[stage] for stage in (0, 1, 3)}
        for target, ours, theirs in zip(
            _targets(phi, origin),
            (found.channels, found.depths[0], found.depths[DEEP_STAGE]),
            (str(released.channels), ", ".join(map(str, sorted(shallow))), str(released.depths[DEEP_STAGE])),
            strict=True,
        ):
            cells += [f"{target:.1f}", str(ours), theirs]
        yield "| " + " | ".join([*cells, _millions(_num_parameters(found))]) + " |"


def _num_parameters(config: InternImageConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in InternImage(config).parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    sys.stdout.write(table())
