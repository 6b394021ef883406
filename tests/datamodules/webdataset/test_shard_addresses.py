"""Servers, secrets in URLs, and clocks."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Fault, FaultyServer
from PIL import Image
from shard_files import write_pairs

from datamodules.webdataset.cache_folder import CacheFolder, Shard
from datamodules.webdataset.decode import decode
from datamodules.webdataset.manifest import ShardEntry, make_manifest, write_manifest
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.settings import Access
from datamodules.webdataset.storage import Storage, TransportError
from datamodules.webdataset.urls import hide_secrets

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
