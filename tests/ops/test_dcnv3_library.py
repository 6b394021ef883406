"""`dcnv3` under torch.compile, torch.export, autocast, double backward and torch.func, and what serves it."""

import io

import pytest
import torch
from torch import Tensor, nn

from ops import dcnv3
from ops.reference import dcnv3_reference

OPTIONS = ([3, 3], [1, 1], [1, 1], [1, 1], 2, 1.0, False, True)


def inputs(height: int = 4, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return x, offset and mask for two groups of 8 channels, which require gradients."""
    random = torch.Generator().manual_seed(0)
    channels = (16, 36, 18)
    return [torch.randn(2, height, width, n, generator=random).to(dtype).requires_grad_() for n in channels]


def operator(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    return dcnv3(x, offset, mask, groups=2, softmax=True)


@pytest.mark.usefixtures("implementation")
def test_opcheck():
    leaves = inputs()
    torch.library.opcheck(torch.ops.internimage.dcnv3_forward, (*leaves, *OPTIONS))
    tensors = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(torch.ops.internimage.dcnv3_backward, (torch.randn_like(tensors[0]), *tensors, *OPTIONS))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(dynamic, backend):
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, dynamic=dynamic, backend=backend)
    for height, width in ((4, 5), (7, 3)):
        leaves = inputs(height, width)
        out, expected = compiled(*leaves), operator(*leaves)
        grad = torch.randn_like(out)
        assert torch.equal(out, expected)
        found = torch.autograd.grad(out, leaves, grad)
        assert all(map(torch.equal, found, torch.autograd.grad(expected, leaves, grad)))


def test_a_compiled_call_with_a_wrong_shape_is_refused():
    torch.compiler.reset()
    x, offset, mask = inputs()
    with pytest.raises(Exception, match=r"`mask` has shape"):
        torch.compile(operator, backend="eager", fullgraph=True)(x, offset, mask[:, 1:])


def test_exports_with_dynamic_sizes():
    class Module(nn.Module):
        def forward(self, x, offset, mask):
            return operator(x, offset, mask)

    sizes = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    tensors = tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(Module(), tensors, dynamic_shapes=(sizes, sizes, sizes))
    assert "internimage.dcnv3_forward" in str(exported.graph)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = [tensor.detach() for tensor in inputs(6, 9)]
    assert torch.equal(loaded(*other), operator(*other))


def test_the_reference_exports_to_standard_operators():
    class Module(nn.Module):
        def forward(self, x, offset, mask):
            return dcnv3_reference(x, offset, mask, groups=2, softmax=True)

    tensors = tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(Module(), tensors)
    # Tensor literals become constants, which exporters of other formats reject.
    assert not exported.constants
    assert torch.equal(exported.module()(*tensors), operator_in_reference(*tensors))


def operator_in_reference(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    return dcnv3_reference(x, offset, mask, groups=2, softmax=True)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_takes_the_dtype_of_x(compiled):
    torch.compiler.reset()
    x, offset, mask = inputs(dtype=torch.float32)
    low = x.bfloat16()
    run = torch.compile(operator, fullgraph=True, backend="aot_eager") if compiled else operator
    with torch.autocast("cpu", torch.bfloat16):
        out = run(low, offset, mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, operator(low, offset.bfloat16(), mask.bfloat16()))
    grads = torch.autograd.grad(out.float().sum(), (x, offset, mask))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(x, offset, mask).dtype == torch.float32


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("direct", [False, True])
def test_double_backward_raises(direct):
    leaves = inputs()
    out = torch.ops.internimage.dcnv3_forward(*leaves, *OPTIONS) if direct else operator(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    # Another term, so that dropping the second derivatives would go unnoticed.
    loss = sum(grad.square().sum() for grad in grads) + leaves[0].sum()
    with pytest.raises(RuntimeError, match="double backward of dcnv3 is not implemented"):
        loss.backward()


def test_the_reference_has_second_derivatives():
    x, offset, mask = (tensor[:1, :2, :2].detach() for tensor in inputs())
    # Finite differences must not cross a whole-number coordinate.
    offset = offset.floor() + 0.2 + 0.6 * (offset - offset.floor())
    tensors = [tensor.requires_grad_() for tensor in (x, offset, mask)]
    assert torch.autograd.gradgradcheck(operator_in_reference, tensors)


@pytest.mark.usefixtures("implementation")
def test_direct_calls_of_the_operators():
    leaves = inputs()
    out = torch.ops.internimage.dcnv3_forward(*leaves, *OPTIONS)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(operator(*leaves), leaves, grad)
    assert all(map(torch.equal, found, expected))
    x, offset, mask = (tensor.detach() for tensor in leaves)
    with pytest.raises(ValueError, match="`offset` has shape"):
        torch.ops.internimage.dcnv3_forward(x, offset[:, :2], mask, *OPTIONS)
    with pytest.raises(ValueError, match=r"`mask` is torch.float32"):
        torch.ops.internimage.dcnv3_forward(x, offset, mask.float(), *OPTIONS)
    with pytest.raises(ValueError, match="`grad` has shape"):
        torch.ops.internimage.dcnv3_backward(grad[:1], x, offset, mask, *OPTIONS)


def test_torch_func_transforms_are_refused():
    tensors = [tensor.detach() for tensor in inputs()]
    with pytest.raises(RuntimeError, match=r"dcnv3: torch.func transforms .* are not supported"):
        torch.vmap(operator)(*[tensor.unsqueeze(1) for tensor in tensors])
    with pytest.raises(RuntimeError, match=r"dcnv3: torch.func transforms .* are not supported"):
        torch.func.grad(lambda x: operator(x, *tensors[1:]).sum())(tensors[0])


def test_fake_tensors_know_shape_and_dtype():
    with torch._subclasses.FakeTensorMode():
        x, offset, mask = torch.empty(2, 8, 9, 32), torch.empty(2, 4, 5, 36), torch.empty(2, 4, 5, 18)
        leaves = [tensor.bfloat16().requires_grad_() for tensor in (x, offset, mask)]
        out = dcnv3(*leaves, groups=2, stride=2)
        out.sum().backward()
    assert (tuple(out.shape), out.dtype) == ((2, 4, 5, 32), torch.bfloat16)
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


def test_meta_tensors_run_without_data():
    leaves = [tensor.detach().to("meta").requires_grad_() for tensor in inputs()]
    out = operator(*leaves)
    out.sum().backward()
    assert out.shape == leaves[0].shape
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_algorithms_refuse_the_cuda_kernel_and_take_the_reference(monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [tensor.detach().cuda().requires_grad_() for tensor in inputs()]
        monkeypatch.setenv("INTERNIMAGE_OPS", "cuda")
        out = operator(*leaves)
        with pytest.raises(RuntimeError, match="INTERNIMAGE_OPS=reference"):
            out.sum().backward()
        monkeypatch.setenv("INTERNIMAGE_OPS", "reference")
        grads = [torch.autograd.grad(operator(*leaves).sum(), leaves) for _ in range(2)]
        assert all(map(torch.equal, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_internimage_ops_chooses_what_runs(implementation, dtype, operators_that_run):
    leaves = inputs(dtype=dtype)
    with operators_that_run as operators:
        operator(*leaves).sum().backward()
    served_by_kernel = implementation == "cpp" and dtype != torch.float16
    kernels = {name for name in operators.names if name.startswith("internimage_kernels")}
    expected = {f"internimage_kernels.dcnv3_{name}.default" for name in ("forward", "backward")}
    assert kernels == (expected if served_by_kernel else set())
    # The registered operators would cost more time than the kernel itself.
    assert not any(name.startswith("internimage.") for name in operators.names)


def test_a_wrong_choice_is_named(monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_OPS", "fast")
    with pytest.raises(ValueError, match="INTERNIMAGE_OPS is 'fast'"):
        operator(*inputs())
