import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from datamodules.detection.coco import CocoSource
from datamodules.detection.shards import ShardSource
from datamodules.webdataset.commands import make as make_module
from datamodules.webdataset.commands.boxes import BoxEntries
from datamodules.webdataset.commands.entries import CaptionEntries, Entry, FolderEntries, ListEntries
from datamodules.webdataset.commands.make import Layout, make


@pytest.fixture
def images(tmp_path):
    """Class folders cat (4 images, one in a subfolder) and dog (3): photographs of 40 x 30 in three formats."""
    random = np.random.default_rng(0)
    root = tmp_path / "images"
    for name in ("dog/a.PNG", "dog/b.jpg", "dog/c.webp", "cat/d.jpg", "cat/more/e.jpeg", "cat/f.jpg", "cat/g.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((40, 30)).save(root / name)
    return root


def read_all(folder):
    """Names and contents of all files in the shards, in order."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


class TestFolder:
    def test_images_are_copied_byte_for_byte_with_the_number_of_their_class(self, images, tmp_path):
        made = make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=3))
        assert (made.shards, made.samples, made.skipped, made.kept) == (3, 7, 0, 0)
        found = read_all(tmp_path / "out")
        order = ["cat/d.jpg", "cat/f.jpg", "cat/g.jpg", "cat/more/e.jpeg", "dog/a.PNG", "dog/b.jpg", "dog/c.webp"]
        for number, name in enumerate(order):
            suffix = name.rpartition(".")[2].lower()
            assert found[f"{number:09}.{suffix}"] == (images / name).read_bytes()
            assert found[f"{number:09}.cls"] == (b"0" if name.startswith("cat") else b"1")
        assert len(found) == 14
        assert json.loads((tmp_path / "out/classes.json").read_text()) == ["cat", "dog"]

    def test_webdataset_reads_them(self, images, tmp_path):
        make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=3))
        shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
        assert [sample["cls"] for sample in samples] == [0, 0, 0, 0, 1, 1, 1]
        assert [sample["__key__"] for sample in samples] == [f"{number:09}" for number in range(7)]
        assert samples[4]["png"].size == (40, 30)

    def test_a_folder_without_classes(self, images, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"cat/more has no class folders; expected .*/<class>/<image>"):
            FolderEntries(images / "cat/more")
        with pytest.raises(FileNotFoundError, match=r"nowhere is no folder"):
            FolderEntries(tmp_path / "nowhere")
        (tmp_path / "empty/cat").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"there are no images"):
            make(FolderEntries(tmp_path / "empty"), tmp_path / "out")


class TestLists:
    def parts(self, entries):
        return [(os.path.basename(entry.image), dict(entry.parts)) for entry in entries]  # noqa: PTH119 - a string

    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    def test_tables_have_captions_labels_or_both(self, images, suffix):
        path = write_csv(
            images / f"list{suffix}",
            [
                ["path", "caption", "label"],
                ["dog/a.PNG", "A dog,\tfor sure", "3"],
                ["dog/b.jpg", "", "0"],
                ["x.jpg", "x", ""],
            ],
        )
        assert self.parts(ListEntries(path)) == [
            ("a.PNG", {"txt": "A dog,\tfor sure", "cls": "3"}),
            ("b.jpg", {"cls": "0"}),
            ("x.jpg", {"txt": "x"}),
        ]

    def test_lines_of_json_with_other_names(self, images, tmp_path):
        path = tmp_path / "list.jsonl"
        path.write_text('{"file": "dog/a.PNG", "title": "Ein H\\u00fcndchen"}\n\n{"file": "cat/d.jpg", "class": 7}\n')
        entries = ListEntries(path, images, ("file", "title", "class"))
        assert self.parts(entries) == [("a.PNG", {"txt": "Ein H\u00fcndchen"}), ("d.jpg", {"cls": "7"})]
        assert next(iter(entries)).image == str(images / "dog/a.PNG")

    def test_text_has_the_label_after_the_last_blank(self, images):
        (images / "list.txt").write_text("# path label\ndog/with blank.jpg 4\n\ncat/d.jpg 0\n")
        assert self.parts(ListEntries(images / "list.txt")) == [
            ("with blank.jpg", {"cls": "4"}),
            ("d.jpg", {"cls": "0"}),
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("path,caption\n,x\n", r"list.csv:2: no 'path' in .* Name the column with --path-column"),
            ("path,text\na.jpg,x\n", r"list.csv:2: neither 'caption' nor 'label' in .*'text'.* --caption-column"),
            ("path,label\na.jpg,cat\n", r"list.csv:2: 'label' is 'cat', expected the number of a class"),
            ("path,label\na.jpg,-1\n", r"list.csv:2: 'label' is '-1', expected the number of a class"),
        ],
    )
    def test_errors_name_the_line(self, tmp_path, content, message):
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            make(ListEntries(tmp_path / "list.csv"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_broken_json_and_missing_lists(self, tmp_path):
        (tmp_path / "list.jsonl").write_text("{}[\n")
        with pytest.raises(ValueError, match=r"list.jsonl:1 is not JSON"):
            list(ListEntries(tmp_path / "list.jsonl"))
        (tmp_path / "list.jsonl").write_text("[]\n")
        with pytest.raises(ValueError, match=r"list.jsonl:1: a JSON list, expected an object"):
            list(ListEntries(tmp_path / "list.jsonl"))
        with pytest.raises(FileNotFoundError, match=r"other.txt does not exist"):
            ListEntries(tmp_path / "other.txt")


class TestCoco:
    def test_the_first_caption_is_text_and_all_are_json(self, images, tmp_path):
        content = {
            "images": [{"id": 5, "file_name": "dog/a.PNG"}, {"id": 6, "file_name": "cat/d.jpg"}, {"id": 7}],
            "annotations": [
                {"image_id": 6, "caption": "A cat."},
                {"image_id": 5, "caption": " A dog\nruns. "},
                {"image_id": 6, "caption": "It sleeps."},
            ],
        }
        (tmp_path / "captions.json").write_text(json.dumps(content))
        make(CaptionEntries(tmp_path / "captions.json", images), tmp_path / "out")
        found = read_all(tmp_path / "out")
        assert found["000000000.txt"] == b"A dog runs."
        assert found["000000001.txt"] == b"A cat."
        assert json.loads(found["000000001.json"]) == {"captions": ["A cat.", "It sleeps."], "image_id": 6}
        assert len(found) == 6  # the image without a caption is left out
        (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 1}]}))
        with pytest.raises(ValueError, match=r"KeyError 'caption'; expected `images` with `id`"):
            CaptionEntries(tmp_path / "captions.json", images)

    def test_boxes_become_shards_that_detection_reads(self, images, tmp_path):
        polygon = [2.0, 3.0, 12.0, 3.0, 12.0, 20.0]
        content = {
            "images": [
                {"id": 5, "file_name": "dog/b.jpg", "height": 30, "width": 40},
                {"id": 9, "file_name": "cat/d.jpg", "height": 30, "width": 40},
            ],
            "annotations": [
                {"id": 1, "image_id": 9, "category_id": 3, "bbox": [2, 3, 10, 17], "segmentation": [polygon]},
                {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0, 0, 5.5, 5], "segmentation": [polygon]},
            ],
            "categories": [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        make(BoxEntries(tmp_path / "boxes.json", images), tmp_path / "out", Layout(samples_per_shard=1))
        truth, found = CocoSource(tmp_path / "boxes.json", images), ShardSource(tmp_path / "out")
        assert found.categories == truth.categories
        for index in range(2):
            assert found.image_id(index) == truth.image_id(index)
            for part in ("boxes", "labels", "areas", "crowd"):
                assert np.array_equal(getattr(found.objects(index), part), getattr(truth.objects(index), part))
            assert found.objects(index).masks == truth.objects(index).masks
            assert np.array_equal(np.asarray(found.read(index)), np.asarray(truth.read(index)))


class TestBadImages:
    def test_they_are_skipped_and_listed_with_the_reason(self, images, tmp_path):
        content = (images / "cat/f.jpg").read_bytes()
        (images / "cat/f.jpg").write_bytes(content[:-100])
        (images / "dog/a.PNG").write_bytes(b"nothing")
        entries = [*FolderEntries(images), Entry(str(images / "gone.jpg"), {"cls": "1"})]
        made = make(Fixed(entries), tmp_path / "out", Layout(samples_per_shard=3))
        assert (made.samples, made.skipped) == (5, 3)
        found = read_all(tmp_path / "out")
        keys = {name.partition(".")[0] for name in found}
        assert keys == {f"{number:09}" for number in (0, 2, 3, 5, 6)}  # the others keep their keys
        listed = [path.read_text().splitlines() for path in sorted((tmp_path / "out/skipped").iterdir())]
        (truncated,), (unknown,), (gone,) = listed
        assert truncated.startswith(f"{images / 'cat/f.jpg'}\tOSError: ")
        assert unknown.startswith(f"{images / 'dog/a.PNG'}\tUnidentifiedImageError: no image")
        assert gone.startswith(f"{images / 'gone.jpg'}\tFileNotFoundError: ")

    def test_without_decoding_only_the_header_is_read(self, images, tmp_path):
        content = (images / "cat/f.jpg").read_bytes()
        (images / "cat/f.jpg").write_bytes(content[:-100])
        assert make(FolderEntries(images), tmp_path / "out", Layout(decode=False)).skipped == 0
        assert read_all(tmp_path / "out")["000000001.jpg"] == content[:-100]

    def test_files_without_a_known_suffix_get_that_of_their_format(self, images, tmp_path):
        (images / "dog/b.jpg").rename(images / "b.jpg_large")
        Image.new("P", (4, 4)).save(images / "b.gif")
        entries = [Entry(str(images / name), {"cls": "1"}) for name in ("b.jpg_large", "b.gif")]
        assert make(Fixed(entries), tmp_path / "out").skipped == 1
        assert sorted(read_all(tmp_path / "out")) == ["000000000.cls", "000000000.jpeg"]
        assert "GIF, expected one of .jpg" in (tmp_path / "out/skipped/00000.tsv").read_text()

    def test_it_is_an_error_if_all_are(self, images, tmp_path):
        (images / "list.txt").write_text("wrong/b.jpg 4\n")
        with pytest.raises(ValueError, match=r"none of 1 images could be read; .*out/skipped says why"):
            make(ListEntries(images / "list.txt"), tmp_path / "out")


class Fixed(list):
    def notes(self):
        return {}


def test_large_images_are_shrunk_and_small_ones_copied(images, tmp_path):
    Image.new("RGBA", (300, 100), (200, 10, 10, 255)).save(images / "dog/large.png")
    make(FolderEntries(images), tmp_path / "out", Layout(max_side=90, quality=80))
    found = read_all(tmp_path / "out")
    with Image.open(io.BytesIO(found["000000007.jpg"])) as image:
        assert (image.size, image.mode) == ((90, 30), "RGB")
        assert abs(np.asarray(image).mean(axis=(0, 1)) - (200, 10, 10)).max() <= 3  # what JPEG loses on one colour
    assert found["000000005.jpg"] == (images / "dog/b.jpg").read_bytes()


def test_shards_stay_below_the_limit_of_bytes(images, tmp_path):
    # A sample is two headers of 512 bytes, a block of 512 for the class, and the image in whole blocks.
    sizes = [3 * 512 + -(-os.path.getsize(entry.image) // 512) * 512 for entry in FolderEntries(images)]  # noqa: PTH202
    limit = sizes[0] + sizes[1]
    made = make(FolderEntries(images), tmp_path / "out", Layout(max_bytes=limit))
    expected, room = 1, limit
    for size in sizes:
        if size > room:
            expected, room = expected + 1, limit
        room -= size
    assert made.shards == expected > 2
    assert len(read_all(tmp_path / "out")) == 14
    assert make(FolderEntries(images), tmp_path / "tiny", Layout(max_bytes=1)).shards == 7


class TestResume:
    def test_shards_that_are_there_stay_and_the_rest_is_as_if_nothing_had_happened(self, images, tmp_path, monkeypatch):
        (images / "cat/g.jpg").write_bytes(b"nothing")
        layout = Layout(samples_per_shard=2)
        make(FolderEntries(images), tmp_path / "whole", layout)
        out, write = tmp_path / "out", make_module.write_shard

        def stop_at_the_third(path, samples):
            if path.name == "00002.tar":
                next(iter(samples))
                path.with_name(path.name + ".unfinished").write_bytes(b"half of a shard")
                raise KeyboardInterrupt
            return write(path, samples)

        monkeypatch.setattr(make_module, "write_shard", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            make(FolderEntries(images), out, layout)
        assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
        before = (out / "00001.tar").stat()
        monkeypatch.setattr(make_module, "write_shard", write)
        made = make(FolderEntries(images), out, layout)
        assert (made.kept, made.shards, made.samples, made.skipped) == (2, 4, 6, 1)
        assert (out / "00001.tar").stat().st_mtime_ns == before.st_mtime_ns
        assert contents(out) == contents(tmp_path / "whole")

    def test_other_entries_or_another_layout_are_refused(self, images, tmp_path):
        make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=2))
        with pytest.raises(FileExistsError, match=r"made otherwise \(samples_per_shard was 2, is 3\). Choose another"):
            make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=3))
        (images / "cat/d.jpg").unlink()
        with pytest.raises(FileExistsError, match=r"entries was 7, is 6; digest was .*, is"):
            make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=2))
        (tmp_path / "out/making.json").unlink()
        with pytest.raises(FileExistsError, match=r"samples_per_shard was None, is 2"):
            make(FolderEntries(images), tmp_path / "out", Layout(samples_per_shard=2))

    @pytest.mark.slow
    def test_a_killed_run_with_workers_goes_on(self, images, tmp_path):
        """The bytes are those of one process without a kill, and no worker outlives its parent."""
        (images / "list.txt").write_text("".join(f"dog/b.jpg {number}\n" for number in range(4000)))
        out = tmp_path / "out"
        program = (
            "import sys; from pathlib import Path\n"
            "from datamodules.webdataset.commands.entries import ListEntries\n"
            "from datamodules.webdataset.commands.make import Layout, make\n"
            "if __name__ == '__main__':\n"
            "    make(ListEntries(Path(sys.argv[1])), Path(sys.argv[2]), Layout(samples_per_shard=50), num_workers=2)\n"
        )
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, tmp_path / "program.py", images / "list.txt", out]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # noqa: PTH109 - a string
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.tar"))) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        number = len(list(out.glob("*.tar")))
        assert 5 <= number < 80
        time.sleep(1)
        assert len(list(out.glob("*.tar"))) <= number + 2  # what the workers were at when their parent went
        subprocess.run(command, env=environment, check=True, timeout=120)
        make(ListEntries(images / "list.txt"), tmp_path / "whole", Layout(samples_per_shard=50))
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0, expected at least 1"),
        ({"max_bytes": 0}, "max_bytes=0, expected at least 1"),
        ({"max_side": 0}, "max_side=0, expected at least 1"),
        ({"quality": 101}, "quality=101, expected 1 to 100"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**options)
