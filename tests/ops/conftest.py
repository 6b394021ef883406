"""What the operator tests share: which implementation serves them, and memory that shows when nobody wrote it."""

from collections.abc import Iterator

import pytest
import torch

from ops.build.toolchain import BuildError, find_cxx


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep parallel loops of small tensors from waiting for the cores that other test processes use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpp"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve `dcnv3` on the CPU by this implementation and no other."""
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
