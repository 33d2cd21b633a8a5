"""Random problems, on a GPU if there is one: --fuzz N for more than 200, --fuzz-draw NUMBER for one of them again."""

import os
import random
import re
import shlex
import subprocess
import sys

import fuzz
import pytest
import reference
import torch
from conftest import why_no_gpu

import depthwise_inline

DEVICE = "cpu" if why_no_gpu() else "cuda"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def one_thread():
    """The problems are small: several threads would spend their time on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def needs(draw):
    """What to compile for a draw: on the CPU nothing."""
    return fuzz.specialisations(draw) if DEVICE == "cuda" else {}


def test_fuzz(request, record_property):
    number, wanted = request.config.getoption("--fuzz-draw"), request.config.getoption("--fuzz") or 200
    seed = int(os.environ.get("DEPTHWISE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DEPTHWISE_TEST_SEED={seed}")
    if number is None:
        most = 20 + wanted // 40  # specialisations: seconds of a core each
        configurations = most // 3 if DEVICE == "cuda" else wanted
        draws, sources = fuzz.plan(seed, wanted, configurations, most, DEVICE, needs)
        depthwise_inline._obtain_all(sources)
    else:
        draws, sources = [fuzz.draw(number, DEVICE)], {}
    failures, failed = reference.Failures(), 0
    for draw in draws:
        before = len(failures.messages)
        fuzz.check(failures, draw, DEVICE)
        failed += len(failures.messages) > before
    record_property("fuzz", {"seed": seed, "draws": len(draws), "specialisations": len(sources), "failed": failed})
    failures.report()


class Broken:
    """The operators, with one wrong element in the corner of every result of forward."""

    def __init__(self, operators):
        self.operators = operators

    def __getattr__(self, name):
        return getattr(self.operators, name)

    def forward_no_autograd(self, *arguments):
        out = self.operators.forward_no_autograd(*arguments)
        out[-1:, -1:, -1:, -1:] += 100
        return out


def test_a_planted_error_is_found_and_repeated(monkeypatch):
    monkeypatch.setattr(reference, "OPERATORS", Broken(reference.OPERATORS))
    draws, _ = fuzz.plan(0, 30, 30, 0, DEVICE, needs)
    broken = [d for d in draws if (d.direction, d.through) == ("forward", "operator") and d.problem.batch]
    assert broken
    failures = reference.Failures()
    for draw in draws:
        fuzz.check(failures, draw, DEVICE)
    assert [message.split(" | ")[:2] for message in failures.messages] == [[str(d), d.line] for d in broken]
    corner = tuple(size - 1 for size in broken[0].problem.out_shape)
    assert re.search(rf"1 of \d+ elements wrong, the first at {re.escape(str(corner))}", failures.messages[0])

    python, *arguments = shlex.split(broken[0].line)
    assert (python, *arguments[:2]) == ("python", "-m", "pytest")
    code = """if True:
        import sys
        import pytest, reference, test_fuzz
        reference.OPERATORS = test_fuzz.Broken(reference.OPERATORS)
        sys.exit(pytest.main(sys.argv[1:]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments[2:], "-k", "test_fuzz and not planted"],
        cwd=reference.ROOT,
        env={**os.environ, "PYTHONPATH": "tests:."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert failures.messages[0] in done.stdout.replace("\nE    ", "")


def test_a_draw_is_its_number():
    for number in (0, 5, 3 * fuzz.DRAWS_OF_A_CONFIGURATION + 7):
        assert fuzz.draw(number, DEVICE) == fuzz.draw(number, DEVICE)
    assert len({str(fuzz.draw(number, DEVICE)) for number in range(20)}) == 20


def test_a_plan_keeps_within_its_bounds():
    def two(draw):
        return {str(draw.problem.kernel): "source", str(draw.problem.image[0] % 5): "source"}

    draws, sources = fuzz.plan(3, 100, 12, 9, DEVICE, two)
    assert len(draws) == 100 and len(sources) == 9
    assert set().union(*map(two, draws)) == set(sources)


def test_every_kind_of_draw_comes_up():
    draws = [fuzz.draw(number * fuzz.DRAWS_OF_A_CONFIGURATION, DEVICE) for number in range(1000)]
    dtypes = set(reference.DTYPES) if DEVICE == "cuda" else {torch.float32, torch.float64}
    drawn = {
        "direction": set(reference.ALL_DIRECTIONS),
        "dtype": dtypes,
        "layout": set(reference.LAYOUTS),
        "through": {way for dtype in dtypes for way in fuzz.ways_through(dtype)},
        "variant": {None, "general"},
    }
    for name, values in drawn.items():
        assert {getattr(draw, name) for draw in draws} == values
    assert {view for draw in draws for view in draw.views} == {None, *fuzz.VIEWS}
    for name in ("multiplier", "batch", "bias"):
        assert len({getattr(draw.problem, name) for draw in draws}) > 1
