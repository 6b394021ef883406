import pytest
import torch
import torch.nn.functional as F

from internimage.layers import Linear


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (1, 1, 1, 12), (3, 1, 9, 12), (0, 4, 4, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_affine_map_of_torch_whatever_computes_it(shape, bias, threads):
    torch.manual_seed(0)
    layer = Linear(12, 20, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sin().sum().backward()

    weight, offset = (None if p is None else p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, weight, offset)
    expected.sin().sum().backward()
    # float32 sums of 12 products, and of up to 70 pixels in the gradient of the weights
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, exact.grad, **close)
    torch.testing.assert_close(layer.weight.grad, weight.grad, **close)
    if bias:
        torch.testing.assert_close(layer.bias.grad, offset.grad, **close)
    assert y.is_contiguous()


def test_linear_takes_the_convolution_on_several_threads_and_keeps_graphs_plain(monkeypatch):
    called = []
    monkeypatch.setattr("internimage.layers.F.conv2d", lambda x, *rest: called.append(1) or x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer, x = Linear(4, 4), torch.randn(1, 2, 2, 4)
    layer(x)
    assert called == [1]
    layer.double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x)
    graph = torch.export.export(layer, (x,))
    assert called == [1]
    assert "linear" in str(graph.graph)


def test_linear_is_traced_into_one_graph(threads):
    layer, x = Linear(4, 4), torch.randn(1, 2, 2, 4)
    traced = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), layer(x))
