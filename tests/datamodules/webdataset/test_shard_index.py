import io
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from datamodules.webdataset.arrays import open_arrays, write_arrays
from datamodules.webdataset.index import ShardIndex, write_index
from datamodules.webdataset.records import BadSample

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def image_bytes(form, size=(40, 30), mode="RGB", **options):
    stored = io.BytesIO()
    Image.new(mode, size).save(stored, form, **options)
    return stored.getvalue()


def make_tar(files, form=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_index(content, path, **options):
    write_index(io.BytesIO(content), len(content), path, {}, **options)
    return ShardIndex(path)


def cut(index, content, i):
    start, stop = index.span(i)
    return index.cut(i, content[start:stop])


def read(index, content):
    samples = [cut(index, content, i) for i in range(len(index))]
    return {sample.key: {name: bytes(part) for name, part in sample.parts.items()} for sample in samples}


def read_webdataset(path):
    """Keys and parts as webdataset's own reader finds them."""
    dataset = webdataset.WebDataset(str(path), shardshuffle=False)
    return {
        sample["__key__"]: {name: part for name, part in sample.items() if not name.startswith("__")}
        for sample in dataset
    }


def pairs(count, prefix="", seed=0):
    random = np.random.default_rng(seed)
    for i in range(count):
        yield f"{prefix}{i:05}.jpg", random.bytes(int(random.integers(1, 3000)))
        yield f"{prefix}{i:05}.txt", f"picture {i}".encode()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_samples_are_those_of_webdataset(form, tmp_path):
    files = [
        ("__meta__/x.json", b"{}"),
        *pairs(20),
        ("README", b"no extension"),
        *pairs(5, "a/b.c/"),
        ("one.JPG", b"upper"),
        ("one.seg.png", b"two dots"),
        (".hidden", b""),
        ("alone.cls", b"3"),
        ("\u00fc\u65e5.txt", b"not ASCII"),
    ]
    if form != tarfile.USTAR_FORMAT:
        files += list(pairs(3, "long" * 60))
    content = make_tar(files, form)
    (tmp_path / "x.tar").write_bytes(content)
    index = make_index(content, tmp_path / "x.idx")
    assert read(index, content) == read_webdataset(tmp_path / "x.tar")
    assert [index.key(i) for i in range(len(index))] == list(read_webdataset(tmp_path / "x.tar"))
    assert index.rejects() == []


def test_part_sizes_are_known_without_reading(tmp_path):
    files = list(pairs(10))
    index = make_index(make_tar(files), tmp_path / "x.idx")
    sizes = {name: len(content) for name, content in files}
    for i in range(10):
        assert index.parts(i) == {"jpg": sizes[f"{i:05}.jpg"], "txt": sizes[f"{i:05}.txt"]}
    for i in (-1, 10):
        with pytest.raises(IndexError, match="0 to 9"):
            index.key(i)


def test_parts_are_views_of_the_block_and_keep_their_order(tmp_path):
    content = make_tar([("a.txt", b"text"), ("a.jpg", b"image")])
    index = make_index(content, tmp_path / "x.idx")
    sample = cut(index, content, 0)
    assert list(sample.parts) == ["txt", "jpg"]
    assert all(isinstance(part, memoryview) and part.obj is sample.parts["txt"].obj for part in sample.parts.values())


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.jpg", image_bytes("JPEG"), (30, 40)),
        ("a.jpeg", image_bytes("JPEG", progressive=True), (30, 40)),
        ("a.jpg", image_bytes("JPEG", comment=b"x" * 60_000), (30, 40)),
        ("a.jpg", image_bytes("JPEG", icc_profile=b"x" * 200_000), (30, 40)),
        ("a.png", image_bytes("PNG", mode="RGBA"), (30, 40)),
        ("a.webp", image_bytes("WEBP"), (30, 40)),
        ("a.webp", image_bytes("WEBP", lossless=True), (30, 40)),
        # A PNG of another name, as downloads have them.
        ("a.jpg", image_bytes("PNG"), (30, 40)),
        ("a.jpg", image_bytes("JPEG")[:10], (0, 0)),
        ("a.jpg", b"<html>", (0, 0)),
        ("a.jpg", b"", (0, 0)),
        ("a.txt", image_bytes("JPEG"), (0, 0)),
    ],
)
def test_image_sizes_come_from_their_headers(name, image, expected, tmp_path):
    assert make_index(make_tar([(name, image)]), tmp_path / "x.idx").size(0) == expected


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../up.txt", "bad\udcff.txt"])
def test_hostile_names_are_rejected_and_their_neighbours_kept(name, tmp_path):
    content = make_tar([("a.jpg", b"1"), (name, b"2"), ("b.jpg", b"3")], tarfile.GNU_FORMAT)
    index = make_index(content, tmp_path / "x.idx")
    assert read(index, content) == {"a": {"jpg": b"1"}, "b": {"jpg": b"3"}}
    assert [cause for _, cause, _ in index.rejects()] == ["name"]


def test_a_key_that_comes_again_and_a_part_that_comes_twice_are_rejected(tmp_path):
    files = ["a.jpg", "a.txt", "b.jpg", "a.jpg", "c.jpg", "c.jpg", "d.jpg", "d.JPG"]
    content = make_tar([(name, bytes([number])) for number, name in enumerate(files)])
    index = make_index(content, tmp_path / "x.idx")
    assert read(index, content) == {"a": {"jpg": b"\0", "txt": b"\1"}, "b": {"jpg": b"\2"}}
    assert [(key, cause) for key, cause, _ in index.rejects()] == [(key, "duplicate") for key in "acd"]


def test_a_sample_that_lost_a_part_between_others_is_rejected(tmp_path):
    content = bytearray(make_tar([(f"{key}.{part}", b"x") for key in "abc" for part in ("jpg", "cls", "txt")]))
    # Each member has a header and a block; the one damaged is b.cls.
    content[4 * 1024 : 4 * 1024 + 20] = b"?" * 20
    index = make_index(bytes(content), tmp_path / "x.idx")
    assert list(read(index, bytes(content))) == ["a", "c"]
    assert [(name, cause) for name, cause, _ in index.rejects()] == [
        ("bytes 4096 to 5120", "archive"),
        ("b", "archive"),
    ]


def test_a_cut_off_last_sample_is_listed(tmp_path):
    content = make_tar(list(pairs(5)))
    whole = make_index(content, tmp_path / "x.idx")
    short = content[: whole.span(4)[0] + 100]
    index = make_index(short, tmp_path / "y.idx")
    assert [index.key(i) for i in range(len(index))] == [f"{i:05}" for i in range(4)]
    [(place, cause, _)] = index.rejects()
    assert (place, cause) == (f"bytes {whole.span(4)[0]} to {len(short)}", "archive")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("seed", range(10))
def test_every_undamaged_sample_of_a_damaged_shard_is_delivered(form, seed, tmp_path):
    random = np.random.default_rng(seed)
    content = make_tar(list(pairs(60, "" if form == tarfile.USTAR_FORMAT else "n" * 120, seed)), form)
    (tmp_path / "x.tar").write_bytes(content)
    truth = read_webdataset(tmp_path / "x.tar")
    whole = make_index(content, tmp_path / "x.idx")
    harmed, changed = bytearray(content), np.zeros(len(content), bool)
    for _ in range(10):
        start = int(random.integers(0, len(content)))
        stop = min(len(content), start + int(random.integers(1, 2000)))
        harmed[start:stop] = bytes(stop - start) if random.random() < 0.5 else random.bytes(stop - start)
        changed[start:stop] = True
    found = read(make_index(bytes(harmed), tmp_path / "y.idx"), bytes(harmed))
    unharmed = [whole.key(i) for i in range(60) if not changed[slice(*whole.span(i))].any()]
    # Less than all, so that the test tests, and more than none.
    assert 0 < len(unharmed) < 60
    assert {key: found.get(key) for key in unharmed} == {key: truth[key] for key in unharmed}


def test_a_block_of_another_shard_is_refused(tmp_path):
    files = list(pairs(6))
    content = make_tar(files)
    index = make_index(content, tmp_path / "x.idx")
    renamed = make_tar([(f"x{name}", part) for name, part in files])
    resized = make_tar([(name, part[:-1]) for name, part in files])
    for other in (renamed, resized, bytes(len(content)), content[512:] + bytes(512)):
        for i in range(1, 6):
            with pytest.raises(BadSample, match="index it again") as caught:
                cut(index, other, i)
            assert caught.value.cause == "changed"


@pytest.mark.parametrize("content", [b"", bytes(10_240), b"<html>404</html>"])
def test_a_shard_without_samples_has_an_empty_index(content, tmp_path):
    index = make_index(content, tmp_path / "x.idx", checksum=True)
    assert len(index) == 0
    assert len(index.rejects()) == (content[:1] == b"<")


def test_an_index_pickles_as_its_path(tmp_path):
    content = make_tar(list(pairs(1000)))
    index = make_index(content, tmp_path / "x.idx")
    stored = pickle.dumps(index)
    assert len(stored) < 1000
    assert pickle.loads(stored).key(999) == "00999"


@pytest.mark.parametrize("length", [0, 7, 30, 100, -1])
def test_a_broken_index_is_refused_by_name(length, tmp_path):
    path = tmp_path / "x.idx"
    make_index(make_tar(list(pairs(3))), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"x\.idx .*make it again"):
        ShardIndex(path)


def test_an_index_of_another_version_is_refused(tmp_path):
    path = tmp_path / "x.idx"
    make_index(make_tar(list(pairs(3))), path)
    content = bytearray(path.read_bytes())
    content[8] = 99
    path.write_bytes(content)
    with pytest.raises(ValueError, match="version 99"):
        ShardIndex(path)


def test_array_files_return_what_was_written_and_leave_nothing_else(tmp_path):
    arrays = {
        "a": np.arange(7, dtype="<i8"),
        "none": np.zeros((0, 3), "<i4"),
        "b": np.arange(6, dtype="u1").reshape(2, 3),
    }
    write_arrays(tmp_path / "x", {"note": 1}, arrays)
    header, found = open_arrays(tmp_path / "x")
    assert header["note"] == 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert not found[name].flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
