"""A small stand-in for kernels/, which compiles in one to two seconds; projects that use it, or the real ones."""

import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from processes import Process

import depthwise_inline
from depthwise_inline import BuildError

MODULE = Path(depthwise_inline.__file__).resolve()
KERNELS = MODULE.parent / "kernels"

FILES = {
    "operators.cpp": """
        #include <pthread.h>

        #include <cstdint>
        #include <cstring>

        using Builder = int (*)(const char*, const char*, char*, int);
        static Builder builder = nullptr;
        static void* launcher = nullptr;
        static const char* source =
            "#include \\"stand_in.cuh\\"\\nextern \\"C\\" int depthwise_inline_launch() { return launch<3>(); }\\n";
        static char message[4096];

        extern "C" {
        void depthwise_inline_set_builder(Builder value) { builder = value; }
        void depthwise_inline_add_launcher(const char* name, void* value) {
          if (std::strcmp(name, "stand_in_k3") == 0) launcher = value;
        }
        int depthwise_inline_select(int, int, int, const int64_t*, char* name, int, char* out, int) {
          std::strcpy(name, "stand_in_k3/tile");
          std::strcpy(out, source);
          return 0;
        }
        void depthwise_inline_force_variant(const char*) {}
        int depthwise_inline_tiles(int, int, int, const int64_t*, char* names, int) {
          std::strcpy(names, "general");
          return 0;
        }
        const char* last_message() { return message; }
        int call() {
          if (launcher == nullptr && builder("stand_in_k3", source, message, sizeof message) != 0) return -1;
          return reinterpret_cast<int (*)()>(launcher)();
        }
        int call_from_threads(int count) {  // which Python did not start, as autograd's
          pthread_t threads[8];
          int sum = 0;
          for (int i = 0; i < count; ++i)
            pthread_create(&threads[i], nullptr, [](void*) { return reinterpret_cast<void*>(call()); }, nullptr);
          for (int i = 0; i < count; ++i) {
            void* result;
            pthread_join(threads[i], &result);
            sum += reinterpret_cast<intptr_t>(result);
          }
          return sum;
        }
        }
        """,
    "stand_in.cuh": """
        #pragma once
        template <int K>
        __global__ void stand_in(float* x) { x[threadIdx.x] += K; }
        template <int K>
        int launch() {
          stand_in<K><<<1, 1>>>(nullptr);  // fails without a GPU, to no effect
          return K;
        }
        """,
}

# Both stages of the stand-in.
USE = """
    import torch, depthwise_inline
    library = depthwise_inline._load_library()
    assert library.call() == 3
    assert not torch.cuda.is_initialized()
"""


def buildable():
    """None, or why nothing can be built here."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    try:
        depthwise_inline._find_compiler()
        depthwise_inline._cxx_command()
        depthwise_inline._ninja_folder()
    except BuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(buildable() is not None, reason=str(buildable()))


class Project:
    """A folder with the module and kernels/, used by processes that see no GPU and build for sm_90."""

    def __init__(self, parent, cache=None, shipped=False):
        self.folder = parent / "my pröject"  # as a drive of a notebook may be called
        self.kernels, self.cache, self.started = self.folder / "kernels", self.folder / "cache", 0
        self.folder.mkdir()
        shutil.copy(MODULE, self.folder)
        if cache:
            shutil.copytree(cache, self.cache)
        if shipped:
            shutil.copytree(KERNELS, self.kernels)
            return
        self.kernels.mkdir()
        for name, text in FILES.items():
            (self.kernels / name).write_text(textwrap.dedent(text).lstrip())

    def add_cuda(self):
        """Let stage 1 compile CUDA as well, as the real one does."""
        (self.kernels / "stand_in.cu").write_text('#include "stand_in.cuh"\nint built_in() { return launch<1>(); }\n')

    def start(self, code, *, prefix=(), **environment):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_", "CUDA_VISIBLE"))}
        env |= {"TORCH_CUDA_ARCH_LIST": "9.0", "TORCH_EXTENSIONS_DIR": str(self.cache), "CUDA_VISIBLE_DEVICES": ""}
        env = {key: str(value) for key, value in (env | environment).items() if value is not None}
        self.started += 1
        return Process(textwrap.dedent(code), self.folder, env, self.folder / f"output{self.started}", prefix)

    def run(self, code, **options):
        """stdout and stderr of a process that must succeed."""
        process = self.start(code, **options)
        status = process.wait()
        out, err = process.output()
        assert status == 0, f"{status}\n{out}\n{err}"
        return out, err

    def libraries(self):
        """The cached libraries, and when each was written."""
        return {path: path.stat().st_mtime_ns for path in self.cache.rglob("library.so")}


@pytest.fixture
def project(tmp_path):
    """A project with nothing built."""
    return Project(tmp_path)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The cache of a project with both stages built; a cache does not depend on where the project lies."""
    project = Project(tmp_path_factory.mktemp("built"))
    project.run(USE)
    assert len(project.libraries()) == 2
    return project.cache


@pytest.fixture
def warm(tmp_path, built):
    """A project with both stages built."""
    return Project(tmp_path, cache=built)


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A project with the real kernels."""
    return Project(tmp_path_factory.mktemp("shipped"), shipped=True)
