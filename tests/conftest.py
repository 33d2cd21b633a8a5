"""GPU tests are skipped where there is no GPU; pytest --record writes down a run of the tests on one."""

import datetime
import os
import time

import pytest
import torch

import bench
import bench_report as report

RECORD = report.RESULTS / "gpu_tests.json"


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
    parser.addoption("--record", action="store_true", help="on a GPU, write results/gpu_tests.json")
    parser.addoption(
        "--all-instances",
        action="store_true",
        help="compile every shipped kernel for every architecture, not for sm_90 alone with samples on the others; "
        "emulate every kernel size in every layout and dtype, not a sample",
    )


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    if config.getoption("--record") and not is_worker and why_no_gpu() is not None:
        raise pytest.UsageError(f"--record writes down a run on a GPU; it {why_no_gpu()}")


def pytest_collection_modifyitems(items):
    reason = why_no_gpu()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionstart(session):
    session.config.started = time.time()


def pytest_terminal_summary(terminalreporter, config):
    """Under pytest-xdist the one process with a terminal, the controller, has every worker's reports."""
    if not config.getoption("--record"):
        return
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    record = {
        "sources_sha256": report.sources_sha256(),
        "gpu": torch.cuda.get_device_name(),
        "driver": bench.driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "seconds": round(time.time() - config.started, 1),
    }
    report.write_json(RECORD, record)
    terminalreporter.write_line(f"wrote {RECORD}")
