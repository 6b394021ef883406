"""A cache, sources and a compiler for tests of `ops.build`; the sources are so small that each compiles in a moment."""

import shutil
import stat
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from ops import build
from ops.build import cache, toolchain
from ops.build.recipe import Kind

# Counts its compilations in TRACE/compiled, one line each; waits there first while TRACE/wait exists.
WRAPPER = """#!/bin/sh
case "$*" in *" -c "*)
  echo "$$" >> "{trace}/compiled"
  while [ -e "{trace}/wait" ]; do /bin/sleep 0.05; done
esac
exec {gxx} "$@"
"""
NVCC_STUB = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  --dryrun) cat "{home}/dryrun" ;;
esac
"""
DRY_RUN = """#$ TOP={home}/bin/..
#$ INCLUDES="-I{home}/include"
#$ LIBRARIES= "-L{home}/lib/stubs" "-L{home}/lib"
"""


@dataclass(frozen=True)
class Sandbox:
    """A test's own folders, where `ops.build` reads and writes instead of the user's."""

    monkeypatch: pytest.MonkeyPatch
    cache: Path
    csrc: Path
    trace: Path
    cxx: Path

    def compilations(self) -> int:
        """How often a source was compiled so far."""
        path = self.trace / "compiled"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def libraries(self, folder: Path | None = None) -> list[Path]:
        return sorted((folder or self.cache).glob("*.so"))

    def new_process(self) -> None:
        """Forget what this process knows, as if it had just started."""
        self.monkeypatch.setattr(build, "_outcomes", {})
        self.monkeypatch.setattr(build, "_warned", set())

    def forbid_building(self) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("the fast path must not build or lock")

        self.monkeypatch.setattr(toolchain, "find_ninja", refuse)
        self.monkeypatch.setattr(cache, "lock", refuse)

    def failure(self, kind: Kind = "cpp") -> str:
        """Check that a failure is one warning, however often asked, and an error on demand; return its text."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [build.load(kind), build.load(kind)] == [False, False]
        assert [warning.category for warning in caught] == [RuntimeWarning]
        self.monkeypatch.setenv("INTERNIMAGE_OPS", kind)
        with pytest.raises(build.BuildError) as error:
            build.load(kind)
        text = str(caught[0].message)
        assert str(error.value) in text
        assert "INTERNIMAGE_OPS=reference" in text
        return text

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def nvcc(self, path: Path, version: str) -> Path:
        """Put an nvcc at `path` that only tells its version and its toolkit's folder, which is returned."""
        home = self.trace / "toolkit"
        home.mkdir()
        (home / "dryrun").write_text(DRY_RUN.format(home=home))
        self.script(path, NVCC_STUB.format(version=version, home=home))
        return home


@pytest.fixture(autouse=True)
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("needs g++")
    own = Sandbox(monkeypatch, *(tmp_path / name for name in ("cache", "csrc", "trace", "cxx")))
    node = tmp_path / "node"
    for folder in (node, own.csrc, own.trace):
        folder.mkdir()
    own.script(own.cxx, WRAPPER.format(trace=own.trace, gxx=gxx))
    (own.csrc / "answer.h").write_text("#define ANSWER 42\n")
    (own.csrc / "tiny_cpu.cpp").write_text(
        '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int tiny() { return ANSWER; }\n'
    )
    for name in ("INTERNIMAGE_OPS", "INTERNIMAGE_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INTERNIMAGE_BUILD_DIR", str(own.cache))
    monkeypatch.setenv("CXX", str(own.cxx))
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    monkeypatch.setattr(build, "CSRC", own.csrc)
    own.new_process()
    return own
