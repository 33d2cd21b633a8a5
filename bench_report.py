"""What bench.py measures and what becomes of it: the cases, means, records in results/ and the README's tables."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
README = ROOT / "README.md"
HEADLINE = "kb82"
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "nhwc")
DIRECTIONS = ("forward", "grad_input", "grad_weight")
GRADIENTS = "gradients"  # both at once, where a kernel of ours computes them so: in rows of their own
LOSS = 1.0  # a speedup below this is a loss

PICTURES = {
    "speedup": "Speedup over PyTorch's best mode in the same layout, by case",
    "share": "Share of the speed that the measured copy bandwidth and matrix product allow, by case",
    "roofline": "Multiplications and additions a second by arithmetic intensity, and the measured limits",
}

ROW_IDENTITY = ("case", "dtype", "layout", "direction")
ROW_KEYS = (*ROW_IDENTITY, "variant", "ours_ms", "pytorch_ms", "pytorch_any_layout_ms", "copy_ms", "bytes", "flops")
MODEL_IDENTITY = ("model", "batch", "layout", "precision")
MACHINE_KEYS = ("sources_sha256", "gpu", "driver", "torch", "cuda", "cudnn")
RECORD_KEYS = (*MACHINE_KEYS, "date", "copy_tbps", "matmul_tflops", "host_us", "rows", "models")


# ---- cases
@dataclass(frozen=True)
class Case:
    """One depthwise problem: x (n, c, h, w), weight (c, 1, kernel_h, kernel_w).

    Stride and dilation are the same for rows and columns, and so is the padding where padding_w is not given.
    """

    name: str
    origin: str
    family: str
    quick: bool
    n: int
    c: int
    h: int
    w: int
    kernel_h: int
    kernel_w: int
    stride: int
    padding: int
    dilation: int
    padding_w: int | None = None

    @property
    def paddings(self) -> tuple[int, int]:
        """Of rows and of columns."""
        return self.padding, self.padding if self.padding_w is None else self.padding_w

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.c, 1, self.kernel_h, self.kernel_w

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        def size(image: int, kernel: int, padding: int) -> int:
            return (image + 2 * padding - self.dilation * (kernel - 1) - 1) // self.stride + 1

        padding_h, padding_w = self.paddings
        return self.n, self.c, size(self.h, self.kernel_h, padding_h), size(self.w, self.kernel_w, padding_w)

    def bytes(self, itemsize: int, at_once: bool = False) -> int:
        """Least traffic: the input-sized tensor, the output-sized tensor and the weights, once each.

        The same in every direction, since a gradient has the shape of what it belongs to. Both gradients at once read
        the output-sized one for both.
        """
        shapes = (self.x_shape, self.out_shape, self.weight_shape, *((self.x_shape, self.weight_shape) * at_once))
        return sum(map(math.prod, shapes)) * itemsize

    def flops(self) -> int:
        """Multiplies and adds of every tap of every output, padding included; the same in every direction."""
        return 2 * math.prod(self.out_shape) * self.kernel_h * self.kernel_w

    def describe(self) -> str:
        """The problem in words, but for its padding."""
        return (
            f"{'x'.join(map(str, self.x_shape))}, kernel {self.kernel_h}x{self.kernel_w}"
            + (f", stride {self.stride}" if self.stride > 1 else "")
            + (f", dilation {self.dilation}" if self.dilation > 1 else "")
        )

    def sizes(self) -> tuple[int, ...]:
        """The problem as the selection of a kernel takes it: depth multiplier 1, tensors aligned to 16 bytes."""
        strides, dilations = 2 * (self.stride,), 2 * (self.dilation,)
        kernel = self.kernel_h, self.kernel_w
        return (self.n, self.c, 1, self.h, self.w, *kernel, *strides, *self.paddings, *dilations, 1)

    def is_channels_last(self, layout: str) -> bool:
        """Whether tensors count as channels_last: those of one channel or one pixel are in both layouts, and do not."""
        return layout == "nhwc" and self.c > 1 and self.h * self.w > 1

    def convolution_arguments(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """What aten.convolution takes after input, weight and bias."""
        return 2 * [self.stride], list(self.paddings), 2 * [self.dilation], False, [0, 0], self.c


def load_cases() -> dict[str, Case]:
    """The cases of bench_cases.json by name, in the order of the file."""
    content = json.loads((ROOT / "bench_cases.json").read_text())
    return {name: Case(name=name, **values) for name, values in content["cases"].items()}


RANDOM_ELEMENTS = 1 << 25  # of x, at most


def random_cases(count: int, seed: int) -> dict[str, Case]:
    """Problems whose sizes no table lists, odd ones among them: where losses hide. Padded by half of the kernel."""
    drawn, cases = random.Random(seed), {}
    while len(cases) < count:
        n, c = drawn.choice((1, 4, 16, 32, 64)), drawn.choice((1, 3, 17, 24, 58, 64, 100, 116, 125, 192, 384))
        h = drawn.choice((7, 12, 14, 20, 28, 41, 56, 112, 128))
        w = drawn.choice((h, h, h + 1, h + 5))
        kernel_h = drawn.choice((1, 2, 3, 3, 4, 5, 5, 7, 9, 11, 15, 21, 31))
        kernel_w = drawn.choice((kernel_h, kernel_h, kernel_h, 1, 3, 11))
        stride, dilation = drawn.choice((1, 1, 1, 2, 2, 3)), drawn.choice((1, 1, 1, 2, 5))
        padding_h, padding_w = (dilation * (kernel - 1) // 2 for kernel in (kernel_h, kernel_w))
        if n * c * h * w > RANDOM_ELEMENTS or padding_h > h // 2 or padding_w > w // 2:
            continue
        name = f"random_{len(cases)}"
        shape = n, c, h, w, kernel_h, kernel_w, stride, padding_h, dilation, padding_w
        cases[name] = Case(name, f"seed {seed}", "random", False, *shape)
    return cases


# ---- means
def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speedups(
    rows: Iterable[dict[str, Any]], direction: str | None = None, against: str = "pytorch_ms", of: str = "ours_ms"
) -> list[float]:
    return [row[against] / row[of] for row in rows if direction in (None, row["direction"])]


def limits_ms(row: dict[str, Any], record: dict[str, Any]) -> tuple[float, float]:
    """What a row's bytes take at the measured copy bandwidth, and its flops at the rate of a matrix product."""
    flops = row["flops"] / record["matmul_tflops"][row["dtype"]] / 1e9
    return row["bytes"] / record["copy_tbps"] / 1e9, flops


def rows_of(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of one direction each."""
    return [row for row in rows if row["direction"] in DIRECTIONS]


def rows_at_once(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of both gradients at once."""
    return [row for row in rows if row["direction"] == GRADIENTS]


def by_family(rows: Iterable[dict[str, Any]], cases: dict[str, Case]) -> dict[str, list[dict[str, Any]]]:
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(cases[row["case"]].family, []).append(row)
    return families


def format_means(rows: Sequence[dict[str, Any]], cases: dict[str, Case]) -> str:
    """Geometric means of the speedup, by family of cases and direction; the losses by name; over all."""
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        return "No row was measured."
    rows, at_once = rows_of(measured), rows_at_once(measured)
    directions = [name for name in DIRECTIONS if any(row["direction"] == name for row in rows)]
    lines = [f"{'geometric mean of the speedup':<42}" + "".join(f"{name:>13}" for name in [*directions, "all"])]

    def add(title: str, chosen: Sequence[dict[str, Any]], against: str = "pytorch_ms", of: str = "ours_ms") -> None:
        means = [geometric_mean(speedups(chosen, direction, against, of)) for direction in [*directions, None]]
        lines.append(f"{title:<42}" + "".join(f"{'-':>13}" if math.isnan(m) else f"{m:12.2f}x" for m in means))

    for family, chosen in by_family(rows, cases).items():
        add(f"  {family}", chosen)
        add("    a copy of as many bytes", chosen, of="copy_ms")
    add("PyTorch's best in any layout", rows, "pytorch_any_layout_ms")
    add("PyTorch's best in the same layout", rows)
    if at_once:
        theirs, apart = (geometric_mean(speedups(at_once, against=key)) for key in ("pytorch_ms", "apart_ms"))
        lines.append(f"both gradients at once: {theirs:.2f}x PyTorch's, {apart:.2f}x ours one after the other")
    slower = [row for row in measured if row["pytorch_ms"] < LOSS * row["ours_ms"]]
    lines.insert(
        0,
        f"Slower than PyTorch in the same layout: {len(slower)} of {len(measured)} rows"
        + "".join(
            f"\n  {' '.join(row[key] for key in ROW_IDENTITY)}: {row['pytorch_ms'] / row['ours_ms']:.2f}x"
            for row in slower
        ),
    )
    return "\n".join(lines)


# ---- records
def sources_sha256(root: Path = ROOT) -> str:
    """Names the sources that a record belongs to: depthwise_inline.py and every file under kernels/."""
    paths = [root / "depthwise_inline.py", *(path for path in (root / "kernels").rglob("*") if path.is_file())]
    paths = [path for path in paths if "__pycache__" not in path.parts]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_record(
    info: dict[str, str],
    speeds: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    models: Iterable[dict[str, Any]],
    old: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of results/bench_<gpu>.json; `speeds` are copy_tbps, matmul_tflops and host_us.

    What `old` holds stays, unless it was measured again, when it comes from the same sources, GPU and versions; so do
    its speeds, unless there are new rows: rows are held against those of their own run.
    """
    entries, models = list(rows), list(models)
    if old is not None and all(old.get(key) == info[key] for key in MACHINE_KEYS):
        if old["rows"] and not entries:
            speeds = {key: old[key] for key in speeds}
        entries = _merge([*old["rows"], *old.get("failed", ())], entries, ROW_IDENTITY)
        models = _merge(old["models"], models, MODEL_IDENTITY)
    failed = [{key: row[key] for key in (*ROW_IDENTITY, "failed")} for row in entries if "failed" in row]
    record = {
        **info,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **speeds,
        "rows": [
            {key: row[key] for key in (*ROW_KEYS, "apart_ms") if key in row} for row in entries if "failed" not in row
        ],
        "models": models,
    }
    return record | ({"failed": failed} if failed else {})


def _merge(old: Iterable[dict], new: Iterable[dict], identity: Sequence[str]) -> list[dict]:
    return list({tuple(entry[key] for key in identity): entry for entry in (*old, *new)}.values())


def record_path(gpu: str) -> Path:
    return RESULTS / f"bench_{re.sub('[^a-z0-9]+', '_', gpu.lower().removeprefix('nvidia ')).strip('_')}.json"


def picture_path(record: dict[str, Any], name: str, folder: Path) -> Path:
    return folder / f"{record_path(record['gpu']).stem}_{name}.svg"


def table_path(record: dict[str, Any], folder: Path) -> Path:
    return folder / f"{record_path(record['gpu']).stem}.md"


def digest(record: dict[str, Any]) -> str:
    """What a picture carries, to tell the record that it was drawn from."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One line a row, so that two records can be compared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            inner = ",\n".join("  " + json.dumps(entry) for entry in value)
            parts.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def load_record(path: Path) -> dict[str, Any]:
    """A record that bench.py wrote with --record or --json."""
    try:
        record = json.loads(path.read_text())
        missing = [key for key in RECORD_KEYS if key not in record]
    except ValueError as error:
        raise RuntimeError(f"{path}: expected a record of bench.py, which is JSON: {error}") from error
    if missing:
        raise RuntimeError(f"{path}: expected a record of bench.py, but it lacks {', '.join(missing)}")
    return record


# ---- README
def load_records() -> list[dict[str, Any]]:
    return [load_record(path) for path in sorted(RESULTS.glob("bench_*.json"))]


def _stale(record: dict[str, Any]) -> str:
    """What has to be said of a record whose sources are not the present ones; '' of a fresh one."""
    now = sources_sha256()
    if record["sources_sha256"] == now:
        return ""
    return (
        f"**Measured on earlier sources (sha256 {record['sources_sha256'][:12]}), not on the present ones "
        f"({now[:12]}): kernels and their selection have changed since.**"
    )


def readme_headline(records: Sequence[dict[str, Any]]) -> str:
    """The measured benefit in one or two sentences for each recorded GPU."""
    paragraphs = []
    for record in records:
        rows = rows_of(record["rows"])
        if not rows:
            continue
        means = [
            f"{direction} {geometric_mean(values):.1f}x"
            for direction in DIRECTIONS
            if (values := speedups(rows, direction))
        ]
        text = f"Measured on one {record['gpu']}: "
        wanted = (HEADLINE, "float32", "nchw", "forward")
        for row in (row for row in rows if tuple(row[key] for key in ROW_IDENTITY) == wanted):
            share = row["bytes"] / row["ours_ms"] / 1e9 / record["copy_tbps"]
            text += (
                f"3x3 over 16x64x512x512 in fp32 takes {row['ours_ms']:.3f} ms, PyTorch "
                f"{row['pytorch_ms']:.3f} ms ({row['pytorch_ms'] / row['ours_ms']:.2f}x; {share:.0%} of the copy "
                "bandwidth). "
            )
        slower = sum(speed < LOSS for speed in speedups(rows))
        paragraphs.append(
            text
            + f"Geometric mean over {len(rows)} measured rows against PyTorch's best mode in the "
            f"same layout: {', '.join(means)}; rows slower than it: {slower}. {_stale(record)}".rstrip()
        )
    return "\n\n".join(paragraphs) or "No GPU run is recorded in `results/` yet, so no speed is claimed here."


def readme_speed(records: Sequence[dict[str, Any]], cases: dict[str, Case]) -> str:
    """The README's tables: speedups by case, losses, what was not measured, host time, networks."""
    return "\n\n".join(_readme_record(record, cases) for record in records) or (
        "No GPU run is recorded in `results/` yet. `python bench.py --all --record` on a GPU writes one."
    )


def _readme_record(record: dict[str, Any], cases: dict[str, Case]) -> str:
    rows, models, host = rows_of(record["rows"]), record["models"], record["host_us"]
    at_once = rows_at_once(record["rows"])
    lines = [
        f"### {record['gpu']}",
        "",
        _versions(record),
        "",
        *([_stale(record), ""] if _stale(record) else []),
        *(line for name in PICTURES if rows for line in (_readme_picture(record, name), "")),
        "Speedup over PyTorch's best mode in the same layout: geometric mean over dtypes and layouts, "
        "lowest and highest in brackets.",
        "",
    ]

    def cell(chosen: Sequence[dict[str, Any]], direction: str | None, against: str = "pytorch_ms") -> str:
        values = speedups(chosen, direction, against)
        return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "not measured"

    lines += _table_head("case", "from", "problem", *DIRECTIONS)
    for name in dict.fromkeys(row["case"] for row in rows):
        case, chosen = cases[name], [row for row in rows if row["case"] == name]
        cells = (cell(chosen, direction) for direction in DIRECTIONS)
        lines.append(_table_row(name, case.origin, case.describe(), *cells))
    lines.append(_table_row("all", "", "", *(cell(rows, direction) for direction in DIRECTIONS)))
    lines.append(
        _table_row(
            "all",
            "",
            "against PyTorch's best in any layout",
            *(cell(rows, direction, "pytorch_any_layout_ms") for direction in DIRECTIONS),
        )
    )

    lines += [
        "",
        "By family of cases, beside what a copy of as many bytes, timed alike, would be: half of them read, half "
        "written. No kernel that moves each byte once is much faster, whatever it computes.",
        "",
        *_table_head("family", *DIRECTIONS, *(f"{direction}: copy" for direction in DIRECTIONS)),
    ]
    for family, chosen in by_family(rows, cases).items():
        means = [
            geometric_mean(speedups(chosen, direction, of=of))
            for of in ("ours_ms", "copy_ms")
            for direction in DIRECTIONS
        ]
        lines.append(_table_row(family, *("not measured" if math.isnan(mean) else f"{mean:.2f}" for mean in means)))

    if at_once:
        lines += [
            "",
            "Grad of input and grad of weight from one read of grad_output, where a kernel computes both, as training "
            "wants them: speedup over PyTorch's backward, and over our two kernels one after the other.",
            "",
            *_table_head("case", "problem", "over PyTorch's", "over ours, one after the other"),
        ]
        for name in (*dict.fromkeys(row["case"] for row in at_once), None):
            chosen = [row for row in at_once if name in (row["case"], None)]
            cells = cell(chosen, None), cell(chosen, None, "apart_ms")
            lines.append(_table_row(name or "all", cases[name].describe() if name else "", *cells))

    slower = [row for row in (*rows, *at_once) if row["pytorch_ms"] < LOSS * row["ours_ms"]]
    lines += ["", f"Slower than PyTorch in the same layout: {len(slower)} of {len(rows) + len(at_once)} rows."]
    lines += [
        f"- {' '.join(row[key] for key in ROW_IDENTITY)}: {row['pytorch_ms'] / row['ours_ms']:.2f}x" for row in slower
    ]
    for row in record.get("failed", ()):
        lines.append(f"- {' '.join(row[key] for key in ROW_IDENTITY)}: failed, {row['failed']}")
    if absent := _not_measured(record, cases):
        lines += ["", "Not measured in that run:", *absent]
    lines += [
        "",
        f"Host time of a call: forward {host['ours_forward']:.1f} us (F.conv2d {host['conv2d_forward']:.1f})"
        f", forward and backward {host['ours_train']:.1f} us (F.conv2d {host['conv2d_train']:.1f}).",
    ]
    if models:
        lines += [
            "",
            "Training step at 224x224 (forward and backward; bfloat16 under autocast) before and after "
            "`replace_depthwise`: wall time (±: half the distance from the 10th to the 90th percentile of its rounds), "
            "and that of the same step as a CUDA graph, in which the host has no part:",
            "",
        ]
        columns = ("PyTorch ms", "ours ms", "speedup", "PyTorch graph ms", "ours graph ms", "speedup")
        lines += _table_head("network", "batch", "precision", "layout", *columns)
        lines += [
            _table_row(
                m["model"],
                m["batch"],
                m["precision"],
                m["layout"],
                *_step_columns(m, "step"),
                *_step_columns(m, "graph"),
            )
            for m in models
        ]
    return "\n".join(
        [*lines, "", f"[All {len(record['rows'])} rows]({table_path(record, RESULTS).relative_to(ROOT).as_posix()})"]
    )


def _step_columns(model: dict[str, Any], kind: str) -> tuple[str, str, str]:
    before, after = model[f"pytorch_{kind}_ms"], model[f"ours_{kind}_ms"]
    spreads = [model.get(f"{name}_{kind}_spread") for name in ("pytorch", "ours")]
    times = [
        f"{ms:.1f}" + (f" ± {s:.0%}" if s is not None else "") for ms, s in zip((before, after), spreads, strict=True)
    ]
    return *times, f"{before / after:.2f}"


def table(record: dict[str, Any]) -> str:
    """Every row of a record as a page of its own."""
    lines = [f"# Every measured row, {record['gpu']}", "", _versions(record), ""]
    lines += [_stale(record), ""] if _stale(record) else []
    lines += _table_head(
        *ROW_IDENTITY, "variant", "ours ms", "PyTorch ms", "any layout ms", "copy ms", "speedup", "of copy"
    )
    for row in record["rows"]:
        share = row["bytes"] / row["ours_ms"] / 1e9 / record["copy_tbps"]
        lines.append(
            _table_row(
                *(row[key] for key in ROW_IDENTITY),
                re.sub("_b?float.*/", " ", row["variant"]),  # less what the other columns say
                f"{row['ours_ms']:.4f}",
                f"{row['pytorch_ms']:.4f}",
                f"{row['pytorch_any_layout_ms']:.4f}",
                f"{row['copy_ms']:.4f}",
                f"{row['pytorch_ms'] / row['ours_ms']:.2f}",
                f"{share:.0%}",
            )
        )
    return "\n".join([*lines, ""])


def _versions(record: dict[str, Any]) -> str:
    return (
        f"torch {record['torch']}, CUDA {record['cuda']}, cuDNN {record['cudnn']}, driver {record['driver']}, "
        f"{record['date'][:10]}. Copy bandwidth {record['copy_tbps']:.2f} TB/s, read and written."
    )


def _not_measured(record: dict[str, Any], cases: dict[str, Case]) -> list[str]:
    """What of the whole table is neither measured nor failed, a line a case."""
    there = {tuple(row[key] for key in ROW_IDENTITY) for row in (*record["rows"], *record.get("failed", ()))}
    lines = []
    for case in cases:
        whole = list(itertools.product(DTYPES, LAYOUTS, DIRECTIONS))
        absent = [row for row in whole if (case, *row) not in there]
        if absent:
            lines.append(f"- {case}: " + ("everything" if absent == whole else ", ".join(map(" ".join, absent))))
    return lines


def _readme_picture(record: dict[str, Any], name: str) -> str:
    return f"![{PICTURES[name]}]({picture_path(record, name, RESULTS).relative_to(ROOT).as_posix()})"


def _table_row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table_head(*titles: str) -> list[str]:
    return [_table_row(*titles), "|---" * len(titles) + "|"]


def readme_outcomes() -> str:
    """What the records of the tests, of random problems and of compute-sanitizer say, a line each."""
    kinds = {
        "tests": ("the tests that need a GPU", "{passed} passed, {failed} failed, {skipped} skipped"),
        "fuzz": ("random problems", "{draws:,} drawn, {failed} failed"),
        "sanitizer": ("compute-sanitizer, every tile of every kernel", "{tools}"),
    }
    lines = []
    for name, (what, outcome) in kinds.items():
        path = RESULTS / f"gpu_{name}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            tools = {tool: found for tool, found in record.items() if isinstance(found, dict)}
            texts = [
                f"{tool} {found['checked']:,} results, {found['reported']} reported" for tool, found in tools.items()
            ]
            where = f"{record['gpu']}, driver {record['driver']}, torch {record['torch']}, {record['date']}"
            found = outcome.format(**record, tools="; ".join(texts))
            lines.append(f"  - `results/{path.name}`: {what} ({where}): {found}. {_stale(record)}".rstrip())
    return "\n".join(lines) or "  - Nothing is recorded in `results/` yet."


def update_readme(text: str, records: Sequence[dict[str, Any]], cases: dict[str, Case]) -> str:
    """The README's text with everything between its markers generated anew."""
    blocks = {
        "headline": readme_headline(records),
        "speed": readme_speed(records, cases),
        "outcomes": readme_outcomes(),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: written by bench.py --readme -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise ValueError(f"README.md lacks the markers '{begin}' and '{end}'")
        text = f"{head}{begin}\n{block}\n{end}{tail}"
    return text
