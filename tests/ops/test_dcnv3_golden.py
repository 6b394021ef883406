"""`dcnv3` on the CPU gives the numbers of the authors' CUDA operator, which were computed in float64."""

import golden_dcnv3
import pytest
import torch
from torch import Tensor

from ops import dcnv3

# Of the largest expected value. float64 sums of 36 products; float32 the same, whose inputs are rounded as well.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

pytestmark = [
    pytest.mark.usefixtures("implementation", "uninitialized_is_nan"),
    pytest.mark.parametrize("name", golden_dcnv3.CASES),
]


def run(tensors: tuple[Tensor, ...], grad: Tensor, **options: object) -> list[Tensor]:
    """Return the output and the gradients of x, offset and mask, in the dtype of `grad`."""
    leaves = [tensor.to(grad.dtype).requires_grad_() for tensor in tensors]
    out = dcnv3(*leaves, **options)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert {result.dtype for result in results} == {grad.dtype}
    return results


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_output_and_gradients_are_the_authors(name, dtype):
    problem = golden_dcnv3.problem(name)
    results = run((problem.x, problem.offset, problem.mask), problem.grad.to(dtype), **problem.options)
    golden_dcnv3.check(name, results, TOLERANCES[dtype])


def test_fused_softmax_is_the_softmax_before(name):
    problem = golden_dcnv3.problem(name)
    fused = run((problem.x, problem.offset, problem.logits), problem.grad, **problem.options, softmax=True)
    logits = problem.logits.clone().requires_grad_()
    mask = problem._replace(logits=logits).mask
    separate = run((problem.x, problem.offset, mask.detach()), problem.grad, **problem.options)
    separate[3:] = torch.autograd.grad(mask, logits, separate[3])
    # Sums of up to 49 terms of about 1 in another order.
    torch.testing.assert_close(fused, separate, rtol=0, atol=1e-12)


def test_bfloat16_rounds_only_the_result(name):
    problem = golden_dcnv3.problem(name)
    rounded = [tensor.bfloat16() for tensor in (problem.x, problem.offset, problem.logits, problem.grad)]
    found = run(tuple(rounded[:3]), rounded[3], **problem.options, softmax=True)
    truth = run(tuple(rounded[:3]), rounded[3].double(), **problem.options, softmax=True)
    for ours, expected in zip(found, truth, strict=True):
        # bfloat16 keeps 8 bits: half a unit in the last place is at most 2**-8 of a value. The float32 before it adds
        # its own error.
        assert (ours - expected).abs().max() <= (2**-8 + 2e-6) * expected.abs().max()
