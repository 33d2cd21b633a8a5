"""What the compiler says of CUDA sources: registers, shared memory and spills of each kernel. No GPU is needed.

bench.py prints it where speed cannot be measured; the tests assert from it that no shipped kernel spills, and that the
compiler wrote no instruction that a GPU refuses.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import depthwise_inline


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int  # arrays in local memory, spilled registers included
    spill_bytes: int


@dataclass(frozen=True)
class Report:
    architecture: str
    seconds: float
    kernels: tuple[Kernel, ...]
    illegal: tuple[str, ...]  # instructions that no GPU executes; none are found where there is no disassembler


def compile_for(architecture: str, sources: Sequence[str] | None = None) -> Report:
    """Compile for one architecture, such as sm_90: specialisations as `_select` gives them; None for stage 1."""
    compiler = depthwise_inline._find_compiler()
    if sources is None:
        text = "\n".join(depthwise_inline._stage1_sources()[1])
    else:  # together in one run of the compiler, so every entry point needs a name of its own
        text = "\n".join(
            source.replace("depthwise_inline_launch", f"depthwise_inline_launch_{i}")
            for i, source in enumerate(sources)
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.cu"
        file.write_text(text)
        command = [compiler.nvcc, *depthwise_inline._NVCC_FLAGS, "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        command += [
            "-I",
            depthwise_inline._kernels_folder(),
            "-I",
            compiler.runtime / "include",
            "-o",
            file.with_suffix(".cubin"),
            file,
        ]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.perf_counter() - started
        illegal = _illegal_instructions(file.with_suffix(".cubin")) if done.returncode == 0 else ()
    if done.returncode != 0:
        raise depthwise_inline.BuildError(f"depthwise_inline: compiling for {architecture} failed:\n{done.stdout}")
    blocks = re.split(r"Compiling entry function ", done.stdout)[1:]
    names = _demangle([re.match(r"'([^']+)'", block)[1] for block in blocks])

    def number(pattern: str, block: str) -> int:
        return sum(int(found) for found in re.findall(pattern, block.partition("Compile time")[0]))

    kernels = [
        Kernel(
            name=name,
            registers=number(r"Used (\d+) registers", block),
            shared_bytes=number(r"(\d+) bytes smem", block),
            stack_bytes=number(r"(\d+) bytes stack frame", block),
            spill_bytes=number(r"(\d+) bytes spill", block),
        )
        for name, block in zip(names, blocks, strict=True)
    ]
    return Report(architecture, seconds, tuple(kernels), illegal)


def _illegal_instructions(cubin: Path) -> tuple[str, ...]:
    """Copies whose descriptor has an odd register: see ptx::copy_async on what ptxas 13.0 writes now and then."""
    tool = _disassembler()
    if tool is None:
        return ()
    done = subprocess.run([tool, "-c", cubin], stdout=subprocess.PIPE, text=True, check=True)
    return tuple(re.findall(r"LDGSTS[^;]*desc\[UR\d*[13579]\][^;]*", done.stdout))


def _disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or that of Triton, which comes with PyTorch."""
    spec = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", "")]
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def _demangle(names: list[str]) -> list[str]:
    """C++ names in words, where a tool for that is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), stdout=subprocess.PIPE, text=True)
    found = done.stdout.splitlines()
    return found if len(found) == len(names) else names
