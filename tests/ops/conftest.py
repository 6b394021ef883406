"""What the operator tests share: which implementation serves them, and memory that shows when nobody wrote it."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ops.build.toolchain import BuildError, find_cxx


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators_that_run() -> Operators:
    """A context that collects the names of the operators that run in it."""
    return Operators()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep parallel loops of small tensors from waiting for the cores that other test processes use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpp"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve the operators on the CPU by this implementation and no other."""
    if request.param == "cpp":
        try:
            find_cxx()
        except BuildError as error:
            pytest.skip(str(error))
    monkeypatch.setenv("INTERNIMAGE_OPS", request.param)
    return request.param


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
