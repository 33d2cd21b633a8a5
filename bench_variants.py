"""Every kernel and tile that can serve a problem, timed side by side: what the numbers in kernels/select*.h come from.

    python bench.py --case convnext_56 --dtype float16 --variants
    python bench.py --all --direction grad_weight --variants weight_x4g4 weight_x2g2 --json FILE

The fastest first; the one that is selected is marked, and the end tells where it is not the fastest. Problems and
stopwatch are those of the table, and each result is held to twice PyTorch's own error before it is timed. The general
kernel takes part where it is named.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import bench
import depthwise_inline
from bench_report import GRADIENTS, ROW_IDENTITY, Case, geometric_mean

NOISE = 1.03  # a selected variant slower than the fastest by less than this is as good

HEADER = (
    f"{'case':<13} {'dtype':<8} {'layout':<6} {'direction':<11} {'variant':<60} {'ms':>9} {'spread':>7} {'of copy':>8}"
)


def serving(case: Case, dtype: torch.dtype, layout: str, direction: str) -> list[str]:
    """The names of all tiles that can serve a problem, and 'general'."""
    names = ctypes.create_string_buffer(1 << 16)
    numbers = depthwise_inline._DIRECTIONS.index(direction), depthwise_inline._DTYPES.index(dtype)
    where = (*numbers, int(case.is_channels_last(layout)))
    sizes = depthwise_inline._SIZES(*case.sizes())
    if depthwise_inline._load_library().depthwise_inline_tiles(*where, sizes, names, len(names)) != 0:
        raise RuntimeError("the library does not list the variants of this problem")
    return names.value.decode().split()


def force(variant: str) -> None:
    """Makes every launch take one variant; "" leaves the choice to the library."""
    depthwise_inline._load_library().depthwise_inline_force_variant(variant.encode())


def plan(
    groups: Sequence[tuple[Case, str, str]], args: Any
) -> tuple[dict[tuple[Case, str, str], dict[str, dict[str, str]]], dict[str, str]]:
    """For each problem and layout its variants' full names by the names that force them, '' for the selected one; and
    the sources of their specialisations. Where nothing is asked for beside the selected one, neither."""
    chosen, sources = {}, {}
    try:
        for (case, dtype, direction), layout in itertools.product(groups, args.layout):
            found = serving(case, bench.DTYPES[dtype], layout, direction)
            wanted = [name for name in found if (name in args.variants if args.variants else name != "general")]
            names = {}
            for variant in ["", *wanted] if wanted else []:
                force(variant)
                name, source = bench.selected(case, bench.DTYPES[dtype], layout, direction)
                names[variant] = name
                if source:
                    sources[name.rpartition("/")[0]] = source
            if names:
                chosen.setdefault((case, dtype, direction), {})[layout] = names
    finally:
        force("")
    named = {variant for layouts in chosen.values() for names in layouts.values() for variant in names}
    if unknown := [name for name in args.variants if name not in named]:
        print(f"none of these problems is served by {', '.join(unknown)}")
    return chosen, sources


def measure(problem: bench.Problem, layout: str, names: dict[str, str], watch: bench.Stopwatch) -> list[dict[str, Any]]:
    """A row for each variant, the fastest first; one that failed holds 'failed' and comes last."""
    selected = names[""]
    rows, calls = [], []
    theirs = bench.pytorch_result(problem, layout, watch)
    allowed = [
        bench.allowed_error(problem, *problem.errors([result], part))
        for part, result in zip(problem.parts, theirs, strict=True)
    ]
    for variant, name in names.items():
        if variant and name == selected:
            continue

        def run(variant: str = variant) -> tuple[torch.Tensor, ...]:
            force(variant)
            return problem.ours(layout)

        row = {"variant": name, "selected": name == selected, "call": bench.Call(run)}
        try:
            for part, result, most in zip(problem.parts, watch.once(row["call"]), allowed, strict=True):
                (row["error"],) = problem.errors([result], part)
                if not row["error"] <= most:
                    raise RuntimeError(f"wrong result: error {row['error']:.2e} against float64, allowed {most:.2e}")
            calls.append(row["call"])
        except Exception as error:  # whatever it is, the other variants are still measured
            row["failed"] = bench.first_line(error)
        rows.append(row)
    watch.time(calls)
    for row in rows:
        call = row.pop("call")
        if "failed" not in row:
            row["ms"], row["spread"] = call.median, call.spread
    return sorted(rows, key=lambda row: row.get("ms", float("inf")))


def run(
    cases: Sequence[Case],
    args: Any,
    watch: bench.Stopwatch,
    copy_tbps: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> int:
    """Measure and print problem after problem; returns the number of failures."""
    chosen, sources = plan(bench.groups_that_fit(cases, args), args)
    depthwise_inline._obtain_all(sources)
    print(f"\n{HEADER}")
    rows, failures = [], 0
    try:
        for (case, dtype, direction), layouts in chosen.items():
            torch.cuda.empty_cache()
            try:
                with torch.no_grad():
                    problem = bench.Problem(case, bench.DTYPES[dtype], direction)
                    new = {layout: measure(problem, layout, names, watch) for layout, names in layouts.items()}
            except Exception as error:  # whatever it is, the other problems are still measured
                print(f"{case.name} {dtype} {direction} FAILED: {bench.first_line(error)}", flush=True)
                failures += 1
                continue
            for layout in new:
                for row in new[layout]:
                    rows.append({"case": case.name, "dtype": dtype, "layout": layout, "direction": direction} | row)
                    moved = case.bytes(bench.DTYPES[dtype].itemsize, at_once=direction == GRADIENTS)
                    print(format_row(rows[-1], moved, copy_tbps), flush=True)
            save(rows)
    finally:
        force("")
    print(f"\n{format_regrets(rows)}")
    return failures + sum("failed" in row for row in rows)


def format_regrets(rows: Sequence[dict[str, Any]]) -> str:
    """What the selection costs: the problems whose selected variant is beyond NOISE slower than the fastest one."""
    measured = [row for row in rows if "failed" not in row]
    groups = itertools.groupby(measured, key=lambda row: [row[key] for key in ROW_IDENTITY])
    regrets, lines = [], []
    for identity, group in groups:
        fastest, *others = group
        chosen = next((row for row in (fastest, *others) if row["selected"]), None)
        if chosen is None:
            continue
        regrets.append(chosen["ms"] / fastest["ms"])
        if regrets[-1] > NOISE:
            lines.append(f"  {' '.join(identity)}: {regrets[-1]:.2f}x the time of {fastest['variant']}")
    if not regrets:
        return "No selected variant was measured."
    mean = geometric_mean(regrets)
    return "\n".join(
        [f"The selected variants take {mean:.3f}x the time of the fastest, {len(lines)} beyond noise", *lines]
    )


def format_row(row: dict[str, Any], bytes: int, copy_tbps: float) -> str:
    head = bench.format_identity(row) + f"{row['variant']:<60} "
    if "failed" in row:
        return head + f"FAILED: {row['failed']}"
    share = bytes / row["ms"] / 1e9 / copy_tbps
    return head + f"{row['ms']:9.4f} {row['spread']:7.1%} {share:8.1%}{'  selected' if row['selected'] else ''}"
