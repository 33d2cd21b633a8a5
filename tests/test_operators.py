"""torch.ops.depthwise_inline on the CPU: schemas, values, autograd, fake kernels; more in test_conventions.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import depthwise_inline
from depthwise_inline import depthwise_conv2d

OPS = torch.ops.depthwise_inline
CL = torch.channels_last
GEOMETRIES = [(1, 1, 0, 0, 1, 1), (2, 1, 1, 2, 1, 2), (1, 2, 3, 0, 2, 1)]  # stride, padding, dilation as (h, w)


def problem(geometry, multiplier=2, dtype=torch.float64, layout=torch.contiguous_format):
    """Input, weight, bias, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    channels, kernel = 3, (3, 2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(2, channels, 6, 7).contiguous(memory_format=layout)
    weight, bias = draw(channels * multiplier, 1, *kernel), draw(channels * multiplier)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *arguments(geometry), channels))
    return x, weight, bias, grad


def arguments(geometry):
    """stride, padding, dilation as pairs."""
    return geometry[0:2], geometry[2:4], geometry[4:6]


# Each operator by name: its arguments for a problem.
CALLS = {
    "forward": lambda x, w, b, g, geo, last: (x, w, b, *geo),
    "forward_no_autograd": lambda x, w, b, g, geo, last: (x, w, b, *geo),
    "grad_input": lambda x, w, b, g, geo, last: (g, w, *x.shape[2:], *geo, last, w.size(0) // x.size(1)),
    "grad_weight": lambda x, w, b, g, geo, last: (g, x, *w.shape[2:], *geo, last, True),
    "gradients": lambda x, w, b, g, geo, last: (g, x, w, *geo, last),
}


def test_schemas():
    geometry = "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w"
    assert {str(getattr(OPS, name).default._schema) for name in CALLS} == {
        f"depthwise_inline::forward(Tensor input, Tensor weight, Tensor? bias, {geometry}) -> Tensor",
        f"depthwise_inline::forward_no_autograd(Tensor input, Tensor weight, Tensor? bias, {geometry}) -> Tensor",
        f"depthwise_inline::grad_input(Tensor grad_output, Tensor weight, SymInt height, SymInt width, {geometry}, "
        "bool channels_last, int multiplier=1) -> Tensor",
        "depthwise_inline::grad_weight(Tensor grad_output, Tensor input, SymInt kernel_h, SymInt kernel_w, "
        f"{geometry}, bool channels_last, bool bias) -> (Tensor, Tensor)",
        f"depthwise_inline::gradients(Tensor grad_output, Tensor input, Tensor weight, {geometry}, bool channels_last) "
        "-> (Tensor, Tensor)",
    }


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("multiplier", (1, 2))
def test_values(geometry, multiplier):
    x, weight, bias, grad = problem(geometry, multiplier)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*leaves, *arguments(geometry), x.size(1))
    grads = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(OPS.forward(x, weight, bias, *geometry), expected.detach())
    torch.testing.assert_close(OPS.forward_no_autograd(x, weight, bias, *geometry), expected.detach())
    ours = OPS.grad_input(grad, weight, *x.shape[2:], *geometry, False, multiplier)
    torch.testing.assert_close(ours, grads[0])
    torch.testing.assert_close(OPS.gradients(grad, x, weight, *geometry, False), tuple(grads[:2]))
    torch.testing.assert_close(OPS.grad_weight(grad, x, *weight.shape[2:], *geometry, False, True), grads[1:])
    no_bias = OPS.grad_weight(grad, x, *weight.shape[2:], *geometry, False, False)
    assert no_bias[1].shape == (0,)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", (torch.contiguous_format, CL))
def test_opcheck(name, layout):
    for geometry in GEOMETRIES:
        tensors = problem(geometry, layout=layout)
        if name != "forward_no_autograd":
            for tensor in tensors:
                tensor.requires_grad_()
        torch.library.opcheck(getattr(OPS, name).default, CALLS[name](*tensors, geometry, layout == CL))


@pytest.mark.parametrize("multiplier", (1, 2))
def test_gradcheck(multiplier):
    for geometry in GEOMETRIES:
        x, weight, bias, grad = (t.requires_grad_() for t in problem(geometry, multiplier))
        for b in (bias, None):
            leaves = tuple(t for t in (x, weight, b) if t is not None)

            def call(x, weight, b=None, geometry=geometry):
                return OPS.forward(x, weight, b, *geometry)

            gradcheck(call, leaves, fast_mode=True)
            gradgradcheck(call, leaves, fast_mode=True)
        size, kernel = x.shape[2:], weight.shape[2:]
        flags = *geometry, False
        gradcheck(lambda g, w: OPS.grad_input(g, w, *size, *flags, multiplier), (grad, weight), fast_mode=True)  # noqa: B023
        gradcheck(lambda g, x: OPS.grad_weight(g, x, *kernel, *flags, True), (grad, x), fast_mode=True)  # noqa: B023


def test_only_needed_gradients_are_computed_and_saved():
    x, weight, bias, grad = problem(GEOMETRIES[0])
    for needed in range(1, 8):
        leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate((x, weight, bias))]
        out = OPS.forward(*leaves, *GEOMETRIES[0])
        assert [t is not None for t in out.grad_fn.saved_tensors] == [bool(needed & 2), bool(needed & 1)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        theirs = torch.autograd.grad(F.conv2d(*leaves, *arguments(GEOMETRIES[0]), 3), wanted, grad)
        torch.testing.assert_close(torch.autograd.grad(out, wanted, grad), theirs)


# --- fake kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("layouts", [(None, None), (CL, None), (None, CL), (CL, CL)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_fake_memory_format(dtype, layouts, device):
    """channels_last where input or weight is (on a GPU never in float64, as cuDNN); no GPU is needed to ask."""
    x, weight, bias, grad = problem(GEOMETRIES[0], dtype=dtype)
    x, weight = (
        tensor.contiguous(memory_format=layout or torch.contiguous_format)
        for tensor, layout in zip((x, weight), layouts, strict=True)
    )
    # A weight of one channel in channels_last: only its strides tell.
    if layouts[1] is CL:
        weight = weight.as_strided(weight.shape, (6, 1, 2, 1))
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x, weight, bias, grad = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in (x, weight, bias, grad)
        )
        out = depthwise_conv2d(x, weight, bias)
        last = CL in layouts and (device == "cpu" or dtype is not torch.float64)
        assert out.device.type == device and out.shape == grad.shape
        assert out.is_contiguous(memory_format=CL if last else torch.contiguous_format)
        if device == "cuda":
            assert out.is_contiguous(memory_format=torch.contiguous_format) != last
        for channels_last in (False, True):
            got = OPS.grad_input(grad, weight, *x.shape[2:], *GEOMETRIES[0], channels_last, 2)
            assert got.shape == x.shape
            assert got.is_contiguous(memory_format=CL if channels_last else torch.contiguous_format)
            grad_weight, grad_bias = OPS.grad_weight(grad, x, 3, 2, *GEOMETRIES[0], channels_last, True)
            assert grad_weight.shape == weight.shape and grad_weight.is_contiguous() and grad_bias.shape == bias.shape


@pytest.mark.parametrize("operator", ("forward", "forward_no_autograd"))
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_operators_reject(operator, device):
    x, weight = torch.empty(2, 3, 6, 6, device=device), torch.empty(3, 1, 3, 3, device=device)
    call = getattr(OPS, operator)
    for bad, words in [
        ((x[0], weight, None, *GEOMETRIES[0]), r"\[N, C, H, W\]"),
        ((x, weight[:2], None, *GEOMETRIES[0]), "divisible by 3"),
        ((x, weight, None, 0, 1, 0, 0, 1, 1), "non-positive stride"),
        ((x, weight, None, 1, 1, -1, 0, 1, 1), "negative padding"),
        ((x.double(), weight, None, *GEOMETRIES[0]), "should be the same"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call(*bad)
    grad = torch.empty(2, 3, 5, 4, device=device)
    with pytest.raises(RuntimeError, match=r"grad_output of size \[2, C \* m, 4, 4\]"):
        OPS.grad_input(grad, weight, 6, 6, *GEOMETRIES[0], False)
    with pytest.raises(RuntimeError, match=r"grad_output of size \[2, C \* m, 4, 4\]"):
        OPS.grad_weight(grad, x, 3, 3, *GEOMETRIES[0], False, False)
    with pytest.raises(RuntimeError, match="multiplier=2"):
        OPS.grad_input(grad, weight, 6, 6, *GEOMETRIES[0], False, 2)


# --- registration -----------------------------------------------------------------------------------------------------


def test_registered_once():
    """A second copy of the module, and a reload, find the operators there."""
    code = """
import importlib, sys, torch, depthwise_inline
first = torch.ops.depthwise_inline.forward.default
sys.modules["other_name"] = sys.modules.pop("depthwise_inline")
import depthwise_inline as again
importlib.reload(again)
del sys.modules["other_name"], sys.modules["depthwise_inline"], depthwise_inline
import gc; gc.collect()
x, w = torch.ones(1, 2, 4, 4, requires_grad=True), torch.ones(2, 1, 3, 3)
out = torch.ops.depthwise_inline.forward(x, w, None, 1, 1, 0, 0, 1, 1)
out.sum().backward()
assert x.grad.sum() == 72
assert again.depthwise_conv2d(x, w).sum() == 72
"""
    root = Path(depthwise_inline.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
