"""Compilers and architectures are found, or their absence explained."""

import os

import pytest

from ops import build
from ops.build import toolchain


def test_toolkit_is_found_behind_a_wrapper_of_another_minor_version(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    home = sandbox.nvcc(tmp_path / "nvcc", "13.1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    nvcc = toolchain.find_nvcc()
    assert (nvcc.version, nvcc.home) == ("13.1", home)
    assert (nvcc.include_dirs, nvcc.library_dirs) == ((str(home / "include"),), (str(home / "lib"),))


def test_missing_cuda_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(toolchain, "CUDA_DEFAULT", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="no nvcc on PATH"):
        toolchain.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="which has no bin/nvcc"):
        toolchain.find_nvcc()
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(build.BuildError, match="built without CUDA"):
        toolchain.find_nvcc()


def test_architectures(sandbox, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(build.BuildError, match="Set INTERNIMAGE_CUDA_ARCHS"):
        toolchain.cuda_archs()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: [(9, 0), (8, 0), (9, 0)][index])
    assert toolchain.cuda_archs() == ("8.0", "9.0")
    monkeypatch.setenv("INTERNIMAGE_CUDA_ARCHS", "9.0+PTX, 8.0")
    assert toolchain.cuda_archs() == ("8.0", "9.0+PTX")
    assert toolchain.arch_flags(toolchain.cuda_archs()) == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    )
    monkeypatch.setenv("INTERNIMAGE_CUDA_ARCHS", "sm_90")
    (sandbox.csrc / "tiny_cuda.cu").touch()
    with pytest.raises(ValueError, match="INTERNIMAGE_CUDA_ARCHS has 'sm_90'"):
        build.load("cuda")
