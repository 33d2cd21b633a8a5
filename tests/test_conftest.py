"""pytest --record, with and without pytest-xdist and --fuzz, on a machine that passes for one with a GPU."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import conftest
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
    # before
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--record", *sys.argv[2:]]))
"""
TEST = "tests/test_reference.py::test_all_bits_set_is_nan"  # four passes


MACHINE = ("sources_sha256", "gpu", "driver", "torch", "cuda", "date")


LOST = """
import pytest, torch

def answer():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

@pytest.mark.gpu
def test_first():
    torch.cuda.synchronize = answer
    answer()

@pytest.mark.gpu
def test_second():
    pass

def test_of_the_cpu():
    pass
"""


SANITIZED = """
import pytest

@pytest.mark.parametrize("tool, reported", (("memcheck", 0), ("memcheck", 2), ("racecheck", 0)))
def test_tool(tool, reported, record_property):
    record_property("sanitizer", {tool: {"parts": 1, "checked": 5, "reported": reported}})
"""


def recorded(folder, *arguments, before=""):
    """What a run of pytest leaves in results/, by the name of the file."""
    code = RUN.replace("# before", before)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments], cwd=report.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize("workers", (0, 2))
def test_record(workers, tmp_path):
    if workers and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    started = time.monotonic()
    records = recorded(tmp_path, TEST, *(["-n", str(workers)] if workers else []))
    record = records.pop("gpu_tests.json")
    assert not records and tuple(record) == (*MACHINE, "passed", "failed", "skipped", "arguments", "seconds")
    assert TEST in record["arguments"]
    assert (record["passed"], record["failed"], record["skipped"]) == (4, 0, 0)
    assert (record["gpu"], record["driver"]) == ("NVIDIA Test", "1.2")
    assert record["sources_sha256"] == report.sources_sha256()
    assert 0 <= record["seconds"] <= time.monotonic() - started  # to a tenth: of these tests 0.0


def test_a_worker_records_nothing(monkeypatch):
    """It has its own tests alone, and comes to its end also where the run is stopped."""
    config = SimpleNamespace(getoption=lambda name: name == "--record" or None, workerinput={}, started=0.0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA Test")
    monkeypatch.setattr("bench.driver_version", lambda: "1.2")
    monkeypatch.setattr(report, "write_json", lambda path, record: pytest.fail(f"wrote {path}"))
    conftest.pytest_terminal_summary(SimpleNamespace(stats={}), config)


def test_record_of_fuzzing(tmp_path):
    on_the_cpu = "sys.path.insert(0, 'tests'); import test_fuzz; test_fuzz.DEVICE = 'cpu'"
    records = recorded(tmp_path, "tests/test_fuzz.py::test_fuzz", "--fuzz", "7", before=on_the_cpu)
    record = records.pop("gpu_fuzz.json")
    assert not records and tuple(record) == (*MACHINE, "seed", "draws", "specialisations", "failed", "seconds")
    assert (record["draws"], record["specialisations"], record["failed"]) == (7, 0, 0)


def test_record_of_sanitizers(tmp_path):
    """The parts of a tool's problems are added up."""
    (tmp_path / "test_tools.py").write_text(SANITIZED)
    (results := tmp_path / "results").mkdir()
    options = ("-p", "conftest", "-c", "pyproject.toml", "--sanitize")
    records = recorded(results, *options, str(tmp_path / "test_tools.py"), before="sys.path.insert(0, 'tests')")
    record = records.pop("gpu_sanitizer.json")
    assert not records and tuple(record) == (*MACHINE, "memcheck", "racecheck", "seconds")
    assert record["memcheck"] == {"parts": 2, "checked": 10, "reported": 2}
    assert record["racecheck"] == {"parts": 1, "checked": 5, "reported": 0}


def test_once_a_run(once):
    """What failed is tried again; what was done is not."""
    calls = []
    with pytest.raises(ZeroDivisionError):
        once("test_once_a_run", lambda: 1 / 0)
    for _ in range(2):
        once("test_once_a_run", lambda: calls.append(1))
    assert calls == [1]


def test_a_lost_gpu_is_said_once(tmp_path):
    (tmp_path / "test_lost.py").write_text(LOST)
    code = RUN.replace("# before", "sys.path.insert(0, 'tests')")
    code = code.replace('"--record"', '"-p", "conftest", "-c", "pyproject.toml"')
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "test_lost.py")]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    assert "1 failed, 1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert re.search(r"(?m)^not run: the GPU was lost in .*::test_first$", done.stdout), done.stdout
