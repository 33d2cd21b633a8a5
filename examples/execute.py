"""Runs the code of quickstart.ipynb in order, without Jupyter.

    python examples/execute.py             run it and print what it prints
    python examples/execute.py --inplace   also keep the outputs in the notebook; on a GPU alone

Outputs come with the digest of the code that they belong to, so that a test can tell stale ones.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parent / "quickstart.ipynb"


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_sha256(notebook: dict[str, Any]) -> str:
    """Names the code of a notebook."""
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in code_cells(notebook)).encode()).hexdigest()


def execute(notebook: dict[str, Any]) -> None:
    """Runs the code cells in this process and puts their outputs into them; raises what a cell raises."""
    os.environ.setdefault("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {count}", "exec"), namespace)
        cell["execution_count"], cell["outputs"] = count, [*_printed(stdout.getvalue()), *_figures()]
        print(stdout.getvalue(), end="", flush=True)
    notebook["metadata"]["executed_code_sha256"] = code_sha256(notebook)


def _printed(text: str) -> list[dict[str, Any]]:
    return [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []


def _figures() -> list[dict[str, Any]]:
    """The open figures, which are closed, as Jupyter does it after each cell."""
    plt = sys.modules.get("matplotlib.pyplot")
    outputs = []
    for number in plt.get_fignums() if plt else ():
        png = io.BytesIO()
        plt.figure(number).savefig(png, format="png")
        plt.close(number)
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Run quickstart.ipynb without Jupyter.")
    parser.add_argument("--inplace", action="store_true", help="keep the outputs in the notebook; on a GPU alone")
    inplace = parser.parse_args().inplace
    if inplace:
        import torch

        if not torch.cuda.is_available():
            parser.error("--inplace keeps the outputs of a run on a GPU, and PyTorch finds none")
    notebook = json.loads(NOTEBOOK.read_text())
    os.chdir(NOTEBOOK.parent)
    execute(notebook)
    if inplace:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
