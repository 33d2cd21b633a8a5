"""compute-sanitizer over every tile of every kernel: pytest --sanitize, on a GPU."""

import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
import reference

TOOLS = ("memcheck", "racecheck", "initcheck")
PARTS = 5  # of the problems, which pytest-xdist runs side by side
COMMAND = sys.executable, "tests/sanitized.py"
SUMMARY = re.compile(r"(?m)^========= (?:RACECHECK SUMMARY: (\d+) hazards?|ERROR SUMMARY: (\d+) errors?)")


def sanitize(tool, command):
    """What a command checked under a tool, and what the tool said of our kernels; on one core, beside others."""
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=depthwise", "--print-limit", "10000", *command],
        cwd=reference.ROOT,
        env={**os.environ, "PYTHONPATH": "tests:.", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    checked = re.search(r"(?m)^checked (\d+)", said)
    assert done.returncode == 0 and checked and SUMMARY.search(said), said[-4000:]
    ours = [line for line in said.splitlines() if line.startswith("=========") and "depthwise::" in line]
    return int(checked[1]), ours


@pytest.fixture
def prepared(request, once):
    """Compiles what the tools watch; without --sanitize, or without the tools, skips."""
    if not request.config.getoption("--sanitize"):
        pytest.skip("minutes: only with --sanitize")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer of the CUDA toolkit is not on PATH")
    env = {**os.environ, "PYTHONPATH": "tests:."}
    once("sanitizer", lambda: subprocess.run([*COMMAND, "prepare"], cwd=reference.ROOT, env=env, check=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_is_reported(tool, part, record_property):
    checked, ours = sanitize(tool, [*COMMAND, str(part), str(PARTS)])
    record_property("sanitizer", {tool: {"parts": 1, "checked": checked, "reported": len(ours)}})
    assert not ours, "\n".join(ours[:20])


SAID = """#!/bin/sh
echo checked 7
echo '========= Uninitialized __global__ memory read of size 4 bytes'
echo '=========     at void at::native::kernel<float>(float *)+0x10'
echo '=========     at void {kernel}<float>(Args)+0x50'
echo '========= {summary}'
exit {status}
"""


@pytest.mark.parametrize(
    ("kernel", "summary", "status", "outcome"),
    (
        ("at::native::other", "ERROR SUMMARY: 2 errors", 0, (7, 0)),
        ("depthwise::direct_nchw_kernel", "ERROR SUMMARY: 2 errors", 0, (7, 1)),
        ("depthwise::direct_nchw_kernel", "RACECHECK SUMMARY: 1 hazard displayed", 0, (7, 1)),
        ("at::native::other", "ERROR SUMMARY: 2 errors", 1, None),
        ("at::native::other", "Target application returned an error", 0, None),
    ),
)
def test_reports_are_read(kernel, summary, status, outcome, tmp_path, monkeypatch):
    """By a tool of ours that says what compute-sanitizer would say."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SAID.format(kernel=kernel, summary=summary, status=status))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if outcome is None:
        with pytest.raises(AssertionError):
            sanitize("memcheck", ["true"])
    else:
        checked, ours = sanitize("memcheck", ["true"])
        assert (checked, len(ours)) == outcome
