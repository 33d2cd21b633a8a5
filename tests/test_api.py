"""The public functions and modules on the CPU: equal to nn.Conv2d, also in what they reject."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize

import depthwise_inline
from depthwise_inline import DepthwiseConv2d, ModelNew, depthwise_conv2d, replace_depthwise


class ReferenceModel(nn.Module):
    """What ModelNew stands in for."""

    def __init__(self, in_channels, kernel_size, stride=1, padding=0, bias=False):
        super().__init__()
        self.conv2d = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=bias)

    def forward(self, x):
        return self.conv2d(x)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- equal to F.conv2d -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("multiplier", (1, 3))
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {}),
        ((3, 3), {"stride": 2, "padding": 1}),
        ((3, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        ((3, 3), {"stride": [2], "padding": [1], "dilation": [2]}),
        ((3, 7), {"padding": "same"}),
        ((2, 4), {"padding": "same"}),
        ((2, 3), {"padding": "same", "dilation": (3, 1)}),
        ((5, 1), {"padding": "valid"}),
        ((1, 1), {"stride": 3}),
        ((9, 9), {"padding": 1}),
    ],
)
def test_equals_conv2d(kernel, options, multiplier):
    weight, bias = draw(5 * multiplier, 1, *kernel, seed=1), draw(5 * multiplier, seed=2)
    for x in (draw(2, 5, 9, 11), draw(5, 9, 11), draw(0, 5, 9, 11), draw(2, 9, 11, 5).permute(0, 3, 1, 2)):
        for b in (None, bias):
            expected = F.conv2d(x, weight, b, groups=5, **options)
            torch.testing.assert_close(depthwise_conv2d(x, weight, b, **options), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(dtype):
    x, weight = draw(2, 3, 8, 8, dtype=dtype), draw(3, 1, 3, 3, dtype=dtype)
    out = depthwise_conv2d(x, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out, F.conv2d(x, weight, groups=3))


def test_gradients_on_the_cpu():
    x, weight, bias = (t.requires_grad_() for t in (draw(2, 3, 8, 8), draw(6, 1, 3, 3), draw(6)))
    ours = torch.autograd.grad(depthwise_conv2d(x, weight, bias, 2, 1).square().sum(), (x, weight, bias))
    theirs = torch.autograd.grad(F.conv2d(x, weight, bias, 2, 1, 1, 3).square().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs)


def test_meta_device():
    out = depthwise_conv2d(torch.empty(2, 3, 8, 8, device="meta"), torch.empty(3, 1, 3, 3, device="meta"), stride=2)
    assert out.shape == (2, 3, 3, 3) and out.device.type == "meta"


# --- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ("zeros", "reflect", "replicate", "circular"))
@pytest.mark.parametrize("padding", (0, 2, (1, 2), "same", "valid"))
def test_module_equals_conv2d(padding, padding_mode):
    torch.manual_seed(0)
    ours = DepthwiseConv2d(4, (3, 5), padding=padding, dilation=(2, 1), padding_mode=padding_mode, out_channels=8)
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 8, (3, 5), padding=padding, dilation=(2, 1), groups=4, padding_mode=padding_mode)
    for x in (draw(2, 4, 9, 8), draw(4, 9, 8)):
        torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == repr(theirs).replace("Conv2d", "DepthwiseConv2d")


def test_module_defaults():
    module = DepthwiseConv2d(6, 3)
    assert isinstance(module, nn.Conv2d)
    assert (module.out_channels, module.groups, module.bias.shape) == (6, 6, (6,))
    module = DepthwiseConv2d(6, 3, device="meta", dtype=torch.float64, bias=False)
    assert (module.weight.device.type, module.weight.dtype, module.bias) == ("meta", torch.float64, None)


@pytest.mark.parametrize("bias", (False, True))
def test_model_new_mirrors_the_reference(bias):
    torch.manual_seed(3)
    reference = ReferenceModel(8, 3, 2, 1, bias)
    torch.manual_seed(3)
    model = ModelNew(8, 3, 2, 1, bias)
    assert list(model.state_dict()) == list(reference.state_dict())
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = draw(2, 8, 10, 10)
    torch.testing.assert_close(model(x), reference(x))
    assert (model.in_channels, model.kernel_size, model.stride, model.padding) == (8, (3, 3), (2, 2), (1, 1))
    assert model.weight is model.conv2d.weight and model.bias is model.conv2d.bias


def test_state_dict_exchange():
    x = draw(2, 8, 10, 10)
    reference, model = ReferenceModel(8, 3, bias=True), ModelNew(8, 3, bias=True)
    model.load_state_dict(reference.state_dict())
    torch.testing.assert_close(model(x), reference(x))
    model = ModelNew(8, 3, bias=True)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), reference(x))


def test_copies():
    model, x = ModelNew(4, 3, bias=True), draw(1, 4, 6, 6)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert type(twin.conv2d) is DepthwiseConv2d and twin.weight is not model.weight
        torch.testing.assert_close(twin(x), model(x))
    saved, twin = io.BytesIO(), ModelNew(4, 3, bias=True)
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    twin.load_state_dict(torch.load(saved, weights_only=True))
    torch.testing.assert_close(twin(x), model(x))


def test_fuse_conv_bn():
    conv, norm, x = DepthwiseConv2d(4, 3).eval(), nn.BatchNorm2d(4).eval(), draw(2, 4, 6, 6)
    norm.running_mean.uniform_()
    norm.running_var.uniform_(0.5, 2)
    fused = fuse_conv_bn_eval(conv, norm)
    assert type(fused) is DepthwiseConv2d
    torch.testing.assert_close(fused(x), norm(conv(x)))


# --- replace_depthwise -----------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, channels, stride):
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )
        self.residual = stride == 1

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class ConvNextBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


NETWORKS = {
    "mobilenet": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), InvertedResidual(8, 1), InvertedResidual(8, 2)),
    "convnext": lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), ConvNextBlock(8), ConvNextBlock(8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_replace_depthwise_in_a_network(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    original = copy.deepcopy(network)
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    calls = []
    conv = next(module for module in network.modules() if isinstance(module, nn.Conv2d) and module.groups > 1)
    conv.register_forward_hook(lambda *_: calls.append(1))
    conv.eval()

    assert replace_depthwise(network) is network
    assert dict(network.named_modules()) == modules
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    replaced = [module for module in network.modules() if type(module) is DepthwiseConv2d]
    assert len(replaced) == 2 and conv in replaced and not conv.training
    assert type(network[0]) is nn.Conv2d

    x = draw(2, 3, 32, 32)
    out, expected = network(x), original(x)
    torch.testing.assert_close(out, expected)
    assert calls == [1]
    out.square().mean().backward()
    expected.square().mean().backward()
    for ours, theirs in zip(network.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    original.load_state_dict(network.state_dict())
    assert type(pickle.loads(pickle.dumps(copy.deepcopy(replaced[1])))) is DepthwiseConv2d


def test_replace_depthwise_takes_a_lone_convolution():
    conv = nn.Conv2d(4, 8, 3, groups=4)
    assert replace_depthwise(conv) is conv and type(conv) is DepthwiseConv2d
    assert replace_depthwise(conv) is conv and type(conv) is DepthwiseConv2d


class OwnInit(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, groups=channels)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


def test_replace_depthwise_leaves_the_rest_alone():
    rest = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(1, 4, 3, groups=1),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 3, groups=4),
        nn.LazyConv2d(4, 3, groups=4),
        OwnForward(4, 4, 3, groups=4),
        OwnConvForward(4, 4, 3, groups=4),
    ]
    classes = [type(module) for module in rest]
    replace_depthwise(nn.ModuleList(rest))
    assert [type(module) for module in rest] == classes


def test_replace_depthwise_in_a_subclass():
    conv, x = OwnInit(4), draw(1, 4, 6, 6)
    expected = conv(x)
    replace_depthwise(conv)
    assert isinstance(conv, OwnInit) and isinstance(conv, DepthwiseConv2d) and type(conv).__name__ == "OwnInit"
    assert type(conv) is type(replace_depthwise(OwnInit(4)))
    for twin in (conv, copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(twin) is type(conv)
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("make", (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: OwnInit(4)))
def test_replace_depthwise_in_a_parametrized_module(make):
    conv, x = parametrizations.weight_norm(make()), draw(1, 4, 6, 6)
    base, expected = type(conv).__bases__[0], conv(x)
    replace_depthwise(conv)
    assert isinstance(conv, DepthwiseConv2d) and isinstance(conv, base)
    torch.testing.assert_close(conv(x), expected)
    parametrize.remove_parametrizations(conv, "weight")
    assert isinstance(conv, DepthwiseConv2d)
    torch.testing.assert_close(conv(x), expected)


# --- rejections ------------------------------------------------------------------------------------------------------

X, W, B = draw(2, 4, 8, 8), draw(4, 1, 3, 3), draw(4)
FP8 = torch.float8_e4m3fn
BAD_ARGUMENTS = {  # arguments; whether F.conv2d rejects them too, with the same type; words of the message
    "rank 2": ((X[0, 0], W), True, r"Expected 3D \(unbatched\) or 4D \(batched\) input.*\[8, 8\]"),
    "rank 5": ((X[None], W), True, r"Expected 3D .* or 4D .*\[1, 2, 4, 8, 8\]"),
    "channels": ((X[:, :3], W), True, r"divisible by 3 at dimension 0.*\[4, 1, 3, 3\]"),
    "no channels": ((X[:, :0], W), True, r"at least one channel.*\[2, 0, 8, 8\]"),
    "no rows": ((X[:, :, :0], W, None, 1, 2), True, r"row and column.*\[2, 4, 0, 8\]"),
    "weight of groups of 2": ((X, draw(4, 2, 3, 3)), True, r"\[4 \* m, 1, kernel_h, kernel_w\].*\[4, 2, 3, 3\]"),
    "weight of rank 3": ((X, W[0]), True, r"\[4 \* m, 1, kernel_h, kernel_w\].*\[1, 3, 3\]"),
    "weight of kernel 0": ((X, W[:, :, :0]), True, r"\[4 \* m, 1, kernel_h, kernel_w\].*\[4, 1, 0, 3\]"),
    "bias too short": ((X, W, B[:3]), True, r"expected bias to be 1-dimensional with 4 elements.*\[3\]"),
    "bias of rank 2": ((X, W, B[None]), True, r"expected bias to be 1-dimensional with 4 elements.*\[1, 4\]"),
    "weight float64": ((X, W.double()), True, r"Input type \(torch.float32\) and weight type \(torch.float64\)"),
    "bias float64": ((X, W, B.double()), True, r"Input type \(torch.float32\) and bias type \(torch.float64\)"),
    "input int": ((X.int(), W.int()), False, r"float32, float16, bfloat16, float64, but got torch.int32"),
    "input bool": ((X.bool(), W.bool()), True, r"but got torch.bool"),
    "input complex": ((X.cfloat(), W.cfloat()), False, r"but got torch.complex64"),
    "input fp8": ((X.to(FP8), W.to(FP8)), True, r"but got torch.float8_e4m3fn"),
    "weight on meta": ((X, W.to("meta")), False, r"same device, but got input on cpu and weight on meta"),
    "bias on meta": ((X, W, B.to("meta")), False, r"same device, but got input on cpu and bias on meta"),
    "sparse input": ((X.to_sparse(), W), True, r"expected input to be a dense \(strided\).*torch.sparse_coo"),
    "sparse weight": ((X, W.to_sparse()), True, r"expected weight to be a dense \(strided\).*torch.sparse_coo"),
    "stride 0": ((X, W, None, 0), True, r"non-positive stride is not supported.*\(0, 0\)"),
    "stride -1": ((X, W, None, (1, -1)), True, r"non-positive stride is not supported.*\(1, -1\)"),
    "three strides": ((X, W, None, (1, 1, 1)), True, r"expected stride to be a single integer value or a list of 2"),
    "stride 1.5": ((X, W, None, 1.5), True, r"expected stride to be an int or a pair of ints.*1.5"),
    "negative padding": ((X, W, None, 1, -1), True, r"negative padding is not supported.*-1"),
    "three paddings": ((X, W, None, 1, (0, 0, 0)), True, r"expected padding to be a single integer value or a list"),
    "padding 'full'": ((X, W, None, 1, "full"), True, r"Invalid padding string: 'full'"),
    "'same' with stride": ((X, W, None, 2, "same"), True, r"padding='same' is not supported for strided"),
    "dilation 0": ((X, W, None, 1, 0, 0), True, r"non-positive dilation is not supported.*\(0, 0\)"),
    "dilation -1": ((X, W, None, 1, 0, (1, -1)), True, r"non-positive dilation is not supported.*\(1, -1\)"),
    "kernel larger": ((X[:, :, :2], W), True, r"padded input size per channel: \(2 x 8\). Kernel size: \(3 x 3\)"),
    "dilated kernel larger": ((X, W, None, 1, 0, (1, 4)), True, r"\(8 x 8\). Kernel size: \(3 x 9\)"),
    "input a list": (([1.0], W), True, r"expected input to be a Tensor, but got list"),
    "no weight": ((X, None), True, r"expected weight to be a Tensor, but got NoneType"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_rejections(name):
    arguments, conv2d_rejects, words = BAD_ARGUMENTS[name]
    with pytest.raises((RuntimeError, TypeError)) as ours:
        depthwise_conv2d(*arguments)
    assert re.search(words, str(ours.value))
    groups = max(arguments[0].shape[-3], 1) if isinstance(arguments[0], torch.Tensor) and arguments[0].dim() > 2 else 4
    full = (*arguments, None, 1, 0, 1)[: len(arguments)] + (None, 1, 0, 1)[len(arguments) - 2 :]
    if conv2d_rejects:
        with pytest.raises(Exception) as theirs:
            F.conv2d(*full, groups)
        assert issubclass(theirs.type, ours.type)
    else:
        F.conv2d(*full, groups)


@pytest.mark.filterwarnings("ignore")
def test_rejects_quantised_tensors():
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    with pytest.raises(RuntimeError, match="a quantized"):
        depthwise_conv2d(x, W)


@pytest.mark.parametrize("channels", (2, 3, 8))
def test_module_rejects_other_channels(channels):
    x = draw(1, channels, 6, 6)
    for module in (DepthwiseConv2d(4, 3), ModelNew(4, 3), nn.Conv2d(4, 4, 3, groups=4)):
        with pytest.raises(RuntimeError, match=f"to have 4 channels, but got {channels} channels instead"):
            module(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelNew(0, 3), "in_channels must be a positive integer, but got in_channels=0"),
        (lambda: DepthwiseConv2d(-1, 3), "in_channels must be a positive integer, but got in_channels=-1"),
        (lambda: DepthwiseConv2d(4, 3, out_channels=6), "out_channels must be divisible by groups"),
        (lambda: DepthwiseConv2d(4, 3, padding="full"), "Invalid padding string 'full'"),
        (lambda: DepthwiseConv2d(4, 3, 2, "same"), "padding='same' is not supported for strided convolutions"),
        (lambda: DepthwiseConv2d(4, 3, padding_mode="mirror"), "padding_mode must be one of"),
    ],
)
def test_constructor_rejections(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_tells_the_path():
    status = depthwise_inline.status()
    assert status.path == ("cuda" if torch.cuda.is_available() else "pytorch")
    assert status.reason in str(status) and torch.__version__ in str(status)


def test_public_names():
    assert set(depthwise_inline.__all__) == {
        *("DepthwiseConv2d", "ModelNew", "depthwise_conv2d", "precompile", "replace_depthwise", "status"),
        "__version__",
    }
