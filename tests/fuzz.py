"""Random depthwise convolutions: draw() makes up a problem, run() computes it, check() compares it with float64.

A draw is named by one number, from which all of it follows. What kernels are compiled for (kernel, stride, dilation,
dtype, layout, a choice of paddings) follows from the number's upper part alone, so that many draws share one
compilation; plan() keeps the number of these within bounds. Anything else that computes convolutions can take the place
of run().
"""

import contextlib
import random
from dataclasses import dataclass
from itertools import count

import reference
import torch
from reference import ALL_DIRECTIONS, DTYPES, GRADIENTS, LAYOUTS, Problem, Tensors
from torch._subclasses import FakeTensorMode

import depthwise_inline

DRAWS_OF_A_CONFIGURATION = 1 << 16
MOST_WORK = {"cpu": 1 << 19, "cuda": 1 << 24}  # multiply-adds of a forward pass
VIEWS = {view.__name__: view for view in reference.VIEWS}
# Of 1 or -1, as the gradient of a sum has it; any other value is rounded to the same side in every addition.
VIEWS["constant"] = lambda t: reference.constant(t.sign())


@dataclass(frozen=True)
class Draw:
    number: int
    problem: Problem
    dtype: torch.dtype
    layout: str
    direction: str
    through: str  # "operator", or depthwise_conv2d and its gradients: "autograd", "autocast" (from float32 weights)
    variant: str | None  # forced on a GPU; None: the automatic choice
    views: tuple[str | None, ...]  # how x, weight, bias and grad_out are stored

    @property
    def line(self):
        """What repeats this draw."""
        return f"python -m pytest tests/test_fuzz.py --fuzz-draw {self.number}"

    def __str__(self):
        named = zip(("x", "weight", "bias", "grad_out"), self.views, strict=True)
        views = [f"{name} {view}" for name, view in named if view]
        forced = [self.variant] if self.variant else []
        return " ".join(
            (str(self.problem), reference.short(self.dtype), self.layout, self.direction, self.through, *views, *forced)
        )


# ---- Drawing


def _pair(drawn, low, high):
    return drawn.randint(low, high), drawn.randint(low, high)


def _size(drawn, most):
    """Small ones as often as large ones, half of them a multiple of the vector widths."""
    size = round(2 ** drawn.uniform(0, most))
    return size if drawn.random() < 0.5 else (size + 7) // 8 * 8


def _configuration(drawn):
    """Kernel, stride, dilation, two paddings to choose from, dtype and layout."""
    kernel = drawn.choices(
        [(3, 3), (5, 5), (7, 7), (1, 1), _pair(drawn, 1, 9), (drawn.randint(10, 31),) * 2, _pair(drawn, 1, 31)],
        weights=(30, 15, 15, 5, 20, 10, 5),
    )[0]
    stride = drawn.choices([(1, 1), (2, 2), _pair(drawn, 1, 4)], weights=(60, 25, 15))[0]
    dilation = drawn.choices([(1, 1), _pair(drawn, 1, 3)], weights=(80, 20))[0]
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    paddings = (reach[0] // 2, reach[1] // 2), (drawn.randint(0, reach[0] + 1), drawn.randint(0, reach[1] + 1))
    dtype = drawn.choices(DTYPES, weights=(40, 30, 20, 10))[0]
    return kernel, stride, dilation, paddings, dtype, drawn.choice(LAYOUTS)


def ways_through(dtype):
    """What a draw of this dtype may go through; autocast is for 16 bits."""
    return ("operator", "autograd", "autocast") if dtype.itemsize == 2 else ("operator", "autograd")


def draw(number, device):
    """The draw of this number: sizes that many networks have, and those at which kernels break."""
    kernel, stride, dilation, paddings, dtype, layout = _configuration(
        random.Random(number // DRAWS_OF_A_CONFIGURATION)
    )
    if device == "cpu" and dtype.itemsize == 2:
        dtype = torch.float32  # PyTorch's CPU kernels accumulate in the half types
    drawn = random.Random(number)
    while True:
        problem = Problem(
            (_size(drawn, 7), _size(drawn, 7)),
            *(kernel, stride, drawn.choice(paddings), dilation),
            batch=drawn.choices((0, 1, 2, 3, 9, drawn.randint(10, 40)), weights=(2, 25, 33, 15, 7, 18))[0],
            channels=_size(drawn, 6),
            multiplier=drawn.choices((1, 2, 3), weights=(80, 15, 5))[0],
            bias=drawn.random() < 0.5,
        )
        work = problem.batch * problem.out_channels * kernel[0] * kernel[1]
        if min(problem.out_image) >= 1 and work * problem.out_image[0] * problem.out_image[1] <= MOST_WORK[device]:
            break
    views = (None,) * 4
    if problem.batch and drawn.random() < 0.4:
        views = tuple(drawn.choice([None, *VIEWS]) for _ in range(4))
    direction, through = drawn.choice(ALL_DIRECTIONS), drawn.choice(ways_through(dtype))
    variant = "general" if drawn.random() < 0.1 else None
    return Draw(number, problem, dtype, layout, direction, through, variant, views)


def make_tensors(draw, device):
    """Inputs of a draw; on the meta device their shapes and strides alone."""
    p = draw.problem
    if device == "meta":

        def empty(*shape):
            return torch.empty(shape, dtype=draw.dtype, device=device)

        def image(shape):
            return empty(*shape).contiguous(memory_format=reference.memory_format(draw.layout))

        bias = empty(p.out_channels) if p.bias else None
        whole = Tensors(image(p.x_shape), empty(*p.weight_shape), bias, image(p.out_shape))
    else:
        generator = torch.Generator(device).manual_seed(draw.number)
        whole = reference.make_tensors(p, draw.dtype, draw.layout, generator)
    views = zip(whole, draw.views, strict=True)
    return Tensors(*(t if t is None or view is None else VIEWS[view](t) for t, view in views))


def specialisations(draw):
    """Names and sources of what a GPU has compiled for a draw."""
    x, weight, bias, grad_out = make_tensors(draw, "meta")
    images = {"forward": (x,), "grad_input": (grad_out,), "grad_weight": (grad_out, x), GRADIENTS: (grad_out, x)}
    others = {"forward": (weight, bias), "grad_input": (weight,), "grad_weight": (), GRADIENTS: ()}

    def is_aligned(t, layout="nchw"):
        """As the operators see it, who copy what is not dense."""
        copied = t is None or not t.is_contiguous(memory_format=reference.memory_format(layout))
        return copied or t.storage_offset() * t.element_size() % 16 == 0

    def choose(direction):
        """Name and source of what a direction runs."""
        by_strides = draw.through != "operator" or direction == "forward"
        layout = reference.forward_layout(x, weight) if by_strides else draw.layout
        aligned = all(is_aligned(t, layout) for t in images[direction]) and all(map(is_aligned, others[direction]))
        with reference.forced(draw.variant):
            float_weight = draw.through == "autocast"
            return reference.select(direction, draw.problem, draw.dtype, layout, aligned, float_weight)

    chosen = [choose(draw.direction), *([choose("forward")] if draw.through != "operator" else [])]
    if draw.direction == GRADIENTS and not chosen[0][1]:  # one after the other
        chosen += [choose("grad_input"), choose("grad_weight")]
    return {name.rpartition("/")[0]: source for name, source in chosen if source}


def plan(first, wanted, configurations, most_specialisations, device, needs=specialisations):
    """`wanted` draws of `configurations` configurations, and what to compile; those that need more are left out."""
    draws, sources = [], {}
    for index in count():
        if len(draws) == wanted:
            return draws, sources
        configuration, rest = (first + index % configurations), index // configurations
        drawn = draw(configuration * DRAWS_OF_A_CONFIGURATION + rest, device)
        needed = needs(drawn)
        if len(sources | needed) <= most_specialisations:
            draws.append(drawn)
            sources |= needed


# ---- Running


def run(draw, tensors):
    """Results by name, computed where the tensors are."""
    with reference.forced(draw.variant) if tensors.x.is_cuda else contextlib.nullcontext():
        if draw.through == "operator":
            return reference.run(draw.direction, draw.problem, tensors, draw.layout)
        asked = {"grad_input": ("x",), "grad_weight": ("weight", "bias"), GRADIENTS: ("x", "weight")}
        wanted = asked.get(draw.direction, ())
        leaves = {name: t.detach() for name, t in vars(tensors).items() if t is not None and name != "grad_out"}
        autocast = draw.through == "autocast"
        if autocast:
            leaves |= {name: reference.as_float(leaves[name]) for name in ("weight", "bias") if name in leaves}
        wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name in wanted]
        with torch.autocast("cuda", draw.dtype) if autocast else contextlib.nullcontext():
            pairs = draw.problem.pairs
            out = depthwise_inline.depthwise_conv2d(leaves["x"], leaves["weight"], leaves.get("bias"), **pairs)
        results = torch.autograd.grad(out, wanted, tensors.grad_out) if wanted else (out,)
        named = dict(zip(reference.result_names(draw.direction, draw.problem), results, strict=True))
        for name in {"grad_weight", "grad_bias"} & set(named) if autocast else ():
            if named[name].dtype is not torch.float32:
                raise RuntimeError(f"{name} of float32 weights is of {named[name].dtype}")
            named[name] = named[name].to(draw.dtype)  # since PyTorch's and what is allowed are of 16 bits
        return named


# ---- Comparing


def check(failures, draw, device, run=run):
    """Add what is wrong with a draw: values against float64 and PyTorch, and what the fake kernels foretell.

    On the CPU a draw computes with the kernels that PyTorch's results are from; then it may have the same bits instead.
    """
    tensors = make_tensors(draw, device)
    expected = reference.expected_results(draw.problem, tensors)
    peer = reference.pytorch_results(draw.problem, tensors)
    names = reference.result_names(draw.direction, draw.problem)
    where = (draw, draw.line)
    with failures.catch(*where):
        if device == "cuda":
            reference.poison(*(peer[name] for name in names))
        with reference.native_pytorch() if device == "cpu" else contextlib.nullcontext():
            results = run(draw, tensors)
        for name in names:
            ours, theirs = results[name], peer[name]
            same_kernel = device == "cpu" and ours.shape == theirs.shape
            same_bits = same_kernel and reference.difference(ours, theirs, draw.dtype) is None
            failures.add(None if same_bits else reference.mismatch(ours, expected[name], theirs), *where, name)
        if draw.through == "operator":
            failures.add(_unforeseen(draw, tensors, results), *where, "fake kernel")


def _unforeseen(draw, tensors, results):
    """None, or how the results differ from those of the fake kernels."""
    with FakeTensorMode() as mode:
        fakes = reference.run(draw.direction, draw.problem, tensors.map(mode.from_tensor), draw.layout)

    def look(t):  # strides count where there is more than one
        strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]
        return tuple(t.shape), t.dtype, t.device, strides

    for name, fake in fakes.items():
        if look(fake) != look(results[name]):
            return f"{name} is {look(results[name])}, foretold {look(fake)}"
    return None
