"""The code in docs/own-task.md runs, and the YAML of docs/first-run.md parses."""

import re
from pathlib import Path

import pytest

from tasks.cli import main

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "own-task.md"
SECTIONS = re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_every_section_has_code() -> None:
    assert len(SECTIONS) == PAGE.read_text().count("\n## ")


@pytest.mark.parametrize("code", [code for _, code in SECTIONS], ids=[title for title, _ in SECTIONS])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_yaml_of_the_first_run_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "first-run.md").read_text(), re.DOTALL | re.MULTILINE)
    Path("flowers.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "-c", "flowers.yaml", "--print_config"])
    assert exit_info.value.code == 0
