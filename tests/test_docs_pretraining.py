"""The commands and YAML of docs/pretraining.md run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from datamodules.webdataset.commands import main as shards
from datamodules.webdataset.tuxpaint import STAMPS
from tasks.cli import main

PAGE = (Path(__file__).parents[1] / "docs/pretraining.md").read_text()
TRAINER = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
SMALL = {
    "global_batch_size": 8,
    "trainer": TRAINER | {"enable_progress_bar": False},
    "model": {"init_args": {"warmup_steps": 1, "text": {"init_args": {"width": 16, "num_layers": 1, "num_heads": 2}}}},
    "data": {"init_args": {"image_size": 32, "batch_size": 8, "num_workers": 0}},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_yaml_parses(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit"]
    for place in dict.fromkeys((0, number)):
        Path(f"{place}.yaml").write_text(blocks("yaml")[place])
        words += ["-c", f"{place}.yaml"]
    with pytest.raises(SystemExit) as exit_info:
        main([*words, "--print_config"])
    assert exit_info.value.code == 0, capsys.readouterr().err


@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_commands_write_what_the_page_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stamps.yaml").write_text(blocks("yaml")[0].replace("internimage_t", "internimage_debug"))
    Path("small.yaml").write_text(json.dumps(SMALL))
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        _, command, *words = shlex.split(line)
        if command == "shards":
            assert shards(words) == 0
        else:
            main([command, *words, *(["-c", "small.yaml"] if command == "fit" and "stamps.yaml" in words else [])])
    header = Path("runs/stamps/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`((?:train|val|data)/\w+)`", tables))
    of_m3i = {f"train/{name}" for name in ("same_view", "other_view", "text", "category", "target_std", "momentum")}
    of_a_cache = {"data/cache_hits", "data/retries"}
    assert len(named) > 20
    assert named - of_m3i - of_a_cache <= set(header)
    assert Path("runs/stamps/version_0/checkpoints/best.ckpt").is_file()
    (found,) = Path("runs/stamps/predict_0").iterdir()
    assert found.name == "embeddings_00000_00000.npz"
