"""examples/quickstart.ipynb: runs without a GPU, runs on one, and holds no stale outputs."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import depthwise_inline

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text())

spec = importlib.util.spec_from_file_location("execute", EXAMPLES / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def printed(notebook):
    outputs = [output for cell in execute.code_cells(notebook) for output in cell["outputs"]]
    return "".join(line for output in outputs if "text" in output for line in output["text"])


def test_a_fresh_machine_without_a_gpu_runs_it_and_is_told_what_is_skipped(tmp_path):
    for name in ("quickstart.ipynb", "execute.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "clone" / "kernels")
    shutil.copy(ROOT / "depthwise_inline.py", tmp_path / "clone")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "execute.py"],
        cwd=tmp_path,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "GPU: none" in done.stdout and "largest difference" in done.stdout and "4 convolutions" in done.stdout
    assert done.stdout.count("Skipped: ") == 5


def test_from_the_examples_folder_it_finds_the_module_above_and_elsewhere_says_where_it_looked(tmp_path, monkeypatch):
    find = "".join(execute.code_cells(NOTEBOOK)[0]["source"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(EXAMPLES)
    exec(find, {})
    assert sys.path[0] == str(ROOT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"copy depthwise_inline.py and kernels/ into {tmp_path}"):
        exec(find, {})


SMALLER = {
    "16 if gpu else 1, 64, 512, 512": "2, 64, 16, 16",
    "32 if gpu else 1, 3, 224, 224": "1, 3, 32, 32",
    "shape = 32, 128, 112, 112": "shape = 2, 8, 16, 16",
    "kernel_sizes = 3, 5, 7, 9, 13, 21, 31": "kernel_sizes = 3, 7",
    "256 << 20": "256",
    "1 << 30": "1 << 10",
    "8192, 8192": "64, 64",
    "repeats=20": "repeats=3",
}


class Event:
    """Takes every call for 2 ms, for want of a GPU."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 2.0


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    monkeypatch.setattr(
        depthwise_inline, "precompile", lambda model, shape, dtype: model(torch.empty(shape, device="meta"))
    )
    return {"gpu = torch.cuda.is_available()": "gpu = True", '"cuda" if gpu else "cpu"': '"cpu"'}


@pytest.mark.parametrize("replaced", ["stand_in", pytest.param(None, marks=pytest.mark.gpu)])
def test_with_a_gpu_it_measures_and_draws(replaced, request, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    replaced = SMALLER | (request.getfixturevalue(replaced) if replaced else {})
    notebook = copy.deepcopy(NOTEBOOK)
    for old, new in replaced.items():
        found = 0
        for cell in execute.code_cells(notebook):
            source = "".join(cell["source"])
            found += source.count(old)
            cell["source"] = source.replace(old, new)
        assert found == 1, old
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(EXAMPLES)
    execute.execute(notebook)
    text = printed(notebook)
    assert "Skipped" not in text
    for line in ("PyTorch ", "training step: ", "3x3: forward ", "7x7: forward ", "copy: "):
        assert f"\n{line}" in text, line
    pictures = [output for cell in execute.code_cells(notebook) for output in cell["outputs"] if "data" in output]
    assert len(pictures) == 2
    assert all(output["data"]["image/png"].startswith("iVBORw0KGgo") for output in pictures)


def test_the_outputs_it_holds_are_those_of_its_code():
    outputs = [output for cell in execute.code_cells(NOTEBOOK) for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    if outputs:
        ran = NOTEBOOK["metadata"].get("executed_code_sha256")
        assert ran == execute.code_sha256(NOTEBOOK), "run python examples/execute.py --inplace on a GPU"
        assert "GPU: none" not in printed(NOTEBOOK) and "Skipped" not in printed(NOTEBOOK)
    else:
        assert all(cell["execution_count"] is None for cell in execute.code_cells(NOTEBOOK))
