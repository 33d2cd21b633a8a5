"""GPU tests are skipped where there is no GPU; pytest --record writes down a run of the tests on one."""

import datetime
import os
import time

import pytest
import torch
from stand_in import built, project, shipped, warm  # noqa: F401  fixtures

import bench
import bench_report as report
import depthwise_inline

RECORD = report.RESULTS / "gpu_tests.json"
FUZZ_RECORD = report.RESULTS / "gpu_fuzz.json"
SANITIZER_RECORD = report.RESULTS / "gpu_sanitizer.json"


def why_no_gpu():
    """None, or why the tests marked gpu cannot run here."""
    if torch.version.cuda is None:
        return f"needs an NVIDIA GPU: torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    where = "" if hidden is None else f", CUDA_VISIBLE_DEVICES={hidden!r}"
    return f"needs an NVIDIA GPU: torch finds none{where}"


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        action="store_true",
        help="on a GPU, write results/gpu_tests.json; with --fuzz gpu_fuzz.json, with --sanitize gpu_sanitizer.json",
    )
    parser.addoption("--fuzz", type=int, metavar="N", help="draw N problems in test_fuzz.py instead of 200")
    parser.addoption("--fuzz-draw", type=int, metavar="NUMBER", help="repeat one draw of test_fuzz.py")
    parser.addoption("--sanitize", action="store_true", help="run test_sanitizer.py's tests on a GPU")
    parser.addoption(
        "--all-instances",
        action="store_true",
        help="compile every shipped kernel for every architecture, not for sm_90 alone with samples on the others; "
        "emulate every kernel size in every layout and dtype, not a sample",
    )


def _is_worker(config):
    """Of pytest-xdist."""
    return hasattr(config, "workerinput")


def pytest_configure(config):
    if config.getoption("--record") and not _is_worker(config) and why_no_gpu() is not None:
        raise pytest.UsageError(f"--record writes down a run on a GPU; it {why_no_gpu()}")


def pytest_collection_modifyitems(items):
    reason = why_no_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


_lost_in = None  # the test in which this process lost the GPU: after a wrong access, CUDA answers no more


def _gpu_answers():
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    global _lost_in
    failed = call.excinfo is not None and call.excinfo.errisinstance(torch.AcceleratorError)
    if failed and _lost_in is None and not _gpu_answers():
        _lost_in = item.nodeid
    return (yield)


def pytest_runtest_setup(item):
    if _lost_in and item.get_closest_marker("gpu"):
        pytest.fail(f"not run: the GPU was lost in {_lost_in}", pytrace=False)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Of this run: under pytest-xdist of all its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def once(shared_folder):
    """once(name, work) works once a run: under pytest-xdist in the first worker that comes, while the others wait."""

    def run(name, work):
        with depthwise_inline._exclusive(shared_folder / f"{name}.lock"):
            if not (shared_folder / f"{name}.done").exists():
                work()
                (shared_folder / f"{name}.done").touch()

    return run


def pytest_sessionstart(session):
    session.config.started = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    """Under pytest-xdist the controller alone has every worker's reports; workers come here too."""
    if not config.getoption("--record") or _is_worker(config):
        return
    stats = {name: terminalreporter.stats.get(name, []) for name in ("passed", "failed", "error", "skipped")}
    properties = [dict(report.user_properties) for report in (*stats["passed"], *stats["failed"])]
    if config.getoption("--sanitize"):
        path, outcome = SANITIZER_RECORD, {}
        for tool, counts in (item for found in properties for item in found.get("sanitizer", {}).items()):
            outcome[tool] = {name: outcome.get(tool, {}).get(name, 0) + count for name, count in counts.items()}
        if not outcome:
            terminalreporter.write_line("--sanitize --record: no tool came to its end, nothing is recorded")
            return
    elif config.getoption("--fuzz") is None:
        path = RECORD
        counts = {name: len(reports) for name, reports in stats.items()}
        counts["failed"] += counts.pop("error")
        outcome = {name: counts[name] for name in ("passed", "failed", "skipped")}
        outcome["arguments"] = list(config.invocation_params.args)  # which of the tests these were
    else:
        path = FUZZ_RECORD
        outcome = next((found["fuzz"] for found in properties if "fuzz" in found), None)
        if outcome is None:
            terminalreporter.write_line("--fuzz --record: test_fuzz did not come to its end, nothing is recorded")
            return
    record = {
        "sources_sha256": report.sources_sha256(),
        "gpu": torch.cuda.get_device_name(),
        "driver": bench.driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        **outcome,
        "seconds": round(time.monotonic() - config.started, 1),
    }
    report.write_json(path, record)
    terminalreporter.write_line(f"wrote {path}")
