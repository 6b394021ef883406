"""What `ops.build.load` does on success and on every failure, as its caller sees it."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops import build
from ops.build import __main__ as command
from ops.build import cache, toolchain
from ops.build.recipe import Tools, recipe_for

NVCC = shutil.which("nvcc")
ROOT = Path(build.__file__).parents[2]


def test_second_process_loads_from_the_cache_without_ninja_or_lock(sandbox):
    assert build.load("cpp")
    assert build.load("cpp")
    assert sandbox.compilations() == 1
    (library,) = sandbox.libraries()
    assert ctypes.CDLL(str(library)).tiny() == 42
    sandbox.new_process()
    sandbox.forbid_building()
    assert build.load("cpp")


def test_private_folders_do_not_outlive_a_build(sandbox):
    build.load("cpp")
    assert [path.name for path in sandbox.cache.iterdir() if path.suffix != ".so"] == []
    assert list(cache.node_dir().glob("build-*")) == []


def test_units_of_all_operators_make_one_library(sandbox):
    (sandbox.csrc / "other_cpu.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int other() { return 7; }\n'
    )
    (sandbox.csrc / "unrelated_cuda.cpp").write_text("#error not part of the C++ library\n")
    assert build.load("cpp")
    (library,) = sandbox.libraries()
    handle = ctypes.CDLL(str(library))
    assert (handle.tiny(), handle.other(), sandbox.compilations()) == (42, 7, 2)


def test_torn_library_is_built_again(sandbox):
    sandbox.cache.mkdir()
    library = sandbox.cache / recipe_for("cpp", sandbox.csrc).name(Tools(cxx=toolchain.find_cxx()))
    library.write_bytes(b"\x7fELF torn")
    assert build.load("cpp")
    assert sandbox.compilations() == 1
    assert ctypes.CDLL(str(library)).tiny() == 42


def test_image_with_a_prebuilt_library_needs_no_compiler(sandbox, monkeypatch):
    build.load("cpp")
    sandbox.new_process()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert build.load("cpp")


def test_reference_builds_nothing(sandbox, monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "reference")
    sandbox.forbid_building()
    assert not build.load("cpp")
    assert not sandbox.cache.exists()


def test_unknown_choice_is_an_error(monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "gpu")
    with pytest.raises(ValueError, match="INTERNIMAGE_OPS is 'gpu', expected one of auto, reference, cpp, cuda"):
        build.load("cpp")


def test_no_compiler(sandbox, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    text = sandbox.failure()
    assert "no C++ compiler (g++, c++, clang++) on PATH" in text


def test_requested_compiler_is_not_replaced_in_silence(sandbox, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert "CXX is '/nonexistent/g++'" in sandbox.failure()


def test_compiler_that_does_not_run(sandbox):
    sandbox.script(sandbox.cxx, "#!/bin/sh\necho licence expired\nexit 1\n")
    assert "licence expired" in sandbox.failure()


def test_failing_source_names_the_line_and_the_log(sandbox):
    (sandbox.csrc / "tiny_cpu.cpp").write_text("int fine;\nint broken(\n")
    text = sandbox.failure()
    assert "tiny_cpu.cpp:2" in text
    assert "error:" in text
    (log,) = cache.node_dir().glob("*.log")
    assert str(log) in text
    assert "tiny_cpu.cpp:2" in log.read_text()


def test_library_that_does_not_load_is_not_kept(sandbox):
    (sandbox.csrc / "tiny_cpu.cpp").write_text(
        "extern int missing();\nint use() { return missing(); }\nint v = missing();\n"
    )
    text = sandbox.failure()
    assert "does not load" in text
    assert "undefined symbol: _Z7missingv" in text
    assert sandbox.libraries() == []


def test_ninja_is_found_off_path_and_its_absence_is_named(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(toolchain.find_ninja()).name == "ninja"
    monkeypatch.setitem(sys.modules, "ninja", None)
    text = sandbox.failure()
    assert "there is no ninja. Install it (`pip install ninja`)" in text


def test_nvcc_of_another_major_version(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("INTERNIMAGE_CUDA_ARCHS", "9.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    sandbox.nvcc(tmp_path / "bin" / "nvcc", "12.4")
    (sandbox.csrc / "tiny_cuda.cu").write_text("")
    text = sandbox.failure("cuda")
    assert f"is 12.4 and torch {torch.__version__} was built for 13.0. Install nvcc 13.0" in text


@pytest.mark.skipif(NVCC is None or torch.version.cuda is None, reason="needs nvcc and a CUDA build of torch")
def test_cuda_library_is_compiled_by_nvcc_and_loads_without_a_device(sandbox, monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_CUDA_ARCHS", "9.0")
    (sandbox.csrc / "tiny_cuda.cu").write_text(
        "__global__ void kernel(int* x) { *x = 1; }\nvoid launch(int* x) { kernel<<<1, 1>>>(x); }\n"
    )
    (sandbox.csrc / "tiny_cuda.cpp").write_text(
        "#include <cuda_runtime_api.h>\nvoid launch(int*);\n"
        'extern "C" __attribute__((visibility("default"))) int version() { launch(nullptr); return CUDART_VERSION; }\n'
    )
    assert build.load("cuda")
    (library,) = sandbox.libraries()
    assert ctypes.CDLL(str(library)).version() // 1000 == int(str(torch.version.cuda).partition(".")[0])


def test_command_reports_and_its_status_tells(sandbox, capsys, monkeypatch):
    monkeypatch.setattr(command, "_self_test", lambda kind: {"output": 1e-7})
    assert command.main(["--cpp"]) == 0
    text = capsys.readouterr().out
    (library,) = sandbox.libraries()
    for expected in ("cpp: built", "-std=c++20", str(library), "s of CPU time", "self-test  passed: output 1.0e-07"):
        assert expected in text
    assert command.main(["--cpp"]) == 0
    assert "cpp: found in the cache" in capsys.readouterr().out
    assert command.main(["--cpp", "--force"]) == 0
    assert "cpp: built" in capsys.readouterr().out
    monkeypatch.setattr(command, "_self_test", lambda kind: {"output": 1e-2})
    assert command.main(["--cpp"]) == 1
    assert "self-test  FAILED" in capsys.readouterr().out
    (sandbox.csrc / "tiny_cpu.cpp").write_text("int broken(\n")
    assert command.main(["--cpp"]) == 1
    assert "tiny_cpu.cpp:1" in capsys.readouterr().out


def test_import_builds_nothing(sandbox):
    script = "import sys, ops, ops.build; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    environment = {**os.environ, "PATH": "", "INTERNIMAGE_BUILD_DIR": str(sandbox.cache)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
    assert not sandbox.cache.exists()
