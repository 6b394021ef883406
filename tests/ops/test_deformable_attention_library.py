"""`deformable_attention` under torch.compile, torch.export, autocast and torch.func, and what serves it."""

import io

import pytest
import torch
from torch import Tensor, nn

from ops import deformable_attention
from ops.reference_attention import deformable_attention_reference

SHAPES = ((6, 7), (3, 4))
FLAT = [6, 7, 3, 4]
FORWARD = torch.ops.internimage.deformable_attention_forward
BACKWARD = torch.ops.internimage.deformable_attention_backward


def inputs(shapes=SHAPES, queries: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return value, locations and weights for two heads of 8 channels and 4 points, which require gradients."""
    random = torch.Generator().manual_seed(0)
    pixels, sampled = sum(height * width for height, width in shapes), (2, queries, 2, len(shapes), 4)
    value = torch.randn(2, pixels, 2, 8, generator=random).to(dtype)
    locations = torch.rand(*sampled, 2, generator=random).to(torch.promote_types(dtype, torch.float32))
    weights = torch.randn(sampled, generator=random).to(dtype)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def operator(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return deformable_attention(value, SHAPES, locations, weights)


def in_reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return deformable_attention_reference(value, SHAPES, locations, weights)


class OfTwoMaps(nn.Module):
    """Attention over two feature maps, whose sizes it takes from them."""

    def forward(self, first: Tensor, second: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        shapes = [tuple(features.shape[1:3]) for features in (first, second)]
        value = torch.cat([features.flatten(1, 2) for features in (first, second)], 1).unflatten(-1, (2, 8))
        return deformable_attention(value, shapes, locations, weights)


def maps(height: int, width: int, queries: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(2, size[0], size[1], 16, generator=random) for size in ((2 * height, 2 * width), (height, width))
    )
    _, locations, weights = inputs(queries=queries, dtype=torch.float32)
    return [first, second, locations.detach(), weights.detach()]


@pytest.mark.usefixtures("implementation")
def test_opcheck():
    leaves = inputs()
    torch.library.opcheck(FORWARD, (*leaves, FLAT))
    tensors = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(BACKWARD, (torch.randn(2, 5, 16).double(), *tensors, FLAT))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(dynamic, backend):
    torch.compiler.reset()
    module = OfTwoMaps()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)
    for height, width, queries in ((2, 3, 5), (4, 2, 7)):
        leaves = [tensor.requires_grad_() for tensor in maps(height, width, queries)]
        out, expected = compiled(*leaves), module(*leaves)
        grad = torch.randn_like(out)
        assert torch.equal(out, expected)
        found = torch.autograd.grad(out, leaves, grad)
        assert all(map(torch.equal, found, torch.autograd.grad(expected, leaves, grad)))


def test_a_compiled_call_with_a_wrong_shape_is_refused():
    torch.compiler.reset()
    value, locations, weights = inputs()
    with pytest.raises(Exception, match=r"`sampling_locations` has shape"):
        torch.compile(operator, backend="eager", fullgraph=True)(value, locations[:, 1:], weights)


def test_exports_with_dynamic_sizes():
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    queries = torch.export.Dim("queries", min=2)
    sizes = ({1: 2 * height, 2: 2 * width}, {1: height, 2: width}, {1: queries}, {1: queries})
    exported = torch.export.export(OfTwoMaps(), tuple(maps(2, 3, 5)), dynamic_shapes=sizes)
    assert "internimage.deformable_attention_forward" in str(exported.graph)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = maps(4, 5, 7)
    assert torch.equal(loaded(*other), OfTwoMaps()(*other))


def test_the_reference_exports_to_standard_operators():
    class Module(nn.Module):
        def forward(self, value, locations, weights):
            return in_reference(value, locations, weights)

    tensors = tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(Module(), tensors)
    # Tensor literals become constants, which exporters of other formats reject.
    assert not exported.constants
    assert torch.equal(exported.module()(*tensors), in_reference(*tensors))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_takes_the_dtype_of_value_and_keeps_locations_in_float32(compiled):
    torch.compiler.reset()
    value, locations, weights = inputs(dtype=torch.float32)
    low = value.bfloat16()
    run = torch.compile(operator, fullgraph=True, backend="aot_eager") if compiled else operator
    with torch.autocast("cpu", torch.bfloat16):
        out = run(low, locations, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, operator(low, locations, weights.bfloat16()))
    grads = torch.autograd.grad(out.float().sum(), (value, locations, weights))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(value, locations, weights).dtype == torch.float32


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("direct", [False, True])
def test_double_backward_raises(direct):
    leaves = inputs()
    out = FORWARD(*leaves, FLAT) if direct else operator(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    # Another term, so that dropping the second derivatives would go unnoticed.
    loss = sum(grad.square().sum() for grad in grads) + leaves[0].sum()
    with pytest.raises(RuntimeError, match="double backward of deformable_attention is not implemented"):
        loss.backward()


def test_the_reference_has_second_derivatives():
    value, locations, weights = (tensor.detach() for tensor in inputs())
    # Finite differences must not cross a whole-number coordinate; odd multiples of 1/128 are none.
    locations = (2 * (64 * locations[:1, :2]).floor() + 1) / 128
    tensors = [tensor.requires_grad_() for tensor in (value[:1, :, :, :2], locations, weights[:1, :2])]
    assert torch.autograd.gradgradcheck(in_reference, tensors)


@pytest.mark.usefixtures("implementation")
def test_direct_calls_of_the_operators():
    leaves = inputs()
    out = FORWARD(*leaves, FLAT)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    assert all(map(torch.equal, found, torch.autograd.grad(operator(*leaves), leaves, grad)))
    value, locations, weights = (tensor.detach() for tensor in leaves)
    with pytest.raises(ValueError, match="`sampling_locations` has shape"):
        FORWARD(value, locations[:, :2], weights, FLAT)
    with pytest.raises(ValueError, match=r"`attention_weights` is torch.float32"):
        FORWARD(value, locations, weights.float(), FLAT)
    with pytest.raises(ValueError, match="`grad` has shape"):
        BACKWARD(grad[:1], value, locations, weights, FLAT)


def test_torch_func_transforms_are_refused():
    tensors = [tensor.detach() for tensor in inputs()]
    with pytest.raises(RuntimeError, match=r"deformable_attention: torch.func transforms .* are not supported"):
        torch.func.grad(lambda value: operator(value, *tensors[1:]).sum())(tensors[0])


def test_fake_tensors_know_shape_and_dtype():
    with torch._subclasses.FakeTensorMode():
        leaves = inputs(dtype=torch.bfloat16)
        out = operator(*leaves)
        out.sum().backward()
    assert (tuple(out.shape), out.dtype) == ((2, 5, 16), torch.bfloat16)
    assert [(leaf.grad.shape, leaf.grad.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in leaves]


def test_meta_tensors_run_without_data():
    leaves = [tensor.detach().to("meta").requires_grad_() for tensor in inputs()]
    out = operator(*leaves)
    out.sum().backward()
    assert out.shape == (2, 5, 16)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_internimage_ops_chooses_what_runs(implementation, dtype, operators_that_run):
    leaves = inputs(dtype=dtype)
    with operators_that_run as operators:
        operator(*leaves).sum().backward()
    served_by_kernel = implementation == "cpp" and dtype != torch.float16
    kernels = {name for name in operators.names if name.startswith("internimage_kernels")}
    expected = {f"internimage_kernels.deformable_attention_{name}.default" for name in ("forward", "backward")}
    assert kernels == (expected if served_by_kernel else set())
    # The registered operators would cost more time than the kernel itself.
    assert not any(name.startswith("internimage.") for name in operators.names)
