"""bench.py without a GPU: the run itself, the arithmetic of its numbers, the records and the README's tables."""

import copy
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import bench_report as report
import bench_variants

ROOT = Path(__file__).resolve().parent.parent
CASES = report.load_cases()
SMALL = report.Case(
    "small", "a test", "3x3", True, n=3, c=4, h=9, w=7, kernel_h=3, kernel_w=5, stride=2, padding=1, dilation=1
)


def run_bench(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        [sys.executable, "bench.py", *arguments],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def row(case="kb82", dtype="float32", layout="nchw", direction="forward", ours=1.0, pytorch=2.0, any_layout=1.5):
    problem = CASES[case]
    return {
        "case": case,
        "dtype": dtype,
        "layout": layout,
        "direction": direction,
        "variant": "f32_nchw_3x3/a",
        "ours_ms": ours,
        "pytorch_ms": pytorch,
        "pytorch_any_layout_ms": any_layout,
        "copy_ms": 0.5,
        "bytes": problem.bytes(4),
        "flops": problem.flops(),
    }


INFO = {
    "sources_sha256": "0" * 64,
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "1",
    "torch": "2",
    "cuda": "13.0",
    "cudnn": "9",
}
HOST = {"conv2d_forward": 10.0, "ours_forward": 11.0, "conv2d_train": 50.0, "ours_train": 60.0}
SPEEDS = {
    "copy_tbps": 3.0,
    "matmul_tflops": {"float32": 50.0, "float16": 700.0, "bfloat16": 690.0},
    "host_us": HOST,
}
MODEL = {
    "model": "MobileNetV2",
    "batch": 128,
    "layout": "nchw",
    "precision": "float32",
    "pytorch_step_ms": 60.0,
    "pytorch_step_spread": 0.052,
    "ours_step_ms": 40.0,
    "ours_step_spread": 0.01,
    "pytorch_graph_ms": 54.0,
    "ours_graph_ms": 27.0,
}


# ---- runs
def test_without_a_gpu_it_checks_the_result_and_says_what_is_missing():
    done = run_bench("--no-compile")
    assert done.returncode == 0, done.stderr
    assert "ModelNew gives the reference's result on cpu" in done.stdout
    assert "batch 1 instead of 16" in done.stdout
    assert "not compiled: --no-compile" in done.stdout
    assert "Speed was not measured: " in done.stdout


def compiler_missing():
    try:
        bench.depthwise_inline._find_compiler()
        bench.depthwise_inline._cxx_command()
    except bench.depthwise_inline.BuildError as error:
        return str(error)
    return None


@pytest.mark.skipif(compiler_missing() is not None, reason=f"needs a CUDA and a C++ compiler: {compiler_missing()}")
def test_without_a_gpu_it_reports_what_the_compiler_makes_of_the_kernels():
    done = run_bench("--case", "kb82", "--dtype", "float32", "--layout", "nchw", "--direction", "forward")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^operator library for 9\.0 ready in \d+\.\d s$", done.stdout, re.MULTILINE)
    assert re.search(r"^operators: \d+ kernels in \d+\.\d s \(1/\d+\)$", done.stdout, re.MULTILINE)
    kernels = re.findall(r"^ +(\d+) registers +(\d+) spilled +(\d+) shared  \S", done.stdout, re.MULTILINE)
    assert kernels
    assert all(0 < int(registers) <= 255 and int(spilled) == 0 for registers, spilled, _ in kernels)
    assert "Speed was not measured: " in done.stdout


def test_no_compiler_is_told_and_a_failed_build_is_a_failure(monkeypatch, capsys):
    def fail(*arguments):
        raise bench.depthwise_inline.BuildError("depthwise_inline: it does not compile")

    args = bench.parser(CASES).parse_args([])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(bench.depthwise_inline, "_ninja_folder", lambda: "")
    monkeypatch.setattr(bench.depthwise_inline, "_cxx_command", lambda: ["c++"])
    monkeypatch.setattr(bench.depthwise_inline, "precompile", fail)
    monkeypatch.setattr(bench.depthwise_inline, "_find_compiler", lambda: None)
    assert bench.print_compiler_report([SMALL], args) == 1
    assert "FAILED: depthwise_inline: it does not compile" in capsys.readouterr().out
    monkeypatch.setattr(bench.depthwise_inline, "_find_compiler", fail)
    assert bench.print_compiler_report([SMALL], args) == 0
    assert "The kernels were not compiled: " in capsys.readouterr().out


def test_random_problems_are_those_of_their_seed():
    drawn = report.random_cases(40, seed=7)
    assert drawn == report.random_cases(40, seed=7) != report.random_cases(40, seed=8)
    for case in drawn.values():
        assert min(case.out_shape) > 0 and math.prod(case.x_shape) <= report.RANDOM_ELEMENTS
    assert {case.c % 2 for case in drawn.values()} == {0, 1}

    done = run_bench("--random", "2", "--seed", "7", "--no-compile")
    assert done.returncode == 0, done.stderr
    for case in list(drawn.values())[:2]:
        assert (
            f"  {case.name}: {'x'.join(map(str, case.x_shape))}, kernel {case.kernel_h}x{case.kernel_w}" in done.stdout
        )
    for refused in (("--random", "0"), ("--random", "2", "--record"), ("--random", "2", "--all"), ("--seed", "7")):
        assert run_bench(*refused).returncode == 2


def test_unknown_case_is_refused_with_the_list_of_cases():
    done = run_bench("--case", "kb99")
    assert done.returncode == 2
    assert "kb82" in done.stderr


def test_model_new_that_computes_something_else_is_found(monkeypatch):
    class Wrong(bench.Model):
        def forward(self, x):
            return super().forward(x) * 1.001

    monkeypatch.setattr(bench.depthwise_inline, "ModelNew", Wrong)
    with pytest.raises(AssertionError):
        bench.check_model_new(SMALL_SQUARE, "cpu", 1)


def test_model_new_with_other_weights_is_found(monkeypatch):
    def wrong(*arguments):
        torch.rand(1)
        return bench.Model(*arguments)

    monkeypatch.setattr(bench.depthwise_inline, "ModelNew", wrong)
    with pytest.raises(RuntimeError, match="differ in their weights"):
        bench.check_model_new(SMALL_SQUARE, "cpu", 1)


SMALL_SQUARE = report.Case("square", "a test", "3x3", True, 1, 4, 9, 9, 3, 3, stride=1, padding=1, dilation=1)


# ---- numbers
def test_headline_is_problem_82_of_kernelbench_level_1():
    case = CASES[report.HEADLINE]
    assert (case.x_shape, case.weight_shape) == ((16, 64, 512, 512), (64, 1, 3, 3))
    assert (case.stride, case.padding, case.dilation) == (1, 0, 1)
    assert case.out_shape == (16, 64, 510, 510)


@pytest.mark.parametrize("case", [*CASES.values(), SMALL], ids=lambda case: case.name)
def test_output_shapes_are_those_of_conv2d(case):
    x, weight = torch.empty(case.x_shape, device="meta"), torch.empty(case.weight_shape, device="meta")
    out = torch.nn.functional.conv2d(x, weight, None, case.stride, case.paddings, case.dilation, case.c)
    assert case.out_shape == tuple(out.shape)


def test_bytes_count_input_output_and_weights_once():
    elements = 3 * 4 * 9 * 7 + 3 * 4 * 5 * 3 + 4 * 3 * 5
    assert SMALL.out_shape == (3, 4, 5, 3)
    assert SMALL.bytes(2) == 2 * elements
    # At 3.00 TB/s the headline problem takes 0.713 ms.
    assert CASES["kb82"].bytes(4) / 3.00e12 == pytest.approx(0.713e-3, rel=2e-3)


def test_flops_count_every_tap_of_every_output():
    assert SMALL.flops() == 2 * (3 * 4 * 5 * 3) * 15


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(report.geometric_mean([]))


def test_the_limits_are_those_of_a_copy_and_of_a_matrix_product():
    record = report.make_record(INFO, SPEEDS, [row()], [])
    kb82 = CASES["kb82"]
    assert report.limits_ms(row(), record) == pytest.approx((kb82.bytes(4) / 3e9, kb82.flops() / 50e9))
    assert report.limits_ms(row(dtype="float16"), record)[1] == pytest.approx(kb82.flops() / 700e9)


def test_quick_has_the_headline_and_a_case_of_every_family():
    quick = [case for case in CASES.values() if case.quick]
    assert report.HEADLINE in [case.name for case in quick]
    assert {case.family for case in quick} == {case.family for case in CASES.values()}


@pytest.mark.parametrize(
    ("milliseconds", "count"),
    [(0.001, bench.MAX_REPS), (1.0, 20), (20.0, bench.MIN_REPS), (134.0, bench.SLOW_REPS)],
)
def test_repetitions_follow_the_duration(milliseconds, count):
    assert bench.repetitions(milliseconds) == count


def test_median_and_spread():
    call = bench.Call(lambda: None, times=[float(t) for t in range(95, 106)])
    assert call.median == 100.0
    assert call.spread == pytest.approx(0.04)


# ---- results
@pytest.mark.parametrize("direction", (*report.DIRECTIONS, report.GRADIENTS))
@pytest.mark.parametrize("layout", bench.LAYOUTS)
@pytest.mark.parametrize("dtype", bench.DTYPES.values(), ids=bench.DTYPES)
def test_both_sides_compute_the_same_and_errors_finds_planted_ones(direction, layout, dtype, monkeypatch):
    monkeypatch.setattr(bench, "CHUNK_ELEMENTS", 1)  # a piece for each image
    problem = bench.Problem(SMALL, dtype, direction, "cpu")
    for part, ours, theirs in zip(problem.parts, problem.ours(layout), problem.pytorch(layout), strict=True):
        wrong = theirs.clone()
        wrong[-1, -1, -1, -1] += wrong.abs().max() * 0.5
        holed = theirs.clone()
        holed[0, 0, 0, 0] = math.nan
        errors = problem.errors([ours, theirs, wrong, holed, theirs[..., :-1]], part)
        eps = torch.finfo(dtype).eps
        assert errors[0] <= 4 * eps and errors[1] <= 4 * eps
        assert errors[2] > 0.4
        assert math.isnan(errors[3]) and math.isnan(errors[4])


def test_a_row_of_the_table():
    text = bench.format_row({**row(ours=1.0, pytorch=2.5), "ours_spread": 0.01}, copy_tbps=3.0)
    assert "2.50x" in text and "71.3%" in text and "slower" not in text
    assert "slower" in bench.format_row({**row(ours=1.0, pytorch=0.9), "ours_spread": 0.01}, copy_tbps=3.0)
    failed = {key: row()[key] for key in report.ROW_IDENTITY} | {"failed": "RuntimeError: no"}
    assert "FAILED: RuntimeError: no" in bench.format_row(failed, copy_tbps=3.0)


def test_means_name_the_losses():
    rows = [row(ours=1.0, pytorch=4.0), row(layout="nhwc", ours=1.0, pytorch=0.25, any_layout=0.25)]
    text = report.format_means(rows, CASES)
    assert "1 of 2 rows" in text
    assert "kb82 float32 nhwc forward: 0.25x" in text
    assert "1.00x" in text.splitlines()[-1]
    copy = next(line for line in text.splitlines() if "a copy of as many bytes" in line)
    assert copy.split()[-2:] == ["2.00x", "2.00x"]  # forward, all: of 8 and 0.5


def test_a_copy_moves_as_many_bytes():
    call = bench.copy_of(200, "cpu")
    copied = call.run()
    assert copied.nbytes == 100 and copied.sum() == 100


class Watch:
    """A stopwatch that runs calls where they are and takes every PyTorch call for twice as long as ours."""

    def once(self, call):
        return call.run()

    def time(self, calls):
        for idx, call in enumerate(calls):
            call.run()
            call.times += [1.0 + call.benchmark] * 10 if idx < 2 else [2.0 + call.benchmark] * 10


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets the GPU's part of bench.py run on the CPU, timed by a stand-in."""
    monkeypatch.setattr(bench, "machine", lambda: dict(INFO))
    monkeypatch.setattr(bench, "check_model_new", lambda *arguments: None)
    monkeypatch.setattr(bench, "Stopwatch", Watch)
    for name, key in (("copy_bandwidth", "copy_tbps"), ("matmul_rates", "matmul_tflops")):
        monkeypatch.setattr(bench, name, lambda watch, key=key: SPEEDS[key])
    monkeypatch.setattr(bench, "host_times", lambda: HOST)
    monkeypatch.setattr(bench.depthwise_inline, "_select", lambda *problem: ("small/tile", ""))
    monkeypatch.setattr(bench, "Problem", functools.partial(bench.Problem, device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16 << 30))


@pytest.mark.parametrize("direction", (*report.DIRECTIONS, report.GRADIENTS))
def test_rows_are_checked_and_timed(on_the_cpu, direction):
    rows = bench.measure(bench.Problem(SMALL, torch.float32, direction), ["nchw", "nhwc"], Watch())
    assert [r["layout"] for r in rows] == ["nchw", "nhwc"]
    for r in rows:
        assert (r["ours_ms"], r["pytorch_ms"], r["pytorch_any_layout_ms"], r["copy_ms"]) == (1.0, 2.0, 2.0, 2.0)
        assert r["error"] <= 4e-7 and r["variant"] == "small/tile"
        assert set(report.ROW_KEYS) <= set(r)
        assert r.get("apart_ms") == (2.0 if direction == report.GRADIENTS else None)
        assert r["bytes"] == SMALL.bytes(4, at_once=direction == report.GRADIENTS)


def test_a_wrong_result_is_a_failed_row_and_leaves_the_others(on_the_cpu, monkeypatch):
    true = bench.Problem.func.ours

    def wrong(self, layout):
        return tuple(result * (1 + (layout == "nhwc")) for result in true(self, layout))

    monkeypatch.setattr(bench.Problem.func, "ours", wrong)
    nchw, nhwc = bench.measure(bench.Problem(SMALL, torch.float32, "forward"), ["nchw", "nhwc"], Watch())
    assert nchw["ours_ms"] == 1.0
    assert "wrong result" in nhwc["failed"] and "ours_ms" not in nhwc


def test_the_table_saves_as_it_goes_and_leaves_out_what_the_memory_cannot_hold(on_the_cpu, capsys):
    calls = []
    args = bench.parser(CASES).parse_args(["--dtype", "float16", "--direction", "forward", "grad_weight"])
    groups = bench.groups_that_fit([SMALL, CASES["kb84"]], args)
    rows = bench.run_table(groups, args, Watch(), 3.0, lambda rows: calls.append(len(rows)))
    printed = capsys.readouterr().out
    assert len(rows) == 4 and calls == [2, 4]
    assert "kb84 float16 is left out" in printed
    assert "   4/4   small" in printed


def test_both_gradients_at_once_have_rows_where_a_kernel_computes_them(on_the_cpu, monkeypatch, capsys):
    def select(direction, dtype, channels_last, sizes):
        return ("general" if direction == report.GRADIENTS and not channels_last else "small/tile"), ""

    monkeypatch.setattr(bench.depthwise_inline, "_select", select)
    args = bench.parser(CASES).parse_args(["--dtype", "float16"])
    rows = bench.run_table(bench.groups_that_fit([SMALL], args), args, Watch(), 3.0, lambda rows: None)
    at_once = report.rows_at_once(rows)
    assert len(report.rows_of(rows)) == 6 and [r["layout"] for r in at_once] == ["nhwc"]
    record = report.make_record(INFO, SPEEDS, rows, [])
    cases = {**CASES, SMALL.name: SMALL}
    text = report.readme_speed([record], cases)
    assert "| small |" in text.split("Grad of input and grad of weight from one read")[1]
    assert "both gradients at once: 2.00x PyTorch's, 1.00x ours one after the other" in report.format_means(rows, cases)
    assert all("apart_ms" in r for r in report.rows_at_once(record["rows"]))


def test_an_exception_in_one_row_does_not_end_the_table(on_the_cpu, monkeypatch, capsys):
    def broken(problem, layouts, watch):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(bench, "measure", broken)
    args = bench.parser(CASES).parse_args(["--dtype", "float16", "--direction", "forward"])
    rows = bench.run_table(bench.groups_that_fit([SMALL], args), args, Watch(), 3.0, lambda rows: None)
    assert [r["failed"] for r in rows] == ["RuntimeError: no such kernel"] * 2
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_the_run_on_a_gpu_records_and_counts_failures(on_the_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", report.ROOT / "results" / "of a test")
    monkeypatch.setattr(report, "write_json", lambda path, content: written.update({path: content}))
    written = {}
    arguments = ["--case", "mbv2_7", "--dtype", "float32", "--direction", "forward", "--record"]
    args = bench.parser(CASES).parse_args([*arguments, "--json", str(tmp_path / "out.json")])
    assert bench.with_gpu({**CASES, "small": SMALL}, [SMALL], args) == 0
    record = written[report.record_path(INFO["gpu"])]
    assert [r["layout"] for r in record["rows"]] == ["nchw", "nhwc"]
    assert written[tmp_path / "out.json"]["rows"] == record["rows"]
    assert {key: record[key] for key in SPEEDS} == SPEEDS
    assert "0 failures" in capsys.readouterr().out


class Library:
    """Two tiles and the general kernel, of which the tile `wrong` computes something else; `forced` is remembered."""

    forced, names = "", ("general", "right", "wrong")

    def depthwise_inline_force_variant(self, variant):
        self.forced = variant.decode()

    def depthwise_inline_tiles(self, direction, dtype, layout, sizes, names, capacity):
        names.value = "\n".join(self.names).encode()
        return 0

    def select(self, *problem):
        variant = self.forced or "right"
        return ("general", "") if variant == "general" else (f"small/{variant}", "source")


@pytest.mark.parametrize(
    ("names", "expected"), [((), {"right", "wrong"}), (("general", "right"), {"general", "right"})]
)
def test_variants_are_forced_checked_and_timed(on_the_cpu, monkeypatch, capsys, names, expected, tmp_path):
    library, built, true = Library(), [], bench.Problem.func.ours
    monkeypatch.setattr(bench_variants.depthwise_inline, "_load_library", lambda: library)
    monkeypatch.setattr(bench_variants.depthwise_inline, "_select", library.select)
    monkeypatch.setattr(bench_variants.depthwise_inline, "_obtain_all", built.append)

    def ours(*arguments):
        return tuple(result * (2 if library.forced == "wrong" else 1) for result in true(*arguments))

    monkeypatch.setattr(bench.Problem.func, "ours", ours)
    arguments = ["--dtype", "float16", "--layout", "nhwc", "--direction", "forward", "--variants", *names]
    args = bench.parser(CASES).parse_args([*arguments, "--json", str(tmp_path / "out.json")])
    assert bench.with_gpu({**CASES, "small": SMALL}, [SMALL], args) == ("wrong" in expected)
    rows = json.loads((tmp_path / "out.json").read_text())["variants"]
    assert {row["variant"].rpartition("/")[2] for row in rows} == expected and built == [{"small": "source"}]
    right = next(row for row in rows if row["variant"] == "small/right")
    assert (right["ms"], right["selected"], library.forced) == (1.0, True, "")
    printed = capsys.readouterr().out
    assert printed.count("  selected") == 1
    if "wrong" in expected:
        assert "wrong result" in rows[-1]["failed"] and "FAILED: RuntimeError: wrong result" in printed


def test_the_selection_is_held_against_the_fastest():
    def timed(variant, ms, case="kb82", selected=False):
        return {key: row(case)[key] for key in report.ROW_IDENTITY} | {
            "variant": variant,
            "ms": ms,
            "selected": selected,
        }

    rows = [timed("a", 1.0), timed("b", 2.0, selected=True), timed("c", 1.0, "mbv2_7", selected=True)]
    failed = timed("d", 1.0, "mbv2_7") | {"failed": "RuntimeError: no"}
    text = bench_variants.format_regrets([*rows, failed])
    assert "take 1.414x the time of the fastest, 1 beyond noise" in text
    assert "  kb82 float32 nchw forward: 2.00x the time of a" in text and "mbv2_7" not in text
    assert bench_variants.format_regrets([failed]) == "No selected variant was measured."


def test_variants_that_serve_nothing_are_named_and_a_broken_problem_does_not_end_the_run(
    on_the_cpu, monkeypatch, capsys
):
    def broken(*arguments):
        raise RuntimeError("out of memory\nand more")

    library = Library()
    monkeypatch.setattr(bench_variants.depthwise_inline, "_load_library", lambda: library)
    monkeypatch.setattr(bench_variants.depthwise_inline, "_select", library.select)
    monkeypatch.setattr(bench_variants, "measure", broken)
    args = bench.parser(CASES).parse_args(
        ["--dtype", "float16", "--direction", "forward", "--variants", "wrong", "rong"]
    )
    assert bench_variants.run([SMALL, CASES["kb84"], SMALL_SQUARE], args, Watch(), 3.0, lambda rows: None) == 2
    printed = capsys.readouterr().out
    assert "none of these problems is served by rong\n" in printed and "kb84 float16 is left out" in printed
    assert "square float16 forward FAILED: RuntimeError: out of memory\n" in printed


def test_variants_do_not_go_into_a_record(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--variants", "--record"])
    assert "measures what is not selected" in capsys.readouterr().err


def test_calls_with_cudnn_benchmark_run_in_a_thread_of_their_own(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "FLUSH_BYTES", 16)
    seen = {False: set(), True: set()}

    def work():
        seen[torch.backends.cudnn.benchmark].add(threading.get_ident())

    watch = bench.Stopwatch("cpu")
    plain, searched = bench.Call(work), bench.Call(work, benchmark=True)
    watch.time([plain, searched])
    assert len(plain.times) == len(searched.times) == bench.MAX_REPS
    assert seen[False] == {threading.get_ident()}
    assert len(seen[True]) == 1 and seen[True] != seen[False]
    assert torch.backends.cudnn.benchmark is False


# ---- records
def test_record_has_the_agreed_fields(tmp_path):
    failed = {key: row("kb83")[key] for key in report.ROW_IDENTITY} | {"failed": "RuntimeError: no"}
    record = report.make_record(INFO, SPEEDS, [row() | {"ours_spread": 0.1, "error": 0.0}, failed], [MODEL])
    path = tmp_path / "results" / "bench.json"
    report.write_json(path, record)
    assert json.loads(path.read_text()) == record
    assert set(record) == {*report.RECORD_KEYS, "failed"}
    assert list(record["rows"][0]) == list(report.ROW_KEYS)
    assert record["failed"] == [failed]
    assert "failed" not in report.make_record(INFO, SPEEDS, [row()], [])


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text("not JSON")
    with pytest.raises(RuntimeError, match=r"bench\.json: expected a record of bench\.py, which is JSON"):
        report.load_record(path)
    path.write_text(json.dumps({**INFO, "date": "", "copy_tbps": 3.0, "host_us": HOST, "models": []}))
    with pytest.raises(RuntimeError, match=r"but it lacks matmul_tflops, rows$"):
        report.load_record(path)
    record = report.make_record(INFO, SPEEDS, [row()], [])
    report.write_json(path, record)
    assert report.load_record(path) == record


def test_record_keeps_what_the_same_sources_measured_before():
    old = report.make_record(INFO, SPEEDS, [row(ours=1.0), row("kb83")], [MODEL])
    new = report.make_record(INFO, SPEEDS, [row(ours=0.5)], [], old)
    assert [(r["case"], r["ours_ms"]) for r in new["rows"]] == [("kb82", 0.5), ("kb83", 1.0)]
    assert new["models"] == [MODEL]
    broken = {key: row()[key] for key in report.ROW_IDENTITY} | {"failed": "RuntimeError: no"}
    new = report.make_record(INFO, SPEEDS, [broken], [], new)
    assert [r["case"] for r in new["rows"]] == ["kb83"] and new["failed"] == [broken]
    assert "failed" not in report.make_record(INFO, SPEEDS, [row()], [], new)
    of_models = report.make_record(INFO, {**SPEEDS, "copy_tbps": 9.0}, [], [MODEL], old)
    assert of_models["copy_tbps"] == SPEEDS["copy_tbps"] and len(of_models["rows"]) == 2
    other = report.make_record({**INFO, "sources_sha256": "1" * 64}, SPEEDS, [row(ours=0.5)], [], old)
    assert len(other["rows"]) == 1 and not other["models"]


def test_record_is_named_after_the_gpu():
    assert report.record_path("NVIDIA H100 80GB HBM3").name == "bench_h100_80gb_hbm3.json"
    assert report.record_path("NVIDIA H200").name == "bench_h200.json"
    assert report.record_path("Tesla T4").name == "bench_tesla_t4.json"


def test_sources_sha256_covers_the_module_and_every_kernel_file(tmp_path):
    (tmp_path / "kernels").mkdir()
    files = {"kernels/b.cuh": b"b", "kernels/a.cu": b"a", "depthwise_inline.py": b"m"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = hashlib.sha256()
    for name in sorted(files):
        expected.update(name.encode() + b"\0" + files[name] + b"\0")
    assert report.sources_sha256(tmp_path) == expected.hexdigest()


# ---- README tables
def test_readme_tables_come_from_the_records_and_show_losses():
    rows = [row(), row(layout="nhwc", pytorch=0.5, any_layout=0.5), row("mbv2_56", direction="grad_input")]
    record = report.make_record(INFO, SPEEDS, rows, [MODEL])
    headline, speed = report.readme_headline([record]), report.readme_speed([record], CASES)
    assert "NVIDIA H100 80GB HBM3" in headline and "2.00x; 71%" in headline and "rows slower than it: 1." in headline
    assert "1 of 3 rows" in speed and "- kb82 float32 nhwc forward: 0.50x" in speed
    assert "| MobileNetV2 | 128 | float32 | nchw | 60.0 ± 5% | 40.0 ± 1% | 1.50 | 54.0 | 27.0 | 2.00 |" in speed
    assert report.table(record).count("| 1.0000 |") == len(rows)
    assert "- kb82: float32 nchw grad_input, " in speed and "- replk_31: everything" in speed


def test_readme_says_so_when_nothing_is_recorded():
    assert "no speed is claimed" in report.readme_headline([])
    assert "No GPU run is recorded" in report.readme_speed([], CASES)


def test_update_readme_replaces_what_stands_between_the_markers():
    text = (ROOT / "README.md").read_text()
    record = report.make_record(INFO, SPEEDS, [row()], [])
    filled = report.update_readme(text, [copy.deepcopy(record)], CASES)
    assert filled != text
    assert report.update_readme(filled, report.load_records(), CASES) == report.update_readme(
        text, report.load_records(), CASES
    )
    with pytest.raises(ValueError, match="lacks the markers"):
        report.update_readme("no markers", [], CASES)


def test_readme_says_of_a_record_that_its_sources_are_not_the_present_ones(monkeypatch):
    record = {"sources_sha256": "a" * 64}
    assert "earlier sources" in report._stale(record)
    monkeypatch.setattr(report, "sources_sha256", lambda: "a" * 64)
    assert report._stale(record) == ""


def test_readme_tells_what_the_records_beside_the_benchmark_say(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "sources_sha256", lambda: "a" * 64)
    assert "Nothing is recorded" in report.readme_outcomes()
    where = {"gpu": "NVIDIA Test", "driver": "1.2", "torch": "2.11", "date": "2026-01-02"}
    of = {
        "tests": {"sources_sha256": "a" * 64, "passed": 5, "failed": 2, "skipped": 1, "arguments": ["-m", "gpu"]},
        "sanitizer": {"sources_sha256": "b" * 64, "memcheck": {"parts": 5, "checked": 4000, "reported": 3}},
    }
    for name, record in of.items():
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(where | record))
    tests, sanitizer = report.readme_outcomes().splitlines()
    assert tests.endswith("(NVIDIA Test, driver 1.2, torch 2.11, 2026-01-02): 5 passed, 2 failed, 1 skipped.")
    assert "memcheck 4,000 results, 3 reported. **Measured on earlier sources" in sanitizer
    assert "earlier sources" not in tests
    monkeypatch.setattr(report, "sources_sha256", lambda: "c" * 64)
    assert all("earlier sources" in line for line in report.readme_outcomes().splitlines())


# ---- pictures
@pytest.fixture
def record():
    rows = [
        row(case, dtype, layout, direction, ours=1.0 + idx, pytorch=3.0)
        for case in ("kb82", "mbv2_7", "replk_31")
        for dtype in bench.DTYPES
        for layout in bench.LAYOUTS
        for idx, direction in enumerate(report.DIRECTIONS)
    ]
    return report.make_record(INFO, SPEEDS, rows, [])


@pytest.fixture
def bench_plot():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    import bench_plot

    return bench_plot


def test_pictures_are_drawn_from_a_record_and_are_the_same_each_time(bench_plot, record, tmp_path, capsys):
    report.write_json(tmp_path / "record.json", record)
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert bench.main(["--plot", str(folder), "--from", str(tmp_path / "record.json")]) == 0
        paths = [report.picture_path(record, name, folder) for name in report.PICTURES]
        assert sorted(paths) == sorted(folder.iterdir())
        assert f"drew {paths[-1]}" in capsys.readouterr().out
        contents.append([path.read_text() for path in paths])
    assert contents[0] == contents[1]
    for text in contents[0]:
        assert report.digest(record) in text
    slower = copy.deepcopy(record)
    slower["rows"][0]["ours_ms"] *= 2
    assert report.digest(slower) != report.digest(record)


def points(axes):
    return sorted(tuple(point) for line in axes.lines if line.get_linestyle() == "None" for point in line.get_xydata())


def test_the_speedups_are_drawn_by_direction_with_a_line_at_one(bench_plot, record):
    panels = bench_plot.speedup(record).axes
    assert [axes.get_title() for axes in panels] == list(report.DIRECTIONS)
    for axes, speed in zip(panels, (3.0, 1.5, 1.0), strict=True):
        assert [x for x, _ in points(axes)] == pytest.approx([speed] * 3 * 3 * 2)
        assert any(list(line.get_xdata()) == [1.0, 1.0] for line in axes.lines)
        assert axes.get_xlabel().endswith("; 0 of 18 below 1x")
        assert axes.get_xlim()[0] < 1.0
    record["rows"][0]["pytorch_ms"] = 0.25
    losing = bench_plot.speedup(record).axes[0]
    assert losing.get_xlabel().endswith("; 1 of 18 below 1x")
    assert losing.get_xlim()[0] < 0.25 == points(losing)[0][0]


def test_the_shares_and_the_roofline_have_the_rows_values(bench_plot, record):
    record["rows"] = record["rows"][:1]
    (measured,) = record["rows"]
    by_bytes, by_flops = report.limits_ms(measured, record)
    assert by_bytes > by_flops
    (axes,) = bench_plot.share(record).axes
    assert points(axes)[0][0] == pytest.approx(by_bytes / measured["ours_ms"])
    (axes,) = bench_plot.roofline(record).axes
    intensity = measured["flops"] / measured["bytes"]
    assert points(axes) == [pytest.approx((intensity, measured["flops"] / measured["ours_ms"] / 1e9))]
    (limit,) = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert list(limit.get_xdata())[1] == pytest.approx(50 / 3.0)
    assert list(limit.get_ydata()) == pytest.approx([3.0 * intensity / 2, 50, 50])


def test_a_record_without_rows_is_not_drawn(bench_plot, tmp_path):
    with pytest.raises(RuntimeError, match="no row to draw"):
        bench_plot.draw(report.make_record(INFO, SPEEDS, [], [MODEL]), tmp_path)


def test_a_run_draws_what_it_measured(on_the_cpu, monkeypatch, tmp_path, capsys):
    drawn = []
    monkeypatch.setattr(bench, "drawing", lambda: lambda record, folder: drawn.append((record, folder)) or ["a.svg"])
    args = bench.parser(CASES).parse_args(["--dtype", "float32", "--direction", "forward", "--plot", str(tmp_path)])
    assert bench.with_gpu({**CASES, "small": SMALL}, [SMALL], args) == 0
    ((record, folder),) = drawn
    assert folder == tmp_path and [r["case"] for r in record["rows"]] == ["small", "small"]
    assert "drew a.svg\n" in capsys.readouterr().out


def test_matplotlib_that_is_missing_is_told_before_anything_is_measured(monkeypatch, tmp_path, record, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench_plot", raising=False)
    report.write_json(tmp_path / "record.json", record)
    assert bench.main(["--plot", str(tmp_path), "--from", str(tmp_path / "record.json")]) == 1
    assert re.fullmatch(r"error: pictures need matplotlib, .*: pip install matplotlib\n", capsys.readouterr().err)
    monkeypatch.setattr(bench, "machine", lambda: pytest.fail("it measures"))
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        bench.with_gpu(CASES, [SMALL], bench.parser(CASES).parse_args(["--plot", str(tmp_path)]))


def test_without_a_gpu_there_is_nothing_to_draw_but_a_record(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "without_gpu", lambda *arguments: pytest.fail("it goes on"))
    assert bench.main(["--plot", "pictures"]) == 1
    assert "--from FILE draws a record instead" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--from", "results/bench.json"])
    assert "give both" in capsys.readouterr().err


def test_the_readme_shows_the_pictures_of_the_records(bench_plot, record, monkeypatch, tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    for name, value in {"ROOT": tmp_path, "RESULTS": results, "README": readme}.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "load_cases", lambda: CASES)
    monkeypatch.setattr(report, "sources_sha256", lambda: INFO["sources_sha256"])
    readme.write_text(report.update_readme((ROOT / "README.md").read_text(), [], CASES))
    assert bench.main(["--readme"]) == 0
    assert "![" not in readme.read_text()
    report.write_json(report.record_path(INFO["gpu"]), record)
    assert bench.main(["--readme"]) == 0
    shown = re.findall(r"^!\[.+\]\((.+)\)$", readme.read_text(), re.MULTILINE)
    assert shown == [f"results/bench_h100_80gb_hbm3_{name}.svg" for name in report.PICTURES]
    for name in shown:
        assert report.digest(record) in (tmp_path / name).read_text()
