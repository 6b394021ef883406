import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.webdataset.tuxpaint import STAMPS, find_stamps, is_held_out, write_tuxpaint

NAMES = [f"{category}/{group}/{name}" for category in ("animals", "food") for group in "ab" for name in range(10)]


@pytest.fixture
def stamps(tmp_path):
    """40 stamps of two categories, red on a clear ground, and files that are no samples."""
    folder = tmp_path / "stamps"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        stamp = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
        stamp.paste((255, 0, 0, 255), (16, 0, 32, 16))
        stamp.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"The {name}, \u00e9.\nde.utf8=Das {name}.\n", encoding="utf-8")
    (folder / "food/drawing.txt").write_text("A drawing.\n")  # its picture is an SVG
    (folder / "food/no caption.png").write_bytes((folder / f"{NAMES[0]}.png").read_bytes())
    return folder


def read_split(folder):
    """Return parts by key, of all shards of a split."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def test_every_stamp_with_a_picture_and_a_caption_is_in_one_split(stamps, tmp_path):
    counts = write_tuxpaint(tmp_path / "out", stamps=stamps, val_fraction=0.3, samples_per_shard=10)
    train, val = (read_split(tmp_path / "out" / split) for split in ("train", "val"))
    assert counts == (len(train), len(val))
    assert sorted([*train, *val]) == sorted(NAMES)
    assert set(val) == {name for name in NAMES if is_held_out(name, 0.3)}
    assert 3 <= len(val) <= 21  # 12 expected, 2.9 standard deviation
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == -(-len(train) // 10)
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert classes == ["animals", "food"]
    for name, parts in (train | val).items():
        assert sorted(parts) == ["cls", "jpg", "txt"]
        assert parts["txt"].decode() == f"The {name}, \u00e9."
        assert classes[int(parts["cls"])] == name.partition("/")[0]


def test_stamps_lie_on_white(stamps, tmp_path):
    write_tuxpaint(tmp_path / "out", stamps=stamps)
    parts = next(iter(read_split(tmp_path / "out/train").values()))
    with Image.open(io.BytesIO(parts["jpg"])) as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == (16, 32, 3)
    # Blocks of one colour each; JPEG loses little of them.
    assert abs(pixels[:, :16] - 255).max() <= 3
    assert abs(pixels[:, 16:] - (255, 0, 0)).max() <= 3


def test_the_split_does_not_depend_on_the_other_stamps_and_the_bytes_on_nothing(stamps, tmp_path):
    write_tuxpaint(tmp_path / "one", stamps=stamps)
    write_tuxpaint(tmp_path / "two", stamps=stamps)
    for path in (tmp_path / "one").rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    before = set(read_split(tmp_path / "one/val"))
    (stamps / f"{NAMES[3]}.png").unlink()
    write_tuxpaint(tmp_path / "three", stamps=stamps)
    assert set(read_split(tmp_path / "three/val")) == before - {NAMES[3]}


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install tuxpaint-stamps-default"):
        write_tuxpaint(tmp_path / "out", stamps=tmp_path)
    with pytest.raises(ValueError, match=r"val_fraction=1, expected a share between 0 and 1"):
        write_tuxpaint(tmp_path / "out", val_fraction=1)
    with pytest.raises(ValueError, match=r"samples_per_shard=0, expected at least 1"):
        write_tuxpaint(tmp_path / "out", samples_per_shard=0)


@pytest.mark.skipif(not STAMPS.is_dir(), reason="tuxpaint-stamps-default is not installed")
def test_the_package_of_debian(tmp_path):
    captions = find_stamps(STAMPS)
    train, val = write_tuxpaint(tmp_path / "out")
    assert train + val == len(captions) > 700
    assert 0.15 < val / (train + val) < 0.25
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert {"animals", "food", "vehicles"} < set(classes)
    samples = read_split(tmp_path / "out/val")
    assert len(samples) == val
    labels = [int(parts["cls"]) for parts in samples.values()]
    assert set(labels) <= set(range(len(classes)))
    assert len(set(labels)) >= 10
    for parts in samples.values():
        assert parts["txt"].decode().strip()
        with Image.open(io.BytesIO(parts["jpg"])) as image:
            assert image.mode == "RGB"
