"""Samples that would end or stall a run."""

import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.EpsImagePlugin
import pytest
import torch
from faulty_server import FaultyServer
from PIL import Image
from shard_files import square, write_tar

from datamodules.webdataset import text as text_module
from datamodules.webdataset.captions import Captions
from datamodules.webdataset.decode import MAX_SCANS, decode
from datamodules.webdataset.index import ShardIndex, write_index
from datamodules.webdataset.labels import Labels
from datamodules.webdataset.manifest import make_manifest
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.storage import Storage
from datamodules.webdataset.tar import Damage, walk_blocks
from datamodules.webdataset.text import ClipTokenizer
from datamodules.webdataset.urls import expand_shards
from datamodules.webdataset.writers import CentreWriter

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


def test_half_a_character_in_json_is_a_bad_text() -> None:
    # As left by a program that cuts texts of UTF-16 anywhere; Rust's tokenizers raise a TypeError.
    captions = Captions(keys=(), json_keys=("caption",))
    with pytest.raises(BadSample) as caught:
        captions.find(part("json", b'{"caption": "a \\ud83d"}'), DRAW)
    assert caught.value.cause == "text"
    assert captions.find(part("json", b'{"caption": "a \\ud83d\\ude00"}'), DRAW) == "a \U0001f600"


def test_brackets_without_end_are_a_bad_sample() -> None:
    nested = part("json", b"[" * 200_000)
    with pytest.raises(BadSample):
        Captions(keys=(), json_keys=("caption",)).find(nested, DRAW)
    with pytest.raises(BadSample):
        Labels(key="json.label").find(nested, 5)


def test_a_text_of_megabytes_without_blanks_does_not_stop_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Counting:
        cache = ()

        def __call__(self, texts: list[str], context_length: int) -> torch.Tensor:
            given.extend(len(text) for text in texts)
            return torch.zeros(len(texts), context_length, dtype=torch.int64)

    letters = "".join(np.random.default_rng(0).choice(list("abcdefghij"), 3_000_000))
    ids, _ = ClipTokenizer().encode([letters[:7000]])
    monkeypatch.setattr(text_module, "_clip", Counting)
    ClipTokenizer().encode([letters])
    # 75 tokens, of which none of the vocabulary has a hundred characters.
    assert given == [7700]
    monkeypatch.undo()
    torch.testing.assert_close(ClipTokenizer().encode([letters])[0], ids)


def test_a_broken_avif_is_a_bad_image() -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)), "AVIF")
    assert decode(data).shape == (60, 80, 3)
    # PIL raises RuntimeError.
    assert cause_of(data[: len(data) // 2]) == "decode"


def test_images_that_run_programs_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    assert cause_of(encode(Image.new("RGB", (20, 30)), "EPS")) == "decode"
    assert not started


def test_an_icon_that_hides_a_larger_image_is_refused() -> None:
    image = encode(Image.new("RGB", (3000, 3000)), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(image), 22) + image
    assert cause_of(icon, max_pixels=1_000_000) == "decode"


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    whole = encode(Image.new("RGB", (64, 64), "grey"), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    assert decode(whole).shape == (64, 64, 3)
    assert cause_of(whole[:-2] + scan * MAX_SCANS + whole[-2:]) == "size"


def test_a_line_of_pixels_does_not_become_gigabytes() -> None:
    writer = CentreWriter(image_size=32, shorter_side=32, interpolation="bicubic", max_pixels=1_000_000)
    row = torch.zeros(3, 32, 32, dtype=torch.uint8)
    writer.write(memoryview(encode(Image.new("RGB", (900, 1)), "PNG")), DRAW, [row])
    with pytest.raises(BadSample, match="after the resize"):
        writer.write(memoryview(encode(Image.new("RGB", (2000, 1)), "PNG")), DRAW, [row])


def test_a_hostile_pax_size_costs_its_member_and_not_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 4
            # More digits than Python turns into a number.
            member.pax_headers = {"size": "9" * 5000} if name == "a" else {}
            tar.addfile(member, io.BytesIO(b"text"))
    with path.open("rb") as file:
        write_index(file, path.stat().st_size, tmp_path / "a.idx", {})
    index = ShardIndex(tmp_path / "a.idx")
    assert [index.key(i) for i in range(len(index))][-1] == "b"
    assert [cause for _, cause, _ in index.rejects()] == ["archive"]


def test_a_row_of_headers_without_a_member_is_walked_once() -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    content = header.tobuf(tarfile.GNU_FORMAT) * 400
    reads = 0

    def read(start: int, stop: int) -> bytes:
        nonlocal reads
        reads += 1
        return content[start:stop]

    assert [type(found) for found in walk_blocks(read, len(content))] == [Damage]
    # Two reads a header, from each of which at most 16 are looked at; 400 * 400 of them would be walked otherwise.
    assert reads <= 400 * 16 * 2


def test_a_mask_beside_the_image_and_upper_case_and_folders_are_one_sample(tmp_path: Path) -> None:
    mask = encode(Image.new("L", (48, 40), 3), "PNG")
    members = [
        ("a b/\u00e9.JPG", square(0)),
        ("a b/\u00e9.seg.png", mask),
        ("a b/\u00e9.PNG", mask),
        ("a b/c.Jpeg", square(1)),
    ]
    folder = tmp_path / "with blanks"
    folder.mkdir()
    write_tar(folder / "00000.tar", iter(members))
    manifest = make_manifest(expand_shards(folder), folder / "index", name="toy")
    reader = Reader([manifest], Storage(), max_sample_bytes=10**6)
    first, second = reader.read(0, 0, 0), reader.read(0, 0, 1)
    assert {name: bytes(data) for name, data in first.parts.items()} == {
        "jpg": square(0), "seg.png": mask, "png": mask
    }  # fmt: skip
    assert (first.key, second.key, bytes(second.parts["jpeg"])) == ("a b/\u00e9", "a b/c", square(1))
