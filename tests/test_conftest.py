"""pytest --record, with and without pytest-xdist, on a machine that passes for one with a GPU."""

import importlib.util
import json
import subprocess
import sys

import pytest

import bench_report as report

RUN = """if True:
    import pathlib, sys
    import pytest, torch
    import bench, bench_report
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *index: "NVIDIA Test"
    bench.driver_version = lambda: "1.2"
    bench_report.RESULTS = pathlib.Path(sys.argv[1])
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--record", *sys.argv[2:]]))
"""
TEST = "tests/test_reference.py::test_all_bits_set_is_nan"  # four passes


@pytest.mark.parametrize("workers", (0, 2))
def test_record(workers, tmp_path):
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    arguments = [TEST, *(["-n", str(workers)] if workers else [])]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), *arguments], cwd=report.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_tests.json").read_text())
    keys = ("sources_sha256", "gpu", "driver", "torch", "cuda", "date", "passed", "failed", "skipped", "seconds")
    assert tuple(record) == keys
    assert (record["passed"], record["failed"], record["skipped"]) == (4, 0, 0)
    assert (record["gpu"], record["driver"]) == ("NVIDIA Test", "1.2")
    assert record["sources_sha256"] == report.sources_sha256() and record["seconds"] > 0
