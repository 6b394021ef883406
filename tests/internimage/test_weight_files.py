import argparse
import json
import os
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from internimage.weight_files import CheckpointError, read_weights, write_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, -1.0]), "steps": torch.tensor(7)}
OTHERS = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("container", ["model", "module", "state_dict", ""])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle of torch < 1.6"])
def test_finds_the_weights_in_every_container(tmp_path, container, zipped):
    path = tmp_path / "weights.pth"
    content = (
        {container: OrderedDict(WEIGHTS), "optimizer": {"state": {0: WEIGHTS}}, "epoch": 3} if container else WEIGHTS
    )
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    file = read_weights(path)
    assert file.container == container
    assert_same(file.tensors, WEIGHTS)
    assert file.skipped == ({"optimizer": "not weights", "epoch": "not weights"} if container else {})


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema"])
def test_takes_the_average_when_asked(tmp_path, name):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS, name: OTHERS}, path)
    assert_same(read_weights(path).tensors, WEIGHTS)
    assert_same(read_weights(path, ema=False).tensors, WEIGHTS)
    averaged = read_weights(path, ema=True)
    assert_same(averaged.tensors, OTHERS)
    assert averaged.skipped == {"model": "another set of weights"}


def test_tells_the_two_sets_of_a_lightning_checkpoint_apart(tmp_path):
    path = tmp_path / "last.ckpt"
    # As lightning's WeightAveraging callback saves them: the average in the usual place.
    torch.save({"state_dict": OTHERS, "current_model_state": WEIGHTS, "averaging_state": {"n": torch.tensor(1)}}, path)
    assert_same(read_weights(path).tensors, OTHERS)
    assert_same(read_weights(path, ema=True).tensors, OTHERS)
    assert_same(read_weights(path, ema=False).tensors, WEIGHTS)


def test_refuses_ema_where_there_is_none(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "weights.pth")
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        with pytest.raises(CheckpointError, match="ema=True"):
            read_weights(tmp_path / name, ema=True)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle of torch < 1.6"])
def test_refuses_code_and_does_not_run_it(tmp_path, zipped):
    path, trace = tmp_path / "weights.pth", tmp_path / "attacked"
    torch.save({"model": WEIGHTS, "x": Attack(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"`posix\.system`"):
        read_weights(path)
    assert not trace.exists()


class Unknown:
    pass


def test_names_the_class_it_refuses_and_the_way_out(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": WEIGHTS, "x": Unknown()}, path)
    with pytest.raises(CheckpointError, match=rf"`\S*Unknown`.*torch\.load\('{path.name}', weights_only=False\)"):
        read_weights(path)


def test_reads_past_what_training_scripts_leave_beside_the_weights(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    # yacs and mmcv are not dependencies; their classes exist only while the file is written.
    for module, name in (("yacs.config", "CfgNode"), ("mmcv.utils.config", "ConfigDict")):
        parent = ""
        for part in module.split("."):
            parent = f"{parent}.{part}".lstrip(".")
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, type(name, (dict,), {"__module__": module}))
    config = sys.modules["yacs.config"].CfgNode(MODEL=sys.modules["yacs.config"].CfgNode(NAME="t"))
    config.frozen = True
    meta = {
        "config": config,
        "cfg": sys.modules["mmcv.utils.config"].ConfigDict(lr=0.1),
        "args": argparse.Namespace(lr=0.1, output=Path("out")),
        "best_score": np.float64(47.2),
        "accuracy": np.float32(83.5),
    }
    torch.save({"model": WEIGHTS, **meta}, path)
    for module in ("yacs.config", "yacs", "mmcv.utils.config", "mmcv.utils", "mmcv"):
        monkeypatch.delitem(sys.modules, module)
    file = read_weights(path)
    assert_same(file.tensors, WEIGHTS)
    assert file.skipped == dict.fromkeys(meta, "not weights")


@pytest.mark.parametrize(
    "content",
    [b"", b"<!doctype html><html>not found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"],
    ids=["empty", "web page", "git-lfs pointer"],
)
def test_says_what_a_file_is_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"\({len(content)} bytes, starting with {re.escape(repr(content[:24]))}"
    ):
        read_weights(path)


def test_reports_a_truncated_file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(path)
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], {"model": {"a": 1}}])
def test_refuses_a_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="expected"):
        read_weights(tmp_path / "weights.pth")


def test_refuses_a_missing_file_and_a_foreign_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"folder without model\.safetensors"):
        read_weights(tmp_path)


def write_shards(folder):
    names = sorted(WEIGHTS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, keys in shards.items():
        save_file({key: WEIGHTS[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_reads_safetensors_single_and_sharded_by_file_and_by_folder(tmp_path):
    for name, index in (("single", False), ("sharded", True)):
        folder = tmp_path / name
        folder.mkdir()
        if index:
            file = write_shards(folder)
        else:
            file = folder / "model.safetensors"
            save_file(WEIGHTS, file)
        assert_same(read_weights(file).tensors, WEIGHTS)
        assert_same(read_weights(folder).tensors, WEIGHTS)


def test_notices_lost_shards_and_keys(tmp_path):
    index = write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match="the index expects steps here"):
        read_weights(index)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is not beside it"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"steps": "../elsewhere.safetensors"}}))
    save_file(WEIGHTS, tmp_path.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="not beside it"):
        read_weights(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        read_weights(index)


def anonymous_memory():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_maps_a_file_instead_of_reading_it_into_memory(tmp_path, suffix):
    size = 64 * 2**20
    path = write_weights(tmp_path / f"weights{suffix}", {"a": torch.ones(size // 4)})
    before = anonymous_memory()
    file = read_weights(path)
    assert file.tensors["a"].sum() == size // 4
    # The sum touched every page; a copy would have taken all 64 MiB.
    assert anonymous_memory() - before < size // 4


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_writes_over_the_file_that_it_reads_from(tmp_path, suffix):
    path = write_weights(tmp_path / "new folder" / f"weights{suffix}", WEIGHTS)
    assert_same(read_weights(write_weights(path, read_weights(path).tensors)).tensors, WEIGHTS)
    assert list(path.parent.iterdir()) == [path]


def test_refuses_to_write_another_suffix(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.pth or \.safetensors"):
        write_weights(tmp_path / "weights.bin", WEIGHTS)
