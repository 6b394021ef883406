"""Weight files: read the tensors out of every container that InternImage weights are published in, and write them.

Nothing in a file is ever executed: pickles go through `torch.load(weights_only=True)`, and the few harmless classes
that training scripts leave beside the weights are read as inert placeholders. Tensors are memory-mapped where the
format allows it, so a file costs page cache, not memory, until its values are copied into a model.
"""

import json
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import safe_globals

# In order of preference: the authors' classifiers, DeepSpeed, OpenMMLab and Lightning.
CONTAINERS = ("model", "module", "state_dict")
EMA_CONTAINERS = ("model_ema", "state_dict_ema")
# Lightning's WeightAveraging callback puts the averaged weights into `state_dict` and the raw ones here.
RAW_CONTAINER = "current_model_state"
# OpenMMLab's averaging hook keeps a second copy of each tensor in the same entry, under its key with `_` for `.`.
HOOK_PREFIX = "ema_"


class CheckpointError(ValueError):
    """A weight file cannot be read, or does not fit the model."""


class _Placeholder:
    """Stands for an object whose class is known to be harmless and of no use here; keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What the authors' scripts (yacs, argparse) and OpenMMLab (mmcv, addict, numpy scores) save beside the weights. The
# real classes are never imported or called. Dictionary classes become OrderedDict, the only kind that torch fills.
_INERT: dict[str, type] = {
    "yacs.config.CfgNode": OrderedDict,
    "addict.addict.Dict": OrderedDict,
    "mmcv.utils.config.ConfigDict": OrderedDict,
    "mmengine.config.config.ConfigDict": OrderedDict,
    "argparse.Namespace": _Placeholder,
    "pathlib.PosixPath": _Placeholder,
    "numpy.dtype": _Placeholder,
    "numpy.core.multiarray.scalar": _Placeholder,
    "numpy._core.multiarray.scalar": _Placeholder,
}


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """The tensors of one weight file under the keys that the file uses.

    Args:
        path: The file, or the folder of a sharded one.
        container: The entry that the tensors were taken from; empty when the file is a plain state dict.
        tensors: Key to tensor; memory-mapped where possible, so they must not be written to.
        skipped: What else the file holds, and why it is not used.
        copies: Key in `tensors` -> key in the file, where the tensor is a second copy that has a key of its own.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    skipped: dict[str, str]
    copies: dict[str, str] = field(default_factory=dict)


def read_weights(path: str | Path, *, ema: bool | None = None) -> WeightFile:
    """Read a `.pth`-like pickle, a `.safetensors` file, its sharded `.index.json`, or a folder with one of them.

    Args:
        path: File or folder.
        ema: `True` takes the exponential moving average, `False` the weights as trained. `None` takes the file's main
            weights: as trained in the authors' classifiers, the average in Lightning checkpoints that were trained
            with one, and the plain keys in files of OpenMMLab's averaging hook. That hook swaps the two copies before
            it saves, so that the plain keys are the average and the `ema_` buffers the weights as trained; where the
            counts of the batch norms show the opposite, they are taken so.

    Raises:
        CheckpointError: The file is missing, damaged, wants to run code, holds no weights, or lacks the average; or an
            `ema_` buffer was asked for and belongs to no key or to two.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    if path.name.endswith((".safetensors", ".index.json")):
        shards = _shards(path) if path.name.endswith(".index.json") else {path: None}
        tensors = {key: tensor for shard, keys in shards.items() for key, tensor in _safetensors(shard, keys).items()}
        if ema:
            raise CheckpointError(f"{path}: ema=True, but a safetensors file holds one set of weights. Use ema=None.")
        return WeightFile(path=path, container="", tensors=tensors, skipped={})
    return _pick(path, _unpickle(path), ema)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], *, container: str = "") -> Path:
    """Write tensors as `.safetensors` or as `.pth`, by the suffix of `path`; the latter under `container` if given.

    Raises:
        CheckpointError: Another suffix.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise CheckpointError(f"{path}: the name must end in .pth or .safetensors.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees a half-written file, and a source that is mapped from `path` itself stays intact.
    partial = path.with_name(f".{path.name}.partial")
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(contiguous, partial, metadata={"format": "pt"})
    else:
        torch.save({container: contiguous} if container else contiguous, partial)
    return partial.replace(path)


def _file_in(folder: Path) -> Path:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder} is a folder without {', '.join(names)}. Name the file; a DeepSpeed folder has to be merged "
            "first (python zero_to_fp32.py, which DeepSpeed puts into it)."
        )
    return found[0]


def _shards(index: Path) -> dict[Path, list[str] | None]:
    """Shard file to the keys that the index expects there."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards (no `weight_map`).") from error
    shards: dict[Path, list[str] | None] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if shard.parent != index.parent or not shard.is_file():
            raise CheckpointError(f"{index}: shard {name} is not beside it. Download every shard into one folder.")
        shards[shard] = [key for key, value in weight_map.items() if value == name]
    return shards


def _safetensors(path: Path, keys: list[str] | None) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            if keys is not None and not present.issuperset(keys):
                lost = sorted(set(keys) - present)
                raise CheckpointError(f"{path}: the index expects {lost[0]} here (and {len(lost) - 1} more keys).")
            return {key: file.get_tensor(key) for key in keys or sorted(present)}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or no safetensors file ({error}).") from error


def _unpickle(path: Path) -> object:
    zipped = zipfile.is_zipfile(path)
    with ExitStack() as stack:
        stack.enter_context(safe_globals([(stand_in, name) for name, stand_in in _INERT.items()]))
        try:
            # Files from before torch 1.6 are bare pickles, which cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            refused = re.search(r"(?:GLOBAL|function) (\S+)", str(error))
            if refused is None:
                raise CheckpointError(_damaged(path)) from error
            raise CheckpointError(
                f"{path} holds a `{refused[1]}`, which is not a tensor and might run code, so it was not loaded. If "
                "you trust where the file comes from, save its weights alone where that class is installed: "
                f"c = torch.load('{path.name}', weights_only=False); torch.save({{'model': c['model']}}, 'weights.pth')"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(24)
    return (
        f"{path} ({path.stat().st_size} bytes, starting with {start!r}) is damaged or no PyTorch checkpoint. "
        "Download it again and compare its size."
    )


def _pick(path: Path, loaded: object, ema: bool | None) -> WeightFile:
    """Choose the set of weights in an unpickled file."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of weights.")
    sets = {name: value for name, value in loaded.items() if isinstance(value, Mapping) and _tensors(value)}
    main = next((name for name in CONTAINERS if name in sets), None)
    averaged = next((name for name in EMA_CONTAINERS if name in sets), None)
    if RAW_CONTAINER in sets and main is not None:
        averaged = main
        main = RAW_CONTAINER if ema is False else main
    main = averaged if ema and averaged is not None else main
    if main is None:
        plain = _tensors(loaded)
        if not plain:
            raise CheckpointError(
                f"{path} holds no weights: expected one of {', '.join(CONTAINERS)} in {_names(loaded)}."
            )
        file = WeightFile(path=path, container="", tensors=plain, skipped=_others(loaded, plain))
    else:
        tensors = _tensors(sets[main])
        skipped = {
            str(name): "another set of weights" if name in sets else "not weights" for name in loaded if name != main
        }
        skipped |= _others(sets[main], tensors)
        file = WeightFile(path=path, container=main, tensors=tensors, skipped=skipped)
    if ema is None or averaged is not None:
        return file
    if any(_is_copy(key) for key in file.tensors):
        return _choose_copies(file, ema)
    if ema:
        raise CheckpointError(
            f"{path}: ema=True, but {_names(loaded)} has none of {', '.join(EMA_CONTAINERS)}, and no key starts with "
            f"{HOOK_PREFIX}. Use ema=None."
        )
    return file


def _choose_copies(file: WeightFile, ema: bool) -> WeightFile:
    """Choose between plain keys and the buffers of OpenMMLab's averaging hook."""
    buffers = {_bare(key): key for key in file.tensors if _is_copy(key)}
    plain = {key: tensor for key, tensor in file.tensors.items() if not _is_copy(key)}
    copies: dict[str, str] = {}
    for key in plain:
        if buffer := buffers.get(HOOK_PREFIX + _bare(key).replace(".", "_")):
            copies[key] = buffer
    shared = [buffer for buffer, count in Counter(copies.values()).items() if count > 1]
    if shared:
        owners = " and ".join(key for key, buffer in copies.items() if buffer == shared[0])
        raise CheckpointError(f"{file.path}: {shared[0]} may be the copy of {owners}. Use ema=None for the plain keys.")
    if lost := sorted(set(buffers.values()) - set(copies.values())):
        raise CheckpointError(
            f"{file.path}: {lost[0]} (and {len(lost) - 1} more) is a copy of no key of the file. Use ema=None."
        )
    # The average does not count batches.
    counts = [key for key in copies if key.endswith("num_batches_tracked")]
    swapped = sum(int(file.tensors[key]) - int(file.tensors[copies[key]]) for key in counts) <= 0
    if swapped == ema:
        skipped = {f"{HOOK_PREFIX}*": f"another set of weights, {len(buffers)} tensors"}
        return replace(file, tensors=plain, skipped=file.skipped | skipped)
    chosen = {key: file.tensors[copies.get(key, key)] for key in plain}
    skipped = {f"plain keys of {HOOK_PREFIX}*": f"another set of weights, {len(copies)} tensors"}
    return replace(file, tensors=chosen, skipped=file.skipped | skipped, copies=copies)


def _bare(key: str) -> str:
    return key.removeprefix("module.")


def _is_copy(key: str) -> bool:
    return _bare(key).startswith(HOOK_PREFIX) and "." not in _bare(key)


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _others(mapping: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {str(key): "not a tensor" for key in mapping if key not in tensors}


def _names(mapping: Mapping[Any, Any]) -> str:
    names = [str(name) for name in mapping]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
