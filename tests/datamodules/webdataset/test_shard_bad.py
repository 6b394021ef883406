"""Bad samples, by key: replaced, counted, listed, and too many of them."""

from pathlib import Path
from typing import Any

import pytest
from shard_data import names, open_pairs
from shard_files import NAMES, sample, square, write_pairs, write_tar

from datamodules.webdataset.dataset import BadShardsError
from datamodules.webdataset.ledger import Ledger
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.settings import Access
from datamodules.webdataset.sources import Shards


def bad_parts() -> dict[int, dict[str, bytes | None]]:
    """Return one sample for each way in which one can be bad while its archive is whole."""
    return {
        3: {"jpg": square(3)[:300]},
        14: {"jpg": b"<html>not found</html>"},
        17: {"txt": None},
        25: {"txt": b"\xff\xfe\xfa"},
        26: {"txt": b"  "},
        31: {"jpg": None},
        40: {"cls": b"99"},
    }


CAUSES = {3: "decode", 14: "decode", 17: "text", 25: "text", 26: "text", 31: "parts", 40: "label"}


def test_bad_samples_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path / "shards", num_shards=6, per_shard=11, changed=bad_parts())
    shards = Shards(urls=str(tmp_path / "shards"), name="squares")

    def run(**options: Any) -> tuple[list[list[str]], Meter]:
        data = open_pairs(train=shards, batch_size=22, class_names=NAMES, **options)
        loader = data.train_dataloader()
        batches = [names(batch) for batch in loader]
        meter, _ = loader.take_meter()
        assert meter is not None
        return batches, meter

    batches, meter = run()
    delivered = [name for batch in batches for name in batch]
    bad = {f"{number:06}" for number in CAUSES}
    assert len(delivered) == 66
    assert not bad & set(delivered)
    # Each of the others comes at its place, and seven of them once more.
    assert set(delivered) == set(keys) - bad
    # A bad sample may also be drawn as a replacement, and is counted again then.
    found = {int(entry.name.rpartition("/")[2]): entry.cause for entry in meter.entries}
    assert found == CAUSES
    assert meter.samples == {0: 66}
    assert sum(meter.bad.values()) == len(meter.entries) >= len(CAUSES)
    again, _ = run(num_workers=2)
    assert again == batches
    # Listed ones are not read again, and replaced the same way.
    ledger = Ledger(tmp_path / "ledger")
    ledger.append(meter.entries)
    known, second = run(ledger=tmp_path / "ledger")
    assert known == batches
    assert second.entries == []
    assert second.bad == meter.bad


def test_evaluation_leaves_bad_samples_out(tmp_path: Path) -> None:
    keys = write_pairs(tmp_path / "shards", num_shards=2, per_shard=25, changed=bad_parts())
    loader = open_pairs(val=Shards(urls=str(tmp_path / "shards")), batch_size=8, class_names=NAMES).val_dataloader()
    with pytest.warns(UserWarning, match="7 of 50 samples of shards are bad and left out"):
        batches = list(loader)
    valid = {name for batch in batches for name, ok in zip(names(batch), batch["valid"].tolist(), strict=True) if ok}
    assert valid == set(keys) - {f"{number:06}" for number in CAUSES}


def test_too_large_samples_are_bad_before_they_are_read(tmp_path: Path) -> None:
    write_pairs(tmp_path / "shards", num_shards=2, per_shard=20, changed={5: {"json": b" " * 1_000_000}})
    access = Access(max_sample_bytes=500_000)
    loader = open_pairs(train=Shards(urls=str(tmp_path / "shards")), batch_size=40, access=access).train_dataloader()
    list(loader)
    meter, _ = loader.take_meter()
    assert meter is not None
    assert set(meter.bad) == {(0, "size")}
    assert meter.storage["bytes"] < 500_000


def test_a_window_of_bad_samples_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "shards", num_shards=2, per_shard=10, changed={n: {"txt": None} for n in range(20)})
    loader = open_pairs(train=Shards(urls=str(tmp_path / "shards")), batch_size=4).train_dataloader()
    with pytest.raises(BadShardsError, match=r"10 samples in a row are bad at step 0 of epoch 0 .*text"):
        next(iter(loader))


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_pairs(folder, num_shards=2, per_shard=10)
    data = open_pairs(train=Shards(urls=str(folder)), batch_size=20)
    loader = data.train_dataloader()
    # The same size and the same numbers, in another order.
    numbers = [1, 0, *range(2, 10)]
    parts = {number: sample(number) for number in numbers}
    longest = {part: max(len(parts[n][part]) for n in (0, 1)) for part in ("jpg", "txt", "cls")}
    assert all(-(-longest[part] // 512) == -(-len(parts[n][part]) // 512) for n in (0, 1) for part in longest)
    write_tar(
        folder / "00000.tar",
        iter([(f"{number:06}.{part}", data) for number in numbers for part, data in parts[number].items()]),
    )
    list(loader)
    meter, _ = loader.take_meter()
    assert meter is not None
    assert meter.bad[0, "changed"] >= 2
