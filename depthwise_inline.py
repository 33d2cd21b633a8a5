"""Fast depthwise convolutions for PyTorch: copy this file and the folder ``kernels/`` into a project, and import it.

``ModelNew`` and ``DepthwiseConv2d`` stand in for ``nn.Conv2d(C, C * m, ..., groups=C)``, ``replace_depthwise`` swaps
the depthwise convolutions of a whole network, ``depthwise_conv2d`` is the function below them. On an NVIDIA GPU they
run the CUDA kernels of ``kernels/``, which are compiled when first needed and kept on disk; on any other device they
call ``F.conv2d``. ``print(depthwise_inline.status())`` says which of the two is live, and why.

``python depthwise_inline.py doctor`` says what a machine lacks; ``clean`` empties the cache of compiled kernels;
``bundle OUT.py`` writes the module and its sources as one file.

This file, from top to bottom: argument checks, operators, functions and modules, the build, the command line.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

__all__ = [
    "DepthwiseConv2d",
    "ModelNew",
    "__version__",
    "depthwise_conv2d",
    "precompile",
    "replace_depthwise",
    "status",
]
__version__ = "0.1.0"

IntPair = int | Sequence[int]

# False where torch is built for the CPU alone or for ROCm: then every call goes to F.conv2d.
_CUDA_BUILD = torch.version.cuda is not None

# ---- Argument checks

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _pair(value: IntPair, name: str) -> tuple[int, int]:
    """An int or a sequence of one or two ints as a pair."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    try:
        values = [operator.index(v) for v in values]
    except TypeError:
        raise TypeError(f"expected {name} to be an int or a pair of ints, but got {name}={value!r}") from None
    if len(values) == 1:
        values *= 2
    if len(values) != 2:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 2 values to match the convolution dimensions, "
            f"but got {name}={values}"
        )
    return values[0], values[1]


def _resolve_padding(padding: str | IntPair, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Symmetric padding (h, w), then the rows and columns that 'same' adds at the bottom and on the right."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return total_h // 2, total_w // 2, total_h % 2, total_w % 2
    return *_pair(padding, "padding"), 0, 0


def check_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntPair, padding: str | IntPair, dilation: IntPair
) -> None:
    """Raise what ``nn.Conv2d`` raises for these arguments, or say what was expected where ``nn.Conv2d`` would not mind.

    Raises:
        TypeError: an argument is not of the kind the signature names.
        RuntimeError: everything else, shapes, values, dtypes and devices.
    """
    tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a Tensor, but got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"expected {name} to be a dense (strided) tensor, but got layout {tensor.layout}")
        if tensor.is_quantized:
            raise RuntimeError(f"expected {name} to be a floating-point tensor, but got a quantized {tensor.dtype}")
        if tensor.dtype not in _DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise RuntimeError(f"expected {name} to have one of the dtypes {names}, but got {tensor.dtype}")
        if tensor.dtype != input.dtype:
            raise RuntimeError(f"Input type ({input.dtype}) and {name} type ({tensor.dtype}) should be the same")
        if tensor.device != input.device:
            raise RuntimeError(
                f"expected input and {name} to be on the same device, but got input on {input.device} and {name} "
                f"on {tensor.device}"
            )

    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input.shape)}"
        )
    channels, height, width = input.shape[-3:]
    if channels < 1 or height < 1 or width < 1:
        raise RuntimeError(
            f"expected input with at least one channel, row and column (only the batch may be empty), but got input "
            f"of size: {list(input.shape)}"
        )
    if weight.dim() != 4 or weight.size(1) != 1 or weight.size(2) < 1 or weight.size(3) < 1:
        raise RuntimeError(
            f"expected weight of size [{channels} * m, 1, kernel_h, kernel_w] for an input of {channels} channels, "
            f"but got weight of size {list(weight.shape)}"
        )
    if weight.size(0) < 1 or weight.size(0) % channels != 0:
        raise RuntimeError(
            f"Given groups={channels}, expected weight to be divisible by {channels} at dimension 0, but got weight of "
            f"size {list(weight.shape)} instead"
        )
    if bias is not None and (bias.dim() != 1 or bias.size(0) != weight.size(0)):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with {weight.size(0)} "
            f"elements, but got bias of size {list(bias.shape)} instead"
        )

    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise RuntimeError(f"Invalid padding string: {padding!r}, expected 'same' or 'valid'")
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    if min(stride) < 1:
        raise RuntimeError(f"non-positive stride is not supported: expected at least 1, but got stride={stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"non-positive dilation is not supported: expected at least 1, but got dilation={dilation}")
    if padding == "same" and stride != (1, 1):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
    kernel = tuple(weight.shape[2:])
    pad_h, pad_w, extra_h, extra_w = _resolve_padding(padding, kernel, dilation)
    if pad_h < 0 or pad_w < 0:
        raise RuntimeError(f"negative padding is not supported: expected at least 0, but got padding={padding}")
    padded = height + 2 * pad_h + extra_h, width + 2 * pad_w + extra_w
    reach = dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )


# ---- Operators: torch.ops.depthwise_inline.*
# Schemas, fake kernels, autograd and autocast live here; the CUDA kernels come with the compiled library. Sizes are
# single ints, since each list argument costs 0.5 us of host time a call. forward_no_autograd is forward without the
# Python autograd formula, whose mere presence costs 6 us a call. The library also serves PyTorch's own extension point
# aten::convolution_overrideable, whose autograd is C++: eager training goes there, traced graphs use `forward`.

_GEOMETRY = "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w"
_SCHEMAS = (
    f"forward(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    f"forward_no_autograd(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
    f"grad_input(Tensor grad_output, Tensor weight, SymInt height, SymInt width, {_GEOMETRY}, bool channels_last, "
    "int multiplier=1) -> Tensor",
    f"grad_weight(Tensor grad_output, Tensor input, SymInt kernel_h, SymInt kernel_w, {_GEOMETRY}, "
    "bool channels_last, bool bias) -> (Tensor, Tensor)",
    f"gradients(Tensor grad_output, Tensor input, Tensor weight, {_GEOMETRY}, bool channels_last) -> (Tensor, Tensor)",
)
_OPS = torch.ops.depthwise_inline
# What torch or the library refers to, kept where neither a reload of this module nor its removal loses it.
_keep_alive: list[object] = vars(_OPS).setdefault("_keep_alive", [])


def _wants_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether F.conv2d with cuDNN would answer in channels_last; in float64 it never does."""
    formats = suggest_memory_format(input), suggest_memory_format(weight)
    return torch.channels_last in formats and input.dtype is not torch.float64


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _check_flat(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int]) -> None:
    """check_arguments for an operator's flat arguments; operators take batches only."""
    if isinstance(input, Tensor) and input.dim() != 4:
        raise RuntimeError(f"expected input of size [N, C, H, W], but got input of size: {list(input.shape)}")
    check_arguments(input, weight, bias, geometry[0:2], geometry[2:4], geometry[4:6])


def _out_size(image: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]) -> list[int]:
    """Rows and columns of the output."""
    axes = zip(image, kernel, geometry[0:2], geometry[2:4], geometry[4:6], strict=True)
    return [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in axes]


def _check_gradient(
    grad_output: Tensor, input_size: Sequence[int], kernel: Sequence[int], geometry: Sequence[int]
) -> None:
    """The gradient of an output must have that output's size."""
    height, width = _out_size(input_size[2:], kernel, geometry)
    if grad_output.dim() != 4 or grad_output.size(0) != input_size[0] or grad_output.shape[2:] != (height, width):
        raise RuntimeError(
            f"expected grad_output of size [{input_size[0]}, C * m, {height}, {width}], but got grad_output of size: "
            f"{list(grad_output.shape)}"
        )


def _lazy_cuda(op: str, tensor: Tensor) -> bool:
    """Load the library for a CUDA tensor that reached an operator before it; whether to dispatch again."""
    if not tensor.is_cuda or not _CUDA_BUILD:
        return False
    if _library is not None:
        raise RuntimeError(f"depthwise_inline: the compiled library has no CUDA kernel for {op}")
    _load_library()
    return True


def _forward_composite(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    if _lazy_cuda("forward", input):
        return _OPS.forward_no_autograd.default(input, weight, bias, *geometry)
    _check_flat(input, weight, bias, geometry)
    out = F.conv2d(input, weight, bias, geometry[0:2], geometry[2:4], geometry[4:6], input.size(1))
    return out.contiguous(memory_format=_memory_format(_wants_channels_last(input, weight)))


def _grad_input_composite(grad_output: Tensor, weight: Tensor, height: int, width: int, *rest: int | bool) -> Tensor:
    if _lazy_cuda("grad_input", grad_output):
        return _OPS.grad_input.default(grad_output, weight, height, width, *rest)
    size, channels_last = _input_size(grad_output, weight, height, width, *rest)
    grad = nn.grad.conv2d_input(size, weight, grad_output, rest[0:2], rest[2:4], rest[4:6], groups=size[1])
    return grad.contiguous(memory_format=_memory_format(channels_last))


def _grad_weight_composite(
    grad_output: Tensor, input: Tensor, kernel_h: int, kernel_w: int, *rest: int | bool
) -> tuple[Tensor, Tensor]:
    if _lazy_cuda("grad_weight", grad_output):
        return _OPS.grad_weight.default(grad_output, input, kernel_h, kernel_w, *rest)
    geometry, bias = rest[:6], rest[7]
    _check_gradient(grad_output, input.shape, (kernel_h, kernel_w), geometry)
    size = (grad_output.size(1), 1, kernel_h, kernel_w)
    grad = nn.grad.conv2d_weight(
        input, size, grad_output, geometry[0:2], geometry[2:4], geometry[4:6], groups=input.size(1)
    )
    grad_bias = grad_output.sum((0, 2, 3)) if bias else grad_output.new_empty(0)
    return grad.contiguous(), grad_bias


def _gradients_composite(
    grad_output: Tensor, input: Tensor, weight: Tensor, *rest: int | bool
) -> tuple[Tensor, Tensor]:
    if _lazy_cuda("gradients", grad_output):
        return _OPS.gradients.default(grad_output, input, weight, *rest)
    return _gradients_apart(grad_output, input, weight, *rest)


def _gradients_apart(grad_output: Tensor, input: Tensor, weight: Tensor, *rest: int | bool) -> tuple[Tensor, Tensor]:
    """Grad of input and grad of weight, each by its own operator."""
    multiplier = weight.size(0) // input.size(1)
    grad_input = _OPS.grad_input.default(grad_output, weight, *input.shape[2:], *rest, multiplier)
    return grad_input, _OPS.grad_weight.default(grad_output, input, *weight.shape[2:], *rest, False)[0]


def _input_size(
    grad_output: Tensor, weight: Tensor, height: int, width: int, *rest: int | bool
) -> tuple[tuple[int, int, int, int], bool]:
    """The size of the input whose gradient is asked for, and whether it is to be in channels_last."""
    geometry, channels_last, multiplier = rest[:6], rest[6], rest[7] if len(rest) > 7 else 1
    if multiplier < 1 or grad_output.size(1) != weight.size(0) or weight.size(0) % multiplier != 0:
        raise RuntimeError(
            f"expected grad_output and weight with the same number of output channels, a multiple of "
            f"multiplier={multiplier}, but got grad_output of size {list(grad_output.shape)} and weight of size "
            f"{list(weight.shape)}"
        )
    size = (grad_output.size(0), weight.size(0) // multiplier, height, width)
    _check_gradient(grad_output, size, weight.shape[2:], geometry)
    return size, bool(channels_last)


def _forward_fake(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    _check_flat(input, weight, bias, geometry)
    size = (input.size(0), weight.size(0), *_out_size(input.shape[2:], weight.shape[2:], geometry))
    channels_last = _wants_channels_last(input, weight)
    return input.new_empty(size).contiguous(memory_format=_memory_format(channels_last))


def _grad_input_fake(grad_output: Tensor, weight: Tensor, height: int, width: int, *rest: int | bool) -> Tensor:
    size, channels_last = _input_size(grad_output, weight, height, width, *rest)
    return grad_output.new_empty(size).contiguous(memory_format=_memory_format(channels_last))


def _grad_weight_fake(
    grad_output: Tensor, input: Tensor, kernel_h: int, kernel_w: int, *rest: int | bool
) -> tuple[Tensor, Tensor]:
    geometry, bias = rest[:6], rest[7]
    _check_gradient(grad_output, input.shape, (kernel_h, kernel_w), geometry)
    grad = grad_output.new_empty((grad_output.size(1), 1, kernel_h, kernel_w))
    return grad, grad_output.new_empty(grad_output.size(1) if bias else 0)


def _gradients_fake(grad_output: Tensor, input: Tensor, weight: Tensor, *rest: int | bool) -> tuple[Tensor, Tensor]:
    geometry, channels_last = rest[:6], rest[6]
    _check_gradient(grad_output, input.shape, weight.shape[2:], geometry)
    grad_input = input.new_empty(input.shape).contiguous(memory_format=_memory_format(bool(channels_last)))
    return grad_input, weight.new_empty(weight.shape)


def _is_transformed() -> bool:
    """Whether torch.func or forward mode may want more of an operator than its results."""
    return _is_functorch_active() or forward_ad._current_level >= 0


def _gradients_autograd(*arguments: Tensor | int | bool) -> tuple[Tensor, Tensor]:
    """Two operators where somebody differentiates; one elsewhere, as in the backward pass of a training step."""
    wants_gradients = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if wants_gradients or _is_transformed():
        return _gradients_apart(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.gradients.default(*arguments)


def _forward_setup(ctx, inputs, output) -> None:
    input, weight, _, *geometry = inputs
    need_input, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
    ctx.save_for_forward(input, weight)
    ctx.geometry = geometry
    ctx.image, ctx.kernel = tuple(input.shape[2:]), tuple(weight.shape[2:])
    ctx.multiplier = weight.size(0) // input.size(1)
    ctx.channels_last = _wants_channels_last(input, weight)


def _forward_backward(ctx, grad_output):
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = grad_bias = None
    if need_input and need_weight and not (need_bias or torch.is_grad_enabled() or _is_transformed()):
        grad_input, grad_weight = _OPS.gradients.default(grad_output, input, weight, *ctx.geometry, ctx.channels_last)
        return grad_input, grad_weight, *(None,) * 7
    if need_input:
        grad_input = _OPS.grad_input.default(
            grad_output, weight, *ctx.image, *ctx.geometry, ctx.channels_last, ctx.multiplier
        )
    if need_weight:
        grad_weight, grad_bias = _OPS.grad_weight.default(
            grad_output, input, *ctx.kernel, *ctx.geometry, ctx.channels_last, need_bias
        )
    elif need_bias:
        grad_bias = grad_output.sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias if need_bias else None, *(None,) * 6


def _forward_tangent(ctx, input_tangent, weight_tangent, bias_tangent, *_):
    input, weight = ctx.saved_tensors
    out = _OPS.forward.default(input_tangent, weight, bias_tangent, *ctx.geometry)
    return out + _OPS.forward.default(input, weight_tangent, None, *ctx.geometry)


# Both gradients are bilinear, so their own gradients are the same three operators again.
def _grad_input_setup(ctx, inputs, output) -> None:
    grad_output, weight, *rest = inputs
    ctx.save_for_backward(grad_output, weight)
    ctx.save_for_forward(grad_output, weight)
    ctx.rest, ctx.geometry, ctx.channels_last = rest, rest[2:8], rest[8]


def _grad_input_backward(ctx, grad):
    grad_output, weight = ctx.saved_tensors
    grad_grad_output = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _OPS.forward.default(grad, weight, None, *ctx.geometry)
    if ctx.needs_input_grad[1]:
        grad_weight, _ = _OPS.grad_weight.default(
            grad_output, grad, *weight.shape[2:], *ctx.geometry, ctx.channels_last, False
        )
    return grad_grad_output, grad_weight, *(None,) * 10


def _grad_input_tangent(ctx, grad_output_tangent, weight_tangent, *_):
    grad_output, weight = ctx.saved_tensors
    grad = _OPS.grad_input.default(grad_output_tangent, weight, *ctx.rest)
    return grad + _OPS.grad_input.default(grad_output, weight_tangent, *ctx.rest)


def _grad_weight_setup(ctx, inputs, output) -> None:
    grad_output, input, *rest = inputs
    ctx.save_for_backward(grad_output, input)
    ctx.save_for_forward(grad_output, input)
    ctx.rest, ctx.geometry, ctx.channels_last, ctx.has_bias = rest, rest[2:8], rest[8], rest[9]


def _grad_weight_backward(ctx, grad, grad_bias):
    grad_output, input = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = _OPS.forward.default(input, grad, grad_bias if ctx.has_bias else None, *ctx.geometry)
    if ctx.needs_input_grad[1]:
        multiplier = grad_output.size(1) // input.size(1)
        grad_input = _OPS.grad_input.default(
            grad_output, grad, *input.shape[2:], *ctx.geometry, ctx.channels_last, multiplier
        )
    return grad_grad_output, grad_input, *(None,) * 10


def _grad_weight_tangent(ctx, grad_output_tangent, input_tangent, *_):
    grad_output, input = ctx.saved_tensors
    grad, grad_bias = _OPS.grad_weight.default(grad_output_tangent, input, *ctx.rest)
    return grad + _OPS.grad_weight.default(grad_output, input_tangent, *ctx.rest[:9], False)[0], grad_bias


def _register_autograd(library: torch.library.Library, name: str, setup, backward, tangent) -> None:
    """torch.library.register_autograd with forward mode, and under torch.func, where that one raises."""
    operator = getattr(_OPS, name).default

    def below(*arguments):
        # A Function computes without gradients, but the transforms of torch.func that enclose this one need theirs.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    methods = {"forward": below, "setup_context": setup, "backward": backward, "jvp": tangent}
    bases = (torch.autograd.function._SingleLevelFunction,)  # torch.func calls this kernel once for each transform
    function = type(name, bases, {method: staticmethod(call) for method, call in methods.items()})

    def kernel(*arguments):
        with enable_single_level_autograd_function():
            return function.apply(*arguments)

    library.impl(name, kernel, "Autograd")


def _autocast(device_type: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Autocast's rule for convolutions: cast the floating-point tensors of the device, float64 excepted.

    Parameters once for each autocast context, as PyTorch does, and from its cache.
    """
    dtype = _autocast_dtype(device_type)

    def is_cast(tensor: Tensor | None) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.dtype is not dtype
            and tensor.device.type == device_type
            and tensor.is_floating_point()
            and tensor.dtype is not torch.float64
        )

    def cast(tensor: Tensor) -> Tensor:
        is_cached = tensor.requires_grad and tensor.is_leaf and device_type == "cuda" and _is_autocast_cache_enabled()
        if is_cached and not _is_compiling():
            return _einsum("...->...", (tensor,))  # the identity; autocast casts its operand, and keeps the cast
        return tensor.to(dtype)

    return [cast(tensor) if is_cast(tensor) else tensor for tensor in tensors]


def _forward_autocast(device_type: str, key: str, *arguments):
    tensors = _autocast(device_type, arguments[:3])
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
        return _OPS.forward.default(*tensors, *arguments[3:])


def _register_operators() -> None:
    """Define the operators once a process, also when this module is reloaded or imported under a second name."""
    if hasattr(_OPS, "gradients"):
        return
    library = torch.library.Library("depthwise_inline", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    kernels = {
        "forward": (_forward_composite, _forward_fake),
        "forward_no_autograd": (_forward_composite, _forward_fake),
        "grad_input": (_grad_input_composite, _grad_input_fake),
        "grad_weight": (_grad_weight_composite, _grad_weight_fake),
        "gradients": (_gradients_composite, _gradients_fake),
    }
    for name, (composite, fake) in kernels.items():
        library.impl(name, composite, "CompositeExplicitAutograd")
        torch.library.register_fake(f"depthwise_inline::{name}", fake, lib=library)
    _register_autograd(library, "forward", _forward_setup, _forward_backward, _forward_tangent)
    _register_autograd(library, "grad_input", _grad_input_setup, _grad_input_backward, _grad_input_tangent)
    _register_autograd(library, "grad_weight", _grad_weight_setup, _grad_weight_backward, _grad_weight_tangent)
    library.impl("gradients", _gradients_autograd, "Autograd")
    for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        library.impl("forward", functools.partial(_forward_autocast, device_type, key), key)
    _keep_alive.append(library)


# ---- Functions and modules

_forward = None  # the operators as OpOverload objects, looked up once
_forward_no_autograd = None  # this one with the library
_convolution_overrideable = torch.ops.aten.convolution_overrideable.default._op  # what calling the OpOverload calls
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_is_autocast_cache_enabled = torch.is_autocast_cache_enabled
_autocast_dtype = torch.get_autocast_dtype
_einsum = torch._VF.einsum
_is_functorch_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair = 0,
    dilation: IntPair = 1,
) -> Tensor:
    """``F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.size(1))``, faster on NVIDIA GPUs.

    Output channel ``o`` reads input channel ``o // m`` alone. float32, float16, bfloat16 and float64; half types
    accumulate in float32. The result is in channels_last if input or weight is, as with ``F.conv2d``.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (C * m, 1, kernel_h, kernel_w), depth multiplier m >= 1.
        bias: (C * m,) or None.
        stride: int or pair, at least 1.
        padding: int or pair, at least 0, or 'valid' (none), or 'same' (output as large as the input; stride 1 only).
        dilation: int or pair, at least 1.

    Returns:
        (N, C * m, H_out, W_out) or (C * m, H_out, W_out), where
        H_out = (H + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) // stride_h + 1.

    Raises:
        TypeError, RuntimeError: as ``F.conv2d`` does, and for dtypes and layouts other than the above.
        RuntimeError: the tensors are on an NVIDIA GPU and the kernels cannot be built; the message says what to do.
    """
    if _is_compiling():
        return _traceable_conv2d(input, weight, bias, stride, padding, dilation)
    # Host time counts in every line below. The kernels check their arguments themselves; what they reject is looked
    # at again afterwards, by check_arguments, for an error in the words of nn.Conv2d.
    try:
        if not input.is_cuda or not _CUDA_BUILD or padding.__class__ is str or input.dim() != 4 or _dispatch_modes():
            return _traceable_conv2d(input, weight, bias, stride, padding, dilation)
        if _library is None:
            _load_library()
        stride_h, stride_w = stride = stride if stride.__class__ is tuple else _pair(stride, "stride")
        pad_h, pad_w = padding = padding if padding.__class__ is tuple else _pair(padding, "padding")
        dilation_h, dilation_w = dilation = dilation if dilation.__class__ is tuple else _pair(dilation, "dilation")
        if _is_functorch_active() or forward_ad._current_level >= 0 or _is_tracing():  # requires_grad does not tell
            return _forward(input, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
        if _is_autocast_enabled("cuda"):
            if input.dtype is not _autocast_dtype("cuda"):
                (input,) = _autocast("cuda", (input,))
            # Float32 parameters stay: the kernels round what they read of them, and their gradients need no cast back.
            if weight.dtype is not torch.float32 or (bias is not None and bias.dtype is not torch.float32):
                weight, bias = _autocast("cuda", (weight, bias))
        elif weight.dtype is not input.dtype:
            raise TypeError("input and weight have different dtypes")
        if _is_grad_enabled() and (
            input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _convolution_overrideable(
                input, weight, bias, stride, padding, dilation, False, (0, 0), input.size(1)
            )
        return _forward_no_autograd(input, weight, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        failure = error
    if isinstance(input, Tensor) and input.is_cuda and _is_autocast_enabled("cuda"):
        input, weight, bias = _autocast("cuda", (input, weight, bias))
    check_arguments(input, weight, bias, stride, padding, dilation)
    if isinstance(failure, ValueError):  # a tuple of one number, which is no pair
        return _traceable_conv2d(input, weight, bias, stride, padding, dilation)
    raise failure


def _traceable_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: IntPair, padding: str | IntPair, dilation: IntPair
) -> Tensor:
    """depthwise_conv2d for every device and every form of the arguments, without anything a tracer stumbles over."""
    device = input.device.type if isinstance(input, Tensor) else None
    if device in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device):  # which makes the dtypes agree
        input, weight, bias = _autocast(device, (input, weight, bias))
    check_arguments(input, weight, bias, stride, padding, dilation)
    if not input.is_cuda or not _CUDA_BUILD:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups=input.size(-3))
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    pad_h, pad_w, extra_h, extra_w = _resolve_padding(padding, weight.shape[2:], dilation)
    if extra_h or extra_w:
        input = F.pad(input, (0, extra_w, 0, extra_h))
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if _is_compiling() or _dispatch_modes():
        out = _forward(batch, weight, bias, *stride, pad_h, pad_w, *dilation)
    else:
        out = depthwise_conv2d(batch, weight, bias, stride, (pad_h, pad_w), dilation)
    return out if input.dim() == 4 else out.squeeze(0)


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, kernel_size, ..., groups=in_channels)`` through :func:`depthwise_conv2d`.

    A subclass of ``nn.Conv2d`` in everything else: parameters and their initialisation, state_dict, repr, hooks.

    Args:
        in_channels: C, at least 1.
        kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as ``nn.Conv2d``.
        out_channels: C * m; None means C.

    Shape:
        input (N, C, H, W) or (C, H, W); output (N, C * m, H_out, W_out) or (C * m, H_out, W_out);
        weight (C * m, 1, kernel_h, kernel_w); bias (C * m,).

    Raises:
        ValueError: as ``nn.Conv2d`` does.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: str | IntPair = 0,
        dilation: IntPair = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        out_channels: int | None = None,
    ) -> None:
        if in_channels < 1:
            raise ValueError(f"in_channels must be a positive integer, but got in_channels={in_channels}")
        super().__init__(
            in_channels,
            in_channels if out_channels is None else out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def __prepare_scriptable__(self):
        raise RuntimeError("DepthwiseConv2d cannot be scripted: expected torch.export or torch.jit.trace in its place")

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Without this check an input of fewer channels would pass for one with a larger depth multiplier.
        if input.dim() in (3, 4) and input.size(-3) != self.in_channels:
            raise RuntimeError(
                f"Given groups={self.groups}, weight of size {list(weight.shape)}, expected input{list(input.shape)} "
                f"to have {self.in_channels} channels, but got {input.size(-3)} channels instead"
            )
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return depthwise_conv2d(input, weight, bias, self.stride, (0, 0), self.dilation)
        return depthwise_conv2d(input, weight, bias, self.stride, self.padding, self.dilation)


class ModelNew(nn.Module):
    """The reference model ``nn.Conv2d(C, C, kernel_size, stride, padding, groups=C, bias=bias)`` on the fast kernels.

    Same constructor, same state_dict keys (``conv2d.weight``, ``conv2d.bias``), same weights under the same seed.

    Args:
        in_channels: C, at least 1.
        kernel_size, stride, padding, bias: as ``nn.Conv2d``.

    Shape:
        input (N, C, H, W) or (C, H, W); output (N, C, H_out, W_out) or (C, H_out, W_out).
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: str | IntPair = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv2d = DepthwiseConv2d(in_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)

    in_channels = property(lambda self: self.conv2d.in_channels)
    kernel_size = property(lambda self: self.conv2d.kernel_size)
    stride = property(lambda self: self.conv2d.stride)
    padding = property(lambda self: self.conv2d.padding)
    weight = property(lambda self: self.conv2d.weight)
    bias = property(lambda self: self.conv2d.bias)


def replace_depthwise(model: nn.Module) -> nn.Module:
    """Let every depthwise ``nn.Conv2d`` of a network compute through :func:`depthwise_conv2d`; returns the network.

    The modules stay the objects they are (parameters, hooks, training flag, parents); only their class changes. A
    convolution is depthwise if groups == in_channels > 1. Subclasses of ``nn.Conv2d`` that define their own
    ``forward`` or ``_conv_forward`` are left alone.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or isinstance(module, (DepthwiseConv2d, nn.LazyConv2d)):
            continue
        if not module.groups == module.in_channels > 1:
            continue
        cls = type(module)
        if cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward:
            continue
        if nn.utils.parametrize.is_parametrized(module):
            # The class is the module's own, and undoing the parametrization goes back to its base.
            cls.__bases__ = (_depthwise_class(cls.__bases__[0]),)
        else:
            module.__class__ = _depthwise_class(cls)
    return model


def _depthwise_class(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """DepthwiseConv2d for nn.Conv2d; for a subclass the one class that inherits from both."""
    if cls is nn.Conv2d:
        return DepthwiseConv2d
    if "_depthwise_class" not in cls.__dict__:
        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
        cls._depthwise_class = type(cls.__name__, (cls, DepthwiseConv2d), members)
    return cls._depthwise_class


def _reduce(module: nn.Conv2d, protocol: int):
    state = object.__reduce_ex__(module, 2)[2]
    return _new_instance, (type(module).__bases__[0],), state


def _new_instance(cls: type[nn.Conv2d]) -> nn.Conv2d:
    subclass = _depthwise_class(cls)
    return subclass.__new__(subclass)


# ---- Build: finding the GPU's architecture and the compiler

_NVCC_FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")
_CXX_FLAGS = ("-O2",)
_SYSTEM_CUDA = Path("/usr/local/cuda")
_SET_CACHE = "To mend it: set TORCH_EXTENSIONS_DIR to a folder that you can write"


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded; the message says what is missing and how to mend it."""


@dataclass(frozen=True)
class _Gpu:
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


@functools.cache
def _nvml_gpus() -> tuple[_Gpu, ...] | None:
    """The machine's GPUs from the driver's management library, which needs no CUDA context; None without it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = []
        for index in range(count.value):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            name = ctypes.create_string_buffer(96)
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
                continue
            nvml.nvmlDeviceGetName(handle, name, len(name))
            if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0:
                gpus.append(_Gpu(name.value.decode(errors="replace"), (major.value, minor.value)))
        return tuple(gpus)
    finally:
        nvml.nvmlShutdown()


def _gpus() -> tuple[_Gpu, ...]:
    """The machine's GPUs, if this process may use any, as far as can be told without a CUDA context."""
    if not _CUDA_BUILD:
        return ()
    gpus = _nvml_gpus()
    if torch.cuda.is_initialized():
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return gpus or tuple(_Gpu(gpu.name, (gpu.major, gpu.minor)) for gpu in properties)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()  # an invalid one hides what follows
    visible = first.startswith(("GPU-", "MIG-")) or (first.isdigit() and int(first) < len(gpus or ()))
    return gpus if gpus and visible else ()


def _architectures() -> tuple[str, ...]:
    """What to build for, such as '9.0' or '9.0+PTX': TORCH_CUDA_ARCH_LIST, else every GPU of the machine.

    Every GPU, because the order in which CUDA numbers them, and with it which ones are hidden, is not known here. One
    library holds the code for all, so that processes on different GPUs share it.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not wanted or wanted == "native":
        return tuple(sorted({f"{major}.{minor}" for major, minor in (gpu.capability for gpu in _gpus())}))
    names = tuple(wanted.replace(";", " ").replace(",", " ").split())
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(f"depthwise_inline: expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', but got {wanted!r}")
    return names


@dataclass(frozen=True)
class _Compiler:
    """nvcc, as found and asked."""

    root: Path
    version: str
    known: tuple[int, ...]  # architectures it compiles for: 75, 80, ..., 121

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    @property
    def major(self) -> str:
        return self.version.split(".")[0]

    @property
    def runtime(self) -> Path:
        """The folder of the CUDA runtime: its own, unless pip put the packages of one version into two places."""
        roots = [self.root, *(root for root in _package_roots() if root.name == self.root.name)]
        return next((root for root in roots if (root / "include" / "cuda_runtime.h").is_file()), self.root)

    def arch_flags(self, architectures: Sequence[str]) -> list[str]:
        """-gencode flags. A GPU newer than the compiler gets PTX of the newest architecture that it knows."""
        flags = []
        for name in architectures:
            number = int(re.sub(r"\D", "", name))
            if number > self.known[-1]:
                flags.append(f"-gencode=arch=compute_{self.known[-1]},code=compute_{self.known[-1]}")
            elif number >= self.known[0]:
                target = name.removesuffix("+PTX").replace(".", "")
                flags.append(f"-gencode=arch=compute_{target},code=sm_{target}")
                if name.endswith("+PTX"):
                    flags.append(f"-gencode=arch=compute_{target},code=compute_{target}")
        if not flags:
            raise BuildError(
                f"depthwise_inline: nvcc {self.version} compiles for sm_{self.known[0]} and newer, but the GPUs of "
                f"this machine are {', '.join(architectures)}"
            )
        return flags


def _without_code(architectures: Sequence[str]) -> list[_Gpu]:
    """The GPUs that code for these architectures does not run on."""

    def runs(gpu: _Gpu, name: str) -> bool:
        major, minor = map(int, re.match(r"(\d+)\.(\d)", name).groups())
        return (major, minor) <= gpu.capability and (major == gpu.capability[0] or name.endswith("+PTX"))

    return [gpu for gpu in _gpus() if not any(runs(gpu, name) for name in architectures)]


def _output(command: Sequence[str | Path]) -> str:
    """What a command prints, or '' where it cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace")


def _package_roots() -> list[Path]:
    """Where pip puts the CUDA toolkit, newest first: nvidia/cu13 in each folder of packages."""
    packages = importlib.util.find_spec("nvidia")
    folders = (packages and packages.submodule_search_locations) or ()
    return [root for folder in folders for root in sorted(Path(folder).glob("cu[0-9]*"), reverse=True)]


def _nvcc_candidates() -> Iterator[Path]:
    """Where nvcc may be, best first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin", "nvcc")
    for root in _package_roots():
        yield root / "bin" / "nvcc"
    yield _SYSTEM_CUDA / "bin" / "nvcc"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)


@functools.cache
def _ask_nvcc(nvcc: Path) -> _Compiler | None:
    version = re.search(r"release \S+, V(\d+\.\d+(?:\.\d+)?)", _output([nvcc, "--version"]))
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", _output([nvcc, "--list-gpu-arch"])))
    # A wrapper script lies anywhere; the compiler itself says where its tree begins.
    top = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "none.cu"]), re.MULTILINE)
    root = Path(top[1].strip()) if top else nvcc.resolve().parent.parent
    return _Compiler(root.resolve(), version[1], tuple(known)) if version and known else None


def _find_compiler() -> _Compiler:
    """The first nvcc of the CUDA major version that torch was built with."""
    wanted = torch.version.cuda.split(".")[0] if _CUDA_BUILD else None
    others = []
    for nvcc in _nvcc_candidates():
        compiler = _ask_nvcc(nvcc) if nvcc.is_file() else None
        if compiler and wanted in (None, compiler.major):
            return compiler
        if compiler:
            others.append(f"nvcc {compiler.version} in {compiler.root}")
    remedy = f'pip install "cuda-toolkit[nvcc,cccl]{f"=={wanted}.*" if wanted else ""}"'
    if wanted and int(wanted) < 13:  # whose packages lack nvcc
        remedy = f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to it, or install torch for CUDA 13"
    if others:
        raise BuildError(
            f"depthwise_inline: torch {torch.__version__} was built with CUDA {torch.version.cuda} and needs nvcc "
            f"{wanted}, but found only {', '.join(others)}. To mend it: {remedy}"
        )
    raise BuildError(
        "depthwise_inline: no CUDA compiler (nvcc) in CUDA_HOME, CUDA_PATH, Python's packages, "
        f"{_SYSTEM_CUDA} or on PATH. To mend it: {remedy}"
    )


def _cxx_command() -> list[str]:
    """The C++ compiler, as torch picks it."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        origin = "named by CXX" if os.environ.get("CXX") else "CXX is not set"
        raise BuildError(
            f"depthwise_inline: no C++ compiler: {command[0]!r} ({origin}) was not found. To mend it: install one "
            "(apt-get install g++) or set CXX"
        )
    return command


def _ninja_folder() -> str:
    """The folder of the ninja program, which may be installed as a package without being on PATH."""
    found = shutil.which("ninja")
    if found:
        return os.path.dirname(found)
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise BuildError("depthwise_inline: ninja was not found. To mend it: pip install ninja") from None
    return BIN_DIR


def _own_file() -> Path | None:
    """The file this code was read from; None where it was executed from a string, as in a notebook's cell."""
    path = Path(_own_file.__code__.co_filename)
    return path.resolve() if path.is_file() else None


def _unpacked_sources() -> Path:
    """A bundle's sources as a folder: in the cache, else in a private one. Each file appears whole or not at all."""
    sources = {name: text.encode() for name, text in _BUNDLED_SOURCES.items()}
    key, problem = hashlib.sha256(repr(sources).encode()).hexdigest()[:20], None
    for find_root in (_cache_root, _private_root):
        try:
            root = find_root()
            folder = root / f"sources-{key}"
            root.mkdir(parents=True, exist_ok=True)
            if (owner := root.stat().st_uid) and owner != os.getuid():  # what lies there would run as this user
                continue
            folder.mkdir(exist_ok=True)
            if {path.name: path.read_bytes() for path in folder.iterdir()} != sources:
                with tempfile.TemporaryDirectory(dir=root) as private:
                    for name, content in sources.items():
                        Path(private, name).write_bytes(content)
                        os.replace(Path(private, name), folder / name)
            return folder
        except OSError as error:
            problem = error
    raise BuildError(
        f"depthwise_inline: the sources cannot be written to {_cache_root()} or a temporary folder ({problem}). "
        f"{_SET_CACHE}"
    )


def _kernels_folder() -> Path:
    if _BUNDLED_SOURCES:
        return _unpacked_sources()
    folder = Path(__file__).resolve().parent / "kernels"
    if not (folder / "operators.cpp").is_file():
        raise BuildError(
            f"depthwise_inline: the folder {folder} with the CUDA sources is missing or incomplete. To mend it: copy "
            "kernels/ to lie beside depthwise_inline.py"
        )
    return folder


def _stage1_sources() -> tuple[list[str], list[str]]:
    """The C++ and CUDA texts of the operator library, each behind a #line directive that names its file."""
    folder = _kernels_folder()

    def read(path: Path) -> str:
        escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
        return f'#line 1 "{escaped}"\n{path.read_text()}'

    return tuple([read(path) for path in sorted(folder.glob(pattern))] for pattern in ("*.cpp", "*.cu"))


# ---- Build: the cache
# A library lies in a folder named after everything that went into it. It is built in a private folder beside that and
# renamed when complete, so no process ever sees half of one. A lock that the system drops when its holder dies keeps
# several processes from building the same thing.

_build_lock = threading.RLock()


def _cache_root() -> Path:
    """TORCH_EXTENSIONS_DIR/depthwise_inline, else depthwise_inline in the user's cache folder."""
    parent = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(parent or os.path.expanduser("~/.cache")) / "depthwise_inline"


@functools.cache
def _private_root() -> Path:
    """A cache that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="depthwise_inline_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cache_entries(compiler: _Compiler, arch_flags: Sequence[str]) -> Callable[[str, Sequence[str]], str]:
    """Names the cache's entry for a library's name and texts: a hash of these, and of all else that it depends on,
    headers, flags, versions and architectures, which are read once."""
    folder = _kernels_folder()
    facts = [
        *(f"{path.name}\n{path.read_text()}" for path in sorted(folder.iterdir()) if path.is_file()),
        *(*_NVCC_FLAGS, *_CXX_FLAGS, *arch_flags),
        *(torch.__version__, str(torch.version.git_version), str(torch.version.cuda), compiler.version),
        *(_output([*_cxx_command(), "--version"]), os.environ.get("CC", "")),
        *(sys.version, str(sysconfig.get_config_var("SOABI")), platform.machine()),
    ]
    shared = hashlib.sha256("\0".join(facts).encode())

    def entry(name: str, texts: Sequence[str]) -> str:
        digest = shared.copy()
        for text in texts:
            digest.update(b"\0" + text.replace(str(folder), "kernels").encode())
        return f"{re.sub('[^A-Za-z0-9]+', '_', name)}-{digest.hexdigest()[:20]}"

    return entry


class _CacheUnusable(OSError):
    """A cache folder that cannot be written, or must not be trusted."""


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock among processes; yields False where the file system has no locks."""
    import fcntl  # absent on Windows, where nothing is built

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        try:
            yield locked
        finally:
            if locked:  # closing alone would not do: a process forked meanwhile holds the file open
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_error(log: str) -> str:
    """The first line of a compiler's or linker's output that tells an error, or a part of it if it is long."""
    for line in log.splitlines():
        if re.search(r"\b(error|fatal)\b|undefined reference|cannot find -l", line) and not line.startswith("FAILED"):
            return line.strip()[:1000]
    return log.strip().rpartition("\n")[2][:1000] or "no output"


def _compile(folder: Path, compiler: _Compiler, flags: Sequence[str], cpp: Sequence[str], cuda: Sequence[str]) -> None:
    """Compile and link folder/library.so; RuntimeError with the tools' output, or OSError, where that fails."""
    cxx, ninja = _cxx_command(), _ninja_folder()
    link_flags = []
    if not any((compiler.root / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
        # The package of the CUDA runtime names its library by version alone, which the linker does not look for.
        (folder / "libcudart.so").symlink_to(compiler.runtime / "lib" / f"libcudart.so.{compiler.major}")
        link_flags.append(f"-L{shlex.quote(str(folder))}")
    nvcc_flags = [*_NVCC_FLAGS, *flags]
    if "CXX" in os.environ and "CC" not in os.environ:
        nvcc_flags += ["-ccbin", shlex.quote(cxx[-1])]  # torch passes CC on itself
    with _environment(CUDA_HOME="", CUDA_PATH=""):  # else this import looks for a GPU and creates a CUDA context
        from torch.utils import cpp_extension  # slow to import, and needed for compiling alone
    cuda_home = cpp_extension.CUDA_HOME or str(compiler.root)
    cpp_extension.CUDA_HOME = str(compiler.root)
    with contextlib.suppress(OSError):
        tempfile.gettempdir()  # remembered, lest another thread takes what TMPDIR is below
    try:
        # The tools' temporary files go the same way as the folder when the disk is full or this process is killed.
        with _environment(PATH=os.pathsep.join((ninja, os.environ.get("PATH", os.defpath))), TMPDIR=str(folder)):
            cpp_extension.load_inline(
                name="depthwise_inline",
                cpp_sources=list(cpp),
                cuda_sources=list(cuda),
                extra_cflags=list(_CXX_FLAGS),
                extra_cuda_cflags=nvcc_flags,
                extra_ldflags=link_flags,
                extra_include_paths=[str(_kernels_folder()), str(compiler.runtime / "include")],
                build_directory=str(folder),
                is_python_module=False,
                no_implicit_headers=True,
            )
    except OSError as error:
        cause = error.__cause__ or error
        if error.errno is None and "failed to map" not in str(cause):  # which a folder mounted noexec says
            raise RuntimeError(f"error: the library does not load: {cause}") from None
        raise
    finally:
        cpp_extension.CUDA_HOME = cuda_home
    (library,) = folder.glob("depthwise_inline*.so")  # torch numbers the builds of one process
    library.rename(folder / "library.so")
    for path in folder.glob("*.o"):
        path.unlink()


def _open_root(root: Path) -> None:
    """Make a cache folder, if it is not there; OSError where it must not or cannot be used."""
    if root.parts[0] == "~":
        raise _CacheUnusable("this user has no home folder")
    root.mkdir(parents=True, exist_ok=True)
    if root.stat().st_uid not in (os.getuid(), 0):  # a library in there would run as this user
        raise _CacheUnusable("it belongs to another user")


def _build_in(root: Path, entry: str, what: str, build: Callable[[Path], None]) -> Path:
    """The library of a cache entry, built by build(folder) unless it is there."""
    library = root / entry / "library.so"
    _open_root(root)
    if library.is_file():
        return library
    with _exclusive(root / f"{entry}.lock") as locked:
        if library.is_file():
            return library
        left = [*root.glob(f"{entry}.tmp*"), library.parent] if locked else []  # by a killed builder
        for rest in left:
            shutil.rmtree(rest, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{entry}.tmp", dir=root))
        print(f"depthwise_inline: compiling {what}, once; cached in {library.parent}", file=sys.stderr, flush=True)
        try:
            build(folder)
            try:
                folder.rename(library.parent)
            except OSError:  # without locks another builder may have been faster
                if not library.is_file():
                    raise
        except BuildError:
            raise
        except RuntimeError as error:
            if "No space left on device" in str(error) or shutil.disk_usage(root).free < 1 << 25:
                raise _CacheUnusable("no space left on device") from None
            log = root / f"{entry}.log"
            log.write_text(str(error))
            raise BuildError(
                f"depthwise_inline: compiling {what} failed:\n{_first_error(str(error))}\nThe whole output is in {log}"
            ) from None
        finally:
            # Once more what was left: its compiler may have lived on, and written there while it was removed.
            for rest in (folder, *left[:-1]):
                shutil.rmtree(rest, ignore_errors=True)
    return library


def _obtain(name: str, what: str, cpp: Sequence[str], cuda: Sequence[str]) -> Path:
    """The compiled library of these sources: from the cache, or built now."""
    if sys.platform != "linux":
        raise BuildError(f"depthwise_inline: the kernels are built on Linux alone, but this is {sys.platform}")
    architectures = _architectures()
    if not architectures:
        raise BuildError(
            "depthwise_inline: there is no GPU to build for. To build all the same: set TORCH_CUDA_ARCH_LIST, "
            "for example to 9.0"
        )
    compiler = _find_compiler()
    flags = compiler.arch_flags(architectures)
    entry = _cache_entries(compiler, flags)(name, (*cpp, *cuda))
    what = f"{what} for {', '.join('sm_' + name.replace('.', '') for name in architectures)}"

    def build(folder: Path) -> None:
        _compile(folder, compiler, flags, cpp, cuda)

    try:
        return _build_in(_cache_root(), entry, what, build)
    except OSError as problem:
        warnings.warn(
            f"depthwise_inline: the cache {_cache_root()} cannot be used ({problem}); compiling in a temporary folder, "
            f"for this process alone. {_SET_CACHE}",
            stacklevel=2,
        )
    try:
        return _build_in(_private_root(), entry, what, build)
    except OSError as problem:
        raise BuildError(
            f"depthwise_inline: neither {_cache_root()} nor a temporary folder can be used ({problem}). {_SET_CACHE}"
        ) from None


# ---- Build: the two stages

_library: ctypes.CDLL | None = None  # stage 1
_library_path: Path | None = None
_library_error: Exception | None = None
_specialisations: dict[str, Path] = {}  # stage 2
_specialisation_errors: dict[str, str] = {}

_DIRECTIONS = ("forward", "grad_input", "grad_weight", "gradients")  # the last: both gradients at once
_BUILDER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_SIZES = ctypes.c_int64 * 15


def _load_library() -> ctypes.CDLL:
    """Stage 1: the operator library, loaded once a process. A failure is kept and raised again, until precompile()."""
    global _library, _library_path, _library_error, _forward_no_autograd
    with _build_lock:
        if _library is None:
            if _library_error is not None:
                raise BuildError(str(_library_error))
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise BuildError(
                    "depthwise_inline: nothing is built while a CUDA graph is captured, and the operator library is "
                    "not loaded yet. To mend it: call precompile() before"
                )
            try:
                _check_schemas()
                path = _obtain("operators", "the operators", *_stage1_sources())
                torch.ops.load_library(str(path))
                library = _declare(ctypes.CDLL(str(path)))
            except Exception as error:
                _library_error = error
                raise
            builder = _BUILDER(_build_callback)
            _keep_alive.append(builder)
            library.depthwise_inline_set_builder(builder)
            _forward_no_autograd = _OPS.forward_no_autograd.default._op
            _library, _library_path = library, path
        return _library


def _check_schemas() -> None:
    """The operators may be those of another copy of this module, which was imported first."""
    for schema in _SCHEMAS:
        registered = getattr(_OPS, schema.partition("(")[0], None)
        if registered is None or registered.default._schema != torch._C.parse_schema(f"depthwise_inline::{schema}"):
            raise BuildError(
                "depthwise_inline: this process has the operators of another version of this module. To mend it: keep "
                "one version, and start the process anew"
            )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The C functions of the library with their types."""
    text, number, sizes = ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)
    signatures = {
        "set_builder": (None, [_BUILDER]),
        "add_launcher": (None, [text, ctypes.c_void_p]),
        "select": (number, [number, number, number, sizes, text, number, text, number]),
        "force_variant": (None, [text]),
        "tiles": (number, [number, number, number, sizes, text, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"depthwise_inline_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _load_specialisation(name: str, source: str) -> None:
    """Stage 2: compile the code of one configuration, and hand its entry point to the library."""
    with _build_lock:
        if name not in _specialisations:
            path = _obtain(name, name, (), (source,))
            launch = ctypes.CDLL(str(path)).depthwise_inline_launch
            _load_library().depthwise_inline_add_launcher(name.encode(), ctypes.cast(launch, ctypes.c_void_p))
            _specialisations[name] = path


def _build_callback(name: bytes, source: bytes, message: int, capacity: int) -> int:
    """What the library calls for a specialisation that it lacks; 0 for success, else the message says why not."""
    key = name.decode()
    error = _specialisation_errors.get(key, "")
    if not error:
        try:
            _load_specialisation(key, source.decode())
            return 0
        except Exception as problem:
            error = _specialisation_errors[key] = str(problem) or repr(problem)
        except BaseException as problem:  # such as Ctrl-C, which would be lost in C
            error = f"depthwise_inline: compiling {key} was interrupted by {problem!r}"
    text = error.encode()[: capacity - 1] + b"\0"
    ctypes.memmove(message, text, len(text))
    return 1


def _select(direction: str, dtype: torch.dtype, channels_last: bool, sizes: Sequence[int]) -> tuple[str, str]:
    """The variant that would serve a problem, and the source of its specialisation ('' where none is needed).

    ``sizes``: n, c, multiplier, h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
    dilation_w, 1 if all tensors are aligned to 16 bytes, and 1 if the weights are float32 beside others of 16 bits.
    """
    library = _load_library()
    name, source = ctypes.create_string_buffer(1 << 12), ctypes.create_string_buffer(1 << 16)
    where = _DIRECTIONS.index(direction), _DTYPES.index(dtype), int(channels_last), _SIZES(*sizes)
    if (failure := library.depthwise_inline_select(*where, name, len(name), source, len(source))) != 0:
        raise RuntimeError(
            "depthwise_inline: a buffer for the specialisation's source is too small"
            if failure == -1
            else f"depthwise_inline: the forced variant cannot serve {direction} of this problem"
        )
    return name.value.decode(), source.value.decode()


def precompile(
    model: nn.Module | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backward: bool = True,
) -> list[str]:
    """Build ahead of time what would be built on first use; for GPUs present, or those in TORCH_CUDA_ARCH_LIST.

    Without arguments: the operator library. With a model: what its depthwise convolutions want for this input, too;
    the model runs once on the meta device, where nothing is computed.

    Args:
        model: any module that holds :class:`DepthwiseConv2d`.
        input_shape: shape of the model's one input, such as (N, C, H, W).
        dtype: of the tensors that the convolutions will see; under autocast, autocast's. Weights keep the model's.
        channels_last: whether they will be in channels_last.
        backward: also what the gradients want, of inputs and weights both. Where one kernel computes both, what one of
            them alone takes (frozen weights, a first layer) is built at first use.

    Returns:
        The names of the variants that will serve.

    Raises:
        RuntimeError: no GPU and no TORCH_CUDA_ARCH_LIST, no compiler, or a build that failed.
    """
    global _library_error
    with _build_lock:
        _library_error = None
        _specialisation_errors.clear()
        _load_library()
    if model is None:
        return []
    if input_shape is None:
        raise TypeError("expected input_shape, such as (1, 3, 224, 224), beside a model")
    variants = {}
    for problem in _problems(model, input_shape):
        variants |= _wanted(*problem, dtype, channels_last, backward)
    sources = {name.rpartition("/")[0]: source for name, source in variants.items() if source}
    _obtain_all(sources)
    for name, source in sources.items():
        _load_specialisation(name, source)
    return list(variants)


def _not_cached(sources: dict[str, str]) -> dict[str, str]:
    """Those of some specialisations that would have to be compiled."""
    try:
        compiler = _find_compiler()
        entry, root = _cache_entries(compiler, compiler.arch_flags(_architectures())), _cache_root()
        return {
            name: text for name, text in sources.items() if not (root / entry(name, (text,)) / "library.so").is_file()
        }
    except (BuildError, OSError):
        return sources


def _obtain_all(sources: dict[str, str]) -> None:
    """Compile specialisations into the cache on disk, a process a core. What fails here fails again, and tells, when it
    is loaded."""
    build = """if True:
        import contextlib, importlib.util, json, sys
        path, items = json.load(sys.stdin)
        spec = importlib.util.spec_from_file_location("depthwise_inline", path)
        module = sys.modules["depthwise_inline"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, source in items:
            with contextlib.suppress(Exception):
                module._obtain(name, name, (), (source,))
    """
    items = sorted(_not_cached(sources).items())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(len(items), cores)
    if count < 2 or _own_file() is None:
        return
    what = f"{len(items)} specialisations in {count} processes"
    print(f"depthwise_inline: compiling {what}, once; cached in {_cache_root()}", file=sys.stderr, flush=True)
    workers = [
        subprocess.Popen([sys.executable, "-c", build], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(count)
    ]
    for index, worker in enumerate(workers):
        json.dump((str(_own_file()), items[index::count]), worker.stdin)
        worker.stdin.close()
    for worker in workers:
        worker.wait()


def _wanted(
    sizes: Sequence[int], bias: bool, dtype: torch.dtype, channels_last: bool, backward: bool = True
) -> dict[str, str]:
    """The variants that serve a convolution, with the sources of their specialisations: in training, if `backward`."""
    found = [_select("forward", dtype, channels_last, sizes)]
    if backward:
        at_once = _select("gradients", dtype, channels_last, sizes)
        if bias or at_once[0] == "general":
            found += [_select(name, dtype, channels_last, sizes) for name in ("grad_input", "grad_weight")]
        else:
            found.append(at_once)
    return dict(found)


def _problems(model: nn.Module, input_shape: Sequence[int]) -> list[tuple[tuple[int, ...], bool]]:
    """The sizes of every depthwise convolution in a run of the model, and whether it has a bias."""
    problems = []

    def record(module: DepthwiseConv2d, inputs: tuple[Tensor]) -> None:
        shape, kernel = list(inputs[0].shape), module.kernel_size
        if module.padding_mode == "zeros":
            *padding, extra_h, extra_w = _resolve_padding(module.padding, kernel, module.dilation)
        else:
            left, right, top, bottom = module._reversed_padding_repeated_twice
            padding, extra_h, extra_w = (0, 0), top + bottom, left + right
        batch, height, width = shape[0] if len(shape) == 4 else 1, shape[-2] + extra_h, shape[-1] + extra_w
        multiplier = module.out_channels // module.in_channels
        geometry = (*kernel, *module.stride, *padding, *module.dilation)
        weights = int(module.weight.dtype is torch.float32)
        sizes = (batch, module.in_channels, multiplier, height, width, *geometry, 1, weights)
        problems.append((sizes, module.bias is not None))

    meta = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), torch.float32)
    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, DepthwiseConv2d)]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, meta, torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return problems


@dataclass(frozen=True)
class Status:
    """Which path is live, and why; printable."""

    path: str  # "cuda": the kernels of this project; "pytorch": F.conv2d; "error": CUDA tensors cannot be served
    reason: str
    gpus: tuple[str, ...]
    architectures: tuple[str, ...]
    compiler: str
    torch: str
    cuda: str
    cache: str
    library: str
    specialisations: tuple[str, ...]

    def __str__(self) -> str:
        def text(value: str | tuple[str, ...]) -> str:
            return value if isinstance(value, str) else ", ".join(value) or "none"

        rows = {"depthwise_inline": __version__} | {name: text(value) for name, value in vars(self).items()}
        return "\n".join(f"{name:<17}{value}" for name, value in rows.items())


def status() -> Status:
    """What runs when a CUDA tensor comes, and why. Builds nothing and creates no CUDA context."""
    gpus = _gpus()
    problems = []
    try:
        architectures = _architectures()
        for gpu in _without_code(architectures):
            named = ";".join(architectures)
            problems.append(
                f"depthwise_inline: TORCH_CUDA_ARCH_LIST={named} has no code for {gpu}. To mend it: unset it"
            )
    except BuildError as error:
        architectures, problems = (), [str(error)]
    try:
        found = _find_compiler()
        compiler = f"nvcc {found.version} in {found.root}"
    except BuildError as error:
        compiler = f"none: {error}"
    if not _CUDA_BUILD:
        path, reason = "pytorch", f"torch {torch.__version__} is built without CUDA: every call goes to F.conv2d"
    elif _library_error is not None or problems:
        path, reason = "error", str(_library_error or problems[0])
    elif _library is not None and gpus:
        path, reason = "cuda", "the operator library is loaded: CUDA tensors run its kernels, others F.conv2d"
    elif _library is not None:
        path, reason = "pytorch", "the operator library is loaded, but no GPU is visible: calls go to F.conv2d"
    elif gpus:
        path, reason = "cuda", "the operator library is built when the first CUDA tensor comes"
    else:
        path, reason = "pytorch", "no GPU is visible to this process: every call goes to F.conv2d"
    return Status(
        path=path,
        reason=reason,
        gpus=tuple(map(str, gpus)),
        architectures=architectures,
        compiler=compiler,
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda),
        cache=str(_cache_root()),
        library=str(_library_path or "not loaded"),
        specialisations=tuple(sorted(_specialisations)),
    )


# ---- Command line


def _doctor() -> int:
    """Print what is found, and what to do about each thing that is wrong; returns how many things are."""
    wrong = 0

    def look(name: str, find: Callable[[], str | bool], problem: str = "") -> None:
        """One line: what find() returns; the problem, where that is nothing or an error."""
        nonlocal wrong
        try:
            found = find()
        except BuildError as error:
            found, problem = "", str(error).removeprefix("depthwise_inline: ")
        wrong += not found
        print(f"ok     {name:<13}{found}" if found else f"WRONG  {name:<13}{problem}")

    def driver() -> str | bool:
        version = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]
        return _nvml_gpus() is not None and (version or "of unknown version")

    def cache() -> str:
        root = _cache_root()
        try:
            _open_root(root)
            with tempfile.TemporaryFile(dir=root) as file:
                file.write(bytes(1 << 20))
        except OSError as error:
            raise BuildError(f"{root} cannot be written ({error}). {_SET_CACHE}") from None
        times = [path.stat().st_mtime for path in root.glob("*/library.so")]
        return f"{root}, writable, {len(times)} libraries{f', last built {time.ctime(max(times))}' if times else ''}"

    _on_import()
    state, gpus, cuda = status(), ", ".join(map(str, _gpus())), f"CUDA {torch.version.cuda}"
    look("Python", lambda: f"{platform.python_version()} in {sys.executable}")
    look(
        "torch",
        lambda: _CUDA_BUILD and f"{torch.__version__} for {cuda}",
        f"{torch.__version__} is built without CUDA. To mend it: choose CUDA on https://pytorch.org/get-started/locally",
    )
    look("driver", driver, "no NVIDIA driver answers. To mend it: install it; start a container with --gpus all")
    look("GPU", lambda: gpus, "none is visible to this process. To mend it: see nvidia-smi and CUDA_VISIBLE_DEVICES")
    if gpus:
        look(
            "torch on GPU",
            lambda: torch.cuda.is_available() and "works",
            f"torch cannot use the GPU. To mend it: install a driver for {cuda}, or torch for the driver's CUDA",
        )
    look("nvcc", lambda: f"{_find_compiler().version} in {_find_compiler().root}")
    look("C++ compiler", lambda: _output([*_cxx_command(), "--version"]).partition("\n")[0])
    look("ninja", lambda: f"in {_ninja_folder()}")
    look("sources", lambda: str(_kernels_folder()))
    look("cache", cache)
    look("kernels", lambda: state.path != "error" and state.reason, state.reason)
    return wrong


def _clean() -> int:
    """Empty the cache of what this module put there; what is needed again is built again."""
    root = _cache_root()
    entries = [path for path in root.glob("*-*") if re.search(r"-[0-9a-f]{20}(\.lock|\.log|\.tmp.*)?$", path.name)]
    print(f"removing {sum((path / 'library.so').exists() for path in entries)} libraries in {root}")
    try:
        for path in entries:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        print(f"cannot be removed: {error}")
        return 1
    return 0


def _bundle() -> int:
    """Write this project as one file: bundle.py does it."""
    folder = _own_file().parent
    for name in ("bundle.py", "bench_report.py", "bench_cases.json", "kernels"):
        if not (folder / name).exists():
            sys.exit(f"depthwise_inline: {folder / name} is missing. To mend it: bundle in a checkout of the project")
    return subprocess.call([sys.executable, folder / "bundle.py", *sys.argv[2:]])


def _is_script() -> bool:
    """Whether this file was started as a command; pasted into a notebook, it is __main__ as well."""
    return __name__ == "__main__" and _own_file() == Path(sys.argv[0]).resolve()


# ---- Import


def _on_import() -> None:
    """Register the operators; load or build their library if there is something to build for."""
    global _forward, _library_error
    _register_operators()
    _forward = _OPS.forward.default
    if not _CUDA_BUILD:
        return
    try:
        if _architectures():
            _load_library()
    except Exception as error:  # an import never fails: the first use of a CUDA tensor tells
        _library_error = error


_BUNDLED_SOURCES: dict[str, str] = {}  # bundle.py puts the files of kernels/ here

if _is_script():
    commands = {"doctor": _doctor, "clean": _clean, "bundle": _bundle}
    if not sys.argv[1:] or sys.argv[1] not in commands or (sys.argv[2:] and sys.argv[1] != "bundle"):
        sys.exit(
            "usage: python depthwise_inline.py doctor   what is found on this machine, and how to mend what is wrong"
            "\n       python depthwise_inline.py clean    empty the cache of compiled kernels"
            "\n       python depthwise_inline.py bundle   write the project as one file, or what KernelBench takes"
        )
    sys.exit(1 if commands[sys.argv[1]]() else 0)
_on_import()
