"""Speed of depthwise_inline beside PyTorch, on the GPU of this machine.

    python bench.py                     headline problem, then the quick cases in float32 and float16
    python bench.py --all --record      every case; writes results/bench_<gpu>.json
    python bench.py --case kb82 --dtype float16 --layout nhwc --direction forward
    python bench.py --random 30         problems that no table lists, drawn anew or by --seed
    python bench.py --model all         training steps of whole networks
    python bench.py --variants          every kernel and tile that can serve (bench_variants.py)
    python bench.py --plot DIR          pictures of what was measured; with --from FILE, of a record
    python bench.py --readme            README tables and pictures from results/*.json

How a number comes about. Times are medians of CUDA event pairs around single calls. Before each call a buffer larger
than the L2 cache is written, so every call reads its tensors from memory; the queue of calls is filled ahead of the
GPU, so host time does not enter. Ours and PyTorch take turns in the same process. PyTorch runs with its defaults,
cudnn.benchmark off and on; its better mode counts. GB/s counts input and output once, plus the weights, whatever a
kernel really moves. The limits they are compared with are the bandwidth of a 1 GiB copy and the rate of a large matrix
product, timed in the same way. Every result is compared with float64 before it is timed: its largest error may be
twice PyTorch's, or one rounding of the largest value. A network's training step is timed by the wall, in rounds in
which copies of it and of the replaced one take turns, and as a CUDA graph, in which the host has no part.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench_report as report
import compiler_report
import depthwise_inline
from bench_models import NETWORKS, Network
from bench_report import DIRECTIONS, GRADIENTS, LOSS, Case

DTYPES = {name: getattr(torch, name) for name in report.DTYPES}
LAYOUTS = dict(zip(report.LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True))
QUICK_DTYPES = ("float32", "float16")  # PyTorch's best ones: in bfloat16 it is slower than in float16
IMAGE_SIZE = 224  # of the networks' images

FLUSH_BYTES = 256 << 20  # at least twice the L2 cache of every GPU so far (H100: 50 MB)
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
MEASURED_MS = 20.0  # aimed at for each call of a row
MIN_REPS, MAX_REPS, ROUNDS = 10, 100, 5
SLOW_MS, SLOW_REPS = 50.0, 5  # calls beyond SLOW_MS are repeated SLOW_REPS times
# Of the training steps of a network, whose time the host decides more often than the GPU. A host drifts, and equal
# networks differ by up to 7% (EfficientNet-B0, bfloat16, a host of an H100): so rounds are short and many, there are
# several copies of each network, a round has one of them, and who is first changes.
STEPS_MS, STEP_ROUNDS, COPIES = 100.0, 36, 3
LEAD_CYCLES = 4_000_000  # about 2 ms in which the host runs ahead
CHUNK_ELEMENTS = 1 << 25  # float64 references are computed in pieces of this many elements
# Too small to keep a GPU busy, so that the host's times show.
HOST_PROBLEM = Case("host", "none", "none", False, 1, 8, 8, 8, kernel_h=3, kernel_w=3, stride=1, padding=1, dilation=1)


class Model(nn.Module):
    """The reference: KernelBench level 1, problem 82."""

    def __init__(self, in_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, bias: bool = False):
        super().__init__()
        self.conv2d = nn.Conv2d(in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)


# ---- operations
class Problem:
    """The operands of one case, dtype and direction in both layouts, and the functions to compare on them."""

    def __init__(self, case: Case, dtype: torch.dtype, direction: str, device: torch.device | str = "cuda"):
        self.case, self.dtype, self.direction = case, dtype, direction
        generator = torch.Generator(device).manual_seed(0)

        def random(shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        weight = random(case.weight_shape) / math.sqrt(case.kernel_h * case.kernel_w)
        x = random(case.x_shape)
        grad = random(case.out_shape) if direction != "forward" else None
        self.x, self.weight, self.grad = (
            {name: None if t is None else t.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}
            for t in (x, weight, grad)
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The directions that are computed."""
        return DIRECTIONS[1:] if self.direction == GRADIENTS else (self.direction,)

    def pytorch(self, layout: str) -> tuple[Tensor, ...]:
        """The parts, by PyTorch's own operator, in the modes its backend flags select."""
        return _convolution(self.case, self.parts, self.x[layout], self.weight[layout], self.grad[layout])

    def apart(self, layout: str) -> tuple[Tensor, ...]:
        """The parts, by this project's operators for each of them."""
        return tuple(self._ours(part, layout) for part in self.parts)

    def ours(self, layout: str) -> tuple[Tensor, ...]:
        """The same from this project's operator for the direction."""
        if self.direction != GRADIENTS:
            return (self._ours(self.direction, layout),)
        case, s, d = self.case, self.case.stride, self.case.dilation
        tensors = self.grad[layout], self.x[layout], self.weight[layout]
        last = case.is_channels_last(layout)
        return torch.ops.depthwise_inline.gradients.default(*tensors, s, s, *case.paddings, d, d, last)

    def _ours(self, direction: str, layout: str) -> Tensor:
        case, x, weight, grad = self.case, self.x[layout], self.weight[layout], self.grad[layout]
        s, p, d = case.stride, case.paddings, case.dilation
        if direction == "forward":
            return depthwise_inline.depthwise_conv2d(x, weight, None, (s, s), p, (d, d))
        last = case.is_channels_last(layout)
        ops = torch.ops.depthwise_inline
        if direction == "grad_input":
            return ops.grad_input.default(grad, weight, case.h, case.w, s, s, *p, d, d, last)
        return ops.grad_weight.default(grad, x, case.kernel_h, case.kernel_w, s, s, *p, d, d, last, False)[0]

    def errors(self, results: Sequence[Tensor], direction: str) -> list[float]:
        """Largest error of each result of a direction against float64, relative to the largest reference value.

        NaN where a result holds NaN or has the wrong shape. In pieces of the batch, to bound the memory.
        """
        case = self.case
        x, weight, grad = self.x["nchw"], self.weight["nchw"].double(), self.grad["nchw"]
        largest = torch.zeros((), dtype=torch.float64, device=weight.device)
        worst = torch.zeros(len(results), dtype=torch.float64, device=weight.device)
        total = torch.zeros_like(weight)
        shapes = {"forward": case.out_shape, "grad_input": case.x_shape, "grad_weight": case.weight_shape}
        shape = shapes[direction]
        wrong = [i for i, result in enumerate(results) if tuple(result.shape) != shape]

        def compare(reference: Tensor, pieces: Iterable[Tensor]) -> None:
            nonlocal largest
            largest = torch.maximum(largest, reference.abs().amax())
            for i, piece in enumerate(pieces):
                if i not in wrong:
                    worst[i] = torch.maximum(worst[i], (piece.double() - reference).abs().amax())

        step = max(1, CHUNK_ELEMENTS // (math.prod(case.x_shape[1:]) + math.prod(case.out_shape[1:])))
        for begin in range(0, case.n, step):
            part = slice(begin, begin + step)
            part_grad = None if grad is None else grad[part].double()
            (reference,) = _convolution(case, (direction,), x[part].double(), weight, part_grad)
            if direction == "grad_weight":
                total += reference
            else:
                compare(reference, (result[part] for result in results))
        if direction == "grad_weight":
            compare(total, results)
        worst[wrong] = math.nan
        return (worst / largest).tolist()


def _convolution(
    case: Case, directions: Sequence[str], x: Tensor, weight: Tensor, grad: Tensor | None
) -> tuple[Tensor, ...]:
    """PyTorch's results: of forward, or of one gradient or both."""
    if directions == ("forward",):
        return (torch.ops.aten.convolution.default(x, weight, None, *case.convolution_arguments()),)
    mask = [*(direction in directions for direction in DIRECTIONS[1:]), False]
    backward = torch.ops.aten.convolution_backward.default
    grads = backward(grad, x, weight, None, *case.convolution_arguments(), mask)
    return tuple(itertools.compress(grads, mask))


def selected(case: Case, dtype: torch.dtype, layout: str, direction: str) -> tuple[str, str]:
    """The name of the variant that serves a case, and the source of its specialisation."""
    return depthwise_inline._select(direction, dtype, case.is_channels_last(layout), case.sizes())


# ---- timing
def spread_of(times: Sequence[float]) -> float:
    """Half the distance from the 10th to the 90th percentile, as a share of the median."""
    ordered, last = sorted(times), len(times) - 1
    return (ordered[round(0.9 * last)] - ordered[round(0.1 * last)]) / 2 / statistics.median(times)


@dataclass
class Call:
    """A function to time, the state of torch.backends.cudnn.benchmark it runs in, and its times in milliseconds."""

    run: Callable[[], Any]
    benchmark: bool = False
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        return spread_of(self.times)


def repetitions(milliseconds: float) -> int:
    """How often to time a call of this length."""
    if milliseconds > SLOW_MS:
        return SLOW_REPS
    return max(MIN_REPS, min(MAX_REPS, math.ceil(MEASURED_MS / max(milliseconds, 1e-6))))


class Stopwatch:
    """Times calls on the GPU, the L2 cache flushed before each.

    cuDNN's choice of algorithm is cached for each thread, under a key without cudnn.benchmark: the mode that runs
    first would decide for both. So calls with the flag on run in a thread of their own.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.worker = ThreadPoolExecutor(max_workers=1)

    def once(self, call: Call) -> Any:
        """Runs the call once, untimed, and returns its result; errors of the GPU are raised here."""
        return self._in_mode(call, lambda: (call.run(), torch.cuda.synchronize())[0])

    def time(self, calls: Sequence[Call]) -> None:
        """Fills the calls' times, in rounds in which they take turns. Each call has run once before."""
        reps = [repetitions(min(self._in_mode(call, lambda call=call: self._sample(call, 2)))) for call in calls]
        for round_idx in range(ROUNDS):
            for call, count in zip(calls, reps, strict=True):
                share = count * (round_idx + 1) // ROUNDS - count * round_idx // ROUNDS
                call.times += self._in_mode(call, lambda call=call, share=share: self._sample(call, share))

    def _in_mode(self, call: Call, function: Callable[[], Any]) -> Any:
        torch.backends.cudnn.benchmark = call.benchmark
        try:
            return self.worker.submit(function).result() if call.benchmark else function()
        finally:
            torch.backends.cudnn.benchmark = False

    def _sample(self, call: Call, count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        torch.cuda._sleep(LEAD_CYCLES)
        for start, end in events:
            self.flush.zero_()
            start.record()
            call.run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def copy_of(moved: int, device: torch.device | str = "cuda") -> Call:
    """A copy that moves so many bytes, half of them read and half written."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Call(lambda: target.copy_(source))


def copy_bandwidth(watch: Stopwatch) -> float:
    """Bytes read and written a second by copying COPY_BYTES, in TB/s."""
    call = copy_of(2 * COPY_BYTES)
    watch.once(call)
    watch.time([call])
    return round(2 * COPY_BYTES / call.median / 1e9, 4)


def matmul_rates(watch: Stopwatch) -> dict[str, float]:
    """TFLOP/s of a large square matrix product in each dtype, without TF32."""
    rates = {}
    for name, dtype in DTYPES.items():
        left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=dtype) for _ in range(2))
        call = Call(functools.partial(torch.mm, left, right))
        watch.once(call)
        watch.time([call])
        rates[name] = round(2 * MATMUL_SIZE**3 / call.median / 1e9, 1)
    return rates


def host_times(calls: int = 200, loops: int = 15) -> dict[str, float]:
    """Host microseconds a call on a problem too small to keep the GPU busy; _train is forward and backward."""
    case = HOST_PROBLEM
    x = torch.randn(case.n, case.c, case.h, case.w, device="cuda")
    weight = torch.randn(case.c, 1, case.kernel_h, case.kernel_w, device="cuda")
    x_grad, weight_grad = x.clone().requires_grad_(), weight.clone().requires_grad_()
    grad = torch.randn_like(x)
    one = (1, 1)

    def conv2d(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, one, one, one, case.c)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_inline.depthwise_conv2d(x, weight, None, one, one, one)

    def forward(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(calls):
                function(x, weight)

    def train(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        with torch.enable_grad():
            for _ in range(calls):
                torch.autograd.grad(function(x_grad, weight_grad), (x_grad, weight_grad), grad)

    samples: dict[str, list[float]] = {}
    for loop_idx in range(loops + 1):
        for suffix, run in (("forward", forward), ("train", train)):
            for name, function in (("conv2d", conv2d), ("ours", ours)):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                run(function)
                elapsed = time.perf_counter() - begin
                if loop_idx:  # the first loop warms up
                    samples.setdefault(f"{name}_{suffix}", []).append(elapsed / calls * 1e6)
    torch.cuda.synchronize()
    return {name: round(statistics.median(values), 2) for name, values in samples.items()}


# ---- table
def measure(problem: Problem, layouts: Sequence[str], watch: Stopwatch) -> list[dict[str, Any]]:
    """The rows of one problem, one for each layout asked for; a row that failed holds 'failed' instead of times."""
    case, dtype = problem.case, problem.dtype
    rows = [
        {
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            "direction": problem.direction,
            "bytes": case.bytes(dtype.itemsize, at_once=len(problem.parts) > 1),
            "flops": case.flops() * len(problem.parts),
        }
        for layout in layouts
    ]
    pytorch = {
        (layout, benchmark): Call(lambda layout=layout: problem.pytorch(layout), benchmark)
        for layout in LAYOUTS
        for benchmark in (False, True)
    }
    ours = {layout: Call(lambda layout=layout: problem.ours(layout)) for layout in layouts}
    apart = {layout: Call(lambda layout=layout: problem.apart(layout)) for layout in layouts if len(problem.parts) > 1}

    for key, call in list(pytorch.items()):
        try:
            watch.once(call)
        except RuntimeError as error:
            print(f"  PyTorch, {key[0]}, cudnn.benchmark={key[1]}: {first_line(error)}", flush=True)
            del pytorch[key]
    results = {}
    for row in rows:
        layout = row["layout"]
        try:
            row["variant"] = selected(case, dtype, layout, problem.direction)[0]
            if not any(key[0] == layout for key in pytorch):
                raise RuntimeError("PyTorch itself fails in this layout")
            results[layout] = results_of(problem, layout, watch)
        except Exception as error:  # whatever it is, the other rows are still measured
            row["failed"] = first_line(error)
    for index, part in enumerate(problem.parts if results else ()):
        # Together, as the reference takes longer than all of them.
        errors = problem.errors([result[index] for pair in results.values() for result in pair], part)
        checked = dict(zip(results, zip(errors[::2], errors[1::2], strict=True), strict=True))
        for row in (row for row in rows if "failed" not in row):
            row["error"], row["pytorch_error"] = checked[row["layout"]]
            if not row["error"] <= allowed_error(problem, row["pytorch_error"]):
                row["failed"] = (
                    f"RuntimeError: wrong result: error {row['error']:.2e} against float64, "
                    f"PyTorch's {row['pytorch_error']:.2e}"
                )
    results.clear()
    for row in rows:
        if "failed" in row:
            del ours[row["layout"]]
            apart.pop(row["layout"], None)

    if ours:
        torch.cuda.empty_cache()
        copy = copy_of(rows[0]["bytes"], problem.x["nchw"].device)
        for call in (copy, *apart.values()):
            watch.once(call)
        watch.time([*ours.values(), *apart.values(), *pytorch.values(), copy])
    for row in rows:
        if "failed" not in row:
            call = ours[row["layout"]]
            row["copy_ms"] = copy.median
            row["ours_ms"], row["ours_spread"] = call.median, call.spread
            if apart:
                row["apart_ms"] = apart[row["layout"]].median
            row["pytorch_ms"] = min(other.median for key, other in pytorch.items() if key[0] == row["layout"])
            row["pytorch_any_layout_ms"] = min(other.median for other in pytorch.values())
    return rows


def results_of(problem: Problem, layout: str, watch: Stopwatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Our results and PyTorch's; raises where one of ours lies in memory as it should not."""
    ours = watch.once(Call(lambda: problem.ours(layout)))
    for part, result in zip(problem.parts, ours, strict=True):
        if part != "grad_weight" and not result.is_contiguous(memory_format=LAYOUTS[layout]):
            raise RuntimeError(f"wrong layout: the result's strides are {result.stride()}")
    return ours, pytorch_result(problem, layout, watch)


def pytorch_result(problem: Problem, layout: str, watch: Stopwatch) -> tuple[Tensor, ...]:
    """PyTorch's own results without TF32, which its convolutions may use by default."""
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return watch.once(Call(lambda: problem.pytorch(layout)))
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32


def allowed_error(problem: Problem, error_pytorch: float) -> float:
    """Twice PyTorch's own error in the same dtype; one rounding of the largest value always."""
    return max(2 * error_pytorch, torch.finfo(problem.dtype).eps)


def memory_needed(case: Case, dtype: torch.dtype) -> int:
    """A generous guess at the bytes of GPU memory that a row takes: operands and results in both layouts, a copy."""
    return 6 * case.bytes(dtype.itemsize) + 10 * 8 * CHUNK_ELEMENTS + FLUSH_BYTES


HEADER = (
    f"{'case':<13} {'dtype':<8} {'layout':<6} {'direction':<11} {'variant':<50} {'ours ms':>9} {'spread':>7} "
    f"{'PyTorch':>9} {'any lay.':>9} {'speedup':>8} {'GB/s':>6} {'TFLOP/s':>8} {'of copy':>8}"
)


def slower(speedup: float) -> str:
    """Marks a loss in a table."""
    return "  slower" if speedup < LOSS else ""


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def format_identity(row: dict[str, Any]) -> str:
    return f"{row['case']:<13} {row['dtype']:<8} {row['layout']:<6} {row['direction']:<11} "


def format_row(row: dict[str, Any], copy_tbps: float) -> str:
    head = format_identity(row)
    if "failed" in row:
        return head + f"FAILED: {row['failed']}"
    ms = row["ours_ms"]
    rate, speedup = row["bytes"] / ms / 1e6, row["pytorch_ms"] / ms
    return (
        head + f"{row['variant']:<50} {ms:9.4f} {row['ours_spread']:7.1%} {row['pytorch_ms']:9.4f} "
        f"{row['pytorch_any_layout_ms']:9.4f} {speedup:7.2f}x {rate:6.0f} {row['flops'] / ms / 1e9:8.2f} "
        f"{rate / copy_tbps / 1000:8.1%}{slower(speedup)}"
    )


# ---- models
def measure_models(names: Sequence[str], save: Callable[[Sequence[dict[str, Any]]], None]) -> int:
    """Training steps of networks, random weights and images, before and after replace_depthwise; saves as it goes.

    Returns the number of failures.
    """
    networks, sources, failed = [], {}, 0
    for network in (NETWORKS[name] for name in names):
        try:
            sources |= specialisations(network)
        except RuntimeError as error:
            print(f"{network.title} is left out: {error}", flush=True)
            failed += 1
        else:
            networks.append(network)
    depthwise_inline._obtain_all(sources)
    print(
        f"\nforward and backward at {IMAGE_SIZE}x{IMAGE_SIZE}, bfloat16 under autocast, cudnn.benchmark on, "
        "milliseconds of wall time a step; then of a step as a CUDA graph"
    )
    columns = f"{'PyTorch':>9} {'ours':>9} {'speedup':>8}"
    print(f"{'model':<16} {'batch':>5} {'precision':<10} {'layout':<6} {columns}   {columns}")
    models: list[dict[str, Any]] = []
    for network in networks:
        for precision, layout in itertools.product(network.precisions, LAYOUTS):
            print(f"{network.title:<16} {network.batch:>5} {precision:<10} {layout:<6} ", end="", flush=True)
            try:
                torch.cuda.empty_cache()
                model = measure_model(network, precision, layout)
            except Exception as error:  # whatever it is, the other rows are still measured
                print(f"FAILED: {first_line(error)}", flush=True)
                failed += 1
            else:
                models.append(model)
                kinds = [kind for kind in ("step", "graph") if f"ours_{kind}_ms" in model]
                pairs = [(model[f"pytorch_{kind}_ms"], model[f"ours_{kind}_ms"]) for kind in kinds]
                texts = [f"{before:9.2f} {after:9.2f} {before / after:7.2f}x" for before, after in pairs]
                print("   ".join(texts) + slower(min(before / after for before, after in pairs)), flush=True)
                save(models)
    return failed


def specialisations(network: Network) -> dict[str, str]:
    """The sources of all that a network's rows want compiled."""
    with torch.device("meta"):
        model = depthwise_inline.replace_depthwise(network.build())
    problems = depthwise_inline._problems(model, (network.batch, 3, IMAGE_SIZE, IMAGE_SIZE))
    variants = {}
    for precision, layout, problem in itertools.product(network.precisions, LAYOUTS, sorted(set(problems))):
        variants |= depthwise_inline._wanted(*problem, DTYPES[precision], layout == "nhwc")
    return {name.rpartition("/")[0]: source for name, source in variants.items() if source}


def difference(before: nn.Module, after: nn.Module, images: Tensor) -> float:
    """The largest difference of two networks' outputs, relative to the largest output."""
    with torch.no_grad():
        expected, actual = before(images).double(), after(images).double()
    return ((expected - actual).abs().amax() / expected.abs().amax()).item()


def measure_model(network: Network, precision: str, layout: str, device: str = "cuda") -> dict[str, Any]:
    """One row of the network table; raises when the replaced network computes something else."""
    torch.manual_seed(0)
    with torch.device(device):
        before = network.build().to(memory_format=LAYOUTS[layout])
    after = depthwise_inline.replace_depthwise(copy.deepcopy(before))
    images = torch.randn(network.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, (network.batch,), device=device)
    # Each weight is cast once a step, so the cache of casts, which a CUDA graph must not see, would have no hits.
    enabled = precision != "float32"
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    def steps_ms(run: Callable[[], None], count: int) -> float:
        """Milliseconds of one of `count` training steps."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count * 1e3

    def count_of(run: Callable[[], None]) -> int:
        return max(1, round(STEPS_MS / steps_ms(run, 1)))

    def graph_ms(model: nn.Module) -> float:
        """Milliseconds of a step as a CUDA graph: what the GPU needs, whatever the host."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model)
        count = count_of(graph.replay)
        times = [steps_ms(graph.replay, count) for _ in range(ROUNDS)]
        model.zero_grad(set_to_none=True)
        return round(statistics.median(times), 3)

    torch.backends.cudnn.benchmark = True
    try:
        with autocast:
            error = difference(before.eval(), after.eval(), images)
        if not error <= (1e-3 if precision == "float32" else 5e-2):
            raise RuntimeError(f"the outputs differ by {error:.1e} after replace_depthwise")
        networks = {"pytorch": before.train(), "ours": after.train()}
        copies = [networks, *(copy.deepcopy(networks) for _ in range(COPIES - 1))]
        every = [model for pair in copies for model in pair.values()]
        for model in every:
            steps_ms(functools.partial(step, model), 1)  # cuDNN searches its algorithms, PyTorch's allocator grows
        counts = {name: count_of(functools.partial(step, model)) for name, model in networks.items()}
        samples: dict[str, list[float]] = {name: [] for name in networks}
        for round_idx in range(STEP_ROUNDS):
            pair = copies[round_idx % COPIES]
            for name in reversed(pair) if round_idx % 2 else pair:
                samples[name].append(steps_ms(functools.partial(step, pair[name]), counts[name]))
        walls = {
            f"{name}_step_{what}": round(of(times), 3)
            for name, times in samples.items()
            for what, of in (("ms", statistics.median), ("spread", spread_of))
        }
        for model in every:
            model.zero_grad(set_to_none=True)
        graphs = {}
        if device == "cuda":
            torch.cuda.empty_cache()
            graphs = {f"{name}_graph_ms": graph_ms(model) for name, model in networks.items()}
    finally:
        torch.backends.cudnn.benchmark = False
    return {
        "model": network.title,
        "batch": network.batch,
        "layout": layout,
        "precision": precision,
        **walls,
        **graphs,
    }


# ---- main
def print_machine() -> None:
    """What the numbers below are valid for."""
    print(
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    )
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        print(
            f"{gpu.name}: compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB, driver {driver_version()}"
        )
    print(depthwise_inline.status(), flush=True)


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def machine() -> dict[str, str]:
    """The GPU, the versions and the sources that a record is valid for."""
    return {
        "sources_sha256": report.sources_sha256(),
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def check_model_new(case: Case, device: str, batch: int) -> None:
    """Compares ModelNew with the reference on the headline problem; raises when they differ."""
    arguments = case.c, case.kernel_h, case.stride, case.padding
    torch.manual_seed(0)
    reference = Model(*arguments)
    torch.manual_seed(0)
    ours = depthwise_inline.ModelNew(*arguments)
    theirs_state, ours_state = reference.state_dict(), ours.state_dict()
    if list(theirs_state) != list(ours_state) or not all(
        torch.equal(theirs_state[k], ours_state[k]) for k in ours_state
    ):
        raise RuntimeError("ModelNew and the reference differ in their weights under one seed")
    reference, ours = reference.to(device), ours.to(device)
    x = torch.rand(batch, *case.x_shape[1:], device=device)
    with torch.no_grad():
        expected, actual = reference(x), ours(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    print(
        f"ModelNew gives the reference's result on {device}: x = rand{tuple(x.shape)}, kernel {case.kernel_h}, "
        f"largest difference {(actual - expected).abs().max().item():.1e}",
        flush=True,
    )


def print_compiler_report(cases: Sequence[Case], args: argparse.Namespace) -> int:
    """Builds the operator library, then compiles it and the specialisations of the cases once more for their report.

    Returns the number of failures; a machine without a compiler is none.
    """
    try:
        depthwise_inline._find_compiler()
        depthwise_inline._cxx_command()
        depthwise_inline._ninja_folder()
    except depthwise_inline.BuildError as error:
        print(f"The kernels were not compiled: {error}")
        return 0
    wanted = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    architecture = "sm_" + re.sub(r"\D", "", re.split("[ ,;]", wanted)[0])
    begin = time.perf_counter()
    try:
        depthwise_inline.precompile()
        print(f"\noperator library for {wanted} ready in {time.perf_counter() - begin:.1f} s")
        sources: dict[str, str | None] = {"operators": None}
        for case, direction in itertools.product(cases, directions_of(args)):
            for dtype, layout in itertools.product(args.dtype, args.layout):
                name, source = selected(case, DTYPES[dtype], layout, direction)
                if source:
                    sources.setdefault(name.rpartition("/")[0], source)
        print(f"compiling for {architecture}; registers and bytes of each kernel:")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            texts = [None if source is None else [source] for source in sources.values()]
            results = pool.map(functools.partial(compiler_report.compile_for, architecture), texts)
            for number, (name, result) in enumerate(zip(sources, results, strict=True), 1):
                print(f"{name}: {len(result.kernels)} kernels in {result.seconds:.1f} s ({number}/{len(sources)})")
                for kernel in result.kernels:
                    print(
                        f"  {kernel.registers:>4} registers {kernel.spill_bytes:>5} spilled "
                        f"{kernel.shared_bytes:>6} shared  {kernel.name}",
                        flush=True,
                    )
    except depthwise_inline.BuildError as error:
        print(f"FAILED: {error}")
        return 1
    return 0


def without_gpu(headline: Case, chosen: Sequence[Case], args: argparse.Namespace) -> int:
    """What can be shown without a GPU: the result on the CPU, and what the compiler makes of the kernels."""
    check_model_new(headline, "cpu", batch=1)
    print(f"(batch 1 instead of {headline.n}: on the CPU, ModelNew is F.conv2d)")
    failures = 0
    if args.no_compile:
        print("The kernels were not compiled: --no-compile was given.")
    else:
        failures = print_compiler_report(chosen, args)
    if torch.version.cuda is None:  # for the CPU alone, or for ROCm
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    else:
        reason = "PyTorch finds no NVIDIA GPU (torch.cuda.is_available() is False)"
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            reason += f"; CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    print(f"Speed was not measured: {reason}.")
    return failures


def directions_of(args: argparse.Namespace) -> list[str]:
    """What is asked for; with both gradients, both at once too."""
    return [*args.direction, *([GRADIENTS] if set(DIRECTIONS[1:]) <= set(args.direction) else [])]


def groups_that_fit(cases: Sequence[Case], args: argparse.Namespace) -> list[tuple[Case, str, str]]:
    """Case, dtype and direction of what is asked for; says what is left out, as the GPU's memory cannot hold it."""
    memory = torch.cuda.get_device_properties(0).total_memory
    groups = []
    for case, dtype in itertools.product(cases, args.dtype):
        needed = memory_needed(case, DTYPES[dtype])
        if needed < 0.9 * memory:
            of_case = [(case, dtype, direction) for direction in directions_of(args)]
            groups += [group for group in of_case if layouts_of(group, args.layout)]
        else:
            print(f"{case.name} {dtype} is left out: it needs about {needed / 2**30:.0f} GiB of GPU memory")
    return groups


def layouts_of(group: tuple[Case, str, str], layouts: Sequence[str]) -> list[str]:
    """The layouts in which a group is measured: both gradients at once where a kernel computes them so."""
    case, dtype, direction = group
    if direction != GRADIENTS:
        return list(layouts)
    return [layout for layout in layouts if selected(case, DTYPES[dtype], layout, direction)[0] != "general"]


def compile_all(groups: Sequence[tuple[Case, str, str]], layouts: Sequence[str], headline: Case) -> None:
    """What the groups need, a process a core; with it what the headline problem and the host's times need."""
    others = [(headline, "float32", "forward"), *((HOST_PROBLEM, "float32", direction) for direction in DIRECTIONS)]
    wanted = [(group, layout) for group in groups for layout in layouts_of(group, layouts)]
    wanted += [(other, "nchw") for other in others]
    found = [selected(case, DTYPES[dtype], layout, direction) for (case, dtype, direction), layout in wanted]
    depthwise_inline._obtain_all({name.rpartition("/")[0]: source for name, source in found if source})


def run_table(
    groups: Sequence[tuple[Case, str, str]],
    args: argparse.Namespace,
    watch: Stopwatch,
    copy_tbps: float,
    save: Callable[[Sequence[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measures and prints the rows, each as soon as it is known; saves as it goes."""
    print(f"\n{'':>9}{HEADER}")
    rows: list[dict[str, Any]] = []
    layouts = [layouts_of(group, args.layout) for group in groups]
    for (case, dtype, direction), of_group in zip(groups, layouts, strict=True):
        try:
            torch.cuda.empty_cache()
            with torch.no_grad():
                new = measure(Problem(case, DTYPES[dtype], direction), of_group, watch)
        except Exception as error:  # whatever it is, the other rows are still measured
            identity = {"case": case.name, "dtype": dtype, "direction": direction}
            new = [{**identity, "layout": layout, "failed": first_line(error)} for layout in of_group]
        for row in new:
            rows.append(row)
            print(f"{len(rows):>4}/{sum(map(len, layouts)):<4}{format_row(row, copy_tbps)}", flush=True)
        save(rows)
    return rows


def drawing() -> Callable[[dict[str, Any], Path], list[Path]]:
    """The function that draws a record; raises where matplotlib is missing."""
    import bench_plot

    return bench_plot.draw


def with_gpu(cases: dict[str, Case], chosen: Sequence[Case], args: argparse.Namespace) -> int:
    """The main job: the check of ModelNew, then the table or the networks. Returns the number of failures."""
    begin = time.perf_counter()
    draw = drawing() if args.plot else None
    info = machine()
    headline = cases[report.HEADLINE]
    groups = [] if args.model or args.variants is not None else groups_that_fit(chosen, args)
    if args.variants is None:
        compile_all(groups, args.layout, headline)
    check_model_new(headline, "cuda", headline.n)
    watch = Stopwatch()
    speeds = {"copy_tbps": copy_bandwidth(watch), "matmul_tflops": matmul_rates(watch), "host_us": host_times()}
    print(f"copy bandwidth {speeds['copy_tbps']:.2f} TB/s, read and written")
    print("matrix product, TFLOP/s: " + ", ".join(f"{k} {v:.0f}" for k, v in speeds["matmul_tflops"].items()))
    print("host microseconds a call: " + ", ".join(f"{k} {v:.1f}" for k, v in speeds["host_us"].items()))
    path = report.record_path(info["gpu"])
    old = json.loads(path.read_text()) if args.record and path.exists() else None
    record = None

    def save(rows: Sequence[dict[str, Any]] = (), models: Sequence[dict[str, Any]] = ()) -> None:
        nonlocal record
        if args.json:
            report.write_json(args.json, report.make_record(info, speeds, rows, models))
        record = report.make_record(info, speeds, rows, models, old)
        if args.record:
            report.write_json(path, record)

    def save_variants(rows: Sequence[dict[str, Any]]) -> None:
        if args.json:
            report.write_json(args.json, {**info, **speeds, "variants": rows})

    if args.model:
        failures = measure_models(args.model, lambda models: save(models=models))
    elif args.variants is not None:
        import bench_variants  # which imports this file

        failures = bench_variants.run(chosen, args, watch, speeds["copy_tbps"], save_variants)
    else:
        rows = run_table(groups, args, watch, speeds["copy_tbps"], save)
        failures = sum("failed" in row for row in rows)
        print(f"\n{report.format_means(rows, cases)}")
    if record and draw:
        for picture in draw(record, args.plot):
            print(f"drew {picture}")
    if record and args.record:
        print(f"recorded in {path.relative_to(report.ROOT)}; python bench.py --readme brings it into the README")
    print(f"{failures} failures, {time.perf_counter() - begin:.0f} s")
    return failures


def positive(text: str) -> int:
    """A number of at least 1, for the command line."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser(cases: Iterable[str]) -> argparse.ArgumentParser:
    """The command line; `cases` are the names that --case takes."""
    result = argparse.ArgumentParser(description="Speed of depthwise_inline beside PyTorch.")
    add = result.add_argument
    which = result.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the headline problem and a case a family (the default)")
    which.add_argument("--all", action="store_true", help="every case")
    which.add_argument("--case", nargs="+", choices=cases, metavar="NAME", help=f"of {', '.join(cases)}")
    which.add_argument("--random", type=positive, metavar="COUNT", help="as many problems that no table lists")
    add("--seed", type=int, help="of --random; default: another in every run")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help=f"default: all; of a quick or random run {' and '.join(QUICK_DTYPES)}",
    )
    add("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    add("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="default: all")
    add("--model", nargs="+", choices=[*NETWORKS, "all"], help="training steps of these networks, not the table")
    add("--variants", nargs="*", metavar="TILE", help="every kernel and tile that can serve, or these; not the table")
    add("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    add("--record", action="store_true", help="write results/bench_<gpu>.json; what it holds of the same sources stays")
    add("--plot", type=Path, metavar="DIR", help="draw what was measured into DIR; needs matplotlib")
    add("--from", dest="source", type=Path, metavar="FILE", help="draw this record instead of measuring")
    add("--readme", action="store_true", help="write the README's tables and pictures from results/*.json and stop")
    add("--no-compile", action="store_true", help="without a GPU: do not compile the kernels")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    cases = report.load_cases()
    command_line = parser(cases)
    args = command_line.parse_args(argv)
    if args.source and not args.plot:
        command_line.error("--from names the record that --plot DIR draws: give both")
    if args.variants is not None and (args.record or args.plot or args.model):
        command_line.error("--variants measures what is not selected: not with --record, --plot or --model")
    if args.seed is not None and not args.random:
        command_line.error("--seed draws the problems of --random COUNT: give both")
    if args.random and (args.record or args.plot or args.model):
        command_line.error("--random measures what no table lists: not with --record, --plot or --model")
    if args.model and "all" in args.model:
        args.model = list(NETWORKS)
    args.dtype = args.dtype or list(DTYPES if args.all or args.case else QUICK_DTYPES)
    if args.random:
        seed = random.randrange(1 << 31) if args.seed is None else args.seed
        drawn = report.random_cases(args.random, seed)
        cases, chosen = cases | drawn, list(drawn.values())
        print(f"random problems, --seed {seed}", *(f"{case.name}: {case.describe()}" for case in chosen), sep="\n  ")
    elif args.case:
        chosen = [cases[name] for name in args.case]
    else:
        chosen = [case for case in cases.values() if args.all or case.quick]
    try:
        if args.readme:
            write_readme(cases)
            return 0
        if args.source:
            for picture in drawing()(report.load_record(args.source), args.plot):
                print(f"drew {picture}")
            return 0
        has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
        if args.plot and not has_gpu:
            raise RuntimeError("--plot draws what is measured, and there is no GPU; --from FILE draws a record instead")
        print_machine()
        failures = with_gpu(cases, chosen, args) if has_gpu else without_gpu(cases[report.HEADLINE], chosen, args)
        return 1 if failures else 0
    except (RuntimeError, AssertionError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def write_readme(cases: dict[str, Case]) -> None:
    """The README's tables, the pictures that it shows and the pages of all rows."""
    records = report.load_records()
    for record in records:
        if record["rows"]:
            drawing()(record, report.RESULTS)
            report.table_path(record, report.RESULTS).write_text(report.table(record))
    report.README.write_text(report.update_readme(report.README.read_text(), records, cases))


if __name__ == "__main__":
    sys.exit(main())
