"""Every kernel variant in every direction against float64, with twice PyTorch's own error allowed (see reference.py).

Grids, and what each would catch:
- SHAPES: kernel, stride and dilation, each with no padding, 'same' padding on an image that may be smaller than the
  kernel, and a padding wider than the kernel on a tiny image (outputs that touch no pixel, negative window starts).
  The general variant runs all of them in every dtype and layout; the specialised ones, which cost a compilation per
  dtype and layout, run in the combinations that the table names.
- WIDTHS: every remainder of the vector widths and tiles, with heights of another rhythm, on the kernels that
  networks use most.
- CHANNELS: the same for the axis along which channels_last threads run.
- then the memory side: views, poisoned outputs, large tensors, special values, repeatability.
"""

import itertools
import random
from dataclasses import replace

import pytest
import reference
import torch
from reference import DTYPES, HALF_AND_SINGLE, LAYOUTS, Expected, Failures, Problem
from torch.nn import functional as F

import depthwise_inline

pytestmark = pytest.mark.gpu

F32, F16, BF16 = HALF_AND_SINGLE
ALL = tuple(itertools.product(LAYOUTS, HALF_AND_SINGLE))
ALL_IDS = reference.pair_grid(LAYOUTS, HALF_AND_SINGLE)
# bfloat16 differs from float16 in its conversions alone, which SHAPES covers: the sweeps over sizes do without it.
SWEPT = tuple(itertools.product(LAYOUTS, (F32, F16)))
SWEPT_IDS = reference.pair_grid(LAYOUTS, (F32, F16))
COMBINATIONS = {  # layout and dtype pairs for kernels that are not run in all six
    "a": (("nchw", F32), ("nhwc", F16)),
    "b": (("nchw", F16), ("nhwc", F32)),
    "c": (("nchw", BF16), ("nhwc", BF16)),
    "nchw": (("nchw", F32), ("nchw", F16)),
}

SHAPES = [  # kernel, stride, dilation, combinations for the specialised variants
    ((1, 1), (1, 1), (1, 1), "a"),
    ((1, 1), (2, 2), (1, 1), "b"),  # a stride that skips pixels: their gradient is 0 and must be written
    ((2, 2), (1, 1), (1, 1), "b"),  # even: 'same' is not symmetric
    ((2, 2), (3, 3), (1, 1), "c"),
    ((3, 3), (1, 1), (1, 1), "all"),
    ((3, 3), (2, 2), (1, 1), "all"),
    ((3, 3), (3, 3), (1, 1), "a"),
    ((3, 3), (2, 1), (1, 1), "b"),
    ((3, 3), (1, 1), (2, 2), "a"),
    ((3, 3), (1, 1), (1, 3), "b"),
    ((3, 3), (2, 2), (2, 2), "c"),
    ((4, 4), (1, 1), (1, 1), "c"),
    ((4, 4), (2, 2), (1, 1), "a"),
    ((3, 1), (1, 1), (1, 1), "a"),
    ((1, 3), (1, 1), (1, 1), "b"),
    ((3, 7), (1, 1), (1, 1), "b"),
    ((7, 3), (1, 1), (1, 1), "a"),
    ((3, 7), (2, 2), (1, 1), "c"),
    ((5, 5), (1, 1), (1, 1), "all"),
    ((5, 5), (2, 2), (1, 1), "b"),
    ((5, 5), (1, 1), (2, 2), "c"),
    ((7, 7), (1, 1), (1, 1), "all"),
    ((7, 7), (2, 2), (1, 1), "a"),
    ((7, 7), (1, 1), (3, 3), "b"),  # large-kernel attention
    ((9, 9), (1, 1), (1, 1), "b"),
    ((11, 11), (1, 1), (1, 1), "a"),
    ((1, 11), (1, 1), (1, 1), "c"),
    ((21, 1), (1, 1), (1, 1), "b"),
    ((6, 14), (1, 1), (1, 1), "c"),
    ((13, 13), (1, 1), (1, 1), "nchw"),
    ((31, 31), (1, 1), (1, 1), "nchw"),
    ((5, 51), (1, 1), (1, 1), "c"),
    ((51, 5), (1, 1), (1, 1), "c"),
]
FORCED = {  # kernel, stride, dilation that are run in every variant; the others of SHAPES as they are selected
    *(((1, 1), (s, s), (1, 1)) for s in (1, 2)),
    *(((3, 3), (s, s), (d, d)) for s in (1, 2) for d in (1, 2)),
    *((k, (1, 1), (1, 1)) for k in ((3, 7), (1, 11), (5, 5), (7, 7), (9, 9), (13, 13), (31, 31), (5, 51), (51, 5))),
    *((k, (2, 2), (1, 1)) for k in ((4, 4), (5, 5))),
    ((2, 2), (3, 3), (1, 1)),
}
USUAL = [  # kernel and stride of the sweeps over widths and channels: SHAPES has them in all six combinations
    ((3, 3), (1, 1)),
    ((3, 3), (2, 2)),
    ((5, 5), (1, 1)),
    ((7, 7), (1, 1)),
]
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 14, 15, 16, 17, 28, 31, 33, 56, 64, 66, 100, 129)
HEIGHTS = (33, 1, 16, 2, 7, 57, 4, 13, 3, 20, 5)  # 11 of them beside 19 widths: no pair repeats
CHANNELS = (1, 3, 8, 12, 40, 64, 129)


def shape_problems(kernel, stride, dilation):
    """Three paddings for one kernel; the third is larger than the kernel, but not horizontally (that is in EDGES):
    every horizontal padding is seconds of compilation for each variant."""
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    same = tuple(e // 2 for e in extent)
    shape = {"kernel": kernel, "stride": stride, "dilation": dilation}
    return [
        Problem((extent[0] + 5, extent[1] + 12), **shape),
        Problem((13, 17), padding=same, multiplier=2, bias=False, **shape),
        Problem((3, max(5, extent[1])), padding=(extent[0] + 1, same[1]), batch=1, channels=5, **shape),
    ]


def shape_id(kernel, stride, dilation):
    return f"k{kernel[0]}x{kernel[1]}-s{stride[0]}x{stride[1]}-d{dilation[0]}x{dilation[1]}"


def specialised_cases():
    for kernel, stride, dilation, which in SHAPES:
        for layout, dtype in ALL if which == "all" else COMBINATIONS[which]:
            name = f"{shape_id(kernel, stride, dilation)}-{layout}-{reference.short(dtype)}"
            yield pytest.param(kernel, stride, dilation, layout, dtype, id=name)


def width_problems(kernel, stride):
    for index, width in enumerate(WIDTHS):
        padding = tuple(k // 2 for k in kernel)
        height = HEIGHTS[index % len(HEIGHTS)]
        yield Problem((height, width), kernel, stride, padding, batch=1 + index % 2, channels=2 + index % 3)


def channel_problems(kernel, stride):
    for index, channels in enumerate(CHANNELS):
        padding = tuple(k // 2 for k in kernel)
        yield Problem((9, 10 + index), kernel, stride, padding, channels=channels, bias=index % 2 == 0)


EDGES = [
    Problem((1, 1), (3, 3), padding=(1, 1), batch=1, channels=1),
    Problem((1, 1), (7, 7), padding=(3, 3), channels=4),
    Problem((1, 129), (5, 5), padding=(2, 2), channels=1),
    Problem((129, 1), (5, 5), padding=(2, 2), channels=9),
    Problem((2, 2), (3, 3), (2, 2), (1, 1), batch=3, channels=1),
    Problem((3, 3), (7, 7), padding=(2, 2)),  # the kernel hangs over the image on both sides; one output
    Problem((7, 7), (7, 7), channels=16),
    Problem((15, 18), (3, 3), padding=(1, 1), channels=5, multiplier=3),
    Problem((15, 18), (5, 5), padding=(2, 2), channels=4, multiplier=2, bias=False),
    Problem((14, 14), (3, 3), (2, 2), (1, 1), channels=8, multiplier=2),  # the last row and column see one pad only
    Problem((10, 300), (3, 3), padding=(0, 2), channels=1, bias=False),
    Problem((3, 5), (3, 3), padding=(4, 5), batch=1, channels=5),  # padding larger than the kernel, and than the image
    Problem((2, 9), (5, 5), (2, 2), padding=(6, 7), batch=1, channels=8),
    Problem((300, 9), (7, 7), padding=(3, 0), batch=1, channels=2),
]

BATCHES = [  # kernels that take several images at once: batches that fill their products and warps, and one image more
    Problem((7, 7), (3, 3), padding=(1, 1), batch=17, channels=16),
    Problem((14, 14), (7, 7), padding=(3, 3), batch=33, channels=24),
    Problem((13, 12), (5, 5), padding=(1, 2), batch=9, channels=11),
    Problem((7, 6), (13, 13), padding=(6, 6), batch=65, channels=8),
    Problem((14, 14), (27, 27), padding=(13, 13), batch=8, channels=8, bias=False),
    Problem((20, 32), (21, 21), padding=(10, 10), batch=18, channels=3),
]

# Of channels_last products with bands: blocks of an odd number, and in pairs; more than 64 columns; few channels;
# pixels on 8 and 4 bytes; narrow kernels in two blocks a multiprocessor.
UNITS = [
    Problem((20, 20), (13, 13), padding=(6, 6), batch=230, channels=200),
    Problem((33, 47), (9, 27), padding=(4, 13), batch=130, channels=16),
    Problem((36, 96), (13, 25), padding=(6, 12), batch=24, channels=48),
    Problem((56, 56), (29, 29), padding=(14, 14), batch=70, channels=3, bias=False),
    Problem((31, 40), (13, 13), padding=(3, 9), batch=90, channels=5),
    Problem((56, 56), (51, 5), padding=(25, 2), batch=50, channels=28),
    Problem((20, 20), (13, 13), padding=(6, 6), batch=90, channels=30),
    Problem((56, 56), (13, 13), padding=(6, 6), batch=20, channels=48),
    Problem((28, 30), (11, 11), padding=(5, 5), batch=40, channels=56),
    Problem((14, 13), (13, 13), padding=(6, 6), batch=33, channels=128),
]

# Tall kernels, whose rows are taken for columns: rows of images on 16, 8, 4 and 2 bytes, blocks of several images and
# of a part of one; dilation; sizes at which warps share the kernel rows of a tile, and at which they do not.
TURNED = [
    Problem((56, 56), (51, 5), padding=(25, 2), batch=32, channels=40),
    Problem((96, 300), (25, 5), padding=(12, 2), batch=3, channels=24),
    Problem((28, 28), (27, 3), padding=(13, 1), batch=40, channels=16, bias=False),
    Problem((33, 47), (41, 6), padding=(20, 3), batch=20, channels=10),
    Problem((31, 18), (9, 3), padding=(12, 3), dilation=(3, 2), batch=50, channels=8),
    Problem((64, 9), (63, 1), padding=(31, 0), batch=2, channels=3),
]

# Both gradients at once: rows within a warp and wider, ragged strips and planes, many images one below the other,
# blocks of whole images and of a part of one, groups of channels that are not full.
AT_ONCE = [
    Problem((112, 112), (3, 3), padding=(1, 1), batch=20, channels=48),
    Problem((130, 520), (3, 3), padding=(1, 1), batch=3, channels=24),
    Problem((7, 7), (3, 3), padding=(1, 1), batch=40, channels=960),
    Problem((14, 14), (3, 3), padding=(1, 1), batch=150, channels=200),
    Problem((33, 51), (3, 3), padding=(1, 1), batch=17, channels=72),
    Problem((3, 1000), (3, 3), padding=(1, 1), batch=5, channels=16),
    Problem((28, 28), (5, 5), padding=(2, 2), batch=33, channels=40),
    Problem((19, 50), (5, 5), padding=(2, 2), batch=70, channels=88),
    Problem((14, 14), (5, 5), padding=(2, 2), batch=60, channels=72),
]

# Kernels whose sums would drift on the tensor cores if those of one sign came first.
DRIFTING = [
    Problem((56, 56), (31, 31), padding=(15, 15), channels=64, batch=16, bias=False),
    Problem((28, 28), (29, 29), padding=(14, 14), channels=64, batch=16, bias=False),
    Problem((14, 14), (27, 27), padding=(13, 13), channels=64, batch=16, bias=False),
    Problem((96, 96), (31, 31), padding=(15, 15), channels=16, batch=2, bias=False),
    Problem((64, 64), (63, 63), padding=(31, 31), channels=16, batch=2, bias=False),
    Problem((56, 56), (51, 5), padding=(25, 2), channels=16, batch=4, bias=False),
    Problem((56, 56), (5, 51), padding=(2, 25), channels=16, batch=4, bias=False),
    Problem((20, 20), (13, 13), padding=(6, 6), channels=64, batch=16, bias=False),
]
# Of inputs of one sign, the signs of a kernel's weights by row and column: a sum is far from zero until late.
SIGNS = {
    "ones": lambda row, column, height, width: row >= 0,
    "rows": lambda row, column, height, width: row < height // 2,
    "columns": lambda row, column, height, width: column < width // 2,
    "quarter": lambda row, column, height, width: row < height // 4,
    "alternate": lambda row, column, height, width: row % 2 == 0,
}

# Channels_last, which NCHW serves between copies: in each dtype all but one.
COPIED = [
    Problem((40, 8), (160, 3), padding=(79, 1), batch=2, channels=8),
    Problem((56, 56), (51, 51), padding=(25, 25), batch=2, channels=16),
    Problem((30, 20), (41, 41), padding=(20, 20), batch=3, channels=5, bias=False),
    Problem((30, 30), (19, 17), padding=(9, 8), batch=3, channels=6, multiplier=2),
]


def on_tensor_cores(direction, problem, dtype, layout):
    """The variants for large kernels that multiply there."""
    found = reference.all_variants(direction, problem, dtype, layout)
    return [variant for variant in found if variant.startswith(("band", "images"))]


def check_all(problems, layout, dtype, **options):
    """Check problems with fresh inputs and report every failure among them at once."""
    failures, generator = Failures(), reference.fresh_generator()
    for problem in problems:
        tensors = reference.make_tensors(problem, dtype, layout, generator)
        reference.check(failures, problem, tensors, layout, **options)
    failures.report()


@pytest.fixture
def alone(shared_folder):
    """One such test at a time holds the GPU's memory, and leaves none of it in PyTorch's cache."""
    with depthwise_inline._exclusive(shared_folder / "memory.lock"):
        yield
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def compiled(once):
    """All specialisations that the grids need, built in parallel instead of one by one at first use."""
    sources = {}
    for case in specialised_cases():
        *shape, layout, dtype = case.values
        variants = None if tuple(shape) in FORCED else [None]
        sources |= reference.specialisations(shape_problems(*shape), dtype, layout, variants)
    for layout, dtype in SWEPT:
        problems = EDGES + BATCHES
        for kernel, stride in USUAL:
            problems += [*width_problems(kernel, stride), *channel_problems(kernel, stride)]
        sources |= reference.specialisations(problems, dtype, layout)
    for dtype in (F16, BF16):
        sources |= reference.specialisations(UNITS, dtype, "nhwc")
        for layout in LAYOUTS:
            sources |= reference.specialisations(TURNED, dtype, layout, ["band"], ("forward", "grad_input"))
            for problem, direction in itertools.product(DRIFTING, ("forward", "grad_input")):
                variants = [None, *on_tensor_cores(direction, problem, dtype, layout)]
                sources |= reference.specialisations([problem], dtype, layout, variants, [direction])
    for dtype in HALF_AND_SINGLE:
        sources |= reference.specialisations(COPIED, dtype, "nhwc")
        for layout in LAYOUTS:
            sources |= reference.specialisations(AT_ONCE, dtype, layout, directions=(reference.GRADIENTS,))
    once("compiled", lambda: depthwise_inline._obtain_all(sources))


# ---- Shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "dtype"), reference.pair_grid(LAYOUTS, DTYPES))
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [pytest.param(*shape[:3], id=shape_id(*shape[:3])) for shape in SHAPES]
)
def test_general_variant(kernel, stride, dilation, layout, dtype):
    check_all(shape_problems(kernel, stride, dilation), layout, dtype, variants=["general"])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kernel", "stride", "dilation", "layout", "dtype"), list(specialised_cases()))
def test_every_variant(kernel, stride, dilation, layout, dtype):
    variants = None if (kernel, stride, dilation) in FORCED else [None]
    check_all(shape_problems(kernel, stride, dilation), layout, dtype, variants=variants)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), SWEPT_IDS)
@pytest.mark.parametrize(("kernel", "stride"), USUAL)
def test_widths(kernel, stride, layout, dtype):
    check_all(width_problems(kernel, stride), layout, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), SWEPT_IDS)
@pytest.mark.parametrize(("kernel", "stride"), USUAL)
def test_channels(kernel, stride, layout, dtype):
    check_all(channel_problems(kernel, stride), layout, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), SWEPT_IDS)
def test_edges(layout, dtype):
    check_all(EDGES, layout, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), SWEPT_IDS)
def test_batches(layout, dtype):
    check_all(BATCHES, layout, dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_units_one_after_the_other(dtype):
    assert all("toeplitz_nhwc" in reference.select("forward", problem, dtype, "nhwc")[0] for problem in UNITS)
    check_all(UNITS, "nhwc", dtype)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_tall_kernels_are_turned(dtype, layout):
    directions = ("forward", "grad_input")
    for problem, direction in itertools.product(TURNED, directions):
        with reference.forced("band"):
            assert "_turned" in reference.select(direction, problem, dtype, layout)[0], (problem, direction)
    check_all(TURNED, layout, dtype, directions=directions, variants=["band"])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_sums_do_not_drift(dtype, layout, signs):
    """Tensor cores truncate; PyTorch's sums do not."""
    failures, generator = Failures(), reference.fresh_generator()
    for problem in DRIFTING:
        tensors = reference.make_tensors(problem, dtype, layout, generator).map(torch.abs)
        row, column = (torch.arange(size, device=tensors.weight.device) for size in problem.kernel)
        is_positive = SIGNS[signs](row[:, None], column[None, :], *problem.kernel)
        tensors.weight.copy_(torch.where(is_positive, tensors.weight, -tensors.weight))
        for direction in ("forward", "grad_input"):
            variants = on_tensor_cores(direction, problem, dtype, layout)
            reference.check(failures, problem, tensors, layout, directions=[direction], variants=[None, *variants])
    failures.report()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), ALL_IDS)
def test_both_gradients_at_once(layout, dtype):
    """By every kernel that computes them so; the automatic choice leaves some of 5x5 to two of them."""
    direction = reference.GRADIENTS
    assert all(len(reference.all_variants(direction, problem, dtype, layout)) > 1 for problem in AT_ONCE)
    check_all(AT_ONCE, layout, dtype, directions=[direction])
    for problem in AT_ONCE:
        at_once = reference.select(direction, problem, dtype, layout)[0] != "general"
        is_fast = dtype is F32 and (layout == "nhwc" or problem.image != (14, 14))
        assert at_once == (problem.kernel == (3, 3) or is_fast)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_served_in_nchw(dtype):
    names = [reference.select("forward", problem, dtype, "nhwc")[0] for problem in COPIED]
    assert sum("nchw" in name for name in names) == len(COPIED) - 1
    check_all(COPIED, "nhwc", dtype)


@pytest.mark.parametrize(("layout", "dtype"), reference.pair_grid(LAYOUTS, DTYPES))
def test_general_variant_on_random_problems(layout, dtype):
    """Combinations of sizes that no table lists: another fifty in every run."""
    check_general_variant_on_random_problems(50, layout, dtype)


def check_general_variant_on_random_problems(count, layout, dtype):
    failures, generator = Failures(), reference.fresh_generator()
    drawn = random.Random(generator.initial_seed())
    problems = 0
    while problems < count:

        def pair(low, high):
            return (drawn.randint(low, high), drawn.randint(low, high))

        problem = Problem(
            pair(1, 40),
            *(pair(1, 12), pair(1, 4), pair(0, 9), pair(1, 3)),
            batch=drawn.randint(1, 3),
            channels=drawn.randint(1, 20),
            multiplier=drawn.randint(1, 3),
            bias=drawn.random() < 0.5,
        )
        if min(problem.out_image) < 1:
            continue
        problems += 1
        tensors = reference.make_tensors(problem, dtype, layout, generator)
        reference.check(failures, problem, tensors, layout, variants=["general"])
    failures.report()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), ALL_IDS)
def test_more_planes_than_a_grid_dimension_holds(layout, dtype):
    """65535 is the limit of the second and third grid dimensions."""
    many = [
        Problem((4, 5), (3, 3), padding=(1, 1), batch=70_001, channels=1),
        Problem((4, 5), (3, 3), padding=(1, 1), batch=2, channels=35_000),
        Problem((5, 6), (3, 3), (2, 2), padding=(1, 1), batch=1, channels=66_000),
    ]
    check_all(many, layout, dtype)


@pytest.mark.parametrize(("layout", "dtype"), reference.pair_grid(LAYOUTS, DTYPES))
def test_empty_batch(layout, dtype):
    problem = Problem((9, 8), (3, 3), padding=(1, 1), batch=0, channels=4, multiplier=2)
    tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
    assert reference.run("forward", problem, tensors, layout)["out"].shape == problem.out_shape
    assert reference.run("grad_input", problem, tensors, layout)["grad_input"].shape == problem.x_shape
    reference.poison(tensors.weight, tensors.bias)
    for name, grad in reference.run("grad_weight", problem, tensors, layout).items():
        assert grad.numel() and (grad == 0).all(), f"{name} of an empty batch is not 0: {grad}"


LARGE = {  # float16; all beyond 2^31 elements on both sides
    "many_planes-nchw": ("nchw", Problem((176, 176), (3, 3), padding=(1, 1), batch=35_010, channels=2, bias=False)),
    "one_plane-nchw": ("nchw", Problem((46_400, 46_400), (3, 3), batch=1, channels=1, bias=False)),
    "channels-nhwc": ("nhwc", Problem((176, 176), (3, 3), padding=(1, 1), batch=1_095, channels=64, bias=False)),
    "large_rows-nhwc": ("nhwc", Problem((66, 512), (9, 9), padding=(4, 4), batch=1, channels=65_536, bias=False)),
}


def large_windows(problem, shape, layout):
    """Batch, channel, rows and columns of small windows at the first element, at number 2^31 and at the last one."""
    n, c, h, w = shape
    for flat in (0, 2**31, n * c * h * w - 1):
        if layout == "nchw":
            batch, channel, row, column = (*divmod(flat // (h * w), c), *divmod(flat % (h * w), w))
        else:
            batch, row, column, channel = (*divmod(flat // c // w, h), flat // c % w, flat % c)
        rows = slice(max(row - 3, 0), min(row + 4, h))
        columns = slice(max(column - 20, 0), min(column + 21, w))
        yield batch, channel, rows, columns


def padded_window(plane, rows, columns, top, left, extra):
    """Float64 window of a plane, moved by -top and -left and `extra` larger, with zeros beyond the plane's border."""
    sides = []
    for window, before, size in ((rows, top, plane.shape[0]), (columns, left, plane.shape[1])):
        start, stop = window.start - before, window.stop - before + extra
        sides.append((slice(max(start, 0), min(stop, size)), max(-start, 0), max(stop - size, 0)))
    (row_part, above, below), (column_part, before, after) = sides
    return F.pad(plane[row_part, column_part].double(), (before, after, above, below))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_31_elements(name):
    layout, problem = LARGE[name]
    if torch.cuda.mem_get_info()[1] < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB of memory")
    generator, failures = reference.fresh_generator(), Failures()
    pad, reach = problem.padding[0], problem.kernel[0] - 1

    def draw(shape):
        result = torch.empty(shape, dtype=F16, device=reference.DEVICE, memory_format=reference.memory_format(layout))
        return result.normal_(generator=generator)

    weight = torch.randn(problem.weight_shape, generator=generator, device=reference.DEVICE).to(F16)
    tensors = reference.Tensors(draw(problem.x_shape), weight, None, draw(problem.out_shape))
    assert min(tensors.x.numel(), tensors.grad_out.numel()) > 2**31

    def correlate(window, taps):
        def run(a, b):
            return F.conv2d(a[None, None], b[None, None])[0, 0]

        return Expected(run(window, taps), run(window.abs(), taps.abs()))

    def check_images(direction, source, shape, taps, before):
        """Forward and grad_input alike: windows of the result from windows of the source."""
        for variant in reference.all_variants(direction, problem, F16, layout):
            where = (problem, layout, direction, variant)
            with failures.catch(*where), reference.forced(variant):
                reference.poison(source, copies=1)
                (result,) = reference.run(direction, problem, tensors, layout).values()
                failures.add("unwritten or NaN" if result.isnan().any() else None, *where)
                for batch, channel, rows, columns in large_windows(problem, shape, layout):
                    window = padded_window(source[batch, channel], rows, columns, before, before, reach)
                    expected = correlate(window, taps[channel, 0].double())
                    got = result[batch, channel, rows, columns]
                    failures.add(reference.mismatch(got, expected), *where, (batch, channel, rows, columns))
                del result

    check_images("forward", tensors.x, problem.out_shape, weight, pad)
    check_images("grad_input", tensors.grad_out, problem.x_shape, weight.flip(-1, -2), reach - pad)

    # Zero gradients outside the windows make the exact weight gradient cheap, and any misread pixel visible.
    windows = list(large_windows(problem, problem.out_shape, layout))
    kept = [tensors.grad_out[b, c, rows, columns].clone() for b, c, rows, columns in windows]
    tensors.grad_out.zero_()
    value = torch.zeros(problem.weight_shape, dtype=torch.float64, device=reference.DEVICE)
    magnitude = torch.zeros_like(value)
    for (batch, channel, rows, columns), grad in zip(windows, kept, strict=True):
        tensors.grad_out[batch, channel, rows, columns] = grad
        part = correlate(padded_window(tensors.x[batch, channel], rows, columns, pad, pad, reach), grad.double())
        value[channel, 0] += part.value
        magnitude[channel, 0] += part.magnitude
    for variant in reference.all_variants("grad_weight", problem, F16, layout):
        where = (problem, layout, "grad_weight", variant)
        with failures.catch(*where), reference.forced(variant):
            result = reference.run("grad_weight", problem, tensors, layout)["grad_weight"]
            failures.add(reference.mismatch(result, Expected(value, magnitude)), *where)
    failures.report()


# ---- Memory ---------------------------------------------------------------------------------------------------------


def view_problems(kernels=USUAL[:3]):
    return [Problem((14, 24), kernel, stride, (1, 1), channels=8) for kernel, stride in kernels]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("layout", "dtype"), ALL_IDS)
@pytest.mark.parametrize("view", reference.VIEWS, ids=lambda view: view.__name__)
def test_views(view, layout, dtype):
    """Each tensor alone as a view, then all of them; with the automatic choice and with every variant."""
    check_views(view_problems(), view, layout, dtype)


def check_views(problems, view, layout, dtype):
    failures, generator = Failures(), reference.fresh_generator()
    for problem in problems:
        whole = reference.make_tensors(problem, dtype, layout, generator)
        for which in ("x", "weight", "bias", "grad_out", "all"):
            tensors = whole.map(view) if which == "all" else replace(whole, **{which: view(getattr(whole, which))})
            # A view need not suggest the layout of its source: let the strides of the inputs decide, as in autograd.
            chosen = reference.forward_layout(tensors.x, tensors.weight)
            with failures.catch(view.__name__, which, problem):
                for variants in (None, [None]):
                    reference.check(failures, problem, tensors, chosen, variants=variants)
    failures.report()


MEAN = Problem((128, 128), (3, 3), padding=(1, 1), batch=8, channels=16)
MEAN_UNITS = 3  # in the emulator the worst of 96 channels: 2.3; equal terms added one after the other: 3.5 to 5


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_of_bias_of_a_mean(layout):
    check_grad_of_bias_of_a_mean(layout)


def check_grad_of_bias_of_a_mean(layout):
    """Its gradient is the same all over a channel: a sum that grows by equal terms rounds the same way every time."""
    failures, tensors = Failures(), reference.make_tensors(MEAN, F32, layout, reference.fresh_generator())
    tensors.grad_out[:] = tensors.grad_out[:1, :, :1, :1].clone()
    exact = tensors.grad_out.double().sum((0, 2, 3))
    expected = reference.Expected(exact, exact.abs())
    for variant in reference.all_variants("grad_weight", MEAN, F32, layout):
        with failures.catch(MEAN, layout, variant), reference.forced(variant):
            reference.poison(tensors.weight, tensors.bias)
            results = reference.run_unless_refused("grad_weight", MEAN, tensors, layout)
            if results is None:
                continue
            worst = reference.errors_in_units(results["grad_bias"], expected).max().item()
            wrong = worst > MEAN_UNITS
            failures.add(f"{worst:.3g} units, allowed {MEAN_UNITS}" if wrong else None, MEAN, layout, variant)
    failures.report()


def test_poison_reaches_the_next_allocation():
    """Otherwise no test above could find an unwritten output."""
    for size in (1, 1000, 300_000, 3_000_000):
        like = torch.empty(size, dtype=F16, device=reference.DEVICE)
        reference.poison(like)
        assert torch.empty_like(like).isnan().all(), f"{size} elements"


def test_inputs_are_left_alone():
    """Values and versions of all inputs, and the NaN around them, survive every direction."""
    problem = Problem((17, 19), (3, 3), padding=(1, 1), channels=8)
    for layout in LAYOUTS:
        tensors = reference.make_tensors(problem, F32, layout, reference.fresh_generator())
        storages = [t.new_empty(0).set_(t.untyped_storage()) for t in tensors]
        before = [(storage.clone(), t._version) for storage, t in zip(storages, tensors, strict=True)]
        for direction in reference.ALL_DIRECTIONS:
            reference.run(direction, problem, tensors, layout)
        for name, t, storage, (values, version) in zip(
            ("x", "weight", "bias", "grad_out"), tensors, storages, before, strict=True
        ):
            same = torch.equal(storage.view(torch.int32), values.view(torch.int32))
            assert same and t._version == version, f"{name} was changed"


# ---- Values ---------------------------------------------------------------------------------------------------------

SPECIAL = [  # kernel, stride, dilation out of SHAPES
    *((kernel, stride, (1, 1)) for kernel, stride in USUAL),
    ((1, 1), (2, 2), (1, 1)),  # NaN in a pixel that no output reads
    ((3, 3), (1, 1), (2, 2)),
    ((13, 13), (1, 1), (1, 1)),
    ((31, 31), (1, 1), (1, 1)),
    ((51, 5), (1, 1), (1, 1)),
]
SPECIAL_CASES = [case for case in specialised_cases() if case.values[:3] in SPECIAL]


def special_problem(image, kernel, stride, dilation, **options):
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Problem(image, kernel, stride, padding, dilation, **{"channels": 8} | options)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kernel", "stride", "dilation", "layout", "dtype"), SPECIAL_CASES)
def test_nan_and_inf_go_where_they_belong(kernel, stride, dilation, layout, dtype):
    """At corners, edges and inside; a zero of padding or of a tile's filling times Inf must not reach an output."""
    check_nan_and_inf(special_problem((67, 74), kernel, stride, dilation), layout, dtype)


def check_nan_and_inf(problem, layout, dtype):
    failures, generator = Failures(), reference.fresh_generator()
    for where, value in itertools.product(("x", "grad_out"), (torch.nan, torch.inf, -torch.inf)):
        tensors = reference.make_tensors(problem, dtype, layout, generator)
        planted = getattr(tensors, where)
        bottom, right = planted.shape[2] - 1, planted.shape[3] - 1
        for spot in (  # channels 6 and 7 stay finite
            (0, 0, 0, 0),
            (0, 1, bottom, right),
            (1, 2, 0, right),
            (1, 3, bottom // 2, right // 2),
            (1, 4, bottom // 2, 0),
            (0, 5, 1, 1),
        ):
            planted[spot] = value
        reference.check(failures, problem, tensors, layout)
    failures.report()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kernel", "stride", "dilation", "layout", "dtype"), SPECIAL_CASES)
def test_magnitudes_near_the_ends_of_the_range(kernel, stride, dilation, layout, dtype):
    """Large: products and partial sums leave float16's range, results mostly do not. Small: subnormal inputs."""
    check_magnitudes(special_problem((20, 37), kernel, stride, dilation), layout, dtype)


def check_magnitudes(problem, layout, dtype):
    failures, generator = Failures(), reference.fresh_generator()
    large = reference.make_tensors(problem, dtype, layout, generator)
    # Multiples of 32 up to 60000, about nine weights of -1 or 1 and the others 0: every sum is exact in float32, so
    # the only rounding is the last, and a result that overflows float16 does so for everyone.
    for t in large:
        t.copy_((t.float() * 20_000).clamp(-60_000, 60_000).div(32).round() * 32)
    kept = torch.rand(large.weight.shape, generator=generator, device=reference.DEVICE) < 9 / (
        problem.kernel[0] * problem.kernel[1]
    )
    large.weight.copy_(large.weight.sign() * kept)
    reference.check(failures, problem, large, layout, directions=("forward", "grad_input"))

    if dtype is not BF16:  # whose subnormals are those of the accumulator
        small = reference.make_tensors(problem, dtype, layout, generator)
        for t in (small.x, small.bias, small.grad_out):
            t.mul_(torch.finfo(dtype).smallest_normal / 4)
        reference.check(failures, problem, small, layout, directions=("forward", "grad_input"))
    failures.report()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kernel", "stride", "dilation", "layout", "dtype"), SPECIAL_CASES)
def test_repeat_runs_agree_bit_for_bit(kernel, stride, dilation, layout, dtype):
    """Enough blocks to be scheduled differently each time: a race or an atomic sum would show in the last bits."""
    failures = Failures()
    problem = special_problem((57, 61), kernel, stride, dilation, batch=16, channels=24)
    tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
    for direction in reference.ALL_DIRECTIONS:
        kernel_layout = reference.forward_layout(tensors.x, tensors.weight) if direction == "forward" else layout
        for variant in reference.all_variants(direction, problem, dtype, kernel_layout):
            where = (problem, reference.short(dtype), layout, direction, variant)
            with failures.catch(*where), reference.forced(variant):
                first = reference.run(direction, problem, tensors, layout)
                for _ in range(5):
                    reference.poison(*first.values())
                    again = reference.run(direction, problem, tensors, layout)
                    for name, result in first.items():
                        differing = int((result != again[name]).sum())
                        failures.add(f"{differing} elements differ" if differing else None, *where, name)
    failures.report()
