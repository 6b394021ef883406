"""Where libraries lie and what decides their names."""

import os
import shutil

import pytest

from ops import build
from ops.build import cache
from ops.build.recipe import Recipe, Tools, recipe_for
from ops.build.toolchain import Cxx


def test_every_ingredient_changes_the_name(sandbox, monkeypatch):
    tools = Tools(cxx=Cxx(command=("g++",), version="g++ 12"))
    names = [recipe_for("cpp", sandbox.csrc).name(tools)]
    names.append(recipe_for("cpp", sandbox.csrc).name(Tools(cxx=Cxx(command=("g++",), version="g++ 13"))))
    (sandbox.csrc / "answer.h").write_text("#define ANSWER 43\n")
    names.append(recipe_for("cpp", sandbox.csrc).name(tools))
    (sandbox.csrc / "tiny_cpu.cpp").write_text("// changed\n")
    names.append(recipe_for("cpp", sandbox.csrc).name(tools))
    (sandbox.csrc / "tiny_cpu.cpp").rename(sandbox.csrc / "renamed_cpu.cpp")
    names.append(recipe_for("cpp", sandbox.csrc).name(tools))
    for target, value in (
        ("ops.build.recipe.CXX_FLAGS", ("-O0",)),
        ("torch.__version__", "2.99.0"),
        ("torch.version.cuda", "99.0"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT"),
        ("platform.machine", lambda: "riscv64"),
    ):
        monkeypatch.setattr(target, value)
        names.append(recipe_for("cpp", sandbox.csrc).name(tools))
    (sandbox.csrc / "tiny_cuda.cu").write_text("")
    for archs in ("8.0", "8.0;9.0"):
        monkeypatch.setenv("INTERNIMAGE_CUDA_ARCHS", archs)
        names.append(recipe_for("cuda", sandbox.csrc).name(tools))
    assert len(set(names)) == len(names) == 12


def test_name_does_not_depend_on_where_things_are_installed(sandbox, tmp_path):
    tools = Tools(cxx=Cxx(command=("g++",), version="g++ 12"))
    other = shutil.copytree(sandbox.csrc, tmp_path / "elsewhere")
    moved = Tools(cxx=Cxx(command=("/opt/bin/g++",), version="g++ 12"))
    assert recipe_for("cpp", sandbox.csrc).name(tools) == recipe_for("cpp", other).name(moved)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("AVX512", {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx2"}),
        ("AVX2", {"-mavx2", "-mfma"}),
        ("DEFAULT", set()),
        ("SVE256", set()),
    ],
)
def test_vector_flags_follow_the_cpu_and_never_the_build_machine(sandbox, capability, expected, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    flags = recipe_for("cpp", sandbox.csrc).flags
    assert {flag for flag in flags if flag.startswith("-m")} == expected


def test_prebuilt_library_serves_devices_among_its_architectures():
    library = "cuda-0123-8.0_9.0+PTX-abcdef.so"
    wanted = [
        Recipe(kind="cuda", sources=(), archs=archs, flags=(), digest="0123")
        for archs in (("9.0",), ("8.0", "9.0"), ("10.0",), ("8.0", "10.0"))
    ]
    assert [one.serves(library) for one in wanted] == [True, True, False, False]


@pytest.mark.parametrize("home", ["file", "/proc"])
def test_home_that_takes_no_files(sandbox, home, tmp_path, monkeypatch):
    monkeypatch.delenv("INTERNIMAGE_BUILD_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert build.load("cpp")
    assert len(sandbox.libraries(cache.node_dir())) == 1
    sandbox.new_process()
    sandbox.forbid_building()
    assert build.load("cpp")


def test_requested_folder_that_takes_no_files_is_named(sandbox, monkeypatch, caplog):
    monkeypatch.setenv("INTERNIMAGE_BUILD_DIR", "/proc/internimage")
    assert build.load("cpp")
    assert "/proc/internimage does not take the kernel library" in caplog.text
    assert len(sandbox.libraries(cache.node_dir())) == 1


@pytest.mark.parametrize(("kind", "network"), [("nfs4", True), ("lustre", True), ("ext4", False)])
def test_default_cache_is_not_on_a_network(kind, network, tmp_path, monkeypatch):
    home = tmp_path / "my home"
    home.mkdir()
    mounts = tmp_path / "mounts"
    escaped = str(home).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/home {escaped} {kind} rw 0 0\n")
    monkeypatch.setattr(cache, "MOUNTS", mounts)
    monkeypatch.delenv("INTERNIMAGE_BUILD_DIR")
    monkeypatch.setenv("HOME", str(home))
    assert cache.cache_dir() == (cache.node_dir() if network else home / ".cache" / "internimage")


def test_folder_that_others_can_write_is_refused():
    cache.node_dir().chmod(0o777)
    with pytest.raises(OSError, match="writable by others"):
        cache.node_dir()


def test_stale_private_folders_are_removed():
    old = cache.node_dir() / "build-old"
    recent = cache.node_dir() / "build-recent"
    old.mkdir()
    recent.mkdir()
    os.utime(old, (0, 0))
    with cache.private_dir():
        pass
    assert (old.exists(), recent.exists()) == (False, True)
