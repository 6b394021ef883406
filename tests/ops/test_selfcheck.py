"""The self-check on first use, with the reference and broken versions of it in the place of kernels."""

import warnings

import pytest
import torch

from ops import build, selfcheck
from ops.build import __main__ as command
from ops.dcnv3 import OPERATOR
from ops.deformable_attention import OPERATOR as ATTENTION
from ops.reference import Taps, dcnv3_reference, dcnv3_reference_backward

CPU = torch.device("cpu")
DTYPES = tuple(selfcheck.TOLERANCES)


def forward(x, offset, mask, *options):
    *taps, softmax = options
    return dcnv3_reference(x, offset, mask, **Taps(*taps)._asdict(), softmax=softmax)


def backward(grad, x, offset, mask, *options):
    *taps, softmax = options
    return dcnv3_reference_backward(grad, x, offset, mask, Taps(*taps), softmax)


def swapped_axes(x, offset, mask, *options):
    return forward(x, offset.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), mask, *options)


def unwritten_pixel(*arguments):
    out = forward(*arguments)
    out[-1, -1, -1] = torch.nan
    return out


def ignores_softmax(x, offset, mask, *options):
    return forward(x, offset, mask, *options[:-1], False)


def wrong_sign(*arguments):
    grad_x, grad_offset, grad_mask = backward(*arguments)
    return grad_x, -grad_offset, grad_mask


def no_kernel_image(*arguments):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_correct_kernels_pass_in_silence(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcheck.passes(OPERATOR.truth, forward, backward, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [swapped_axes, unwritten_pixel, ignores_softmax])
def test_a_wrong_output_is_noticed(wrong, dtype):
    with pytest.warns(RuntimeWarning, match=r"self-check on cpu in torch\.\w+: .* the output is off by .*Rebuild it"):
        assert not selfcheck.passes(OPERATOR.truth, wrong, backward, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_gradient_is_noticed(dtype):
    with pytest.warns(RuntimeWarning, match="the gradient of offset is off by") as caught:
        assert not selfcheck.passes(OPERATOR.truth, forward, wrong_sign, CPU, dtype)
    assert len(caught) == 1


def test_a_kernel_that_fails_is_named_with_its_error():
    with pytest.warns(RuntimeWarning, match="it raised no kernel image"):
        assert not selfcheck.passes(OPERATOR.truth, no_kernel_image, backward, CPU, torch.float32)


def test_a_demanded_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="INTERNIMAGE_OPS=reference"):
        selfcheck.passes(OPERATOR.truth, swapped_axes, backward, CPU, torch.float32, demanded=True)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert selfcheck.passes(OPERATOR.truth, forward, backward, CPU, torch.float32)


def rows_for_columns(value, locations, weights, shapes):
    return ATTENTION.truth.forward(value, locations.flip(-1), weights, shapes)


def levels_in_another_order(value, locations, weights, shapes):
    return ATTENTION.truth.forward(value, locations.flip(3), weights.flip(3), shapes)


def off_by_a_thousandth(value, locations, weights, shapes):
    return ATTENTION.truth.forward(value, locations + 1e-3, weights, shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", [rows_for_columns, levels_in_another_order, off_by_a_thousandth])
def test_a_wrong_attention_kernel_is_noticed(wrong, dtype):
    assert selfcheck.passes(ATTENTION.truth, ATTENTION.truth.forward, ATTENTION.truth.backward, CPU, dtype)
    with pytest.warns(RuntimeWarning, match="with 3 levels, 4 points and 32 channels per head"):
        assert not selfcheck.passes(ATTENTION.truth, wrong, ATTENTION.truth.backward, CPU, dtype)


@pytest.mark.parametrize("implementation", ["cpp"], indirect=True)
def test_the_build_command_tests_all_kernels(implementation):
    assert build.load(implementation)
    differences = command._self_test(implementation)
    assert {name.partition(" ")[0] for name in differences} == {"dcnv3", "deformable_attention"}
    assert len(differences) == 2 * 4
    assert max(differences.values()) < selfcheck.TOLERANCES[torch.float32]
