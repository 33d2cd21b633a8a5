"""ModelNew, DepthwiseConv2d and replace_depthwise on a GPU, against nn.Conv2d and float64."""

import copy
import io

import pytest
import reference
import torch
from reference import DEVICE, HALF_AND_SINGLE, LAYOUTS, Failures, Problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthwise_inline import DepthwiseConv2d, ModelNew, replace_depthwise

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32():
    with reference.full_float32():
        yield


class Model(nn.Module):
    """The reference model."""

    def __init__(self, in_channels, kernel_size, stride=1, padding=0, bias=False):
        super().__init__()
        self.conv2d = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride=stride, padding=padding, groups=in_channels, bias=bias
        )

    def forward(self, x):
        return self.conv2d(x)


def randn(*shape, generator, dtype=torch.float32, layout="nchw"):
    values = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    return values.contiguous(memory_format=reference.memory_format(layout))


def gradients(model, x, grad_out):
    """Output and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *model.parameters()), grad_out.to(out.dtype))]


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def compare_networks(before, after, exact, dtype, names):
    """Tensors of a network against float64: each may be off by twice what any of them was before.

    Relative errors of whole tensors: what a single kernel does to single elements is for test_gpu_numerics.py.
    """
    failures = Failures()
    # A shift before a batch norm changes nothing: its gradient is zero, and what float64 leaves of it is noise.
    largest = max(e.norm() for e in exact)
    told = [(n, b, a, e) for n, b, a, e in zip(names, before, after, exact, strict=True) if e.norm() > 1e-9 * largest]
    allowed = 2 * max(relative_error(b, e) for _, b, _, e in told) + 16 * torch.finfo(dtype).eps
    assert allowed < max(1e-3, 64 * torch.finfo(dtype).eps), "before is too far from float64 to tell anything"
    for name, b, a, e in told:
        error = relative_error(a, e)
        good = error <= allowed and a.dtype == b.dtype and a.shape == b.shape
        failures.add(None if good else f"relative error {error:.3g}, allowed {allowed:.3g}", name)
    failures.report()


class Operators(TorchDispatchMode):
    """Names of the operators that run, with the groups of convolutions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func._schema.name, args[8] if func is torch.ops.aten.convolution.default else None))
        return func(*args, **(kwargs or {}))


# ---- Single modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=reference.short)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 0), (3, 2, 1), ((3, 7), (1, 2), (1, 3))], ids=["k3", "k3s2", "k3x7"]
)
def test_model_new_is_the_reference_model(kernel, stride, padding, bias, dtype):
    """Same seed, same weights; state_dicts in both directions; output and gradients within the rule."""
    arguments = (16, kernel, stride, padding, bias)
    torch.manual_seed(3)
    theirs = Model(*arguments).to(DEVICE, dtype)
    torch.manual_seed(3)
    ours = ModelNew(*arguments).to(DEVICE, dtype)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(-2)
    ours.load_state_dict(theirs.state_dict())
    fresh = Model(*arguments).to(DEVICE, dtype)
    fresh.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), theirs.parameters(), strict=True))

    conv = theirs.conv2d
    problem = Problem((30, 33), conv.kernel_size, conv.stride, conv.padding, batch=4, channels=16, bias=bias)
    tensors = reference.make_tensors(problem, dtype, "nchw", reference.fresh_generator())
    tensors.weight.copy_(conv.weight.detach())
    if bias:
        tensors.bias.copy_(conv.bias.detach())
    expected, peer = reference.expected_results(problem, tensors), reference.pytorch_results(problem, tensors)
    failures = Failures()
    names = ("out", "grad_input", "grad_weight", "grad_bias")
    for name, result in zip(names, gradients(ours, tensors.x, tensors.grad_out), strict=False):
        failures.add(reference.mismatch(result, expected[name], peer[name]), name)
    failures.report()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_modes(padding_mode, padding, layout):
    generator = reference.fresh_generator()
    options = {"padding": padding, "padding_mode": padding_mode, "device": DEVICE, "dtype": torch.float64}
    theirs = nn.Conv2d(6, 12, (4, 3), groups=6, **options)
    ours = DepthwiseConv2d(6, (4, 3), out_channels=12, **options)
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 6, 9, 10, generator=generator, dtype=torch.float64, layout=layout)
    grad_out = torch.randn_like(theirs(x))
    for found, expected in zip(gradients(ours, x, grad_out), gradients(theirs, x, grad_out), strict=True):
        torch.testing.assert_close(found, expected)


def test_unbatched_input():
    ours = DepthwiseConv2d(6, 3, padding=1, device=DEVICE)
    x = torch.randn(6, 9, 10, device=DEVICE)
    assert torch.equal(ours(x), ours(x[None])[0])


def test_wrong_number_of_channels():
    """A (C * m)-channel weight must not pass for a multiplier of another input."""
    with pytest.raises(RuntimeError, match=r"to have 6 channels, but got 3 channels"):
        DepthwiseConv2d(6, 3, device=DEVICE)(torch.randn(2, 3, 9, 10, device=DEVICE))


def test_copies_work_after_use():
    """deepcopy, torch.save and moving between devices, after the kernels have run."""
    ours = ModelNew(8, 3, 1, 1, True).to(DEVICE)
    x = torch.randn(2, 8, 12, 13, device=DEVICE)
    expected = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for copied in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), expected)
        assert copied.conv2d.weight is not ours.conv2d.weight
    torch.testing.assert_close(copy.deepcopy(ours).cpu()(x.cpu()), expected.cpu(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.cpu().to(DEVICE)(x), expected)


def test_training_follows_the_reference():
    """Ten optimizer steps in float64, in step with nn.Conv2d."""
    theirs = Model(5, 3, 2, 1, True).to(DEVICE, torch.float64)
    ours = ModelNew(5, 3, 2, 1, True).to(DEVICE, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    generator = reference.fresh_generator()
    losses = {}
    x = randn(4, 5, 11, 12, generator=generator, dtype=torch.float64)
    target = randn(4, 5, 6, 6, generator=generator, dtype=torch.float64)
    for name, model in (("theirs", theirs), ("ours", ours)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses[name] = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["theirs"][-1] < losses["theirs"][0]
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-9)


def test_gradient_scaler():
    """The usual float16 loop: weights in float32, their gradients unscaled and finite."""
    net = nn.Sequential(ModelNew(8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)).to(DEVICE)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with torch.autocast("cuda", dtype=torch.float16):
        loss = net(torch.randn(2, 8, 12, 12, device=DEVICE)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    for parameter, old in zip(net.parameters(), before, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter, old)


def test_graphed_callable():
    """torch.cuda.make_graphed_callables: forward and backward as graphs."""
    net = nn.Sequential(ModelNew(8, 3, 1, 1, True), nn.SiLU(), ModelNew(8, 3, 2, 1)).to(DEVICE)
    x = torch.randn(2, 8, 12, 12, device=DEVICE)
    grad_out = torch.randn_like(net(x))
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(net), (x.clone().requires_grad_(),))
    for _ in range(2):
        x = torch.randn_like(x)
        for found, expected in zip(gradients(graphed, x, grad_out), gradients(net, x, grad_out), strict=True):
            assert torch.equal(found, expected)


# ---- Networks -------------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNet's block: expand, depthwise, project. SiLU, because the steps of ReLU would exaggerate rounding."""

    def __init__(self, channels, out_channels, kernel, stride):
        super().__init__()
        hidden = 4 * channels
        self.residual = stride == 1 and channels == out_channels
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.SiLU()),
            *(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class ConvNextBlock(nn.Module):
    """ConvNeXt's block: 7x7 depthwise with bias, then a perceptron over channels_last."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        y = self.perceptron(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


def mobilenet():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
        *(InvertedResidual(8, 8, 3, 1), InvertedResidual(8, 12, 3, 2), InvertedResidual(12, 16, 5, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def convnext():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 4, 4), ConvNextBlock(16), nn.Conv2d(16, 24, 2, 2), ConvNextBlock(24), ConvNextBlock(24)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


NETWORKS = {"mobilenet": (mobilenet, 3), "convnext": (convnext, 3)}  # with the number of depthwise convolutions


def prepared(name, layout):
    make, count = NETWORKS[name]
    net = make().to(DEVICE, memory_format=reference.memory_format(layout))
    generator = reference.fresh_generator()
    x = randn(4, 3, 64, 56, generator=generator, layout=layout)
    return net, count, x, randn(4, 10, generator=generator)


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_replace_depthwise_keeps_results(name, layout, autocast):
    """Output and every gradient before and after, against the same network in float64."""
    net, count, x, grad_out = prepared(name, layout)
    exact = gradients(copy.deepcopy(net).double(), x.double(), grad_out.double())

    def run(network):
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            return gradients(network, x, grad_out)

    before = run(copy.deepcopy(net))
    parameters = dict(net.named_parameters())
    assert replace_depthwise(net) is net
    assert sum(isinstance(module, DepthwiseConv2d) for module in net.modules()) == count
    assert all(parameter is parameters[key] for key, parameter in net.named_parameters())
    after = run(net)
    compare_networks(before, after, exact, autocast or torch.float32, ["out", "x", *parameters])


@pytest.mark.parametrize("name", NETWORKS)
def test_replaced_networks_run_the_kernels(name):
    """No depthwise convolution is left to PyTorch."""
    net, count, x, _ = prepared(name, "nchw")
    replace_depthwise(net)
    with Operators() as operators:
        net(x)
    names = [name for name, _ in operators.seen]
    assert names.count("depthwise_inline::forward") == count
    assert all(groups in (None, 1) for _, groups in operators.seen)


def test_replaced_network_in_evaluation():
    """Running statistics, no graph, and batch norms folded into the depthwise convolutions."""
    net, _, x, _ = prepared("mobilenet", "nchw")
    for _ in range(3):
        net(x)
    net.eval()
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        before = net(x)
        replace_depthwise(net)
        after = net(x)
        for block in (module for module in net.modules() if isinstance(module, InvertedResidual)):
            layers = block.layers
            layers[3] = nn.utils.fuse_conv_bn_eval(layers[3], layers[4])
            layers[4] = nn.Identity()
            assert isinstance(layers[3], DepthwiseConv2d)
        fused = net(x)
    compare_networks([before], [after], [exact], torch.float32, ["out"])
    assert relative_error(fused, exact) < 1e-5


def test_compiled_network():
    """A block under torch.compile, forward and backward, in one graph."""
    torch._dynamo.reset()
    net, _, x, grad_out = prepared("convnext", "nchw")
    exact = gradients(copy.deepcopy(net).double(), x.double(), grad_out.double())
    before = gradients(copy.deepcopy(net), x, grad_out)
    replace_depthwise(net)
    after = gradients(torch.compile(net, fullgraph=True), x, grad_out)
    compare_networks(before, after, exact, torch.float32, ["out", "x", *dict(net.named_parameters())])
