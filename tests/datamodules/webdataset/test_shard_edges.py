"""Shards that run for weeks: several sources, new and changed shards, lists that outlive a crash."""

import io
import json
import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer
from PIL import Image
from shard_files import square, write_pairs

from datamodules.webdataset.commands import main
from datamodules.webdataset.decode import decode
from datamodules.webdataset.eval_loader import warn_of_bad
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.ledger import BadEntry, Ledger
from datamodules.webdataset.manifest import Manifest, make_manifest
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.urls import expand_shards

DRAW = Draw(0, 0, 0, 0)


def part(name: str, content: bytes) -> RawSample:
    return RawSample("a", {name: memoryview(content)})


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def cause_of(data: bytes, **options: Any) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, **options)
    return caught.value.cause


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer() as server:
        yield server


def test_training_and_validation_shards_of_one_folder_have_their_own_index(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path, num_shards=4, per_shard=3)
    train, val = (Shards(urls=f"{tmp_path}/{{{span}}}.tar") for span in ("00000..00001", "00002..00003"))
    for shards in (train, val, train):
        shards.prepare()
    found = [[manifest.index(s).key(i) for s in range(2) for i in range(3)] for manifest in (train.open(), val.open())]
    assert found == [keys[:6], keys[6:]]
    # The command makes the index that a run will look for.
    assert main(["index", f"{tmp_path}/{{00000..00001}}.tar", "--name", "by hand"]) == 0
    assert train.open().name == "by hand"
    whole = Shards(urls=str(tmp_path))
    whole.prepare()
    assert whole.open().folder == tmp_path / "index"


def test_two_sources_cannot_share_a_folder_of_the_index(tmp_path: Path) -> None:
    write_pairs(tmp_path, num_shards=4, per_shard=3)
    sources = [
        Shards(urls=f"{tmp_path}/{{{span}}}.tar", index=tmp_path / "one") for span in ("00000..00001", "00002..00003")
    ]
    for shards in sources:
        shards.prepare()
    with pytest.raises(ValueError, match=r"one is the index of other shards than these 2 \(.*00000.tar, .*a folder of"):
        sources[0].open()


def test_shards_are_found_through_links(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path / "data", num_shards=1, per_shard=3)
    whole = Shards(urls=str(tmp_path / "data"))
    whole.prepare()
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").symlink_to(tmp_path / "data")
    (home / "toy-index").symlink_to(tmp_path / "data" / "index")
    made = (tmp_path / "data" / "index" / "manifest.json").stat().st_mtime_ns
    linked = Shards(urls=str(home / "data"))
    linked.prepare()
    for shards in (whole, linked, Shards(index=home / "toy-index")):
        manifest = shards.open()
        assert Path(manifest.url(0)).samefile(tmp_path / "data" / "00000.tar")
        assert manifest.index(0).key(0) == keys[0]
    # None of them made it again.
    assert (tmp_path / "data" / "index" / "manifest.json").stat().st_mtime_ns == made


def test_an_index_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", num_shards=1, per_shard=3)
    (tmp_path / "fast").mkdir()
    (tmp_path / "data" / "index").symlink_to(tmp_path / "fast")
    shards = Shards(urls=str(tmp_path / "data"))
    shards.prepare()
    assert shards.open().url(0) == str(tmp_path / "data" / "00000.tar")


def test_one_shard_that_came_and_one_that_went_make_a_new_index(tmp_path: Path) -> None:
    write_pairs(tmp_path, num_shards=2, per_shard=3)
    shards = Shards(urls=str(tmp_path))
    shards.prepare()
    (tmp_path / "00001.tar").rename(tmp_path / "00007.tar")
    shards.prepare()
    assert [shards.open().url(s) for s in range(2)] == [str(tmp_path / "00000.tar"), str(tmp_path / "00007.tar")]


def test_an_index_that_is_made_again_is_not_mixed_with_the_one_in_use(tmp_path: Path) -> None:
    write_pairs(tmp_path, num_shards=2, per_shard=3)
    urls = expand_shards(tmp_path)
    manifest = make_manifest(urls, tmp_path / "index", name="toy")
    sent = pickle.dumps(manifest)
    write_pairs(tmp_path, num_shards=2, per_shard=4)
    make_manifest(urls, tmp_path / "index", name="toy")
    with pytest.raises(ValueError, match="was made again for other shards while it was in use"):
        pickle.loads(sent)
    with pytest.raises(ValueError, match="indexed again while it was in use"):
        manifest.index(0)


def test_open_indices_of_all_sources_together_stay_below_a_limit(tmp_path: Path) -> None:
    # A process may often open 1024 files.
    limit = 300
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with tarfile.open(folder / "00000.tar", "w"):
            pass
        empty = (folder / "00000.tar").read_bytes()
        for shard in range(1, 160):
            (folder / f"{shard:05}.tar").write_bytes(empty)
    manifests = [make_manifest(expand_shards(tmp_path / n), tmp_path / n / "index", name=n) for n in ("0", "1")]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for manifest in manifests:
        for shard in range(160):
            manifest.index(shard)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < limit


def test_evaluation_shards_without_a_sample_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"<html>not found</html>".ljust(1024))
    data = ImageTextShards(val=Shards(urls=str(tmp_path), name="pages"), image_size=32, num_workers=0)
    data.prepare_data()
    with pytest.raises(ValueError, match="pages has no samples to evaluate"):
        data.val_dataloader()


def test_the_command_says_what_of_the_shards_is_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, num_shards=1, per_shard=3)
    (tmp_path / "00001.tar").write_bytes(b"<html>not found</html>".ljust(1024))
    assert main(["index", str(tmp_path)]) == 0
    assert "3 samples in 2 shards; 1 rejects (archive 1)" in capsys.readouterr().out


def entry(sample: int) -> BadEntry:
    return BadEntry("toy", "digest", 0, sample, f"a.tar/{sample}", "decode", "broken")


def test_nothing_is_lost_behind_a_line_that_a_killed_process_left(tmp_path: Path) -> None:
    Ledger(tmp_path).append([entry(1)])
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps({"source": "toy"}).encode()[:9])
    Ledger(tmp_path).append([entry(2)])
    Ledger(tmp_path).append([entry(3)])
    assert Ledger(tmp_path).read() == [entry(1), entry(2), entry(3)]


def test_an_evaluation_also_warns_of_what_the_ledger_knew() -> None:
    with pytest.warns(UserWarning, match="2 of 5 samples are bad and left out of the evaluation"):
        warn_of_bad(Meter(samples=Counter({0: 3}), bad=Counter({(0, "decode"): 2})))


def test_a_recipe_that_a_crash_left_empty_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images" / "red"
    images.mkdir(parents=True)
    (images / "a.jpg").write_bytes(square(0))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        main(["make", "folder", str(tmp_path / "images"), "--out", str(out)])
    monkeypatch.undo()
    assert not (out / "making.json").exists()
    assert main(["make", "folder", str(tmp_path / "images"), "--out", str(out)]) == 0
    assert Manifest.open(out / "index").num_samples == 1


def test_a_list_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(square(0))
    (tmp_path / "list.csv").write_text("path,caption\na.jpg,a square\n", encoding="utf-8-sig")
    assert main(["make", "list", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 0
