"""The authors' numbers, and the weights and inputs that they were computed from.

Weights, images and upstream gradients are a hash of the tensor's name, so that no file holds them: the same bits on
every platform and numpy version. Names are the official state-dict keys.
"""

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# (pattern of the official key, mean, scale of the noise, divided by sqrt(fan in)); the first match decides.
_RULES = [
    (r"num_batches_tracked$", 0.0, 0.0, False),
    (r"running_mean$", 0.0, 0.1, False),
    (r"running_var$", 1.0, 0.25, False),
    (r"gamma[12]$", 0.2, 0.05, False),
    (r"\.offset\.bias$", 0.0, 0.5, False),
    (r"\.offset\.weight$", 0.0, 1.5, True),
    (r"\.sampling_offsets\.bias$", 0.0, 1.5, False),
    (r"\.sampling_offsets\.weight$", 0.0, 0.5, True),
    (r"center_feature_scale_proj_weight$", 0.0, 2.0, True),
    (r"center_feature_scale_proj_bias$", 0.0, 0.5, False),
]


def _hash(name: str, size: int) -> np.ndarray:
    """24 random bits for each of `size` elements (splitmix64, keyed by the name)."""
    encoded = name.encode()
    key = np.uint64((zlib.crc32(encoded) << 32) | zlib.adler32(encoded))
    with np.errstate(over="ignore"):
        z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z >> np.uint64(40)


def noise(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform values of zero mean and unit variance."""
    size = int(np.prod(shape, dtype=np.int64))
    uniform = _hash(name, size).astype(np.float64) * 2.0**-24
    values = (2 * uniform - 1 + 2.0**-24) * 1.7320508075688772
    return torch.from_numpy(values.reshape(shape)).to(dtype)


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Whole numbers in [low, high), int64."""
    size = int(np.prod(shape, dtype=np.int64))
    values = low + (_hash(name, size).astype(np.int64) * (high - low) >> 24)
    return torch.from_numpy(values.reshape(shape))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """Value of the parameter or running statistic with the official key `name`, float64."""
    n = noise(name, shape, torch.float64)
    fan_in = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
    scaled = n / np.sqrt(float(fan_in))
    for pattern, mean, scale, by_fan_in in _RULES:
        if re.search(pattern, name):
            return mean + scale * (scaled if by_fan_in else n)
    if len(shape) == 2 and name.endswith(".mask.weight"):
        return 1.5 * scaled
    if len(shape) > 1:
        return scaled
    return 0.02 * n if name.endswith("bias") else 1 + 0.1 * n


def image(tag: str, shape: tuple[int, int, int, int]) -> Tensor:
    """Images whose neighbouring pixels correlate, float32, already normalised."""
    batch, channels, height, width = shape
    coarse = noise("image-coarse/" + tag, (batch, channels, -(-height // 8), -(-width // 8)), torch.float64)
    coarse = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]
    return (0.6 * noise("image/" + tag, shape, torch.float64) + 0.8 * coarse).float()


@torch.no_grad()
def load(model: nn.Module, official_key: Callable[[str], str | None] = lambda key: key) -> list[str]:
    """Fill every parameter and running statistic of `model` in place.

    Args:
        official_key: From a state-dict key of `model` to the authors' key; None leaves the tensor as it is. A tensor
            that stands under several keys takes the first.

    Returns:
        The keys that were filled.
    """
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    filled: list[str] = []
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = official_key(key) if key in parameters or key.endswith(_STATISTICS) else None
        if name is None or (tensor.numel() > 0 and tensor.data_ptr() in seen):
            continue
        seen.add(tensor.data_ptr())
        tensor.copy_(fill(name, tuple(tensor.shape)))
        filled.append(key)
    return filled


class Golden:
    """Entries of one .npz file, each whole or as shape, (mean, std, sum of magnitudes) and every s-th element.

    Args:
        path: File, relative to `tests/golden`.
        separator: Between an entry's name and `shape`, `stats`, `sub`: "_" in `backbone/`.
    """

    def __init__(self, path: str, separator: str = "|") -> None:
        self._arrays = np.load(FOLDER / path)
        self._separator = separator

    def names(self) -> list[str]:
        """Names of the entries."""
        suffixes = tuple(self._separator + suffix for suffix in ("shape", "stats", "sub"))
        return sorted({next((f.removesuffix(s) for s in suffixes if f.endswith(s)), f) for f in self._arrays.files})

    def difference(self, name: str, tensor: Tensor) -> float:
        """Largest absolute difference over the entry's standard deviation."""
        found = tensor.detach().cpu().double().numpy()
        if name in self._arrays.files:
            expected = self._arrays[name].astype(np.float64)
            assert found.shape == expected.shape, f"{name} has shape {found.shape}, expected {expected.shape}"
        else:
            shape, stats, sub = (self._arrays[name + self._separator + s] for s in ("shape", "stats", "sub"))
            assert found.shape == tuple(shape), f"{name} has shape {found.shape}, expected {tuple(shape)}"
            expected = sub.astype(np.float64)
            # Catches an error between the stored elements.
            np.testing.assert_allclose([found.mean(), found.std()], stats[:2], rtol=0, atol=1e-3 * stats[1])
            found = every(found, expected.size)
        return float(np.abs(found - expected).max(initial=0) / max(expected.std(), 1e-12)) if expected.size else 0.0

    def check(self, name: str, tensor: Tensor, tolerance: float) -> None:
        """Assert that `tensor` is entry `name` within `tolerance` times the entry's standard deviation."""
        found = self.difference(name, tensor)
        assert found <= tolerance, f"{name} differs by {found:.2e} of its standard deviation, more than {tolerance:.0e}"


def every(values: np.ndarray, count: int) -> np.ndarray:
    """Every s-th element of the flattened array, s the smallest odd step that leaves `count`."""
    step = next(s for s in range(1, values.size + 1, 2) if -(-values.size // s) == count)
    return values.reshape(-1)[::step]
