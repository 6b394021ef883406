"""The torch binding of deformable attention's CUDA kernels, on CPU tensors: emulated kernels replace a GPU."""

import emulated_cuda
import pytest
import torch

from ops import selfcheck
from ops.deformable_attention import OPERATOR
from ops.reference_attention import deformable_attention_reference

SHAPES = ((6, 7), (3, 4))
FLAT = [6, 7, 3, 4]

pytestmark = emulated_cuda.needs_compiler


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The operators of the binding, for CPU tensors."""
    return emulated_cuda.emulated_operators(tmp_path_factory.mktemp("binding"), "deformable_attention", "value")


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return value, locations and weights."""
    random = torch.Generator().manual_seed(0)
    sampled = (2, 5, 2, 2, 4)
    value, weights = torch.randn(2, 54, 2, 16, generator=random), torch.randn(sampled, generator=random)
    locations = torch.rand(*sampled, 2, generator=random).to(torch.promote_types(dtype, torch.float32))
    return [value.to(dtype), locations, weights.to(dtype)]


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
def test_self_check_passes(operators, dtype):
    kernels = (operators.deformable_attention_forward, operators.deformable_attention_backward)
    assert selfcheck.passes(OPERATOR.truth, *kernels, torch.device("cpu"), dtype)


def test_inputs_of_any_strides(operators):
    value, locations, weights = inputs()
    truth = deformable_attention_reference(value, SHAPES, locations, weights)
    transposed = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (value, locations, weights)]
    for tensors in ((value, locations, weights), transposed):
        out = operators.deformable_attention_forward(*tensors, FLAT)
        # Outputs of about 1: float32 sums of 32 products.
        torch.testing.assert_close(out, truth, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", selfcheck.TOLERANCES, ids=str)
def test_gradients_have_the_shape_and_dtype_of_the_inputs(operators, dtype):
    for size in (2, 0):
        batch = [tensor[:size] for tensor in inputs(dtype)]
        grad = operators.deformable_attention_forward(*batch, FLAT)
        for gradient, tensor in zip(operators.deformable_attention_backward(grad, *batch, FLAT), batch, strict=True):
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            assert gradient.is_contiguous()


def test_wrong_dtypes_are_refused(operators):
    value, locations, weights = inputs()
    with pytest.raises(RuntimeError, match="`sampling_locations` has another dtype or device than `value` needs"):
        operators.deformable_attention_forward(value, locations.double(), weights, FLAT)
    with pytest.raises(RuntimeError, match="`attention_weights` has another dtype or device than `value` needs"):
        operators.deformable_attention_forward(value, locations, weights.half(), FLAT)
    with pytest.raises(RuntimeError, match="serves float16, bfloat16, float32 and float64"):
        operators.deformable_attention_forward(value.int(), locations, weights.int(), FLAT)


def test_too_many_levels_are_refused(operators):
    value, locations, weights = inputs()
    with pytest.raises(RuntimeError, match="found 17 levels, and the kernels take at most 16"):
        operators.deformable_attention_forward(value, locations, weights, [1, 1] * 17)
