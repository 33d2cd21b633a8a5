"""Every kernel on the CPU, by the emulator (see emulator.py), in every variant that can serve, against float64.

Problems and bodies are mostly those of test_gpu_numerics.py. Of its kernel sizes the ordinary run takes a sample in
which every kernel and every tile occurs; --all-instances takes all, in every layout and dtype.
"""

import contextlib
import itertools
import re
import shutil
import time
from dataclasses import replace

import fuzz
import pytest
import reference
import test_gpu_numerics as gpu
import torch
from emulator import KERNELS, Build, Emulator
from reference import DTYPES, LAYOUTS, Failures, Problem

import depthwise_inline

F32, F16, BF16 = reference.HALF_AND_SINGLE
SAMPLE = {  # kernel, stride, dilation: layouts and dtypes
    ((3, 3), (1, 1), (1, 1)): (("nchw", F32), ("nhwc", F16)),
    ((3, 3), (2, 2), (1, 1)): (("nchw", F16), ("nhwc", F32)),
    ((1, 1), (2, 2), (1, 1)): (("nchw", F32),),
    ((5, 5), (1, 1), (1, 1)): (("nchw", F16),),
    ((3, 3), (1, 1), (2, 2)): (("nhwc", BF16),),
    ((13, 13), (1, 1), (1, 1)): (("nchw", F32), ("nhwc", BF16)),
}
T4, RTX_3060 = (40, 64 << 10, 64 << 10), (28, 100 << 10, 99 << 10)  # multiprocessors; shared memory of each, of a block


@pytest.fixture(scope="module")
def emulator(request):
    """The library on the CPU, where the tests would find that for GPUs."""
    try:
        depthwise_inline._cxx_command()
    except depthwise_inline.BuildError as error:
        pytest.skip(str(error))
    root = request.config.cache.mkdir("emulator")
    emulator = Emulator(root)
    for folder in root.iterdir():  # of older sources
        if folder != emulator.build.folder and time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the references, which are small
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise_inline, "_library", emulator.library)
        patch.setattr(reference, "DEVICE", "cpu")
        patch.setattr(reference, "OPERATORS", torch.ops.depthwise_emulated)
        yield emulator
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def everything(request):
    return request.config.getoption("--all-instances")


def pytest_generate_tests(metafunc):
    """The sample, or everything."""
    everything = metafunc.config.getoption("--all-instances")
    if "dilation" in metafunc.fixturenames:
        cases = [(*shape, *where) for shape, places in SAMPLE.items() for where in places]
        if everything:
            cases = [(*shape[:3], *where) for shape in gpu.SHAPES for where in gpu.ALL]
        if metafunc.definition.originalname == "test_sizes":
            cases = [case for case in cases if case[:2] in gpu.USUAL and case[2] == (1, 1)]
        ids = [f"{gpu.shape_id(*case[:3])}-{case[3]}-{reference.short(case[4])}" for case in cases]
        metafunc.parametrize(("kernel", "stride", "dilation", "layout", "dtype"), cases, ids=ids)
    elif "view" in metafunc.fixturenames:
        views, places = (reference.misaligned, reference.constant), (("nchw", F32),)
        if everything:
            views, places = reference.VIEWS, gpu.ALL
        cases = [(view, *where) for view in views for where in places]
        ids = [f"{view.__name__}-{layout}-{reference.short(dtype)}" for view, layout, dtype in cases]
        metafunc.parametrize(("view", "layout", "dtype"), cases, ids=ids)


def same_padding(kernel, dilation=(1, 1)):
    return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))


def shape_problems(kernel, stride, dilation, everything):
    """Odd sizes, a padding wider than the kernel, sizes that vectors divide, and small images; without padding if
    everything is asked for: every horizontal padding is a compilation of its own."""
    width = dilation[1] * (kernel[1] - 1) // 8 * 8 + 16
    divided = Problem((11, width), kernel, stride, same_padding(kernel, dilation), dilation, batch=3, channels=16)
    small = Problem((7, 8), kernel, stride, same_padding(kernel, dilation), dilation, batch=35, channels=8)
    without, *others = gpu.shape_problems(kernel, stride, dilation)
    if stride == dilation == (1, 1):
        others.append(small)
    if (kernel, stride, dilation) == ((3, 3), (1, 1), (1, 1)):  # narrow, as some tiles want it
        others.append(Problem((7, 7), kernel, padding=(1, 1), batch=9, channels=16))
    if kernel[0] * kernel[1] >= 25 and dilation == (1, 1):  # more images than lanes
        others.append(Problem((7, 6), kernel, stride, same_padding(kernel, dilation), dilation, batch=33, channels=3))
    return [divided, *others, *([without] if everything else [])]


def edge_problems(kernel, stride):
    """Images of one pixel, row or column, one channel, a depth multiplier, outputs of padding alone."""
    same = same_padding(kernel)
    return [
        Problem((1, 1), kernel, stride, same, batch=1, channels=1),
        Problem((1, 70), kernel, stride, same, channels=1, bias=False),
        Problem((70, 1), kernel, stride, same, channels=9),
        Problem((2, 2), kernel, stride, same, batch=3, channels=8),
        Problem((15, 18), kernel, stride, same, channels=5, multiplier=3),
        Problem((14, 16), kernel, stride, same, channels=8, multiplier=2, bias=False),
        Problem((3, 5), kernel, stride, (kernel[0] + 1, same[1]), batch=1, channels=5),
    ]


def check(emulator, problems, layout, dtype):
    emulator.obtain(reference.specialisations(problems, dtype, layout))
    gpu.check_all(problems, layout, dtype)


def test_the_sample_has_every_tile(emulator):
    tiles = set(re.findall(r'\{"(\w+)", \d', (KERNELS / "variants.h").read_text()))
    found = {
        variant
        for shape, places in SAMPLE.items()
        for (layout, dtype), problem in itertools.product(places, shape_problems(*shape, everything=False))
        for direction in reference.ALL_DIRECTIONS
        for variant in reference.all_variants(direction, problem, dtype, layout)
    }
    assert len(tiles) > 40 and tiles | {"general"} == found


def test_shapes(emulator, everything, kernel, stride, dilation, layout, dtype):
    check(emulator, shape_problems(kernel, stride, dilation, everything), layout, dtype)


def test_sizes(emulator, everything, kernel, stride, dilation, layout, dtype):
    """Of everything: each remainder of the vectors' and tiles' widths in width, height and channels; edges, batches."""
    problems = edge_problems(kernel, stride)
    if everything:
        problems += [*gpu.width_problems(kernel, stride), *gpu.channel_problems(kernel, stride)]
    if everything and (kernel, stride) == gpu.USUAL[0]:
        problems += gpu.EDGES + gpu.BATCHES
    check(emulator, problems, layout, dtype)


def test_values(emulator, kernel, stride, dilation, layout, dtype):
    """NaN and infinity, at the edges too, and numbers near the ends of the range."""
    images = [(15, 18), *([(7, 6)] if kernel == (13, 13) else [])]
    for problem in [gpu.special_problem(image, kernel, stride, dilation) for image in images]:
        emulator.obtain(reference.specialisations([problem], dtype, layout))
        gpu.check_nan_and_inf(problem, layout, dtype)
        gpu.check_magnitudes(problem, layout, dtype)


@pytest.mark.parametrize("device", [T4, RTX_3060], ids=["T4", "RTX_3060"])
def test_smaller_devices(emulator, device, everything, kernel, stride, dilation, layout, dtype):
    """Launches are cut by the number of multiprocessors and by shared memory."""
    with emulator.device(*device):
        check(emulator, shape_problems(kernel, stride, dilation, everything)[:1], layout, dtype)


def test_views(emulator, everything, view, layout, dtype):
    problems = gpu.view_problems() if everything else gpu.view_problems(gpu.USUAL[:1])
    emulator.obtain(reference.specialisations(problems, dtype, layout))
    gpu.check_views(problems, view, layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_of_bias_of_a_mean(emulator, layout):
    emulator.obtain(reference.specialisations([gpu.MEAN], F32, layout))
    gpu.check_grad_of_bias_of_a_mean(layout)


@pytest.mark.parametrize(("layout", "dtype"), reference.pair_grid(LAYOUTS, DTYPES))
def test_general(emulator, everything, layout, dtype):
    gpu.check_general_variant_on_random_problems(50 if everything else 5, layout, dtype)
    gpu.test_empty_batch(layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", reference.DIRECTIONS)
def test_the_general_variant_runs_where_it_is_forced(emulator, monkeypatch, direction, layout):
    """It needs no specialisation; what is selected does, and finds none."""
    monkeypatch.setattr(emulator, "obtain", lambda sources: built.extend(sources))
    problem, built = reference.Problem((9, 11), (2, 3), channels=8), []
    tensors = reference.make_tensors(problem, F32, layout, reference.fresh_generator())
    with reference.forced("general"):
        reference.run(direction, problem, tensors, layout)
    assert not built
    with pytest.raises(RuntimeError):
        reference.run(direction, problem, tensors, layout)
    assert built


def test_a_variant_that_cannot_serve_is_told(emulator):
    problem = reference.Problem((9, 11), (3, 3), (2, 2))
    with reference.forced("band"), pytest.raises(RuntimeError, match="variant cannot serve grad_input of this problem"):
        reference.select("grad_input", problem, F16, "nchw")


def test_an_empty_batch_wants_nothing_compiled(emulator):
    for (layout, dtype), shape in itertools.product(gpu.SWEPT, gpu.SHAPES):
        for problem in gpu.shape_problems(*shape[:3]):
            assert not reference.specialisations([replace(problem, batch=0)], dtype, layout), (problem, dtype, layout)


def test_a_choice_is_made_for_every_problem(emulator):
    """Random ones, as test_fuzz.py draws them for a GPU: whatever their sizes, the arithmetic of no kernel fails."""
    first = reference.fresh_generator().initial_seed()
    for number in range(first, first + 1000):
        fuzz.specialisations(fuzz.draw(number, "cuda"))


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_backward_of_the_backward(emulator, mask):
    """aten::convolution_backward_overrideable has gradients itself, with float32 weights beside 16 bits too."""
    backward, problem = (
        torch.ops.depthwise_emulated.convolution_backward_overrideable,
        reference.Problem((6, 5), (3, 2)),
    )
    convolution = (problem.stride, problem.padding, problem.dilation, False, (0, 0), problem.channels, mask)

    def grads(grad_out, x, weight):
        return tuple(grad for grad in backward(grad_out, x, weight, *convolution) if grad is not None)

    tensors = reference.make_tensors(problem, torch.float64, "nchw", reference.fresh_generator())
    leaves = [t.requires_grad_() for t in (tensors.grad_out, tensors.x, tensors.weight)]
    assert len(grads(*leaves)) == sum(mask)
    assert torch.autograd.gradcheck(grads, leaves)

    halves = [t.detach().half().requires_grad_() for t in leaves]
    halves[2] = halves[2].detach().float().requires_grad_()
    found = grads(*halves)
    assert [grad.dtype for grad in found] == [torch.float16] * mask[0] + [torch.float32] * (mask[1] + mask[2])
    seconds = torch.autograd.grad([grad.sum() for grad in found], halves, allow_unused=True)
    assert all(second is None or second.dtype is leaf.dtype for second, leaf in zip(seconds, halves, strict=True))


def only(direction, variant, problem, dtype, layout):
    """The specialisations of one variant: with float32 weights beside 16 bits it has another."""
    with reference.forced(variant):
        found = [reference.select(direction, problem, dtype, layout, float_weight=kind) for kind in (False, True)]
    return {name.rpartition("/")[0]: source for name, source in found}


def messages(direction, variant, problem, dtype, layout):
    """What is wrong with one variant."""
    failures, tensors = Failures(), reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
    reference.check(failures, problem, tensors, layout, [direction], [variant])
    assert failures.checked
    return "\n".join(failures.messages)


def check_one(emulator, *where, device=None):
    """One variant is right: direction, variant, problem, dtype, layout; on this device, if one is named."""
    emulator.obtain(only(*where))
    with emulator.device(*device) if device else contextlib.nullcontext():
        assert messages(*where) == ""


SMALL = Problem((11, 16), (3, 3), padding=(1, 1), batch=3, channels=16)
ODD = replace(SMALL, image=(11, 15))
TALL = replace(SMALL, image=(60, 16))
TINY = Problem((7, 6), (7, 7), padding=(3, 3), batch=5)
LARGE = Problem((11, 24), (13, 13), padding=(6, 6), batch=3, channels=16)


def test_several_groups_of_images_in_a_split(emulator):
    """Of the kernels whose lanes are images: so many channels that a block adds up more images than it has lanes."""
    problem = Problem((2, 3), (7, 7), padding=(3, 3), batch=96, channels=530)
    check_one(emulator, "grad_weight", "weight_images_fma", problem, F32, "nchw")


WIDE_LANES = [  # more images than lanes of half a warp; odd and even kernels, one of one row
    Problem((20, 20), (13, 13), padding=(6, 6), batch=17, channels=3),
    Problem((7, 19), (12, 31), padding=(5, 15), batch=5, channels=9),
    Problem((19, 17), (27, 13), padding=(13, 6), batch=35, channels=2),
    Problem((1, 20), (1, 25), padding=(0, 12), batch=16, channels=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_images_of_lanes(emulator, layout):
    """Of the kernels whose lanes are images: those of which a warp's shared memory holds half as many."""
    for problem, direction in itertools.product(WIDE_LANES, reference.DIRECTIONS):
        variant = "weight_images_fma" if direction == "grad_weight" else "images_fma"
        check_one(emulator, direction, variant, problem, F32, layout)


def test_wide_planes_of_lanes(emulator):
    """Of the kernels whose lanes are images: whole planes, however wide, take whole warps."""
    for image in ((3, 15), (3, 18)):
        problem = Problem(image, (5, 5), padding=(2, 2), batch=33)
        check_one(emulator, "grad_weight", "weight_images_fma_plane", problem, F32, "nchw")


WORDS = [  # of input of blocked_grad_weight: of four columns, with and without columns before the first tap, and of two
    Problem((9, 20), (13, 13), padding=(6, 6), batch=3, channels=2),
    Problem((9, 72), (13, 31), padding=(6, 16), batch=2, channels=1),
    Problem((9, 70), (13, 29), padding=(6, 14), batch=2, channels=1),
]


def test_words_of_blocked_input(emulator):
    for problem in WORDS:
        check_one(emulator, "grad_weight", "weight_blocked", problem, F32, "nchw")


CUTS = [  # of blocked_grad_weight: parts of the kernel, and splits that are cut within images and tiles of columns
    Problem((20, 24), (31, 31), padding=(15, 15), batch=3, channels=2),
    Problem((90, 70), (13, 13), padding=(6, 6), batch=1, channels=2),
    Problem((33, 21), (27, 27), padding=(13, 13), batch=3, channels=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuts_of_blocked_grad_weight(emulator, layout):
    variant = "weight_blocked_nhwc" if layout == "nhwc" else "weight_blocked"
    for problem, dtype in zip(CUTS, (F32, F32, F16), strict=True):
        check_one(emulator, "grad_weight", variant, problem, dtype, layout)


def test_one_channel_is_summed_in_parts(emulator):
    """In fp32, as PyTorch's kernel for it is not a depthwise one and has smaller errors than running sums."""
    worst = []
    for channels in (2, 1):
        problem = Problem((40, 40), (31, 31), padding=(15, 15), batch=1, channels=channels, bias=False)
        tensors = reference.make_tensors(problem, F32, "nchw", reference.fresh_generator())
        emulator.obtain(only("forward", "blocked", problem, F32, "nchw"))
        with reference.forced("blocked"):
            result = reference.run("forward", problem, tensors, "nchw")["out"]
        expected = reference.expected_results(problem, tensors)["out"].value
        worst.append(((result - expected).square().mean() / expected.square().mean()).sqrt().item())
    assert worst[1] < 0.6 * worst[0], worst


ANY_BOUNDARY = [  # odd rows, and even ones that begin on no word; bands of a wide image; fewer elements than words hold
    Problem((11, 15), (13, 13), padding=(6, 6), batch=3, channels=3),
    Problem((9, 16), (13, 13), padding=(6, 6), batch=18, channels=2),
    Problem((21, 71), (13, 13), padding=(6, 6), batch=1, channels=2, multiplier=2),
    Problem((2, 1), (13, 13), padding=(6, 6), batch=1, channels=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_on_any_boundary(emulator, layout):
    """Kernels that read words: of tensors that begin and end within one, nothing outside is read."""
    kernels = re.compile(r"(weight_)?band\d*(_images\d)?(_nhwc)?")
    for problem, dtype in zip(ANY_BOUNDARY, (F16, BF16, F16, BF16), strict=True):
        failures, tensors = Failures(), reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
        for direction in reference.DIRECTIONS:
            variants = reference.all_variants(direction, problem, dtype, layout)
            variants = [variant for variant in variants if kernels.fullmatch(variant)]
            for variant in variants:
                emulator.obtain(only(direction, variant, problem, dtype, layout))
            views = tensors.map(reference.misaligned)
            reference.check(failures, problem, views, layout, [direction], variants)
        assert failures.checked
        assert failures.messages == []


TIGHT = [  # grads of weight at the end of shared memory: of the block's own, and of what the device grants
    (None, "weight_band32_nhwc", Problem((3, 3), (50, 50), padding=(24, 24), batch=1, channels=4), F16),
    (T4, "weight_band32_nhwc", Problem((7, 3), (39, 6), padding=(19, 3), batch=20, channels=1), F16),
    (T4, "weight_images8_nhwc", Problem((8, 8), (15, 15), padding=(7, 7), batch=17, channels=8), F16),
]


WHOLE_ROWS = [  # several bands a block and more than one image; channels that do not fit one block
    (None, "weight_rows1", Problem((31, 56), (5, 5), (2, 2), (2, 2), batch=17, channels=144), F16),
    (None, "weight_rows2", Problem((5, 56), (3, 3), padding=(1, 1), batch=90, channels=144, bias=False), BF16),
    (T4, "weight_rows2", Problem((14, 31), (3, 3), padding=(1, 1), batch=1, channels=56), BF16),
    # Parts of the columns; groups of channels; several bands at once, of a small image; rows that no window meets.
    (None, "weight_rows1", Problem((9, 112), (3, 3), (2, 2), (1, 1), batch=30, channels=96), F32),
    (None, "weight_rows1", Problem((14, 56), (5, 5), (2, 2), (2, 2), batch=20, channels=144), F32),
    (None, "weight_rows2", Problem((14, 14), (3, 3), padding=(1, 1), batch=5, channels=36), F32),
    (None, "weight_rows2", Problem((12, 9), (2, 3), (2, 1), (0, 4), batch=3, channels=8), F16),
]


@pytest.mark.parametrize(("device", "variant", "problem", "dtype"), TIGHT + WHOLE_ROWS, ids=str)
def test_grad_weight_in_channels_last(emulator, device, variant, problem, dtype):
    check_one(emulator, "grad_weight", variant, problem, dtype, "nhwc", device=device)


WHOLE_PLANES = [  # small planes side by side, bands of a large one, and channels of which several blocks have a part
    (None, "weight_planes_x1g1", Problem((7, 7), (3, 3), padding=(1, 1), batch=9, channels=12), F32),
    (None, "weight_planes_x2g2", Problem((14, 14), (5, 5), padding=(2, 2), batch=9, channels=136), BF16),
    (T4, "weight_planes_x8g8", Problem((200, 208), (3, 3), (2, 2), (1, 1), batch=1, channels=1), F16),
    (None, "weight_planes_x4g4", Problem((9, 16), (3, 3), padding=(1, 1), batch=3, channels=150, bias=False), F32),
    (RTX_3060, "weight_planes_x4g4", Problem((60, 56), (5, 5), padding=(2, 2), batch=2, channels=2), F32),
    (None, "weight_planes_x1g1", Problem((10, 12), (4, 2), (2, 1), (3, 1), channels=4, multiplier=2), F32),
]


@pytest.mark.parametrize(("device", "variant", "problem", "dtype"), WHOLE_PLANES, ids=str)
def test_grad_weight_of_whole_planes(emulator, device, variant, problem, dtype):
    check_one(emulator, "grad_weight", variant, problem, dtype, "nchw", device=device)


def test_grad_weight_of_whole_planes_without_bulk_copies(emulator):
    build = Build(emulator.root, arch=800)
    for _, variant, problem, dtype in WHOLE_PLANES:
        with emulator.replaced(build, only("grad_weight", variant, problem, dtype, "nchw")):
            assert messages("grad_weight", variant, problem, dtype, "nchw") == ""


def test_selected_where_shared_memory_is_too_small(emulator):
    """The kernel that is selected wants more than a T4 grants: another specialised one serves."""
    problem = Problem((15, 17), (9, 9), padding=(4, 4), batch=4, channels=8)
    with emulator.device(*T4):
        emulator.obtain(only("forward", None, problem, F16, "nhwc") | only("forward", "band", problem, F16, "nhwc"))
        assert "strips" in reference.select("forward", problem, F16, "nhwc")[0]
        assert messages("forward", None, problem, F16, "nhwc") == ""
        assert "'strips11_nhwc' needs more shared memory" in messages("forward", "strips11_nhwc", problem, F16, "nhwc")


def test_selected_where_registers_are_too_few(emulator):
    """Before sm_80, where products of bfloat16 are calls."""
    variants = (None, "band", "blocked")
    with emulator.device(*T4):
        for variant in variants:
            emulator.obtain(only("forward", variant, LARGE, BF16, "nhwc"))
        found = {variant: messages("forward", variant, LARGE, BF16, "nhwc") for variant in variants}
        assert "toeplitz" in reference.select("forward", LARGE, BF16, "nhwc")[0]
    assert "'band' needs a GPU of compute capability 8.0" in found.pop("band")
    assert set(found.values()) == {""}


def test_selected_where_sums_need_more_registers(emulator):
    """Before sm_80, of float16 too: then another specialised kernel serves."""
    problem, before = Problem((12, 56), (5, 29), padding=(2, 14), batch=2, channels=8), set(emulator.loaded)
    with emulator.device(*T4):
        assert messages("forward", None, problem, F16, "nhwc") == ""
        assert "toeplitz" in reference.select("forward", problem, F16, "nhwc")[0]
    assert any(name.startswith("blocked") for name in set(emulator.loaded) - before)


# Of several images, of several columns of tiles, without room to fetch ahead, of channels that fill no block; of pairs
# of blocks, and of an odd number of them; of more than 64 columns; of fewer channels than eight; of pixels on
# 8 and 4 bytes; of narrow kernels in two blocks a multiprocessor.
UNITS = [
    (2, (228 << 10, 227 << 10), Problem((33, 20), (13, 13), padding=(6, 6), batch=5, channels=16)),
    (2, (228 << 10, 227 << 10), Problem((40, 75), (9, 9), padding=(4, 4), batch=3, channels=8)),
    (2, (100 << 10, 99 << 10), Problem((40, 75), (9, 9), padding=(4, 4), batch=3, channels=8)),
    (1, (228 << 10, 227 << 10), Problem((20, 20), (13, 13), padding=(0, 13), batch=7, channels=11)),
    (6, (228 << 10, 227 << 10), Problem((20, 20), (13, 13), padding=(6, 6), batch=30, channels=32)),
    (4, (228 << 10, 227 << 10), Problem((33, 47), (9, 27), padding=(4, 13), batch=3, channels=24)),
    (2, (228 << 10, 227 << 10), Problem((36, 96), (13, 25), padding=(6, 12), batch=2, channels=16)),
    (2, (228 << 10, 227 << 10), Problem((20, 74), (5, 31), padding=(2, 15), batch=3, channels=3)),
    (1, (100 << 10, 99 << 10), Problem((56, 56), (15, 15), padding=(7, 7), batch=2, channels=3)),
    (3, (228 << 10, 227 << 10), Problem((33, 20), (13, 13), padding=(6, 6), batch=5, channels=12)),
    (2, (100 << 10, 99 << 10), Problem((40, 75), (9, 9), padding=(4, 4), batch=3, channels=12)),
    (2, (228 << 10, 227 << 10), Problem((20, 24), (5, 11), padding=(2, 5), batch=7, channels=10)),
    (2, (228 << 10, 227 << 10), Problem((20, 24), (11, 5), padding=(5, 2), batch=7, channels=4)),
    (60, (228 << 10, 227 << 10), Problem((4, 20), (5, 9), padding=(2, 4), batch=66, channels=192)),
]


@pytest.mark.parametrize(("multiprocessors", "shared", "problem"), UNITS, ids=str)
def test_units_one_after_the_other(emulator, multiprocessors, shared, problem):
    """Of channels_last products with bands: a block has more than its warps hold at a time."""
    for direction, dtype in (("forward", F16), ("grad_input", BF16)):
        check_one(emulator, direction, "band", problem, dtype, "nhwc", device=(multiprocessors, *shared))


# Tall kernels, whose rows are taken for columns: images of odd and even sizes, pixels on 8, 4 and 2 bytes.
TURNED = [
    Problem((56, 56), (51, 5), padding=(25, 2), batch=2, channels=12),
    Problem((19, 50), (11, 3), padding=(5, 1), batch=3, channels=9),
    Problem((30, 70), (13, 2), padding=(3, 5), batch=1, channels=24),
    Problem((31, 17), (9, 3), padding=(12, 3), dilation=(3, 2), batch=5, channels=6),
    Problem((29, 20), (25, 1), padding=(12, 0), batch=2, channels=5, bias=False),
]


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize("problem", TURNED, ids=str)
def test_tall_kernels_are_turned(emulator, problem, layout):
    """Of few multiprocessors a block has rows of several images; of many, warps share the kernel rows of a tile."""
    for direction, dtype in (("forward", F16), ("grad_input", BF16)):
        assert all("_turned" in name for name in only(direction, "band", problem, dtype, layout))
        for multiprocessors in (1, 132):
            check_one(
                emulator, direction, "band", problem, dtype, layout, device=(multiprocessors, 228 << 10, 227 << 10)
            )


@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_nan_and_inf_in_turned_images(emulator, layout):
    problem = Problem((35, 30), (21, 2), padding=(10, 1), channels=8)
    emulator.obtain(reference.specialisations([problem], F16, layout))
    gpu.check_nan_and_inf(problem, layout, F16)


@pytest.mark.parametrize("layout", reference.LAYOUTS)
@pytest.mark.parametrize(
    ("image", "kernel", "dtype"),
    (((64, 16), (63, 3), F16), ((64, 16), (51, 11), F16), ((48, 48), (31, 31), BF16)),
    ids=("turned", "added up in parts", "rows apart"),
)
def test_sums_of_large_kernels_do_not_drift(emulator, image, kernel, dtype, layout):
    """Tensor cores truncate, as the emulated ones do: here always towards zero, until the kernel's second half."""
    padding = kernel[0] // 2, kernel[1] // 2
    problem = Problem(image, kernel, padding=padding, channels=8, bias=False)
    tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator()).map(torch.abs)
    tensors.weight[:, :, (kernel[0] + 1) // 2 :].neg_()
    failures = Failures()
    for direction in ("forward", "grad_input"):
        served = reference.all_variants(direction, problem, dtype, layout)
        for variant in ("band", *(name for name in served if name.startswith("band_images"))):
            emulator.obtain(only(direction, variant, problem, dtype, layout))
            reference.check(failures, problem, tensors, layout, [direction], [variant])
    failures.report()


@pytest.mark.parametrize("channels", (12, 10, 9))
@pytest.mark.parametrize("kernel", ((9, 21), (50, 40)), ids=str)
def test_grad_weight_of_pixels_on_few_bytes(emulator, kernel, channels):
    """Channels_last: pixels on 8, 4 and 2 bytes, of blocks that take eight channels and four; not all exist."""
    padding = kernel[0] // 2, kernel[1] // 2
    problem = Problem((20, 50), kernel, padding=padding, batch=2, channels=channels)
    check_one(emulator, "grad_weight", "weight_band_nhwc", problem, F16, "nhwc")


COPIED = [  # channels_last, which NCHW serves between copies: weights of one channel find room, of eight they do not
    (F16, Problem((40, 8), (160, 3), padding=(79, 1), batch=2, channels=8)),
    (F32, Problem((12, 12), (41, 41), padding=(20, 20), batch=2, channels=3)),
    (BF16, Problem((20, 9), (19, 17), padding=(9, 8), batch=2, channels=3, multiplier=2)),
]


@pytest.mark.parametrize(("dtype", "problem"), COPIED, ids=str)
def test_served_in_nchw(emulator, dtype, problem):
    directions = ("forward", "grad_input") if problem.multiplier == 1 else ("forward",)
    for direction in directions:
        name, source = reference.select(direction, problem, dtype, "nhwc")
        assert "nhwc" not in name and source
        check_one(emulator, direction, None, problem, dtype, "nhwc")


# Multiprocessors: for few, a block's rows are of several images; for many, warps share the kernel rows of a tile.
ROWS_OF_IMAGES = [
    (1, "nchw", Problem((21, 23), (13, 13), padding=(6, 6), batch=7, channels=2)),
    (4, "nchw", Problem((30, 24), (13, 13), padding=(9, 8), batch=4, channels=1, bias=False)),
    (132, "nchw", Problem((33, 47), (27, 27), padding=(13, 13), batch=2, channels=1)),
    (132, "nhwc", Problem((40, 24), (13, 13), padding=(6, 6), batch=3, channels=3)),
    (3, "nhwc", Problem((41, 28), (13, 13), padding=(6, 6), batch=9, channels=7)),
    (3, "nhwc", Problem((40, 24), (13, 13), padding=(6, 6), batch=9, channels=2)),
]


@pytest.mark.parametrize(("multiprocessors", "layout", "problem"), ROWS_OF_IMAGES, ids=str)
def test_rows_of_bands_are_dealt(emulator, multiprocessors, layout, problem):
    for direction, dtype in (("forward", F16), ("grad_input", BF16)):
        check_one(emulator, direction, "band", problem, dtype, layout, device=(multiprocessors, 228 << 10, 227 << 10))


STRAIGHT = Problem((19, 32), (3, 3), padding=(1, 0), batch=3, channels=4)  # grad of input: rows of 30, with padding
MANY = Problem((100, 20), (3, 3), padding=(1, 1), batch=12, channels=8)
TALL_STRIPS = Problem((100, 9), (3, 7), padding=(1, 2), batch=2, channels=136)
WIDE = Problem((40, 33), (3, 7), padding=(1, 2), batch=3, channels=8)
# Input rows that begin within words, as they lie in memory; tall images in many strips; eight columns a thread; tensors
# much larger than the L2 cache.
OTHER_WAYS = [
    ("grad_input", "warps_v8", STRAIGHT, F16, "nchw"),
    ("forward", "warps_v8", replace(STRAIGHT, image=(18, 34)), BF16, "nchw"),
    ("forward", "stream_channels8", MANY, F16, "nhwc"),
    ("grad_input", "stream_channels128", TALL_STRIPS, F16, "nhwc"),
    ("forward", "stream_channels48", MANY, F16, "nhwc"),
    ("forward", "stream_channels8", WIDE, F16, "nhwc"),
    ("grad_input", "stream_channels8", WIDE, BF16, "nhwc"),
    ("grad_weight", "weight_stream32", WIDE, F16, "nhwc"),
    ("grad_weight", "weight_strips", ODD, F16, "nchw"),
    ("gradients", "gradients_lanes8", MANY, BF16, "nhwc"),
    ("gradients", "gradients", replace(STRAIGHT, image=(9, 280), padding=(1, 1)), F16, "nchw"),
]


@pytest.mark.parametrize("where", OTHER_WAYS, ids=lambda where: f"{where[0]}-{where[1]}-{where[2].kernel}")
def test_other_ways(emulator, where):
    check_one(emulator, *where, device=(1, 228 << 10, 227 << 10, 0))  # without an L2 cache


BEFORE_SM_80 = [  # what goes other ways there: asynchronous copies, bfloat16's conversions and products
    ("forward", "planes_v8", SMALL, F16, "nchw"),
    ("forward", "stream_v1", replace(TALL, image=(60, 15)), F16, "nchw"),
    ("forward", "warps_v2", TALL, BF16, "nchw"),
    ("grad_input", "warps_v8", STRAIGHT, F16, "nchw"),
    ("forward", "stream_channels32", TALL, BF16, "nhwc"),
    ("forward", "lanes8", SMALL, F32, "nhwc"),
    ("forward", "band", LARGE, BF16, "nchw"),
    ("forward", "band", LARGE, F16, "nhwc"),
    ("forward", "band_images4", LARGE, F16, "nchw"),
    ("forward", "band_images7", LARGE, BF16, "nchw"),
    ("forward", "images_c4", SMALL, BF16, "nchw"),
    ("forward", "image_bands_nhwc", SMALL, BF16, "nhwc"),
    ("forward", "strips7", SMALL, F16, "nchw"),
    ("forward", "strips7_nhwc", SMALL, BF16, "nhwc"),
    ("grad_weight", "weight_band", LARGE, BF16, "nchw"),
    ("grad_weight", "weight_band_nhwc", LARGE, F16, "nhwc"),
    ("grad_weight", "weight_blocked", LARGE, F32, "nchw"),
    ("grad_weight", "weight_images16", SMALL, BF16, "nchw"),
    ("grad_weight", "weight_images16_nhwc", SMALL, F16, "nhwc"),
    ("grad_weight", "weight_image_rows", SMALL, BF16, "nhwc"),
    ("forward", "images_fma", TINY, F32, "nchw"),
    ("grad_weight", "weight_images_fma_plane", TINY, F32, "nchw"),
    ("grad_weight", "weight_stream32", SMALL, BF16, "nhwc"),
    ("grad_weight", "weight_rows1", SMALL, F32, "nhwc"),
    ("grad_weight", "weight_x4g4_queue", SMALL, F32, "nchw"),
    ("grad_weight", "weight_strips", ODD, F16, "nchw"),
    ("grad_weight", "weight_strips_nhwc", SMALL, BF16, "nhwc"),
    ("forward", "columns", SMALL, BF16, "nchw"),
    ("forward", "columns_nhwc", SMALL, F16, "nhwc"),
    ("grad_weight", "weight_columns", SMALL, F16, "nchw"),
    ("grad_weight", "weight_planes_x4g4", SMALL, F32, "nchw"),
    ("grad_weight", "weight_rows1", SMALL, BF16, "nhwc"),
    ("gradients", "gradients", SMALL, F32, "nchw"),
    ("gradients", "gradients_planes", ODD, BF16, "nchw"),
    ("gradients", "gradients_lanes16", SMALL, F16, "nhwc"),
]


def test_before_sm_80(emulator):
    build = Build(emulator.root, arch=750)
    sources = {name: source for where in BEFORE_SM_80 for name, source in only(*where).items()}
    with emulator.device(*T4), emulator.replaced(build, sources):
        assert {where: found for where in BEFORE_SM_80 if (found := messages(*where))} == {}


PLANTED = {  # what is said of an error: file, text, its replacement; direction, variant, problem, dtype, layout
    "without a barrier between": (
        ("stream_nhwc.cuh", "__syncthreads();  // and every", "// and every"),
        ("forward", "stream_channels32", TALL, F16, "nhwc"),
    ),
    "got nan": (
        ("planes_nchw.cuh", "wait_for_copies<0>();", ""),
        ("forward", "planes_v4", SMALL, F32, "nchw"),
    ),
    "bytes of shared memory at": (
        ("planes_nchw.cuh", "static_cast<int>(bytes(plan.planes));", "static_cast<int>(bytes(plan.planes)) - 256;"),
        ("forward", "planes_v4", SMALL, F32, "nchw"),
    ),
    "reads 4 bytes at offset": (
        ("nchw_tile.cuh", "static_cast<unsigned>(start) < static_cast<unsigned>(width)", "start < width"),
        ("forward", "v4r4_unaligned", ODD, F32, "nchw"),
    ),
    "writes 8 bytes at offset": (
        ("direct_nhwc.cuh", "if (column + q < args.out_w)", ""),
        ("forward", "q4r4", ODD, F16, "nhwc"),
    ),
    "no multiple": (
        ("blocked.cuh", "kWeightPitch = divide_up(kKernelW, 4) * 4", "kWeightPitch = kKernelW"),
        ("forward", "blocked", LARGE, F32, "nchw"),
    ),
    "launch bounds 128": (
        ("direct_nhwc.cuh", "const int y = kDirectNhwcThreads / x;", "const int y = 2 * kDirectNhwcThreads / x;"),
        ("forward", "q2r2", SMALL, F16, "nhwc"),
    ),
    "hangs": (
        ("tiled_nhwc.cuh", "  wait_for_copies<0>();", "  if (thread == 0) return;\n  wait_for_copies<0>();"),
        ("forward", "lanes8", SMALL, F32, "nhwc"),
    ),
}


@pytest.mark.parametrize("said", PLANTED)
def test_planted_errors_are_found(emulator, tmp_path, said):
    """By the results or by what the emulator sees; without the error, nothing is said."""
    (name, text, replacement), where = PLANTED[said]

    def edit(file, source):
        assert file != name or text in source
        return source.replace(text, replacement) if file == name else source

    with emulator.replaced(Build(tmp_path, edit=edit), only(*where)):
        assert said in messages(*where)
    assert messages(*where) == ""
