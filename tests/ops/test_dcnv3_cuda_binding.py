"""The torch binding of the CUDA kernels, on CPU tensors: the emulated kernels take the place of a GPU.

The binding is changed in the three places where it speaks to a device; everything else runs as it is.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ops import selfcheck
from ops.reference import dcnv3_reference

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
SCHEMA = (
    "Tensor x, Tensor offset, Tensor mask, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, float offset_scale, bool remove_center, bool softmax"
)
CHANGES = {
    "(internimage_kernels, CUDA, library)": "(internimage_emulated, CPU, library)",
    "tensor.is_cuda()": "tensor.is_cpu()",
    "STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));": "",
    "const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());": "",
}
# Its definitions live as long as it does.
LIBRARY = torch.library.Library("internimage_emulated", "FRAGMENT")
OPTIONS = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, True)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler to build the emulation")


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators of the binding, for CPU tensors."""
    folder = tmp_path_factory.mktemp("binding")
    text = (ROOT / "ops/csrc/dcnv3_cuda.cpp").read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "binding.cpp").write_text(text)
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'ops/csrc'}", f"-I{ROOT / 'tests/ops/emulation'}", f"-isystem{torch_folder / 'include'}"]
    command = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", *include]
    kernels = ["-fno-strict-aliasing", "-DDCNV3_CUDA_EMULATION", ROOT / "tests/ops/emulation/driver.cpp"]
    subprocess.run([*command, *kernels, "-c", "-o", folder / "kernels.o"], check=True)
    subprocess.run([*command, folder / "binding.cpp", "-c", "-o", folder / "binding.o"], check=True)
    link = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-shared", "-o", folder / "binding.so"]
    subprocess.run([COMPILER, folder / "kernels.o", folder / "binding.o", *link], check=True)
    LIBRARY.define(f"dcnv3_forward({SCHEMA}) -> Tensor")
    LIBRARY.define(f"dcnv3_backward(Tensor grad, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
    torch.ops.load_library(folder / "binding.so")
    return torch.ops.internimage_emulated


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """x, and offset and mask as slices of one tensor."""
    random = torch.Generator().manual_seed(0)
    both = torch.randn(2, 4, 5, 54, generator=random)
    return [torch.randn(2, 4, 5, 32, generator=random), *both.split((36, 18), -1)]


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
def test_self_check_passes(operators, dtype):
    assert selfcheck.passes(operators.dcnv3_forward, operators.dcnv3_backward, torch.device("cpu"), dtype)


def test_inputs_of_any_strides(operators, inputs):
    truth = dcnv3_reference(*inputs, groups=2, softmax=True)
    # Relative to outputs of about 1: float32 sums of 36 products.
    torch.testing.assert_close(operators.dcnv3_forward(*inputs, *OPTIONS), truth, rtol=0, atol=2e-6)
    transposed = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in inputs]
    torch.testing.assert_close(operators.dcnv3_forward(*transposed, *OPTIONS), truth, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
def test_gradients_have_the_shape_and_dtype_of_the_inputs(operators, inputs, dtype):
    for size in (2, 0):
        batch = [tensor[:size].to(dtype) for tensor in inputs]
        grad = operators.dcnv3_forward(*batch, *OPTIONS)
        for gradient, tensor in zip(operators.dcnv3_backward(grad, *batch, *OPTIONS), batch, strict=True):
            assert gradient.shape == tensor.shape
            assert gradient.dtype == dtype
            assert gradient.is_contiguous()


def test_wrong_dtypes_are_refused(operators, inputs):
    x, offset, mask = inputs
    with pytest.raises(RuntimeError, match="`offset` has another dtype or device than `x`"):
        operators.dcnv3_forward(x, offset.double(), mask, *OPTIONS)
    with pytest.raises(RuntimeError, match="serves float16, bfloat16, float32 and float64"):
        operators.dcnv3_forward(x.int(), offset.int(), mask.int(), *OPTIONS)
