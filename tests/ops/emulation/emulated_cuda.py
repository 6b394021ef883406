"""Build CUDA sources of ops/csrc for the CPU, call them, and compare their results: what the operators' tests share."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
EMULATION = ROOT / "tests/ops/emulation"
SOURCES = ROOT / "ops/csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler to build the emulation")

ORDERS = {"natural": 0, "reversed": 1, "shuffled": 2}
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Largest difference over the largest expected value. The arithmetic is float64 or float32; results stored in 16 bits
# are off by half a unit in the last place, 2**-11 or 2**-8 of a value in the same binade.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}

# Where the binding of CUDA kernels speaks to a device, and what it says instead.
BINDING_CHANGES = {
    "{name}_cuda.cpp": {
        "(internimage_kernels, CUDA, library)": "(internimage_emulated, CPU, library)",
        "const torch::stable::accelerator::DeviceGuard guard({tensor}.get_device_index());": "",
    },
    "cuda_binding.h": {
        ".is_cuda()": ".is_cpu()",
        "STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));": "",
    },
}
# Its definitions live as long as it does.
LIBRARY = torch.library.Library("internimage_emulated", "FRAGMENT")


def compile_emulation(target: Path, source: Path, *flags: str | Path) -> Path:
    """Build `source`, which includes cuda_emulation.h, into `target`."""
    return _compile(target, source, *flags, f"-I{EMULATION}", "-DCUDA_EMULATION", "-fno-strict-aliasing")


def load_driver(target: Path, source: str, *flags: str) -> ctypes.CDLL:
    """Build and load a driver of this folder; its run function is `run_<operator>`."""
    library = ctypes.CDLL(str(compile_emulation(target, EMULATION / source, *flags, "-shared", "-fPIC")))
    for name in ("run_dcnv3", "run_deformable_attention"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_char_p
    return library


def addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def assert_close(names: Sequence[str], found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Compare with float64 results by `TOLERANCES`; what is not 16 bits wide was left in the type of the arithmetic."""
    for name, ours, theirs in zip(names, found, truth, strict=True):
        assert ours.shape == theirs.shape
        if theirs.numel():
            difference = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
            assert difference <= TOLERANCES[ours.dtype], f"{name}: {difference:.2e}"


def changed_sources(folder: Path, file: str, old: str, new: str) -> str:
    """Copy the sources with one change; return the flag that puts the copy first."""
    shutil.copytree(SOURCES, folder)
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    return f"-I{folder}"


def compile_sanitized(folder: Path, source: str) -> Path:
    """Build a driver as a program with AddressSanitizer and UBSan.

    It takes the branches for older GPUs, and its launches hold one image each.
    """
    found = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("needs the compiler's AddressSanitizer library")
    include = changed_sources(
        folder / "csrc", "cuda_launch.cuh", "images = kMaxThreads / threads_per_image", "images = 1"
    )
    flags = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DSTANDALONE")
    return compile_emulation(folder / "driver", EMULATION / source, include, *flags, "-D__CUDA_ARCH__=800")


def run_program(
    program: Path, records: Iterable[tuple[ctypes.Structure, Sequence[Tensor], Sequence[Tensor]]]
) -> Iterator[Sequence[Tensor]]:
    """Run a standalone driver on (call, inputs, outputs); fill and yield the outputs of each."""
    records = list(records)
    stream = bytearray()
    for call, inputs, outputs in records:
        stream += bytes(call)
        stream += b"".join(tensor.nbytes.to_bytes(8, "little") for tensor in (*inputs, *outputs))
        stream += b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in inputs)
    done = subprocess.run([program], input=bytes(stream), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    results = memoryview(bytearray(done.stdout))
    for _, _, outputs in records:
        for tensor in outputs:
            if tensor.numel():
                tensor.copy_(torch.frombuffer(results[: tensor.nbytes], dtype=tensor.dtype).view(tensor.shape))
            results = results[tensor.nbytes :]
        yield outputs


def emulated_operators(folder: Path, name: str, first_tensor: str) -> Any:
    """Build an operator's CUDA binding for CPU tensors, the emulated kernels in the place of a GPU.

    The binding is changed only where it speaks to a device.

    Args:
        folder: For the build.
        name: Of the operator.
        first_tensor: Name of its first argument.

    Returns:
        The namespace of its operators.
    """
    for file, changes in BINDING_CHANGES.items():
        text = (SOURCES / file.format(name=name)).read_text()
        for old, new in changes.items():
            old = old.format(tensor=first_tensor)
            assert old in text
            text = text.replace(old, new)
        (folder / file.format(name=name)).write_text(text)
    (folder / "kernels.cpp").write_text(f'#include "cuda_emulation.h"\n#include "{name}_cuda.cu"\n')
    torch_folder = Path(torch.__file__).parent
    flags = ("-O0", "-fPIC", "-fvisibility=hidden", "-c")
    compile_emulation(folder / "kernels.o", folder / "kernels.cpp", *flags)
    include = (f"-I{folder}", f"-isystem{torch_folder / 'include'}")
    _compile(folder / "binding.o", folder / f"{name}_cuda.cpp", *flags, *include)
    link = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-shared", "-o", folder / "binding.so"]
    subprocess.run([COMPILER, folder / "kernels.o", folder / "binding.o", *link], check=True)
    for direction in ("forward", "backward"):
        schema = getattr(torch.ops.internimage_kernels, f"{name}_{direction}").default._schema
        LIBRARY.define(str(schema).removeprefix("internimage_kernels::"))
    torch.ops.load_library(folder / "binding.so")
    return torch.ops.internimage_emulated


def _compile(target: Path, source: Path, *flags: str | Path) -> Path:
    command = [COMPILER, *flags, f"-I{SOURCES}", "-std=c++20", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target
