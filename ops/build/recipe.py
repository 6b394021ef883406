"""What a kernel library is made of: its sources, its flags, the name that they give it, and the ninja file."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ops.build.toolchain import BuildError, Cxx, Nvcc, arch_flags, cuda_archs, simd_flags

Kind = Literal["cpp", "cuda"]

CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
NVCC_FLAGS = ("-std=c++20", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden")
# at::parallel_for runs on one thread when its caller is compiled without OpenMP. Apple's compiler has none.
OPENMP_FLAGS = () if sys.platform == "darwin" else ("-fopenmp",)
SOURCES = {"cpp": ("*_cpu.cpp",), "cuda": ("*_cuda.cpp", "*_cuda.cu")}
HEADERS = {"cpp": ("*.h",), "cuda": ("*.h", "*.cuh")}
LIBRARIES = {"cpp": ("c10", "torch_cpu"), "cuda": ("c10", "torch_cpu", "c10_cuda", "torch_cuda", "cudart")}


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The compilers of one build; `nvcc` only for CUDA."""

    cxx: Cxx
    nvcc: Nvcc | None = None

    def describe(self) -> str:
        """Return the compilers' versions in words, the part of a library's name that depends on them."""
        return self.cxx.version + (f"; nvcc {self.nvcc.version}" if self.nvcc else "")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the compiler that decides what a library holds.

    Args:
        kind: Which library.
        sources: The compilation units.
        archs: CUDA architectures such as `9.0`; empty for C++.
        flags: Of the C++ compiler.
        digest: Of sources, headers, flags, torch, CUDA, machine and CPU capability.
    """

    kind: Kind
    sources: tuple[Path, ...]
    archs: tuple[str, ...]
    flags: tuple[str, ...]
    digest: str

    @property
    def prefix(self) -> str:
        """The beginning that the names of all libraries from these inputs share, for any compiler and architecture."""
        return f"{self.kind}-{self.digest}-"

    @property
    def all_flags(self) -> tuple[str, ...]:
        """The C++ compiler's flags, then nvcc's."""
        return self.flags if self.kind == "cpp" else (*self.flags, "nvcc", *NVCC_FLAGS, *arch_flags(self.archs))

    def name(self, tools: Tools) -> str:
        """Return the library's file name, the cache key."""
        return f"{self.prefix}{'_'.join(self.archs) or 'cpu'}-{_digest(tools.describe())[:12]}.so"

    def serves(self, name: str) -> bool:
        """Say whether a library of this prefix holds every architecture wanted (it may hold more)."""
        held = name.removeprefix(self.prefix).partition("-")[0].replace("+PTX", "").split("_")
        return {arch.removesuffix("+PTX") for arch in self.archs} <= set(held)


def recipe_for(kind: Kind, csrc: Path) -> Recipe:
    """Return the recipe of `kind` from the folder `csrc`, for this machine.

    Raises:
        BuildError: `csrc` has no source of this kind, or no CUDA architecture is known.
    """
    sources = _matching(csrc, SOURCES[kind])
    if not sources:
        raise BuildError(f"{csrc} has no {' or '.join(SOURCES[kind])}. Install the package again")
    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*CXX_FLAGS, *OPENMP_FLAGS, *simd_flags(capability))
    inputs = {
        "files": {file.name: _digest(file.read_bytes()) for file in (*sources, *_matching(csrc, HEADERS[kind]))},
        "flags": (*flags, *NVCC_FLAGS) if kind == "cuda" else flags,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": f"{sys.platform}-{platform.machine()}",
        "cpu_capability": capability,
    }
    return Recipe(
        kind=kind,
        sources=sources,
        archs=cuda_archs() if kind == "cuda" else (),
        flags=flags,
        digest=_digest(json.dumps(inputs, sort_keys=True))[:24],
    )


def ninja_file(recipe: Recipe, tools: Tools, library: str) -> str:
    """Return the text of a ninja file that compiles each source by itself and links them into `library`."""
    torch_dir = Path(torch.__file__).parent
    includes = [f"-I{recipe.sources[0].parent}", f"-isystem{torch_dir / 'include'}"]
    folders = [str(torch_dir / "lib")]
    nvcc_command: tuple[str, ...] = ()
    if tools.nvcc:
        includes += [f"-isystem{folder}" for folder in tools.nvcc.include_dirs]
        folders += tools.nvcc.library_dirs
        # CXX may be `ccache g++` or carry options.
        host = next(word for word in reversed(tools.cxx.command) if not word.startswith("-"))
        nvcc_command = (tools.nvcc.command, "-ccbin", host, *NVCC_FLAGS, *arch_flags(recipe.archs), includes[0])
    link = [f"-L{folder}" for folder in folders] + [f"-l{name}" for name in LIBRARIES[recipe.kind]]
    rules = {
        "cxx": f"{_words((*tools.cxx.command, *recipe.flags, *includes))} -c $in -o $out",
        "nvcc": f"{_words(nvcc_command)} -c $in -o $out",
        "link": f"{_words((*tools.cxx.command, '-shared', *OPENMP_FLAGS))} $in {_words(link)} -o $out",
    }
    lines = [f"rule {name}\n  command = {command}" for name, command in rules.items()]
    objects = {source: f"{source.name}.o" for source in recipe.sources}
    for source, target in objects.items():
        lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {_path(source)}")
    lines.append(f"build {library}: link {' '.join(objects.values())}")
    return "\n".join(lines) + "\n"


def _matching(folder: Path, patterns: Iterable[str]) -> tuple[Path, ...]:
    return tuple(sorted(file for pattern in patterns for file in folder.glob(pattern)))


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _words(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
