"""The library of kernels/ on the CPU: a C++ compiler in nvcc's place, the folder emulator/ in CUDA's.

The sources are those of kernels/, with CUDA's own syntax rewritten word for word. Its operators are
torch.ops.depthwise_emulated for CPU tensors, and run all that runs on a GPU: checks, selection, launchers, kernels.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import depthwise_inline

HERE = Path(__file__).resolve().parent / "emulator"
KERNELS = HERE.parent.parent / "kernels"
TORCH = Path(torch.__file__).resolve().parent
FLAGS = (
    *("-std=c++17", "-O1", "-march=native", "-fPIC", "-w", "-fno-gnu-unique", "-fno-threadsafe-statics"),
    "-fno-tree-sra",  # else a vector's elements are loaded one by one, whatever its alignment
)
CHECKED = "-fsanitize=thread"  # its calls are answered by emulator.cpp

# What launches, shared memory and launch bounds become in plain C++.
NESTED = r"((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)"  # text with balanced parentheses, two deep
CUDA = (
    ("<<<", " * emulator::Launch{"),
    (">>>", "}"),
    (
        r"extern __shared__ (?:__align__\(\d+\) )?(.+?) (\w+)\[\];",
        r"auto* const \2 = static_cast<\1*>(emulator::dynamic_shared());",
    ),
    (
        r"__shared__ (\w+) (\w+)((?:\[[^;]+\])+);",
        r"auto& \2 = *static_cast<\1(*)\3>(emulator::static_shared(__LINE__, sizeof(\1\3)));",
    ),
    (rf"__launch_bounds__\({NESTED}\)\s*(\w+)\({NESTED}\) {{", r"\2(\3) { emulator::check_threads(\1);"),
)
# What one file needs beside.
OWN = {
    "direct.cuh": (("device != known", "true"),),
    "operators.cpp": (
        ('#include "launch.h"', '#include "cuda_runtime.h"\n#include "launch.h"'),
        (r"(\w+)\.data_ptr\(\)", r'emulator::device_pointer("\1", \1)'),
        (r"(\w+)->data_ptr\(\)", r'emulator::device_pointer("\1", *\1)'),
        (r"is_cuda\(\)", "is_cpu()"),
        ("aoti_torch_device_type_cuda", "aoti_torch_device_type_cpu"),
        (r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream.*?;", ""),
        (
            r"(?s)class DeviceScope \{.*?\n\};",
            "struct DeviceScope { explicit DeviceScope(int) { emulator::forget_memory(); } };",
        ),
        (r"LIBRARY_IMPL\((depthwise_inline|aten), (Autograd)?CUDA", r"LIBRARY_IMPL(depthwise_emulated, \2CPU"),
    ),
}


def rewritten(path, text):
    for pattern, replacement in CUDA if path.suffix in (".cu", ".cuh") else ():
        text = re.sub(pattern, replacement, text)
    for pattern, replacement in OWN.get(path.name, ()):
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path.name} has no {pattern}"
    return f'#line 1 "{path}"\n{text}'


class Build:
    """The rewritten sources, and libraries made of them, in a folder of their own below `root`."""

    def __init__(self, root, arch=900, edit=lambda name, text: text):
        """`edit(name, text)`: a source, changed to see that an error in it is found."""
        self.compiler = depthwise_inline._cxx_command()
        self.flags = (*FLAGS, f"-DEMULATED_ARCH={arch}", f"-I{HERE}")
        self.texts = {path.name: rewritten(path, edit(path.name, path.read_text())) for path in KERNELS.iterdir()}
        del self.texts["ptx.cuh"]  # emulator/ has another
        facts = [*sorted(self.texts.values()), *(path.read_text() for path in sorted(HERE.iterdir())), *self.flags]
        facts += [depthwise_inline._output([*self.compiler, "--version"]), torch.__version__]
        self.folder = Path(root) / hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]
        if not self.folder.exists():
            folder = Path(tempfile.mkdtemp(dir=root))
            for name, text in self.texts.items():
                (folder / name).write_text(text)
            try:
                folder.rename(self.folder)
            except OSError:  # another process was faster
                shutil.rmtree(folder)

    def library(self, name, sources, *link_flags):
        """NAME.so of these texts, each with flags of its own; compiled unless it is there."""
        target = self.folder / f"{name}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder, ThreadPoolExecutor(2) as pool:

                def compiled(index, text, *flags):
                    out = f"{folder}/{index}.o"
                    self.run(*self.flags, f"-I{self.folder}", *flags, "-x", "c++", "-c", "-", "-o", out, text=text)
                    return out

                objects = pool.map(lambda item: compiled(item[0], *item[1]), enumerate(sources))
                self.run("-shared", "-Wl,-Bsymbolic", *objects, *link_flags, "-o", f"{folder}/library.so")
                os.replace(f"{folder}/library.so", target)
        return target

    def run(self, *arguments, text=""):
        command = [*self.compiler, *map(str, arguments)]
        result = subprocess.run(command, input=text, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(depthwise_inline._first_error(result.stderr))


class Emulator:
    """The library, loaded. Specialisations are compiled on demand, or several at a time by `obtain`."""

    def __init__(self, root):
        self.root, self.build = root, Build(root)
        texts = self.build.texts
        sources = [
            (texts["operators.cpp"], f"-I{TORCH / 'include'}"),
            *((texts[name], CHECKED) for name in ("forward.cu", "grad_input.cu", "grad_weight.cu", "gradients.cu")),
            (texts["specialise.cpp"],),
            ((HERE / "emulator.cpp").read_text(), "-O2", "-U_FORTIFY_SOURCE"),
        ]
        torch_libraries = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}")
        self.path = self.build.library("operators", sources, *torch_libraries)
        self.schemas = torch.library.Library("depthwise_emulated", "DEF")
        aten = (torch.ops.aten.convolution_overrideable, torch.ops.aten.convolution_backward_overrideable)
        for schema in (*depthwise_inline._SCHEMAS, *(str(op.default._schema).removeprefix("aten::") for op in aten)):
            self.schemas.define(schema)
        self.library = depthwise_inline._declare(ctypes.CDLL(str(self.path)))
        self.loaded = {}
        self.builder = depthwise_inline._BUILDER(self.on_demand)
        self.library.depthwise_inline_set_builder(self.builder)

    def on_demand(self, name, source, message, capacity):
        try:
            self.obtain({name.decode(): source.decode()})
            return 0
        except RuntimeError as error:
            text = str(error).encode()[: capacity - 1] + b"\0"
            ctypes.memmove(message, text, len(text))
            return 1

    def obtain(self, sources, build=None):
        """Compile and load specialisations, given by name; those of another build replace what is loaded."""
        wanted = {name: source for name, source in sources.items() if build or name not in self.loaded}
        with ThreadPoolExecutor(2) as pool:

            def compiled(item):
                return (build or self.build).library(item[0], [(item[1], CHECKED)], self.path)

            for name, path in zip(wanted, pool.map(compiled, wanted.items()), strict=True):
                self.loaded[name] = ctypes.CDLL(str(path))
                launcher = ctypes.cast(self.loaded[name].depthwise_inline_launch, ctypes.c_void_p)
                self.library.depthwise_inline_add_launcher(name.encode(), launcher)

    @contextlib.contextmanager
    def replaced(self, build, sources):
        """Specialisations of another build for a while."""
        self.obtain(sources, build)
        try:
            yield
        finally:
            for name in sources:  # to be loaded again when they are wanted
                del self.loaded[name]
                self.library.depthwise_inline_add_launcher(name.encode(), None)

    @contextlib.contextmanager
    def device(self, multiprocessors, shared_bytes, shared_bytes_block, l2_bytes=50 << 20):
        """For a while another GPU than an H200."""
        self.library.emulator_set_device(multiprocessors, shared_bytes, shared_bytes_block, l2_bytes)
        try:
            yield
        finally:
            self.library.emulator_set_device(132, 228 << 10, 227 << 10, 50 << 20)
