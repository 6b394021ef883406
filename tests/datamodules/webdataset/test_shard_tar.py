import io
import tarfile
import zlib

import numpy as np
import pytest

from datamodules.webdataset.tar import BLOCK, Damage, Member, Window, split_name, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(files, form=tarfile.USTAR_FORMAT, add=()):
    """A tar of (name, content), and of further TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in add:
            tar.addfile(info)
    return buffer.getvalue()


def random_files(count, seed=0):
    random = np.random.default_rng(seed)
    return [(f"{i:05}.jpg", random.bytes(int(random.integers(0, 3000)))) for i in range(count)]


def members(content):
    return [item for item in walk(io.BytesIO(content), len(content)) if isinstance(item, Member)]


def damages(content):
    return [item for item in walk(io.BytesIO(content), len(content)) if isinstance(item, Damage)]


def read(content):
    """Contents by name; damage may have made other names of some."""
    found = members(content)
    return {item.name.decode(errors="replace"): content[item.data : item.data + item.size] for item in found}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_members_are_those_of_tarfile(form):
    long = ["a/" * 60 + "b.jpg", "f/" * 49 + "g" * 90 + ".txt"]
    if form != tarfile.USTAR_FORMAT:
        long += ["d" * 300 + ".png", "\u00fc/\u65e5" * 80 + ".txt"]
    files = [*random_files(20), *((name, name.encode()) for name in long), ("empty.txt", b"")]
    content = make_tar(files, form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(item.name.decode(), item.data, item.size) for item in members(content)] == expected
    assert read(content) == dict(files)
    assert damages(content) == []


def test_folders_links_and_devices_are_skipped():
    special = []
    for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
        info = tarfile.TarInfo(f"{number}.jpg")
        info.type, info.linkname = kind, "00000.jpg"
        special.append(info)
    content = make_tar(random_files(3), tarfile.GNU_FORMAT, special)
    assert list(read(content)) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert damages(content) == []


def test_end_blocks_may_be_missing_or_many():
    files = random_files(5)
    content = make_tar(files)
    last = members(content)[-1]
    for variant in (content[: last.data + last.size], content.rstrip(b"\0"), content + bytes(100_000)):
        # Without its padding too.
        assert read(variant)[last.name.decode()] == dict(files)[last.name.decode()]
        assert damages(variant) == []


def test_a_size_of_more_than_eight_gigabytes_is_read():
    info = tarfile.TarInfo("large.jpg")
    info.size = 9 << 30
    content = info.tobuf(tarfile.GNU_FORMAT)

    class Sparse(io.BytesIO):
        def read(self, count=-1):
            return super().read(count).ljust(count, b"\0")

    found = list(walk(Sparse(content), BLOCK + info.size))
    assert found == [Member(b"large.jpg", 0, BLOCK, 9 << 30)]


@pytest.mark.parametrize("field", [slice(0, 100), slice(124, 136), slice(148, 156), slice(0, 512)])
def test_a_damaged_header_costs_its_member_alone(field):
    files = random_files(9)
    content = bytearray(make_tar(files))
    victim = members(content)[4]
    damaged = slice(victim.start + field.start, victim.start + field.stop)
    content[damaged] = b"\x07" * (field.stop - field.start)
    assert read(content) == {name: data for name, data in files if name != "00004.jpg"}
    [damage] = damages(content)
    assert (damage.start, damage.stop) == (victim.start, members(content)[4].start)


def test_a_hole_of_zeros_costs_what_lies_in_it_and_not_the_rest():
    files = [(f"{i}.jpg", b"x" * 1000) for i in range(20)]
    content = bytearray(make_tar(files))
    start = members(content)[5].start
    stop = members(content)[8].start
    content[start:stop] = bytes(stop - start)
    assert list(read(content)) == [f"{i}.jpg" for i in range(20) if i not in (5, 6, 7)]
    assert damages(content) == [Damage(start, stop, "zeros between members")]


def test_an_absurd_size_with_a_right_checksum_costs_its_member_alone():
    files = random_files(6)
    content = bytearray(make_tar(files))
    victim = members(content)[2]
    info = tarfile.TarInfo("00002.jpg")
    info.size = 7 << 30
    content[victim.start : victim.start + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)
    assert list(read(content)) == [name for name, _ in files if name != "00002.jpg"]
    assert "7516192768 bytes is cut off" in damages(content)[0].message


@pytest.mark.parametrize("cut", [1, 300, 511, 512, 700])
def test_a_cut_off_shard_keeps_what_came_before(cut):
    files = [(f"{i}.jpg", b"x" * 1024) for i in range(4)]
    content = make_tar(files)
    last = members(content)[-1]
    short = content[: last.start + cut]
    assert read(short) == dict(files[:-1])
    assert [(found.start, found.stop) for found in damages(short)] == [(last.start, len(short))]


def test_what_is_no_tar_has_no_members():
    for content in (b"", b"<html>404</html>", np.random.default_rng(0).bytes(50_000)):
        assert members(content) == []
    assert damages(b"") == []
    assert len(damages(b"<html>404</html>")) == 1


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("seed", range(15))
def test_random_damage_costs_only_members_that_it_touches(form, seed):
    random = np.random.default_rng(seed)
    name = "n" * 120 if form != tarfile.USTAR_FORMAT else "n"
    files = [(f"{name}{i:03}.jpg", random.bytes(int(random.integers(0, 4000)))) for i in range(60)]
    content = bytearray(make_tar(files, form))
    whole = members(content)
    changed = np.zeros(len(content), bool)
    for _ in range(12):
        start = int(random.integers(0, len(content)))
        stop = min(len(content), start + int(random.integers(1, 3000)))
        kind = random.integers(0, 3)
        if kind == 0:
            content[start:stop] = bytes(stop - start)
        elif kind == 1:
            content[start:stop] = random.bytes(stop - start)
        else:
            content[start] ^= 1 << int(random.integers(0, 8))
            stop = start + 1
        changed[start:stop] = True
    found, contents = read(content), dict(files)
    unharmed = [item.name.decode() for item in whole if not changed[item.start : item.data + item.size].any()]
    # Less than all, so that the test tests, and more than none.
    assert 0 < len(unharmed) < len(files)
    assert {key: found.get(key) for key in unharmed} == {key: contents[key] for key in unharmed}


@pytest.mark.parametrize("seed", range(5))
def test_hostile_bytes_never_raise_and_nothing_lies_outside_the_file(seed):
    random = np.random.default_rng(seed)
    content = bytearray(make_tar(random_files(10), tarfile.PAX_FORMAT))
    for _ in range(200):
        block = int(random.integers(0, len(content) // BLOCK)) * BLOCK
        content[block : block + 512] = content[:512]
        content[block + int(random.integers(0, 512))] = int(random.integers(0, 256))
        # The checksum is made right, so that the fields themselves are tried.
        header = content[block : block + BLOCK]
        header[156] = random.choice(list(b"0LxgKS\0\xff5"))
        header[148:156] = b" " * 8
        content[block : block + BLOCK] = header
        content[block + 148 : block + 156] = b"%06o\0 " % sum(header)
        for item in walk(io.BytesIO(content), len(content)):
            stop = item.data + item.size if isinstance(item, Member) else item.stop
            assert 0 <= item.start < stop <= len(content)


def test_the_checksum_of_a_window_is_that_of_the_whole_file_whatever_is_read():
    content = np.random.default_rng(0).bytes(1_000_000)
    window = Window(io.BytesIO(content), len(content), checksum=True)
    for start, stop in ((0, 10), (500_000, 500_100), (499_000, 499_500), (10, 20), (999_990, 1_000_000)):
        assert window.read(start, stop) == content[start:stop]
    assert window.crc32() == zlib.crc32(content)


@pytest.mark.parametrize("name", ["a.jpg", "x/a.b/c.JPG", "a.seg.png", ".hidden", "noext", "a./b", "x/.y", "d/n.json"])
def test_names_are_split_as_webdataset_does(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))
