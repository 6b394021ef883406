import io
import os
import pickle
import shutil
import tarfile
import zlib
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest

from datamodules.webdataset import manifest as manifest_module
from datamodules.webdataset.manifest import Manifest, ShardEntry, make_manifest, write_manifest
from datamodules.webdataset.urls import expand_shards

COUNTS = (3, 1, 5, 0, 2)


def write_tar(path, count, seed=0):
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:05}.jpg")
            info.size = 100 + i
            tar.addfile(info, io.BytesIO(random.bytes(info.size)))


@pytest.fixture
def data(tmp_path):
    """A folder of five shards."""
    folder = tmp_path / "data"
    for number, count in enumerate(COUNTS):
        write_tar(folder / f"{number:05}.tar", count, number)
    return folder


@pytest.fixture
def walked(monkeypatch):
    """Names of the indices that are written."""
    names = []
    write_index = manifest_module.write_index

    def counting(file, size, path, header, **options):
        names.append(header["url"])
        write_index(file, size, path, header, **options)

    monkeypatch.setattr(manifest_module, "write_index", counting)
    return names


def index(folder, **options):
    return make_manifest(expand_shards(folder), folder / "index", name="toy", **options)


def open_elsewhere(url, *, folder):
    return (Path(folder) / url.rpartition("/")[2]).open("rb")


def open_text(url, *, folder):
    raise RuntimeError(f"no client for {url}")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_manifest_knows_its_shards(data, num_workers):
    found = index(data, num_workers=num_workers)
    files = sorted(data.glob("*.tar"))
    assert found.name == "toy"
    assert found.counts.dtype == np.int64
    assert tuple(found.counts) == COUNTS
    assert found.num_samples == sum(COUNTS)
    assert found.num_bytes == sum(file.stat().st_size for file in files)
    assert [found.url(s) for s in range(5)] == [str(file) for file in files]
    assert [found.num_bytes_of(s) for s in range(5)] == [file.stat().st_size for file in files]
    assert [len(found.index(s)) for s in range(5)] == list(COUNTS)
    assert [found.checksum(s) for s in range(5)] == [None] * 5
    for s in (-1, 5):
        with pytest.raises(IndexError, match="0 to 4"):
            found.url(s)


def test_checksums_are_those_of_whole_files(data):
    found = index(data, checksums=True)
    assert [found.checksum(s) for s in range(5)] == [
        zlib.crc32(file.read_bytes()) for file in sorted(data.glob("*.tar"))
    ]


def test_a_second_run_walks_only_new_and_changed_shards(data, walked):
    index(data)
    assert len(walked) == 5
    walked.clear()
    first = index(data)
    assert walked == []
    write_tar(data / "00002.tar", 4)
    write_tar(data / "00007.tar", 1)
    # The same size, so that only the time tells.
    time = (data / "00000.tar").stat().st_mtime_ns
    os.utime(data / "00000.tar", ns=(time, time + 10**9))
    found = index(data)
    assert walked == ["../00000.tar", "../00002.tar", "../00007.tar"]
    assert tuple(found.counts) == (3, 1, 4, 0, 2, 1)
    assert found.digest != first.digest
    walked.clear()
    index(data, checksums=True)
    assert len(walked) == 6
    walked.clear()
    assert index(data).checksum(0) is not None
    assert walked == []


def test_an_index_cut_off_by_a_crash_is_made_again(data, walked):
    index(data)
    walked.clear()
    victim = sorted((data / "index").glob("00001.tar*.idx"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    assert tuple(index(data).counts) == COUNTS
    assert walked == ["../00001.tar"]


def test_shards_that_cannot_be_read_are_all_named_and_the_others_kept(data, walked):
    urls = [*expand_shards(data), str(data / "gone.tar"), str(data / "lost.tar")]
    with pytest.raises(OSError, match=r"(?s)2 of 7 shards.*gone\.tar.*lost\.tar"):
        make_manifest(urls, data / "index", name="toy")
    assert not (data / "index" / "manifest.json").exists()
    assert len(walked) == 5
    walked.clear()
    index(data)
    assert walked == []


def test_errors_of_a_storage_client_are_named_too(data):
    opener = partial(open_text, folder=data)
    with pytest.raises(OSError, match=r"s3://bucket/a\.tar: RuntimeError: no client"):
        make_manifest(["s3://bucket/a.tar"], data / "index", name="toy", open_file=opener)


def test_a_data_set_can_be_moved(data, tmp_path, walked):
    digest = index(data).digest
    shutil.move(data, tmp_path / "moved" / "there")
    found = Manifest.open(tmp_path / "moved" / "there" / "index")
    assert found.url(2) == str(tmp_path / "moved" / "there" / "00002.tar")
    assert len(found.index(2)) == 5
    walked.clear()
    assert index(tmp_path / "moved" / "there").digest == digest
    assert walked == []


def test_local_shards_elsewhere_keep_their_place(data, tmp_path):
    found = make_manifest(expand_shards(data), tmp_path / "other" / "index", name="toy")
    shutil.move(tmp_path / "other", tmp_path / "moved")
    found = Manifest.open(tmp_path / "moved" / "index")
    assert found.url(0) == str(data / "00000.tar")


def test_remote_shards_are_opened_by_the_given_function_and_keep_their_url(data, walked):
    urls = [f"s3://bucket/{number:05}.tar" for number in range(5)]
    found = make_manifest(urls, data / "index", name="far", open_file=partial(open_elsewhere, folder=data))
    assert [found.url(s) for s in range(5)] == urls
    assert tuple(found.counts) == COUNTS
    walked.clear()
    make_manifest(urls, data / "index", name="far", open_file=partial(open_elsewhere, folder=data))
    assert walked == []


def test_shards_of_one_name_in_two_folders_have_their_own_index(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", 3)
    write_tar(tmp_path / "b" / "0.tar", 4)
    urls = [str(tmp_path / part / "0.tar") for part in "ab"]
    found = make_manifest(urls, tmp_path / "index", name="toy")
    assert [len(found.index(s)) for s in range(2)] == [3, 4]


def test_no_shards_and_shards_listed_twice_are_refused(data):
    with pytest.raises(ValueError, match="no shards"):
        make_manifest([], data / "index", name="toy")
    with pytest.raises(ValueError, match="listed twice"):
        make_manifest([str(data / "00000.tar"), f"{data}/../data/00000.tar"], data / "index", name="toy")


def test_rejects_are_counted_by_cause(data):
    with (data / "00000.tar").open("ab") as file:
        file.write(b"garbage" * 200)
    found = index(data)
    assert found.rejects == {"archive": 1}
    assert tuple(found.counts) == COUNTS


def test_the_digest_depends_on_names_counts_and_bytes_alone(tmp_path):
    def digest(**changes):
        entry = {"url": "../a.tar", "count": 3, "num_bytes": 10, "checksum": None, "rejects": Counter(), **changes}
        return write_manifest(tmp_path, "toy", [ShardEntry(**entry)]).digest

    same = digest()
    assert digest(url="/else/where/a.tar") == digest(checksum=7) == same
    assert len({same, digest(url="../b.tar"), digest(count=4), digest(num_bytes=11)}) == 4


def test_a_manifest_pickles_as_its_folder(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = Manifest.open(index(data).folder.relative_to(tmp_path))
    stored = pickle.dumps(found)
    assert len(stored) < 500
    monkeypatch.chdir("/")
    again = pickle.loads(stored)
    assert again.digest == found.digest
    assert again.index(2).key(4) == "00004"


def test_a_manifest_that_is_open_survives_a_new_one(data):
    before = index(data)
    write_tar(data / "00009.tar", 9)
    after = index(data)
    assert (before.url(4), before.counts.sum(), after.counts.sum()) == (str(data / "00004.tar"), 11, 20)
    # The replaced table goes when nobody can be about to open it.
    tables = list((data / "index").glob("*.table"))
    assert len(tables) == 2
    for table in tables:
        os.utime(table, (0, 0))
    index(data)
    assert len(list((data / "index").glob("*.table"))) == 1


def test_indices_are_kept_open_up_to_a_limit(data, monkeypatch):
    monkeypatch.setattr(manifest_module, "_open_index", lru_cache(2)(manifest_module._open_index.__wrapped__))
    index(data)
    found = Manifest.open(data / "index")
    first = found.index(0)
    assert found.index(0) is first
    for s in (1, 2):
        found.index(s)
    assert found.index(0) is not first


def test_a_manifest_of_many_shards_is_a_small_file_beside_a_table(tmp_path):
    entries = [ShardEntry(f"s3://bucket/{s:05}.tar", 10_000, 10**9 + s, s, Counter()) for s in range(43_000)]
    found = write_manifest(tmp_path, "large", entries)
    assert (tmp_path / "manifest.json").stat().st_size < 1000
    assert (found.num_samples, found.url(42_999)) == (430_000_000, "s3://bucket/42999.tar")
    assert (found.num_bytes_of(41_000), found.checksum(41_000)) == (1_000_041_000, 41_000)


def test_what_is_missing_broken_or_of_another_version_is_named(data):
    with pytest.raises(FileNotFoundError, match="shards index"):
        Manifest.open(data)
    index(data)
    path = data / "index" / "manifest.json"
    text = path.read_text()
    for content, message in ((text[:40], "is broken"), (text.replace('"version": 1', '"version": 9'), "version 9")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            Manifest.open(data / "index")
