"""The torch binding of DCNv3's CUDA kernels, on CPU tensors: the emulated kernels take the place of a GPU."""

import emulated_cuda
import pytest
import torch

from ops import selfcheck
from ops.dcnv3 import OPERATOR
from ops.reference import dcnv3_reference

OPTIONS = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, True)

pytestmark = emulated_cuda.needs_compiler


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators of the binding, for CPU tensors."""
    return emulated_cuda.emulated_operators(tmp_path_factory.mktemp("binding"), "dcnv3", "x")


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """x, and offset and mask as slices of one tensor."""
    random = torch.Generator().manual_seed(0)
    both = torch.randn(2, 4, 5, 54, generator=random)
    return [torch.randn(2, 4, 5, 32, generator=random), *both.split((36, 18), -1)]


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
def test_self_check_passes(operators, dtype):
    kernels = (operators.dcnv3_forward, operators.dcnv3_backward)
    assert selfcheck.passes(OPERATOR.truth, *kernels, torch.device("cpu"), dtype)


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
