"""What the tests compare against: problems, float64 references, PyTorch's own error, and the comparison itself.

The rule: an element may be off by twice the largest error that PyTorch's own kernel makes on the same inputs in the
same dtype, plus a small floor. Errors are counted in units that differ for each element,

    unit = u(dtype) * |exact| + u(float32) * sum |x| * |weight|        (u = half an ulp of 1; float64 uses its own u)

that is: one rounding of the result and one rounding of the accumulated products. An absolute tolerance would let small
outputs (borders, where convolutions break) hide behind large ones, and a tolerance relative to the sum alone would let
a missing tap of a 31x31 kernel pass in float16. The floor keeps an exact PyTorch result (one tap, few outputs) from
failing ours for an honest rounding; the cap keeps a bad PyTorch result from excusing a bad one of ours.

Everything here runs on the CPU too: test_reference.py plants errors and expects them to be found.
"""

import contextlib
import ctypes
import itertools
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

import depthwise_inline

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
OPERATORS = torch.ops.depthwise_inline

DIRECTIONS = ("forward", "grad_input", "grad_weight")  # this order, and that of the next three, is the C interface's
GRADIENTS = "gradients"  # grad_input and grad_weight at once
ALL_DIRECTIONS = (*DIRECTIONS, GRADIENTS)
LAYOUTS = ("nchw", "nhwc")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*HALF_AND_SINGLE, torch.float64)

FLOOR_UNITS = 2.0
FLOOR_UNITS_FLOAT64 = 16.0  # there the reference itself is float64 and off by as much
CAP_UNITS = 32.0

# What is said of a forced variant that is not for this GPU.
REFUSALS = ("needs more shared memory than this GPU has", "needs a GPU of compute capability 8.0 or higher")


def short(dtype):
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def fresh_generator(device=None):
    """A generator with a new seed, printed so that a failure can be repeated with DEPTHWISE_TEST_SEED."""
    seed = int(os.environ.get("DEPTHWISE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DEPTHWISE_TEST_SEED={seed}")
    return torch.Generator(device=device or DEVICE).manual_seed(seed)


@dataclass(frozen=True)
class Problem:
    """One depthwise convolution; pairs are (vertical, horizontal)."""

    image: tuple
    kernel: tuple
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    batch: int = 2
    channels: int = 3
    multiplier: int = 1
    bias: bool = True

    @property
    def out_channels(self):
        return self.channels * self.multiplier

    @property
    def out_image(self):
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                self.image, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def x_shape(self):
        return (self.batch, self.channels, *self.image)

    @property
    def weight_shape(self):
        return (self.out_channels, 1, *self.kernel)

    @property
    def out_shape(self):
        return (self.batch, self.out_channels, *self.out_image)

    @property
    def geometry(self):
        """Stride, padding and dilation as the operators take them: six ints."""
        return (*self.stride, *self.padding, *self.dilation)

    @property
    def pairs(self):
        """Stride, padding and dilation as PyTorch takes them."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def sizes(self, aligned, float_weight=False):
        """The fifteen numbers of the C interface."""
        return (
            self.batch,
            self.channels,
            self.multiplier,
            *self.image,
            *self.kernel,
            *self.stride,
            *self.padding,
            *self.dilation,
            int(aligned),
            int(float_weight),
        )

    def __str__(self):
        def pair(values):
            return "x".join(map(str, values))

        text = f"{self.batch}x{self.channels}x{pair(self.image)} k{pair(self.kernel)}"
        for letter, values, usual in (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            if values != (usual, usual):
                text += f" {letter}{pair(values)}"
        if self.multiplier != 1:
            text += f" m{self.multiplier}"
        return text if self.bias else text + " no bias"


@dataclass
class Tensors:
    """Inputs of the three directions, in one dtype."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    grad_out: torch.Tensor

    def map(self, function):
        return Tensors(*(None if t is None else function(t) for t in self))

    def __iter__(self):
        return iter((self.x, self.weight, self.bias, self.grad_out))


def memory_format(layout):
    return torch.channels_last if layout == "nhwc" else torch.contiguous_format


def guarded(tensor):
    """A copy with the same strides inside a buffer of NaN: a read beyond its ends that counts gives NaN."""
    guard = 256  # elements: keeps 16-byte alignment in every dtype
    buffer = tensor.new_full((tensor.numel() + 2 * guard,), torch.nan)
    return buffer.as_strided(tensor.shape, tensor.stride(), guard).copy_(tensor)


def make_tensors(problem, dtype, layout, generator):
    """Normally distributed inputs in the wanted layout, surrounded by NaN."""

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(dtype)

    def image(shape):
        return guarded(draw(*shape).contiguous(memory_format=memory_format(layout)))

    return Tensors(
        image(problem.x_shape),
        guarded(draw(*problem.weight_shape)),
        guarded(draw(problem.out_channels)) if problem.bias else None,
        image(problem.out_shape),
    )


# Other ways to store the same values, or to take fewer of them for all.


def misaligned(t):
    """One element past an aligned address."""
    return t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t)


def sliced(t):
    """A window of a larger tensor, which holds NaN around it."""
    larger = t.new_full([size + 3 for size in t.shape], torch.nan)
    window = larger[tuple(slice(1, size + 1) for size in t.shape)]
    return window.copy_(t)


def every_other(t):
    """Every second element along the last dimension; NaN between."""
    larger = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
    return larger[..., ::2].copy_(t)


def transposed(t):
    """Stored with its last two dimensions exchanged."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t


def batch_last(t):
    """Stored with its first dimension innermost."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(t):
    """One image for the whole batch, with stride 0: what the gradient of a mean over the batch looks like."""
    return t[:1].expand_as(t)


def constant(t):
    """One element for all, every stride 0: the gradient of sum()."""
    return t.flatten()[:1].reshape((1,) * t.ndim).expand_as(t)


VIEWS = (misaligned, sliced, every_other, transposed, batch_last, expanded, constant)


class Expected(NamedTuple):
    value: torch.Tensor  # float64
    magnitude: torch.Tensor  # float64: the same sum over absolute values


@contextlib.contextmanager
def native_pytorch():
    """PyTorch's own depthwise kernels: they accumulate in float32, use no TF32 and need no planning per shape.

    On the CPU too: oneDNN's, of torch 2.14, crash in channels_last for some of these problems (1x19x21x2, kernel 3x1,
    stride (2, 4), padding (0, 5), dilation 2, 57 outputs), and take minutes to plan 31x31 in float16 where there is
    AVX512-FP16.
    """
    before = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    torch.backends.cudnn.enabled = torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled = before


@contextlib.contextmanager
def full_float32():
    """PyTorch's convolutions without TF32, so that their error is a measure for ours."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def grad_weight_by_taps(problem, x, grad_out):
    """Products of pixels that exist: PyTorch on the CPU multiplies NaN and infinity by the zeros of the padding too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, grad_out = x.to(wide).repeat_interleave(problem.multiplier, 1), grad_out.to(wide)
    result = x.new_zeros(problem.weight_shape)
    axes = list(zip(problem.image, problem.out_image, problem.stride, problem.padding, problem.dilation, strict=True))
    for tap in itertools.product(*map(range, problem.kernel)):
        pixels, outputs = [...], [...]
        for t, (size, out_size, stride, padding, dilation) in zip(tap, axes, strict=True):
            shift = t * dilation - padding
            first, last = max(0, -(shift // stride)), min(out_size, (size - 1 - shift) // stride + 1)
            outputs.append(slice(first, max(first, last)))
            pixels.append(slice(first * stride + shift, max(first, last) * stride + shift, stride))
        if all(span.start < span.stop for span in outputs[1:]):
            result[:, 0, tap[0], tap[1]] = (x[tuple(pixels)] * grad_out[tuple(outputs)]).sum((0, 2, 3))
    return result


def pytorch_results(problem, tensors):
    """All results of PyTorch in the dtype of the tensors, by name; the gradients of undefined inputs are left out."""
    x, weight, bias, grad_out = tensors
    with native_pytorch(), torch.no_grad():
        results = {"out": F.conv2d(x, weight, bias, **problem.pairs, groups=problem.channels)}
        grads = torch.ops.aten.convolution_backward(
            grad_out,
            x,
            weight,
            [problem.out_channels],
            *(problem.stride, problem.padding, problem.dilation),
            *(False, (0, 0), problem.channels),
            (True, True, bias is not None),
        )
    results |= {"grad_input": grads[0], "grad_weight": grads[1]}
    if x.device.type == "cpu" and not (x.isfinite().all() and grad_out.isfinite().all()):
        results["grad_weight"] = grad_weight_by_taps(problem, x, grad_out).to(x.dtype)
    if bias is not None:
        results["grad_bias"] = grads[2]
    return results


def peer_results(problem, tensors):
    """What our errors are measured by: PyTorch's results in the dtype of the tensors.

    On the CPU those of float32, rounded: in 16 bits its own kernels accumulate in 16 bits there.
    """
    if tensors.x.is_cuda:
        return pytorch_results(problem, tensors)
    dtype = tensors.x.dtype
    wide = tensors.map(lambda t: t.to(torch.promote_types(dtype, torch.float32)))
    return {name: result.to(dtype) for name, result in pytorch_results(problem, wide).items()}


def expected_results(problem, tensors):
    """Float64 results with their magnitudes, by name."""
    exact = pytorch_results(problem, tensors.map(torch.Tensor.double))
    magnitudes = pytorch_results(problem, tensors.map(lambda t: t.double().abs()))
    return {name: Expected(exact[name], magnitudes[name]) for name in exact}


def errors_in_units(result, expected):
    """Error of each element in its own unit; infinite where one is NaN or infinite and the other is not the same."""
    value, magnitude = expected
    dtype = result.dtype
    accumulator = torch.float64 if dtype is torch.float64 else torch.float32
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the subnormal step: never 0
    unit = torch.finfo(dtype).eps / 2 * value.abs() + torch.finfo(accumulator).eps / 2 * magnitude + smallest
    rounded = value.to(dtype).double()  # beyond the dtype's range this is infinite, as the result must be
    got = result.double()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    errors = torch.where(rounded.isfinite(), (got - value).abs() / unit, torch.inf)
    return torch.where(same & ~rounded.isfinite(), 0.0, errors).nan_to_num(nan=torch.inf)


def allowed_units(dtype, expected, peer=None):
    """The bound for our errors, from the largest error of PyTorch's result (no peer: as if it were one unit)."""
    floor = FLOOR_UNITS_FLOAT64 if dtype is torch.float64 else FLOOR_UNITS
    if peer is None:
        return 2.0 + floor
    worst = errors_in_units(peer, expected).max().item() if peer.numel() else 0.0
    return min(2 * worst, CAP_UNITS) + floor


def mismatch(result, expected, peer=None):
    """None, or a text with the first coordinate where the result breaks the rule."""
    shape = tuple(expected.value.shape)
    if tuple(result.shape) != shape:
        return f"shape {tuple(result.shape)}, expected {shape}"
    if peer is not None and result.dtype != peer.dtype:
        return f"dtype {result.dtype}, expected {peer.dtype}"
    allowed = allowed_units(result.dtype, expected, peer)
    errors = errors_in_units(result, expected)
    wrong = errors > allowed
    if not wrong.any():
        return None
    index = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements wrong, the first at {index}: got {result[index].item()!r}, "
        f"expected {expected.value[index].item()!r} (error {errors[index].item():.3g} units, "
        f"worst {errors.max().item():.3g}, allowed {allowed:.3g})"
    )


def as_float(parameter):
    """Float32 that rounds to what weight or bias of 16 bits are, and is not that."""
    if parameter is None:
        return None
    wide = parameter.float() * (1 + 2**-14)  # aligned, as are the copies that operators make of what is not contiguous
    return misaligned(wide) if parameter.is_contiguous() and parameter.data_ptr() % 16 != 0 else wide


def with_float_weight(tensors):
    """The tensors with `as_float` of weight and bias."""
    return Tensors(tensors.x, as_float(tensors.weight), as_float(tensors.bias), tensors.grad_out)


def run_with_float_weight(direction, problem, tensors):
    """`run` as under autocast: weight and bias of float32 beside tensors of 16 bits. Strides decide the layout."""
    x, weight, bias, grad_out = tensors
    if direction == "forward":
        return {"out": OPERATORS.forward_no_autograd(x, weight, bias, *problem.geometry)}
    masks = {"grad_input": (True, False, False), "grad_weight": (False, True, bias is not None)}
    of_emulator = hasattr(OPERATORS, "convolution_backward_overrideable")
    backward = (OPERATORS if of_emulator else torch.ops.aten).convolution_backward_overrideable
    mask = masks.get(direction, (True, True, False))
    convolution = (*(problem.stride, problem.padding, problem.dilation), False, (0, 0), problem.channels)
    with torch.no_grad():
        grads = backward(grad_out, x, weight, *convolution, mask)
    return dict(zip(result_names(direction, problem), [grad for grad in grads if grad is not None], strict=True))


def difference(result, expected, dtype):
    """None, or what is wrong with a result that is to be the expected one, bit for bit, but for its dtype."""
    if result.dtype is not dtype:
        return f"dtype {result.dtype}, expected {dtype}"
    rounded = result.to(expected.dtype)
    same = (rounded == expected) | (rounded.isnan() & expected.isnan())
    return None if same.all() else f"{int((~same).sum())} of {same.numel()} elements are others with float32 weights"


def run(direction, problem, tensors, layout):
    """One direction through its operator; results by name, as pytorch_results names them."""
    x, weight, bias, grad_out = tensors
    channels_last = layout == "nhwc"
    if direction == "forward":
        return {"out": OPERATORS.forward_no_autograd(x, weight, bias, *problem.geometry)}
    if direction == "grad_input":
        flags = (channels_last, problem.multiplier)
        return {"grad_input": OPERATORS.grad_input(grad_out, weight, *problem.image, *problem.geometry, *flags)}
    if direction == GRADIENTS:
        both = OPERATORS.gradients(grad_out, x, weight, *problem.geometry, channels_last)
        return dict(zip(result_names(direction, problem), both, strict=True))
    results = OPERATORS.grad_weight(grad_out, x, *problem.kernel, *problem.geometry, channels_last, bias is not None)
    return (
        dict(zip(("grad_weight", "grad_bias"), results, strict=True))
        if bias is not None
        else {"grad_weight": results[0]}
    )


def run_unless_refused(direction, problem, tensors, layout):
    """As run; None where this GPU is smaller or older than what the forced variant is for."""
    try:
        return run(direction, problem, tensors, layout)
    except RuntimeError as error:
        if any(words in str(error) for words in REFUSALS):
            return None
        raise


def result_names(direction, problem):
    if direction == "forward":
        return ("out",)
    if direction == "grad_input":
        return ("grad_input",)
    if direction == GRADIENTS:
        return ("grad_input", "grad_weight")
    return ("grad_weight", "grad_bias") if problem.bias else ("grad_weight",)


def select(direction, problem, dtype, layout, aligned=True, float_weight=False):
    """The variant that the library chooses for a problem, and the source of its specialisation ('' if built in)."""
    return depthwise_inline._select(direction, dtype, layout == "nhwc", problem.sizes(aligned, float_weight))


def all_variants(direction, problem, dtype, layout, aligned=True):
    """Every variant that can serve a problem, the general one included."""
    names = ctypes.create_string_buffer(1 << 16)
    sizes = (ctypes.c_int64 * 15)(*problem.sizes(aligned))
    where = (ALL_DIRECTIONS.index(direction), DTYPES.index(dtype), LAYOUTS.index(layout), sizes)
    assert depthwise_inline._load_library().depthwise_inline_tiles(*where, names, len(names)) == 0
    variants = names.value.decode().split()
    assert "general" in variants, f"{direction} of {problem}: the general variant is not among {variants}"
    return variants


def specialisations(problems, dtype, layout, variants=None, directions=ALL_DIRECTIONS):
    """What `check` has compiled for these problems, aligned or not: the sources by name. `variants` as there."""
    sources = {}
    for problem, direction, aligned in itertools.product(problems, directions, (True, False)):
        served = [None, *all_variants(direction, problem, dtype, layout, aligned)]
        for variant in served[1:] if variants is None else [variant for variant in variants if variant in served]:
            with forced(variant):
                for float_weight in (False, True):
                    name, source = select(direction, problem, dtype, layout, aligned, float_weight)
                    if source:
                        sources[name.rpartition("/")[0]] = source
    return sources


@contextlib.contextmanager
def forced(variant):
    """Every launch takes this variant, or raises; None leaves the choice to the library."""
    force = depthwise_inline._load_library().depthwise_inline_force_variant
    force((variant or "").encode())
    try:
        yield
    finally:
        force(b"")


def is_aligned(tensors):
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def forward_layout(x, weight):
    """The layout that F.conv2d on CUDA gives its output: decided by strides, and never channels_last in float64."""
    suggested = (suggest_memory_format(t) for t in (x, weight))
    return "nhwc" if torch.channels_last in suggested and x.dtype is not torch.float64 else "nchw"


def check(failures, problem, tensors, layout, directions=ALL_DIRECTIONS, variants=None):
    """Run a problem in every direction and variant on poisoned memory and hold it against float64 and PyTorch.

    variants: None for every variant that can serve it, or a list of them, where None stands for automatic choice. Both
    gradients at once are left out where no kernel computes them so.
    """
    dtype = tensors.x.dtype
    expected, peer = expected_results(problem, tensors), peer_results(problem, tensors)
    for direction in directions:
        names = result_names(direction, problem)
        if variants is None:
            kernel_layout = forward_layout(tensors.x, tensors.weight) if direction == "forward" else layout
            found = all_variants(direction, problem, dtype, kernel_layout, is_aligned(tensors))
        else:
            found = variants
        if direction == GRADIENTS:
            served = all_variants(direction, problem, dtype, layout, is_aligned(tensors))
            found = [variant for variant in found if variant in served[1:] or (variant is None and served[1:])]
        for variant in found:
            where = (problem, short(dtype), layout, direction, variant or "automatic")
            with failures.catch(*where), forced(variant):
                poison(*(peer[name] for name in names))
                results = (run_unless_refused if variants is None else run)(direction, problem, tensors, layout)
                if results is None:
                    continue
                for name in names:
                    failures.add(mismatch(results[name], expected[name], peer[name]), *where, name)
                strides_agree = direction == "forward" or forward_layout(tensors.x, tensors.weight) == layout
                if dtype.itemsize == 2 and strides_agree:
                    poison(*(peer[name] for name in names))
                    with_float = run_with_float_weight(direction, problem, with_float_weight(tensors))
                    for name in names:
                        of_float = torch.float32 if name in ("grad_weight", "grad_bias") else dtype
                        failures.add(difference(with_float[name], results[name], of_float), *where, name)


def poison(*tensors, copies=3):
    """Fill the memory that the next allocations of these sizes get with NaN, so that unwritten elements are found.

    The caching allocator chooses the same blocks again once these are freed; the extra copies cover calls that also
    allocate a workspace. All bits set is NaN in every floating dtype.
    """
    sizes = [t.numel() * t.element_size() for t in tensors if t is not None and t.numel()]
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in sizes * copies]
    del blocks


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of the driver."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def launches(function):
    """What a call puts on the GPU, read from a captured CUDA graph: (kernel name, grid, block), or ('copy or set',)."""
    function()  # whatever is built or cached at first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        result = function()
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        status = getattr(driver, name)(*arguments)
        assert status == 0, f"{name} returned {status}"

    raw, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    call("cuGraphGetNodes", raw, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    if count.value:
        call("cuGraphGetNodes", raw, nodes, ctypes.byref(count))
    found = []
    for node in map(ctypes.c_void_p, nodes):
        kind, parameters, name = ctypes.c_int(), _KernelNode(), ctypes.c_char_p()
        call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value != 0:
            found.append(("copy or set",))
            continue
        call("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(parameters))
        if parameters.function:
            call("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(parameters.function))
        else:
            call("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(parameters.kernel))
        found.append((name.value.decode(), tuple(parameters.grid), tuple(parameters.block)))
    del result
    return found


class Failures:
    """Collects messages over a grid, so that one run shows every failing problem and not only the first."""

    def __init__(self):
        self.messages = []
        self.checked = 0

    def add(self, message, *where):
        """Count one check; a message that is not None is a failure."""
        self.checked += 1
        if message is not None:
            self.messages.append(" | ".join(map(str, (*where, message))))

    @contextlib.contextmanager
    def catch(self, *where):
        """An exception is one more failure of this problem, not the end of the grid; a lost GPU is the end."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            self.add(f"{type(error).__name__}: {error}", *where)

    def report(self):
        shown = "\n".join(self.messages[:20])
        assert not self.messages, f"{len(self.messages)} of {self.checked} checks failed:\n{shown}"
        assert self.checked, "nothing was checked"


def pair_grid(*axes):
    """itertools.product with readable pytest ids."""

    def text(value):
        if isinstance(value, torch.dtype):
            return short(value)
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [pytest.param(*values, id="-".join(map(text, values))) for values in itertools.product(*axes)]
