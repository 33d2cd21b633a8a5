"""The operators and depthwise_conv2d as PyTorch sees them: registration, memory format, autograd, compile, streams.

Numbers of single kernels are in test_gpu_numerics.py; here a result is right if the parts around the kernels are.
"""

import functools
import gc
import itertools
import random
import subprocess
import sys
import textwrap

import pytest
import reference
import torch
from reference import DEVICE, HALF_AND_SINGLE, LAYOUTS, Failures, Problem
from torch.nn import functional as F

import bench_report
import depthwise_inline
from depthwise_inline import depthwise_conv2d

pytestmark = pytest.mark.gpu

PROBLEM = Problem((14, 18), (3, 3), padding=(1, 1), channels=8)
STRIDED = Problem((15, 18), (5, 5), (2, 2), (2, 1), channels=6, multiplier=2)
DILATED = Problem((16, 13), (3, 3), (1, 1), (2, 3), (2, 3), channels=4, bias=False)
PROBLEMS = [pytest.param(problem, id=str(problem)) for problem in (PROBLEM, STRIDED, DILATED)]


@pytest.fixture(autouse=True)
def full_float32():
    with reference.full_float32():
        yield


@pytest.fixture
def builds(monkeypatch):
    """The names of what is taken from the cache or compiled from here on."""
    names, obtain = [], depthwise_inline._obtain

    def recorded(name, *rest):
        names.append(name)
        return obtain(name, *rest)

    monkeypatch.setattr(depthwise_inline, "_obtain", recorded)
    return names


def leaves(tensors, wanted=(True, True, True)):
    """The inputs as fresh leaves, each requiring a gradient if wanted."""
    inputs = (tensors.x, tensors.weight, tensors.bias)
    return [None if t is None else t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]


def convolve(problem, x, weight, bias):
    return depthwise_conv2d(x, weight, bias, **problem.pairs)


def compare_training(problem, tensors, out, grads):
    """Forward result and the gradients (None: not asked for) of x, weight and bias against float64."""
    failures = Failures()
    expected, peer = reference.expected_results(problem, tensors), reference.pytorch_results(problem, tensors)
    found = dict(zip(("out", "grad_input", "grad_weight", "grad_bias"), (out, *grads), strict=True))
    for name, result in found.items():
        if result is not None:
            failures.add(reference.mismatch(result, expected[name], peer[name]), problem, name)
    failures.report()


def train(problem, tensors, function):
    """Out and gradients of a function of (x, weight, bias), all three asked for where they exist."""
    inputs = leaves(tensors)
    out = function(*inputs)
    grads = torch.autograd.grad(out, [t for t in inputs if t is not None], tensors.grad_out)
    return out.detach(), [*grads, None][:3]


# ---- Variants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", reference.ALL_DIRECTIONS)
def test_forcing_a_variant_launches_it(direction, layout):
    """Every variant launches something else; otherwise the numeric tests would test one of them many times."""
    problem = Problem((56, 64), (3, 3), padding=(1, 1), channels=32)
    tensors = reference.make_tensors(problem, torch.float32, layout, reference.fresh_generator())
    found = {}
    for variant in reference.all_variants(direction, problem, torch.float32, layout):
        with reference.forced(variant):
            found[variant] = tuple(
                reference.launches(functools.partial(reference.run, direction, problem, tensors, layout))
            )
    assert all(found.values())
    same = [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
    assert not same, f"variants that launch the same kernel in the same grid: {same}"


@pytest.mark.parametrize("direction", reference.ALL_DIRECTIONS)
def test_the_automatic_choice_is_the_selected_variant(direction):
    problem = Problem((56, 64), (3, 3), padding=(1, 1), channels=32)
    tensors = reference.make_tensors(problem, torch.float32, "nchw", reference.fresh_generator())
    run = functools.partial(reference.run, direction, problem, tensors, "nchw")
    name, _ = reference.select(direction, problem, torch.float32, "nchw")
    tile = name.rpartition("/")[2]
    assert tile in reference.all_variants(direction, problem, torch.float32, "nchw")
    automatic = reference.launches(run)
    with reference.forced(tile):
        assert reference.launches(run) == automatic


def test_no_benchmark_case_is_left_to_the_general_kernels():
    cases = bench_report.load_cases().values()
    slow = [
        (case.name, *where)
        for case, *where in itertools.product(cases, reference.DIRECTIONS, HALF_AND_SINGLE, (False, True))
        if depthwise_inline._select(*where, case.sizes())[0] == "general"
    ]
    assert not slow


def test_what_was_precompiled_serves_the_first_call(builds):
    layer = depthwise_inline.DepthwiseConv2d(6, (2, 5), device=DEVICE)
    names = depthwise_inline.precompile(layer, (3, 6, 19, 23))
    assert names and "general" not in names
    builds.clear()
    x = torch.randn(3, 6, 19, 23, device=DEVICE)
    out = layer(x)
    out.sum().backward()
    assert not builds
    torch.testing.assert_close(out, F.conv2d(x, layer.weight, layer.bias, groups=6))


def test_a_variant_that_does_not_exist_is_named():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    for direction in reference.DIRECTIONS:
        with reference.forced("no_such_tile"), pytest.raises(RuntimeError, match="no_such_tile"):
            reference.run(direction, PROBLEM, tensors, "nchw")
        reference.run(direction, PROBLEM, tensors, "nchw")


# ---- Registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("nchw", torch.float32), ("nhwc", torch.float16), ("nhwc", torch.float64)],
    ids=["nchw-float32", "nhwc-float16", "nhwc-float64"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck(problem, layout, dtype):
    tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
    operators = torch.ops.depthwise_inline
    x, weight, bias = leaves(tensors)
    grad_out = tensors.grad_out.detach().requires_grad_()
    plain = (tensors.x, tensors.weight, tensors.bias, *problem.geometry)
    last = layout == "nhwc"
    torch.library.opcheck(operators.forward.default, (x, weight, bias, *problem.geometry))
    torch.library.opcheck(operators.forward_no_autograd.default, plain)
    torch.library.opcheck(
        operators.grad_input.default,
        (grad_out, weight, *problem.image, *problem.geometry, last, problem.multiplier),
    )
    torch.library.opcheck(
        operators.grad_weight.default,
        (grad_out, x, *problem.kernel, *problem.geometry, last, bias is not None),
    )
    torch.library.opcheck(operators.gradients.default, (grad_out, x, weight, *problem.geometry, last))


def test_the_two_forward_operators_agree():
    tensors = reference.make_tensors(STRIDED, torch.float32, "nchw", reference.fresh_generator())
    arguments = (tensors.x, tensors.weight, tensors.bias, *STRIDED.geometry)
    operators = torch.ops.depthwise_inline
    assert torch.equal(operators.forward(*arguments), operators.forward_no_autograd(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_autograd_of_the_forward_operator(problem, layout):
    tensors = reference.make_tensors(problem, torch.float32, layout, reference.fresh_generator())
    operator = torch.ops.depthwise_inline.forward
    compare_training(problem, tensors, *train(problem, tensors, lambda *inputs: operator(*inputs, *problem.geometry)))


# ---- Memory format --------------------------------------------------------------------------------------------------

SIZES = [
    (2, 8, 9, 10),
    (1, 8, 9, 10),
    (2, 1, 9, 10),
    (2, 8, 1, 1),
    (2, 8, 1, 7),
    (2, 8, 7, 1),
    (1, 1, 1, 1),
    (0, 4, 6, 6),
]


def strided_like(t, how):
    """The same values, stored in another way."""
    if how == "contiguous":
        return t.contiguous()
    if how == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if how == "permuted":  # NHWC strides also where a dimension of size 1 makes them ambiguous
        return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if how == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    larger = t.new_zeros((t.size(0), 2 * t.size(1), *t.shape[2:])).contiguous(memory_format=torch.channels_last)
    return larger[:, : t.size(1)].copy_(t)  # "sliced": channels_last order, but not dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=reference.short)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["k1x1", "k3x3"])
def test_output_strides_are_those_of_conv2d(kernel, dtype):
    """Sizes of 1 make strides ambiguous, and what follows in a network decides its own layout by them."""
    failures = Failures()
    formats = ("contiguous", "channels_last", "permuted", "transposed", "sliced")
    for size, x_how, weight_how in itertools.product(SIZES, formats, formats[:3]):
        x = strided_like(torch.randn(size, device=DEVICE, dtype=dtype), x_how)
        weight = strided_like(torch.randn((2 * size[1], 1, *kernel), device=DEVICE, dtype=dtype), weight_how)
        options = {"padding": (kernel[0] // 2, kernel[1] // 2)}
        expected = F.conv2d(x, weight, **options, groups=size[1])
        where = (size, f"x {x_how}", f"weight {weight_how}")
        with failures.catch(*where):
            for name, out in (
                ("without grad", depthwise_conv2d(x, weight, **options)),
                ("with grad", depthwise_conv2d(x.requires_grad_(), weight, **options)),
                ("operator", torch.ops.depthwise_inline.forward(x, weight, None, 1, 1, *options["padding"], 1, 1)),
            ):
                same = out.shape == expected.shape and out.stride() == expected.stride()
                message = f"{tuple(out.shape)} strides {out.stride()}, F.conv2d {expected.stride()}"
                failures.add(None if same else message, *where, name)
    failures.report()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=reference.short)
def test_gradient_strides_are_those_of_conv2d(dtype):
    failures = Failures()
    for x_how, weight_how in itertools.product(("contiguous", "channels_last"), repeat=2):
        x = strided_like(torch.randn(2, 8, 9, 10, device=DEVICE, dtype=dtype), x_how).requires_grad_()
        weight = strided_like(torch.randn(8, 1, 3, 3, device=DEVICE, dtype=dtype), weight_how).requires_grad_()
        strides = []
        for out in (F.conv2d(x, weight, groups=8), depthwise_conv2d(x, weight)):
            grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
            strides.append(grads[0].stride())
        same = strides[0] == strides[1]
        failures.add(None if same else f"F.conv2d {strides[0]}, ours {strides[1]}", x_how, weight_how)
    failures.report()


def test_unbatched_input():
    problem = Problem((11, 12), (3, 3), (2, 1), (1, 1), batch=1, channels=6, multiplier=2)
    tensors = reference.make_tensors(problem, torch.float32, "nchw", reference.fresh_generator())

    def unbatched(x, weight, bias):
        out = convolve(problem, x.squeeze(0), weight, bias)
        assert out.shape == problem.out_shape[1:]
        return out.unsqueeze(0)

    compare_training(problem, tensors, *train(problem, tensors, unbatched))


@pytest.mark.parametrize("kernel", [(3, 3), (4, 2), (2, 5)], ids=lambda k: f"{k[0]}x{k[1]}")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(kernel, padding):
    generator = reference.fresh_generator()
    x = torch.randn(2, 4, 15, 17, device=DEVICE, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 1, *kernel, device=DEVICE, dtype=torch.float64, generator=generator)
    for dilation in (1, (2, 3)):
        expected = F.conv2d(x, weight, padding=padding, dilation=dilation, groups=4)
        torch.testing.assert_close(depthwise_conv2d(x, weight, padding=padding, dilation=dilation), expected)


@pytest.mark.parametrize("argument", [2, (2,), [2, 2], (2, 2), torch.Size([2, 2])], ids=str)
def test_forms_of_the_arguments(argument):
    options = {"device": DEVICE, "dtype": torch.float64, "generator": reference.fresh_generator()}
    x, weight = torch.randn(2, 4, 12, 12, **options), torch.randn(4, 1, 3, 3, **options)
    for name in ("stride", "padding", "dilation"):
        expected = F.conv2d(x, weight, groups=4, **{name: 2})
        for image in (x, x.clone().requires_grad_()):
            torch.testing.assert_close(depthwise_conv2d(image, weight, **{name: argument}), expected)


# ---- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("problem", [PROBLEM, STRIDED], ids=str)
def test_only_what_is_asked_for_is_computed(problem, wanted):
    """Results, and the kernels that were launched for them."""
    tensors = reference.make_tensors(problem, torch.float32, "nchw", reference.fresh_generator())
    inputs = leaves(tensors, wanted)
    asked = [t for t, want in zip(inputs, wanted, strict=True) if want]

    def forward_and_backward():
        out = convolve(problem, *inputs)
        grads = iter(torch.autograd.grad(out, asked, tensors.grad_out))
        return out, [next(grads) if want else None for want in wanted]

    compare_training(problem, tensors, *forward_and_backward())

    def names(direction, bias=inputs[2]):
        given = reference.Tensors(*inputs[:2], bias, tensors.grad_out)
        with torch.no_grad():
            launched = reference.launches(lambda: reference.run(direction, problem, given, "nchw"))
        return [launch[0] for launch in launched]

    launched = [launch[0] for launch in reference.launches(forward_and_backward)]
    expected = names("forward")
    at_once = wanted == (True, True, False)
    if at_once:
        expected += names(reference.GRADIENTS)
    if wanted[0] and not at_once:
        expected += names("grad_input")
    if wanted[1] and not at_once:
        expected += names("grad_weight", inputs[2] if wanted[2] else None)
    if wanted[1] or not wanted[2]:
        assert sorted(launched) == sorted(expected)
    else:  # the gradient of the bias alone is a sum, by whatever kernel
        assert set(launched) >= set(expected)
        assert not set(launched) & (set(names("grad_weight", None)) - set(expected))


def test_no_graph_is_kept_without_a_reason():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    x, weight, bias = leaves(tensors)
    assert convolve(PROBLEM, x, weight, bias).requires_grad
    with torch.no_grad():
        assert not convolve(PROBLEM, x, weight, bias).requires_grad
    with torch.inference_mode():
        assert not convolve(PROBLEM, x, weight, bias).requires_grad
    assert not convolve(PROBLEM, tensors.x, tensors.weight, tensors.bias).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem((5, 6), (3, 3), padding=(1, 1), channels=2),
        Problem((6, 5), (2, 3), (2, 1), (1, 0), (1, 2), channels=2, multiplier=2, bias=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("through", ["function", "operator"])
def test_gradcheck_and_gradgradcheck(problem, layout, through):
    tensors = reference.make_tensors(problem, torch.float64, layout, reference.fresh_generator())
    inputs = [t for t in leaves(tensors) if t is not None]

    def function(x, weight, bias=None):
        if through == "operator":
            return torch.ops.depthwise_inline.forward(x, weight, bias, *problem.geometry)
        return convolve(problem, x, weight, bias)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_penalty(layout):
    """A double backward in float32, as in training: the gradient of the squared norm of a gradient."""
    tensors = reference.make_tensors(STRIDED, torch.float32, layout, reference.fresh_generator())

    def penalty_gradients(function, inputs, grad_out):
        (grad,) = torch.autograd.grad(function(*inputs), inputs[0], grad_out, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs[1])[0]

    def exact(x, weight, bias):
        return F.conv2d(x, weight, bias, **STRIDED.pairs, groups=STRIDED.channels)

    double = tensors.map(torch.Tensor.double)
    expected = penalty_gradients(exact, leaves(double), double.grad_out)
    found = penalty_gradients(functools.partial(convolve, STRIDED), leaves(tensors), tensors.grad_out)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_accumulation_into_grad():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    inputs = leaves(tensors)
    for _ in range(2):
        convolve(PROBLEM, *inputs).backward(tensors.grad_out)
    once = train(PROBLEM, tensors, functools.partial(convolve, PROBLEM))[1]
    for t, grad in zip(inputs, once, strict=True):
        torch.testing.assert_close(t.grad, 2 * grad, rtol=0, atol=0)


# ---- torch.compile, autocast, graphs, streams -----------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    torch._dynamo.reset()
    generator = reference.fresh_generator()
    compiled = torch.compile(functools.partial(convolve, PROBLEM), fullgraph=True, dynamic=dynamic)
    images = ((14, 18), (21, 16)) if dynamic else ((14, 18),)
    layouts = LAYOUTS if dynamic else ("nchw",)
    for image, layout in itertools.product(images, layouts):
        problem = Problem(image, (3, 3), padding=(1, 1), channels=8)
        tensors = reference.make_tensors(problem, torch.float32, layout, generator)
        out, grads = train(problem, tensors, compiled)
        compare_training(problem, tensors, out, grads)
        assert out.stride() == tensors.grad_out.stride()


@pytest.mark.parametrize("cast_to", [torch.float16, torch.bfloat16], ids=reference.short)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=lambda dtypes: "_".join(map(reference.short, dtypes)),
)
@pytest.mark.parametrize("through", ["function", "operator"])
def test_autocast(dtypes, cast_to, through):
    """Dtypes of results and gradients as with F.conv2d, and values as of the inputs cast by hand."""
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    sources = [t.to(dtype) for t, dtype in zip((tensors.x, tensors.weight, tensors.bias), dtypes, strict=True)]

    def ours(x, weight, bias):
        if through == "operator":
            return torch.ops.depthwise_inline.forward(x, weight, bias, *PROBLEM.geometry)
        return convolve(PROBLEM, x, weight, bias)

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, **PROBLEM.pairs, groups=PROBLEM.channels)

    results = []
    for function in (ours, theirs):
        inputs = [t.detach().requires_grad_() for t in sources]
        with torch.autocast("cuda", dtype=cast_to):
            with torch.no_grad():
                without_grad = function(*inputs)
            out = function(*inputs)
        assert out.dtype == without_grad.dtype and torch.equal(out, without_grad)
        results.append((out, *torch.autograd.grad(out, inputs, tensors.grad_out.to(out.dtype))))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
    kind = results[1][0].dtype
    cast = reference.Tensors(*(t.to(kind) for t in sources), tensors.grad_out.to(kind))
    # A gradient goes back to its leaf's dtype, which rounds a second time where that is the coarser one.
    coarser = max(torch.finfo(kind).eps, *(torch.finfo(dtype).eps for dtype in dtypes)) > torch.finfo(kind).eps
    grads = [None if coarser else grad.to(kind) for grad in results[0][1:]]
    compare_training(PROBLEM, cast, results[0][0], grads)
    if coarser:
        for found, expected in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=0.02)


def test_autocast_casts():
    """No parameter, as the kernels read float32; the operator casts as often as PyTorch: once a context, and back."""
    tensors = reference.make_tensors(PROBLEM, torch.bfloat16, "nchw", reference.fresh_generator())
    weight, bias = (torch.nn.Parameter(t.float()) for t in (tensors.weight, tensors.bias))

    def casts(function, **options):
        def twice():
            with torch.autocast("cuda", dtype=torch.bfloat16, **options):
                outs = [function(x, weight, bias) for x in (tensors.x, tensors.x)]
            return torch.autograd.grad(outs, (weight, bias), [tensors.grad_out, tensors.grad_out])

        return sum("copy_kernel" in launch[0] for launch in reference.launches(twice))

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, **PROBLEM.pairs, groups=PROBLEM.channels)

    def operator(x, weight, bias):
        return torch.ops.depthwise_inline.forward(x, weight, bias, *PROBLEM.geometry)

    assert casts(operator) == casts(theirs) == 4
    assert casts(operator, cache_enabled=False) == casts(theirs, cache_enabled=False) == 8
    assert casts(functools.partial(convolve, PROBLEM)) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cast_to", [torch.float16, torch.bfloat16], ids=reference.short)
def test_second_order_under_autocast(cast_to, layout):
    """The gradient of a penalty on a gradient, as with F.conv2d; the backward of both is outside of autocast."""
    tensors = reference.make_tensors(PROBLEM, torch.float32, layout, reference.fresh_generator())
    tensors = tensors.map(lambda t: t.to(cast_to).float())

    def second_order(function, tensors):
        inputs = [t.clone().requires_grad_() for t in (tensors.x, tensors.weight, tensors.bias)]
        with torch.autocast("cuda", dtype=cast_to, enabled=tensors.x.dtype is torch.float32):
            out = function(PROBLEM, *inputs)
        grads = torch.autograd.grad(out, inputs, tensors.grad_out.to(out.dtype), create_graph=True)
        assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
        return torch.autograd.grad([grad.square().sum() for grad in grads[:2]], inputs[:2])

    def theirs(problem, x, weight, bias):
        return F.conv2d(x, weight, bias, **problem.pairs, groups=problem.channels)

    exact = second_order(theirs, tensors.map(torch.Tensor.double))
    for found, peer, value in zip(second_order(convolve, tensors), second_order(theirs, tensors), exact, strict=True):
        assert found.dtype == peer.dtype == torch.float32
        error, allowed = ((t.double() - value).abs().max().item() for t in (found, peer))
        assert error <= 2 * allowed


def test_autocast_off_inside_on_is_off():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    with torch.autocast("cuda", dtype=torch.float16), torch.autocast("cuda", enabled=False):
        assert convolve(PROBLEM, tensors.x, tensors.weight, tensors.bias).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph_with_a_configuration_never_seen_before(layout, builds):
    """During capture nothing may be compiled: the general kernels serve, and replays follow the inputs."""
    generator = reference.fresh_generator()
    drawn = random.Random(generator.initial_seed())
    for _ in range(1000):

        def pair(low, high):
            return (drawn.randint(low, high), drawn.randint(low, high))

        problem = Problem((30, 34), pair(1, 9), pair(1, 2), (2, 2), pair(1, 2), channels=8)
        name, source = reference.select("forward", problem, torch.float32, layout)
        if source and name.rpartition("/")[0] not in depthwise_inline._specialisations:
            break  # one that would be compiled now if it were not for the capture
    tensors = reference.make_tensors(problem, torch.float32, layout, generator)
    convolve(PROBLEM, tensors.x, torch.randn(8, 1, 3, 3, device=DEVICE), None)  # the library itself is loaded before
    torch.cuda.synchronize()
    builds.clear()
    inputs = leaves(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = convolve(problem, *inputs)
        grads = torch.autograd.grad(out, inputs, tensors.grad_out)
    assert not builds, f"compiled during capture: {builds}"
    for _ in range(2):
        fresh = reference.make_tensors(problem, torch.float32, layout, generator)
        for t, values in zip(tensors, fresh, strict=True):
            t.copy_(values)
        for result in (out, *grads):
            result.detach().fill_(torch.nan)
        graph.replay()
        compare_training(problem, fresh, out.detach(), grads)
    # Outside of capture the same configuration still works, compiled or not.
    compare_training(problem, tensors, *train(problem, tensors, functools.partial(convolve, problem)))


def test_work_goes_to_the_current_stream():
    """The inputs are written late on the side stream: a kernel on another stream would read what was there before."""
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    train(PROBLEM, tensors, functools.partial(convolve, PROBLEM))  # compiled and loaded
    late = reference.Tensors(*(torch.zeros_like(t) for t in tensors))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(600_000_000)  # about 0.3 s
        for t, values in zip(late, tensors, strict=True):
            t.copy_(values)
        without_grad = convolve(PROBLEM, late.x, late.weight, late.bias)
        out, grads = train(PROBLEM, late, functools.partial(convolve, PROBLEM))
        assert not stream.query(), "the stream was done before the test could tell"
    torch.cuda.synchronize()
    assert torch.equal(out, without_grad)
    compare_training(PROBLEM, tensors, out, grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    moved = tensors.map(lambda t: t.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    compare_training(PROBLEM, moved, *train(PROBLEM, moved, functools.partial(convolve, PROBLEM)))
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="device"):
        convolve(PROBLEM, tensors.x, moved.weight, None)


def test_deterministic_algorithms():
    """Allowed under the switch, with the same bits; and the switch fills new memory with NaN, workspaces included."""
    failures, generator = Failures(), reference.fresh_generator()
    for problem, layout in itertools.product((PROBLEM, STRIDED, DILATED), LAYOUTS):
        tensors = reference.make_tensors(problem, torch.float32, layout, generator)
        function = functools.partial(convolve, problem)
        before = train(problem, tensors, function)
        torch.use_deterministic_algorithms(True)
        try:
            with failures.catch(problem, layout):
                after = train(problem, tensors, function)
                pairs = zip((before[0], *before[1]), (after[0], *after[1]), strict=True)
                same = all(a is b is None or torch.equal(a, b) for a, b in pairs)
                failures.add(None if same else "other bits under the deterministic switch", problem, layout)
        finally:
            torch.use_deterministic_algorithms(False)
    failures.report()


def test_nothing_is_leaked():
    tensors = reference.make_tensors(PROBLEM, torch.float32, "nchw", reference.fresh_generator())
    function = functools.partial(convolve, PROBLEM)

    def allocated():
        train(PROBLEM, tensors, function)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    allocated()
    before = allocated()
    for _ in range(20):
        allocated()
    assert allocated() == before


# ---- Bad input ------------------------------------------------------------------------------------------------------


def image(*size, **options):
    return torch.ones(size or (2, 4, 8, 8), device=DEVICE, **options)


def filters(*size, **options):
    return torch.ones(size or (4, 1, 3, 3), device=DEVICE, **options)


BAD = {  # name: arguments for depthwise_conv2d, keyword arguments, words the message must hold
    "rank 2": (lambda: (image(8, 8), filters()), {}, ("8, 8",)),
    "rank 5": (lambda: (image(1, 2, 4, 8, 8), filters()), {}, ("1, 2, 4, 8, 8",)),
    "channels": (lambda: (image(2, 3, 8, 8), filters()), {}, ("3", "4")),
    "weight of a dense convolution": (lambda: (image(), filters(4, 4, 3, 3)), {}, ("4, 4, 3, 3",)),
    "weight of rank 3": (lambda: (image(), filters(4, 3, 3)), {}, ("4, 3, 3",)),
    "bias too long": (lambda: (image(), filters(), image(5)), {}, ("bias", "4", "5")),
    "bias of rank 2": (lambda: (image(), filters(), image(4, 1)), {}, ("bias",)),
    "weight on the CPU": (lambda: (image(), filters().cpu()), {}, ("cuda", "cpu")),
    "bias on the CPU": (lambda: (image(), filters(), torch.ones(4)), {}, ("cuda", "cpu")),
    "input on the CPU": (lambda: (image().cpu(), filters()), {}, ("cuda", "cpu")),
    "mixed dtypes": (lambda: (image(), filters().half()), {}, ("float", "half")),
    "bias of another dtype": (lambda: (image(), filters(), image(4).half()), {}, ("float", "half")),
    "int": (lambda: (image().int(), filters().int()), {}, ("int",)),
    "fp8": (lambda: (image().to(torch.float8_e4m3fn), filters().to(torch.float8_e4m3fn)), {}, ("float8",)),
    "stride 0": (lambda: (image(), filters()), {"stride": 0}, ("stride", "0")),
    "stride -1": (lambda: (image(), filters()), {"stride": (1, -1)}, ("stride", "-1")),
    "negative padding": (lambda: (image(), filters()), {"padding": -1}, ("padding", "-1")),
    "three strides": (lambda: (image(), filters()), {"stride": (1, 1, 1)}, ("stride",)),
    "kernel larger than the image": (lambda: (image(), filters(4, 1, 9, 3)), {}, ("9", "8")),
    "dilated kernel larger than the image": (lambda: (image(), filters()), {"dilation": 4}, ("9", "8")),
    "same with a stride": (lambda: (image(), filters()), {"padding": "same", "stride": 2}, ("same",)),
    "unknown padding": (lambda: (image(), filters()), {"padding": "full"}, ("full",)),
    "a list": (lambda: ([1.0], filters()), {}, ("list",)),
    "a word for a stride": (lambda: (image(), filters()), {"stride": "two"}, ("stride", "two")),
    "a fraction": (lambda: (image(), filters()), {"stride": 1.5}, ("stride", "1.5")),
    "sparse": (lambda: (image().to_sparse(), filters()), {}, ("sparse",)),
}
OURS_ALONE = {  # what F.conv2d takes, in some versions of PyTorch at least
    "dilation 0": (lambda: (image(), filters()), {"dilation": (0, 1)}, ("dilation", "0")),
    "complex": (lambda: (image(dtype=torch.complex64), filters(dtype=torch.complex64)), {}, ("complex64",)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", [*BAD, *OURS_ALONE])
def test_bad_input(name, grad):
    """The kind of exception that nn.Conv2d raises, naming what came; and the GPU works as before."""
    make, options, words = (BAD | OURS_ALONE)[name]
    arguments = make()
    if grad and arguments[1].is_floating_point() and arguments[1].dtype.itemsize > 1:
        arguments[1].requires_grad_()
    with pytest.raises((RuntimeError, TypeError, ValueError)) as ours:
        depthwise_conv2d(*arguments, **options)
    message = str(ours.value).lower()
    assert all(word in message or (word == "half" and "float16" in message) for word in words), message
    if name in BAD:
        with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
            F.conv2d(*arguments, groups=4, **options)
        kinds = [
            next(k for k in (RuntimeError, TypeError, ValueError) if issubclass(e.type, k)) for e in (ours, theirs)
        ]
        assert kinds[0] is kinds[1], f"{ours.value!r} where F.conv2d raises {theirs.value!r}"
    torch.cuda.synchronize()
    assert torch.equal(depthwise_conv2d(image(), filters()), torch.full((2, 4, 6, 6), 9.0, device=DEVICE))


BAD_GRADIENTS = {  # changes to a grad_out of (2, 4, 8, 8), for a 3x3 kernel with padding 1
    "height": lambda g: g[:, :, 1:],
    "batch": lambda g: g[:1],
    "channels": lambda g: g[:, :3],
    "rank": lambda g: g[0],
    "dtype": lambda g: g.half(),
    "device": lambda g: g.cpu(),
    "int": lambda g: g.int(),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_operators_reject_bad_gradients(name):
    """They are public: a gradient of the wrong size must not become a read outside of a tensor."""
    grad_out = BAD_GRADIENTS[name](image())
    geometry = (1, 1, 1, 1, 1, 1)
    if name != "batch":  # which grad_out alone tells
        with pytest.raises(RuntimeError):
            torch.ops.depthwise_inline.grad_input(grad_out, filters(), 8, 8, *geometry, False)
    with pytest.raises(RuntimeError):
        torch.ops.depthwise_inline.grad_weight(grad_out, image(), 3, 3, *geometry, False, True)
    with pytest.raises(RuntimeError):
        torch.ops.depthwise_inline.gradients(grad_out, image(), filters(), *geometry, False)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("a list", "three strides", "unknown padding")])
def test_operators_reject_bad_input(name):
    """The guards in C++ alone, without the checks of depthwise_conv2d in front."""
    make, options, _ = BAD[name]
    arguments = (*make(), None)[:3]
    pairs = []
    for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = options.get(key, usual)
        if not isinstance(value, (int, tuple)):
            pytest.skip("cannot be said to the operator, whose arguments are ints")
        pairs += [value, value] if isinstance(value, int) else value
    for operator in (torch.ops.depthwise_inline.forward, torch.ops.depthwise_inline.forward_no_autograd):
        with pytest.raises(RuntimeError):
            operator(*arguments, *pairs)
    torch.cuda.synchronize()


# ---- Processes ------------------------------------------------------------------------------------------------------


def run_python(code, timeout=300):
    """A fresh interpreter; its output, or the whole of its complaint."""
    root = str(reference.ROOT)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forked_workers_after_import():
    """A DataLoader that forks, and a forked child that uses the GPU itself: both need an import without a context."""
    out = run_python(
        """
        import torch
        import depthwise_inline
        from torch.utils.data import DataLoader

        assert not torch.cuda.is_initialized()

        class Blurred(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                image = torch.full((1, 3, 6, 6), float(index))
                return depthwise_inline.depthwise_conv2d(image, torch.ones(3, 1, 3, 3))[0]

        def on_the_gpu(queue):
            x, weight = torch.ones(1, 3, 6, 6, device="cuda"), torch.ones(3, 1, 3, 3, device="cuda")
            queue.put(depthwise_inline.depthwise_conv2d(x, weight).sum().item())

        context = torch.multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=on_the_gpu, args=(queue,))
        child.start()
        child.join()
        assert child.exitcode == 0, child.exitcode
        print(queue.get())
        loader = DataLoader(Blurred(), batch_size=4, num_workers=2, multiprocessing_context="fork")
        weight = torch.ones(3, 1, 3, 3, device="cuda")
        print([depthwise_inline.depthwise_conv2d(batch.cuda(), weight).mean().item() for batch in loader])
        """
    )
    assert out.splitlines()[-2:] == ["432.0", str([9 * 9 * 1.5, 9 * 9 * 5.5])]


def test_two_threads_at_first_use():
    """Loading and compiling for the first time from several threads at once."""
    out = run_python(
        """
        import threading
        import torch
        import depthwise_inline

        x, weight = torch.ones(2, 3, 9, 9, device="cuda"), torch.ones(3, 1, 3, 3, device="cuda", requires_grad=True)
        sums, ready = [], threading.Barrier(6)

        def work():
            ready.wait()
            out = depthwise_inline.depthwise_conv2d(x, weight)
            sums.append((out.sum().item(), torch.autograd.grad(out.sum(), weight)[0].sum().item()))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(sums)
        """
    )
    assert out.splitlines()[-1] == str([(2 * 3 * 49 * 9.0, 2 * 3 * 49 * 9.0)] * 6)
