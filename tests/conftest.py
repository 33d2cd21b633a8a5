"""pytest --record: writes down a run of the tests on a GPU."""

import datetime
import hashlib
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results" / "gpu_tests.json"


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="on a GPU, write results/gpu_tests.json")


def pytest_configure(config):
    if config.getoption("--record") and not torch.cuda.is_available():
        raise pytest.UsageError("--record writes down a run on a GPU, and this machine has none")


def sources_sha256():
    """The hash of everything that decides what runs on the GPU, as results/*.json carry it."""
    digest = hashlib.sha256()
    names = [ROOT / "depthwise_inline.py", *(path for path in (ROOT / "kernels").rglob("*") if path.is_file())]
    for path in sorted(names, key=lambda path: path.relative_to(ROOT).as_posix()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def pytest_sessionstart(session):
    session.config.started = time.time()


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not config.getoption("--record"):
        return
    counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    record = {
        "sources_sha256": sources_sha256(),
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "seconds": round(time.time() - config.started, 1),
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    terminalreporter.write_line(f"wrote {RECORD.relative_to(ROOT)}")
