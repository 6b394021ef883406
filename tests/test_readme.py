"""The README's commands and code run as they stand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tasks.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def test_the_commands_of_the_command_line_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    run = [words[1:] for words in COMMANDS if words[0] == "internimage"]
    assert {words[0] for words in run} == {"fit", "validate", "predict"}
    for words in run:
        if "--print_config" in words:
            with pytest.raises(SystemExit) as exit_info:
                main(words)
            assert exit_info.value.code == 0
        else:
            main(words)
    folder = tmp_path / "runs/my-run/version_0"
    for name in ("config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / name).is_file(), f"the README promises {name} in the run's folder"


def test_the_other_commands_are_the_two_make_targets_and_the_activation() -> None:
    others = [words for words in COMMANDS if words[0] != "internimage"]
    assert others == [["make", "quickstart"], ["make", "test"], ["source", ".venv/bin/activate"]]
    # A dry run fails for a target that does not exist.
    subprocess.run(["make", "-n", "-C", ROOT, "quickstart", "test"], check=True, capture_output=True)


def test_the_quickstart_prints_the_last_line_that_the_readme_expects() -> None:
    expected = next(line for line in LINES if line.startswith("make quickstart")).split("last line: ")[1]
    pattern = re.escape(expected).replace(r"0\.98\.\.", r"{top1:.4f}").replace(r"0\.97", r"{REQUIRED_TOP1}")
    pattern = pattern.replace("passed", "{verdict}")
    assert re.search(pattern.replace("{", r"\{").replace("}", r"\}"), (ROOT / "tools/quickstart.py").read_text())


def test_the_python_example_runs() -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    names: dict = {}
    exec(code, names)
    shapes = [tuple(feature.shape) for feature in names["features"]]
    assert shapes == [(1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    assert names["logits"].shape == (1, 1000)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https)([^)]+)\)", README))
def test_links_lead_to_files(target: str) -> None:
    assert (ROOT / target).exists()
