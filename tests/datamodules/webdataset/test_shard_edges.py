"""What a stranger's data, servers and habits bring: none of it may end, hang or silently change a long run."""

import io
import json
import os
import pickle
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.EpsImagePlugin
import pytest
import torch
from faulty_server import Fault, FaultyServer
from PIL import Image
from shard_files import square, write_pairs, write_tar

from datamodules.webdataset import text as text_module
from datamodules.webdataset.cache_folder import CacheFolder, Shard
from datamodules.webdataset.captions import Captions
from datamodules.webdataset.commands import main
from datamodules.webdataset.decode import MAX_SCANS, decode
from datamodules.webdataset.eval_loader import warn_of_bad
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.index import ShardIndex, write_index
from datamodules.webdataset.labels import Labels
from datamodules.webdataset.ledger import BadEntry, Ledger
from datamodules.webdataset.manifest import Manifest, ShardEntry, make_manifest, write_manifest
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.settings import Access
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.storage import Storage, TransportError
from datamodules.webdataset.tar import Damage, walk_blocks
from datamodules.webdataset.text import ClipTokenizer
from datamodules.webdataset.urls import expand_shards, hide_secrets
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


# Two sources in one folder.


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


# Hostile and broken samples.


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


# Servers, secrets, clocks.


def test_users_passwords_and_signatures_are_not_shown() -> None:
    shown = {
        "https://me:p@ss@host/a.tar": "https://host/a.tar",
        "pipe:curl -s 'https://me:pass@host/a.tar'": "pipe:curl -s 'https://host/a.tar'",
        "https://b.s3.aws.com/a.tar?X-Amz-Signature=0a1b&X-Amz-Expires=9": (
            "https://b.s3.aws.com/a.tar?X-Amz-Signature=...&X-Amz-Expires=9"
        ),
        "https://x.blob.net/a.tar?sv=2022&sig=0a1b%3D": "https://x.blob.net/a.tar?sv=2022&sig=...",
        "https://host/a@b.tar?shard=3": "https://host/a@b.tar?shard=3",
        "pipe:curl -H 'Authorization: Bearer 0a1b' https://host/a.tar": (
            "pipe:curl -H 'Authorization: Bearer ...' https://host/a.tar"
        ),
        "s3://bucket/a@b.tar": "s3://bucket/a@b.tar",
        "/data/a@b/c.tar": "/data/a@b/c.tar",
    }
    assert {url: hide_secrets(url) for url in shown} == shown


def test_secrets_of_a_url_are_in_no_name_and_no_error(tmp_path: Path, server: FaultyServer) -> None:
    write_pairs(tmp_path, num_shards=1, per_shard=3)
    server.files["/a.tar"] = (tmp_path / "00000.tar").read_bytes()
    url = f"http://me:secret@{server.url.removeprefix('http://')}/a.tar?token=secret"
    manifest = make_manifest([url], tmp_path / "index", name="far")
    reader = Reader([manifest], Storage(retries=0), max_sample_bytes=10**6)
    assert reader.read(0, 0, 1).key == "000001"
    assert reader.name(0, 0, 1) == f"{server.url}/a.tar?token=.../000001"
    server.always["/a.tar"] = Fault(status=503)
    with pytest.raises(BadSample, match=r"a\.tar\?token=.*status 503") as caught:
        reader.read(0, 0, 1)
    assert "secret" not in str(caught.value)
    with pytest.raises(OSError, match="1 of 1 shards could not be read") as failed:
        make_manifest([url.replace("a.tar", "b.tar")], tmp_path / "other", name="far")
    assert "secret" not in str(failed.value)


def test_a_new_signature_is_no_new_data(tmp_path: Path) -> None:
    # Signatures last for days, runs for weeks; a run goes on only with the same digest.
    digests = {
        write_manifest(tmp_path, "far", [ShardEntry(f"https://host/x/a.tar?sig=/{sig}", 3, 10, None, Counter())]).digest
        for sig in ("1", "2")
    }
    assert len(digests) == 1


def test_urls_with_blanks_and_letters_of_any_alphabet_are_read(server: FaultyServer) -> None:
    server.files["/a%20%C3%A9.tar"] = b"0123456789"
    for url in (f"{server.url}/a \u00e9.tar", f"{server.url}/a%20%C3%A9.tar"):
        assert Storage(retries=0).read(url, 2, 5, size=10, checksum=None) == b"234"


def test_a_redirect_to_what_is_not_http_is_an_error_of_the_transport(server: FaultyServer) -> None:
    server.always["/a.tar"] = Fault(status=302, headers={"Location": "file:///etc/hostname"})
    with pytest.raises(TransportError, match=r"redirects to what is no http\(s\) URL"):
        Storage(retries=0).read(f"{server.url}/a.tar", 0, 5, size=10, checksum=None)


def test_a_proxy_is_not_told_the_password_of_a_server(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/a.tar"] = b"0123456789"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    # Not asked where `no_proxy` names the server, whatever stands before its name.
    url = f"http://me:secret@{server.url.removeprefix('http://')}/a.tar"
    assert Storage(retries=0).read(url, 2, 5, size=10, checksum=None) == b"234"


def test_a_clock_that_was_put_back_does_not_keep_shards_for_ever(tmp_path: Path) -> None:
    shard = Shard("s3://bucket/a.tar", 10, None)
    path = tmp_path / f"{shard.name}.tar"
    path.write_bytes(b"0123456789")
    future = path.stat().st_mtime + 1e6
    os.utime(path, (future, future))
    file = CacheFolder(tmp_path, 100).open(shard)
    assert file is not None
    file.close()
    assert path.stat().st_mtime < future - 9e5


def test_no_patience_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timeout=0\.0, expected more than 0 seconds"):
        Access(timeout=0.0)


# Books that are kept for weeks.


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
