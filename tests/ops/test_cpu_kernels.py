"""The CPU kernels compiled for each instruction set, under the address and undefined-behaviour sanitizers."""

import subprocess
from pathlib import Path

import pytest
import torch

from ops.build.toolchain import BuildError, find_cxx, simd_flags

ROOT = Path(__file__).parents[2]
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["dcnv3", "deformable_attention"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_stay_within_their_tensors_and_agree_with_plain_loops(capability, operator, tmp_path):
    available = torch.backends.cpu.get_cpu_capability()
    if available not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(available):
        pytest.skip(f"this CPU has {available}")
    try:
        compiler = find_cxx().command
    except BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "cpu_kernel"
    flags = ("-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-fno-sanitize-recover=all")
    subprocess.run(
        [
            *compiler,
            *flags,
            "-fsanitize=address,undefined",
            *simd_flags(capability),
            f"-I{ROOT / 'ops/csrc'}",
            str(ROOT / f"tests/ops/cpu_kernel/{operator}.cpp"),
            f"-o{program}",
        ],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
