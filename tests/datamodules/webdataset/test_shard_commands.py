import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.webdataset.commands import main


def jpeg(height, width):
    random = np.random.default_rng(height)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    stored = io.BytesIO()
    coarse.resize((width, height)).save(stored, "jpeg")
    return stored.getvalue()


def sample(number, caption=None):
    text = f"picture {number}" if caption is None else caption
    return {"jpg": jpeg(40 + number, 60), "txt": text.encode(), "json": json.dumps({"caption": text}).encode()}


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """As img2dataset leaves it: numbers with a gap, tables and statistics beside the shards."""
    folder = tmp_path / "pictures"
    for shard in (0, 1, 3):
        write(folder / f"{shard:05}.tar", {f"{shard:05}{n:04}": sample(n) for n in range(4)})
        (folder / f"{shard:05}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05}_stats.json").write_text("{}")
    return folder


@pytest.fixture
def images(tmp_path):
    for number in range(6):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(30 + number, 50))
    return tmp_path / "images"


class TestMake:
    def test_shards_are_made_and_indexed_and_good(self, images, tmp_path, capsys):
        out = tmp_path / "out"
        assert main(["make", "folder", str(images), "--out", str(out), "--samples-per-shard", "4"]) == 0
        assert f"{out}: 6 samples in 2 shards\n" in capsys.readouterr().out
        assert main(["verify", str(out), "--decode", "--parts", "cls"]) == 0
        assert "6 samples are good, 0 bad\n" in capsys.readouterr().out
        assert main(["make", "folder", str(images), "--out", str(out), "--samples-per-shard", "4"]) == 0
        assert f"{out}: 6 samples in 2 shards, 2 of them from before\n" in capsys.readouterr().out

    def test_a_list_with_options(self, images, tmp_path, capsys):
        (tmp_path / "list.csv").write_text("file,title\ncat/0.jpg,A cat\ncat/8.jpg,Gone\n")
        options = ["--root", str(images), "--path-column", "file", "--caption-column", "title", "--max-side", "25"]
        out = str(tmp_path / "out")
        assert main(["make", "list", str(tmp_path / "list.csv"), "--out", out, *options, "--quality", "70"]) == 0
        assert f"1 samples in 1 shards, 1 images skipped (listed in {out}/skipped)" in capsys.readouterr().out
        assert main(["stats", out, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["samples"], found["parts"]) == (1, {"jpg": 1, "txt": 1})
        assert found["sides"] == {"1": 1}  # 15 pixels

    def test_mistakes_are_named_without_a_trace(self, images, tmp_path, capsys):
        out = str(tmp_path / "out")
        assert main(["make", "folder", str(images), "--out", out, "--quality", "50"]) == 2
        assert "--quality has no effect without --max-side" in capsys.readouterr().err
        assert main(["make", "folder", str(tmp_path / "nowhere"), "--out", out]) == 2
        assert "nowhere is no folder" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["make", "folder", str(images), "--out", out, "--workers", "-1"])


class TestIndex:
    def test_it_lies_beside_local_shards(self, folder, capsys):
        assert main(["index", str(folder)]) == 0
        assert f"{folder / 'index'}: 12 samples in 3 shards" in capsys.readouterr().out
        assert (folder / "index/manifest.json").is_file()
        assert json.loads((folder / "index/manifest.json").read_text())["name"] == "pictures"

    def test_it_can_lie_elsewhere(self, folder, tmp_path, capsys):
        shards = [str(folder / "00000.tar"), str(folder / "00003.tar")]
        assert main(["index", *shards, "--out", str(tmp_path / "x"), "--name", "few", "--checksums"]) == 0
        assert not (folder / "index").exists()
        assert main(["stats", "--index", str(tmp_path / "x")]) == 0
        assert "samples  8, 4 a shard" in capsys.readouterr().out

    def test_mistakes(self, tmp_path, capsys):
        assert main(["index", "https://example.org/{0..3}.tar"]) == 2
        assert "is not local. Name the folder of the index with --out." in capsys.readouterr().err
        assert main(["index", str(tmp_path)]) == 2
        assert "has no *.tar" in capsys.readouterr().err
        assert main(["verify"]) == 2
        assert "shards verify: name the shards, or the folder of their index with --index" in capsys.readouterr().err


class TestVerify:
    def bad(self, folder, capsys, *options):
        """Return the lines about bad samples by key or shard, and the last line."""
        status = main(["verify", str(folder), *options])
        *lines, last = capsys.readouterr().out.splitlines()
        assert status == (1 if lines else 0)
        return {line.partition(": ")[0].rpartition("/")[2]: line.partition(": ")[2] for line in lines}, last

    def test_good_data_is_good_and_what_lies_beside_the_shards_is_no_matter(self, folder, capsys):
        assert self.bad(folder, capsys, "--decode", "--parts", "txt", "json") == ({}, "12 samples are good, 0 bad")

    def test_each_fault_is_counted_by_its_cause(self, folder, capsys):
        good = sample(1)
        samples = {
            "good": good,
            "no_image": {"txt": b"x"},
            "no_text": {"jpg": good["jpg"]},
            "blank": good | {"txt": b" \n"},
            "not_utf8": good | {"txt": b"\xff\xfe"},
            "not_json": good | {"json": b"{"},
            "class": good | {"cls": b"cat"},
            "no_jpeg": good | {"jpg": b"nothing"},
            "truncated": good | {"jpg": good["jpg"][:-200]},
            "../climbs": good,
        }
        write(folder / "00002.tar", samples)
        bad, last = self.bad(folder, capsys, "--decode", "--parts", "txt")
        causes = {key: text.partition(":")[0] for key, text in bad.items()}
        climbing = {key: causes.pop(key) for key in list(causes) if "climbs" in key}
        assert set(climbing.values()) == {"name"}
        assert causes == {
            "no_image": "parts",
            "no_text": "parts",
            "blank": "text",
            "not_utf8": "text",
            "not_json": "text",
            "class": "label",
            "no_jpeg": "decode",
            "truncated": "decode",
        }
        assert last.startswith("13 samples are good, ")
        for count in ("decode 2", "label 1", "parts 2", "text 3"):
            assert count in last

    def test_truncated_images_are_found_by_decoding_only(self, folder, capsys):
        write(folder / "00002.tar", {"truncated": {"jpg": jpeg(40, 60)[:-200]}})
        assert self.bad(folder, capsys)[0] == {}
        assert list(self.bad(folder, capsys, "--decode")[0]) == ["truncated"]

    def test_a_shard_of_another_size_or_checksum_than_indexed_is_changed(self, folder, capsys):
        assert main(["index", str(folder), "--checksums"]) == 0
        shard = folder / "00001.tar"
        content = bytearray(shard.read_bytes())
        content[600] ^= 1  # in the first image
        shard.write_bytes(content)
        bad, last = self.bad(folder, capsys)
        assert bad["00001.tar"].startswith("changed: crc32 ")
        assert "8 samples are good, 4 bad: changed 4" in last
        shard.write_bytes(content + bytes(512))
        assert (
            f"{len(content) + 512} bytes, {len(content)} when it was indexed"
            in self.bad(folder, capsys)[0]["00001.tar"]
        )

    def test_a_shard_that_is_gone_counts_with_all_its_samples(self, folder, capsys):
        assert main(["index", str(folder)]) == 0
        (folder / "00001.tar").rename(folder / "00001.away")
        assert main(["verify", "--index", str(folder / "index")]) == 1
        assert "8 samples are good, 4 bad: transport 4" in capsys.readouterr().out

    def test_few_are_named(self, folder, capsys):
        write(folder / "00002.tar", {str(number): {"txt": b"x"} for number in range(5)})
        assert main(["verify", str(folder), "--max-listed", "2"]) == 1
        out = capsys.readouterr().out
        assert out.count(": parts: ") == 2
        assert "... and 3 more (--max-listed)" in out

    @pytest.mark.slow
    def test_processes_find_the_same(self, folder, capsys):
        write(folder / "00002.tar", {"no_image": {"txt": b"x"}})
        assert self.bad(folder, capsys) == self.bad(folder, capsys, "--workers", "2")


class TestStats:
    def test_they_count_what_the_shards_hold(self, folder, capsys):
        write(folder / "00002.tar", {"large": sample(260, "x" * 70) | {"cls": b"1"}})
        assert main(["stats", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["shards"], found["samples"]) == (4, 13)
        assert found["num_bytes"] == sum(os.path.getsize(path) for path in folder.glob("*.tar"))  # noqa: PTH202
        assert found["parts"] == {"cls": 1, "jpg": 13, "json": 13, "txt": 13}
        assert found["part_bytes"]["txt"] == 12 * len("picture 0") + 70
        assert found["sides"] == {"1": 13}  # 40 to 43 pixels, and 60
        assert found["captions"] == {"1": 12, "64": 1}
        assert main(["stats", str(folder)]) == 0
        text = capsys.readouterr().out
        assert "samples  13, 3 a shard" in text
        assert ".txt: 13 samples, 14 bytes each" in text
        rows = [line.split() for line in text.splitlines()]
        assert ["1", "to", "15", "12", "#" * 37] in rows

    def test_images_without_a_size_and_what_is_no_sample(self, folder, capsys):
        write(folder / "00002.tar", {"broken": {"jpg": b"nothing"}, "/absolute": sample(1)})
        assert main(["stats", str(folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["sides"] == {"0": 1, "1": 12}
        assert set(found["rejects"]) == {"name"}
