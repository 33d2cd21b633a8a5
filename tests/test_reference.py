"""The comparison itself, on the CPU: planted errors must be found, honest rounding must pass."""

import pytest
import reference
import torch
from reference import Problem

PROBLEM = Problem((9, 11), (3, 3), padding=(1, 1), multiplier=2)
LARGE_KERNEL = Problem((33, 31), (31, 31), padding=(15, 15), batch=1)
RESULTS = ("out", "grad_input", "grad_weight", "grad_bias")


def prepared(problem, dtype, layout="nchw"):
    tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator("cpu"))
    return tensors, reference.expected_results(problem, tensors), reference.peer_results(problem, tensors)


@pytest.mark.parametrize(("layout", "dtype"), reference.pair_grid(reference.LAYOUTS, reference.DTYPES))
def test_correct_rounding_passes(layout, dtype):
    _, expected, _ = prepared(PROBLEM, dtype, layout)
    for name in RESULTS:
        rounded = expected[name].value.to(dtype)
        assert reference.mismatch(rounded, expected[name], rounded) is None


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=reference.short)
def test_an_exact_zero_must_be_zero(dtype):
    """Where no pixel is read there is nothing to round."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    expected = reference.Expected(zeros, zeros)
    assert reference.mismatch(zeros.to(dtype), expected) is None
    result = zeros.to(dtype, copy=True)
    result[1, 1] = torch.finfo(dtype).smallest_normal
    assert "first at (1, 1)" in reference.mismatch(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=reference.short)
def test_another_order_of_summation_passes(dtype):
    tensors, expected, peer = prepared(LARGE_KERNEL, dtype)
    flipped = reference.peer_results(LARGE_KERNEL, tensors.map(lambda t: t.flip(-1, -2) if t.ndim == 4 else t))
    for name in ("out", "grad_input", "grad_weight"):
        assert reference.mismatch(flipped[name].flip(-1, -2), expected[name], peer[name]) is None


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=reference.short)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None], ids=["nan", "inf", "wrong"])
def test_one_bad_element_is_found_and_named(dtype, value):
    _, expected, peer = prepared(PROBLEM, dtype)
    for name in RESULTS:
        exact = expected[name].value
        index = tuple(size - 1 for size in exact.shape)
        result = exact.to(dtype, copy=True)
        allowed = reference.allowed_units(dtype, expected[name], peer[name])
        # Half as much again as allowed, and a unit is at most two roundings (2 * eps / 2) of the magnitude.
        wrong = exact[index] + 1.5 * allowed * torch.finfo(dtype).eps * expected[name].magnitude[index]
        result[index] = wrong if value is None else value
        message = reference.mismatch(result, expected[name], peer[name])
        assert message is not None and f"1 of {exact.numel()} elements wrong, the first at {index}:" in message


@pytest.mark.parametrize("dtype", reference.HALF_AND_SINGLE, ids=reference.short)
def test_a_missing_tap_of_a_large_kernel_is_found(dtype):
    tensors, expected, peer = prepared(LARGE_KERNEL, dtype)
    tensors.weight[1, 0, 17, 4] = 0
    broken = reference.peer_results(LARGE_KERNEL, tensors)
    message = reference.mismatch(broken["out"], expected["out"], peer["out"])
    assert message is not None and "first at (0, 1, " in message


def test_an_unwritten_output_is_found():
    _, expected, peer = prepared(PROBLEM, torch.float16)
    unwritten = torch.full((expected["out"].value.numel() * 2,), 255, dtype=torch.uint8).view(torch.float16)
    message = reference.mismatch(unwritten.view(PROBLEM.out_shape), expected["out"], peer["out"])
    assert message is not None and f"{unwritten.numel()} of {unwritten.numel()} elements wrong" in message


@pytest.mark.parametrize("dtype", reference.DTYPES, ids=reference.short)
def test_all_bits_set_is_nan(dtype):
    assert torch.full((16,), 255, dtype=torch.uint8).view(dtype).isnan().all()


def test_wrong_shape_and_dtype_are_found():
    _, expected, peer = prepared(PROBLEM, torch.float16)
    assert "shape" in reference.mismatch(peer["out"][..., 1:], expected["out"], peer["out"])
    assert "dtype" in reference.mismatch(peer["out"].float(), expected["out"], peer["out"])


def test_a_bad_pytorch_result_excuses_nothing_beyond_the_cap():
    _, expected, peer = prepared(PROBLEM, torch.float16)
    zeros = torch.zeros_like(peer["out"])
    assert reference.mismatch(zeros, expected["out"], zeros) is not None


def test_infinities_must_be_where_they_belong():
    tensors, _, _ = prepared(PROBLEM, torch.float16)
    tensors.x[0, 1, 4, 5] = torch.inf
    expected, peer = (f(PROBLEM, tensors)["out"] for f in (reference.expected_results, reference.peer_results))
    assert reference.mismatch(peer, expected, peer) is None
    wrong_sign = torch.where(peer.isinf(), -peer, peer)
    spread = peer.index_fill(3, torch.tensor([7]), torch.nan)
    for result in (wrong_sign, spread, peer.nan_to_num()):
        assert reference.mismatch(result, expected, peer) is not None


def test_overflow_to_infinity_is_expected_where_the_exact_result_overflows():
    problem = Problem((4, 4), (2, 2), channels=1, bias=False)
    tensors, _, _ = prepared(problem, torch.float16)
    tensors.x.fill_(60000.0)
    tensors.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    expected = reference.expected_results(problem, tensors)["out"]
    assert reference.mismatch(torch.full(problem.out_shape, torch.inf, dtype=torch.float16), expected) is None
    assert reference.mismatch(torch.full(problem.out_shape, 65504.0, dtype=torch.float16), expected) is not None


def test_failures_report_what_was_collected():
    failures = reference.Failures()
    with pytest.raises(AssertionError, match="nothing was checked"):
        failures.report()
    failures.add(None)
    failures.report()
    with failures.catch("3x3", "forward"):
        raise RuntimeError("no such tile")
    with pytest.raises(AssertionError, match=r"1 of 2 checks failed:\n3x3 \| forward \| RuntimeError: no such tile"):
        failures.report()
