"""The build: two stages, its cache, what a machine may lack, and the compiler's report for every shipped kernel.

Most tests copy the module beside a small stand-in for kernels/, which compiles in seconds, and import it in a process
of its own with TORCH_CUDA_ARCH_LIST set, so that none of this needs a GPU.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bench_report
import compiler_report
import depthwise_inline
from depthwise_inline import BuildError

MODULE = Path(depthwise_inline.__file__).resolve()
KERNELS = MODULE.parent / "kernels"

# Budgets of DESIGN for two cores, in seconds.
COLD, WARM, SPECIALISATION = 15, 0.5, 4
COMPILED = {90: 40}  # specialisations in the ordinary run, each 1 s to 3 s of a core
COMPILED_ELSEWHERE = 4  # on every other architecture

STAND_IN = {
    "operators.cpp": """
        #include <cstdint>
        #include <cstring>

        using Builder = int (*)(const char*, const char*);
        static Builder builder = nullptr;
        static void* launcher = nullptr;
        static const char* source =
            "#include \\"stand_in.cuh\\"\\nextern \\"C\\" int depthwise_inline_launch() { return launch<3>(); }\\n";
        int launch_built_in();

        extern "C" {
        void depthwise_inline_set_builder(Builder value) { builder = value; }
        void depthwise_inline_add_launcher(const char*, void* value) { launcher = value; }
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
        int call_built_in() { return launch_built_in(); }
        int call() {
          if (launcher == nullptr && builder("stand_in_k3", source) != 0) return -1;
          return reinterpret_cast<int (*)()>(launcher)();
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
    "stand_in.cu": """
        #include "stand_in.cuh"
        int launch_built_in() { return launch<1>(); }
        """,
}


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
    """A folder with the module and a stand-in for kernels/, used by processes of their own."""

    def __init__(self, folder, shipped=False):
        self.folder, self.kernels, self.cache = folder, folder / "kernels", folder / "cache"
        shutil.copy(MODULE, folder)
        if shipped:
            shutil.copytree(KERNELS, self.kernels)
            return
        self.kernels.mkdir()
        for name, text in STAND_IN.items():
            (self.kernels / name).write_text(textwrap.dedent(text).lstrip())

    def start(self, code, *, prefix=(), **environment):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_", "CUDA_VISIBLE"))}
        env |= {"TORCH_CUDA_ARCH_LIST": "9.0", "TORCH_EXTENSIONS_DIR": str(self.cache), "CUDA_VISIBLE_DEVICES": ""}
        env = {key: value for key, value in (env | environment).items() if value is not None}
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", textwrap.dedent(code)],
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, code, **options):
        """stdout and stderr of a process that must succeed."""
        process = self.start(code, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"
        return out, err

    def libraries(self):
        return {path: path.stat().st_mtime_ns for path in self.cache.rglob("library.so")}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The module with the real kernels; its cache lives as long as these tests."""
    return Project(tmp_path_factory.mktemp("shipped"), shipped=True)


USE = """
    import torch, depthwise_inline
    library = depthwise_inline._load_library()
    assert library.call_built_in() == 1 and library.call() == 3
    assert not torch.cuda.is_initialized()
"""


def slack():
    """By how much a budget may be overrun on a machine that does other things at the same time."""
    return 2 if os.getloadavg()[0] < os.cpu_count() else 6


# --- the two stages and the cache ------------------------------------------------------------------------------------


@needs_compiler
def test_two_stages_of_the_shipped_kernels(shipped):
    """Cold and warm, within the budgets, with the real sources."""
    code = """
        import sys, time, torch
        start = time.perf_counter()
        import depthwise_inline
        print(time.perf_counter() - start)
        start = time.perf_counter()
        model = depthwise_inline.DepthwiseConv2d(64, 5, padding=2)
        print(depthwise_inline.precompile(model, (8, 64, 56, 56), backward=False))
        print(len(depthwise_inline._specialisations), time.perf_counter() - start)
        print("torch.utils.cpp_extension" in sys.modules, torch.cuda.is_initialized())
    """
    out, err = shipped.run(code)
    cold, _, second, modules = out.splitlines()
    lines = [line for line in err.splitlines() if line.startswith("depthwise_inline: compiling")]
    assert re.fullmatch(r"depthwise_inline: compiling the operators for sm_90, once; cached in .*", lines[0])
    built, seconds = int(second.split()[0]), float(second.split()[1])
    assert len(lines) == 1 + built and modules == "True False"
    assert float(cold) < COLD * slack() and seconds < SPECIALISATION * slack()
    print(f"cold {cold} s, specialisation {seconds} s")

    out, err = shipped.run(code)
    warm, _, _, modules = out.splitlines()
    assert "compiling" not in err and modules == "False False"
    assert float(warm) < WARM * slack()


def usual_problems():
    """The kernels that networks use most, on large, small and ragged images."""
    for kernel_h, kernel_w in ((3, 3), (3, 1), (1, 3), (3, 7), (7, 3), (5, 5), (7, 7)):
        padding = kernel_h // 2, kernel_w // 2
        for stride in (1, 2):
            for n, c, h, w in ((32, 64, 224, 224), (32, 96, 56, 56), (32, 192, 14, 14), (2, 3, 33, 47)):
                yield (n, c, 1, h, w, kernel_h, kernel_w, stride, stride, *padding, 1, 1, 1)


@pytest.fixture(scope="module")
def specialisations(shipped):
    """The sources of all that bench.py's cases and the usual problems need, as the selection says."""
    problems = [*(case.sizes() for case in bench_report.load_cases().values()), *usual_problems()]
    (shipped.folder / "problems.json").write_text(json.dumps(problems))
    code = """
        import itertools, json, torch, depthwise_inline
        where = depthwise_inline._DIRECTIONS, depthwise_inline._DTYPES, (False, True)
        problems = json.load(open("problems.json"))
        sources = {depthwise_inline._select(*problem)[1] for problem in itertools.product(*where, problems)}
        print(json.dumps(sorted(sources - {""})))
    """
    return json.loads(shipped.run(code)[0])


@needs_compiler
@pytest.mark.parametrize("architecture", (75, 80, 90, 100, 120))
def test_no_shipped_kernel_spills(architecture, specialisations, request):
    """Stage 1 and about COMPILED specialisations of every kind; with --all-instances all of them."""
    if architecture not in depthwise_inline._find_compiler().known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    wanted = COMPILED.get(architecture, COMPILED_ELSEWHERE)
    step = 1 if request.config.getoption("--all-instances") else max(1, round(len(specialisations) / wanted))
    sources = specialisations[::step]
    assert sources
    parts = [None, *(sources[i :: os.cpu_count()] for i in range(min(os.cpu_count(), len(sources))))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda part: compiler_report.compile_for(f"sm_{architecture}", part), parts))
    assert all(report.kernels for report in reports)
    kernels = [kernel for report in reports for kernel in report.kernels]
    print(f"sm_{architecture}: {len(sources)} of {len(specialisations)} specialisations, {len(kernels)} kernels")
    bad = [f"{k.spill_bytes} bytes spilled: {k.name}" for k in kernels if k.spill_bytes]
    assert not bad, f"{len(bad)} of {len(kernels)} kernels:\n" + "\n".join(bad)


@needs_compiler
def test_no_benchmark_case_is_left_to_the_general_kernels(shipped):
    """The library as this C++ compiler made it; a GPU run of the suite asks the one it runs."""
    cases = {name: case.sizes() for name, case in bench_report.load_cases().items()}
    (shipped.folder / "cases.json").write_text(json.dumps(cases))
    out, _ = shipped.run("""
        import itertools, json, torch, depthwise_inline
        where = depthwise_inline._DIRECTIONS, (torch.float32, torch.float16, torch.bfloat16), (False, True)
        for (name, sizes), *where in itertools.product(json.load(open("cases.json")).items(), *where):
            if depthwise_inline._select(*where, sizes)[0] == "general":
                print(name, *where)
        print("done")
    """)
    assert out.strip() == "done"


@needs_compiler
def test_cache_follows_the_sources(project):
    _, err = project.run(USE)
    assert err.count("depthwise_inline: compiling") == 2
    first = project.libraries()
    assert len(first) == 2
    _, err = project.run(USE)
    assert "compiling" not in err and project.libraries() == first

    header = project.kernels / "stand_in.cuh"
    text = header.read_text()
    header.write_text(text + "// edited\n")
    _, err = project.run(USE)
    assert err.count("depthwise_inline: compiling") == 2
    assert len(project.libraries()) == 4 and project.libraries().items() > first.items()
    _, err = project.run("import torch, depthwise_inline", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert "for sm_80, sm_90+PTX, once" in err and len(project.libraries()) == 5

    header.write_text(text)
    _, err = project.run(USE)
    assert "compiling" not in err


def test_cache_key(monkeypatch, tmp_path):
    """Everything a library depends on is in the name of its cache entry; nothing else is."""
    compiler = depthwise_inline._Compiler(tmp_path, "13.0.88", (75, 90))
    monkeypatch.setattr(depthwise_inline, "_kernels_folder", lambda: tmp_path)
    (tmp_path / "a.cuh").write_text("")

    def key(compiler=compiler, flags=("-gencode",), texts=("text",)):
        return depthwise_inline._cache_key(compiler, flags, texts)

    keys = [key(), key(flags=("-other",)), key(texts=("other",))]
    keys.append(key(depthwise_inline._Compiler(tmp_path, "13.1.0", (75, 90))))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "echo another compiler")
        keys.append(key())
    (tmp_path / "a.cuh").write_text("// edited")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    (tmp_path / "a.cuh").write_text("")
    elsewhere = depthwise_inline._Compiler(tmp_path / "elsewhere", "13.0.88", (75, 90))
    assert key() == key(elsewhere) == keys[0]


@needs_compiler
def test_killed_builder_leaves_nothing_in_the_way(project):
    process = project.start(USE)
    assert any("compiling the operators" in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not project.libraries()
    project.run(USE)
    assert len(project.libraries()) == 2
    left = [path.name for path in (project.cache / "depthwise_inline").iterdir() if ".tmp" in path.name]
    assert not left


@needs_compiler
def test_processes_at_once_build_once(project):
    """As torchrun starts them."""
    processes = [project.start(USE) for _ in range(8)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    assert "".join(errors).count("compiling the operators") == 1
    assert "".join(errors).count("compiling stand_in_k3") == 1


@needs_compiler
def test_reload_and_second_copy(project):
    code = """
        import importlib, sys, torch, depthwise_inline
        importlib.reload(depthwise_inline)
        first = sys.modules.pop("depthwise_inline")
        import depthwise_inline
        assert depthwise_inline is not first
        assert depthwise_inline._load_library().call() == 3
    """
    _, err = project.run(code)
    assert err.count("compiling the operators") == 1


def test_without_gpu_nothing_is_built(project):
    code = """
        import sys, torch, depthwise_inline
        x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
        assert depthwise_inline.depthwise_conv2d(x, w).shape == (1, 2, 3, 3)
        status = depthwise_inline.status()
        assert status.path == "pytorch" and status.gpus == () and status.library == "not loaded", status
        assert not torch.cuda.is_initialized() and "torch.utils.cpp_extension" not in sys.modules
        try:
            depthwise_inline.precompile()
        except RuntimeError as error:
            print(error)
    """
    out, err = project.run(code, TORCH_CUDA_ARCH_LIST=None)
    assert "set TORCH_CUDA_ARCH_LIST" in out
    assert "compiling" not in err and not project.cache.exists()


def test_torch_without_cuda(project):
    code = """
        import torch
        torch.version.cuda = None
        import depthwise_inline
        x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
        assert depthwise_inline.depthwise_conv2d(x, w).shape == (1, 2, 3, 3)
        status = depthwise_inline.status()
        assert status.path == "pytorch" and "built without CUDA" in status.reason and not status.gpus, status
    """
    _, err = project.run(code)
    assert "compiling" not in err


@pytest.mark.gpu
def test_import_leaves_cuda_to_forked_processes(tmp_path):
    """A cold and a warm import, each followed by a fork whose child uses the GPU."""
    project = Project(tmp_path, shipped=True)
    code = """
        import os, torch, depthwise_inline
        assert depthwise_inline._library is not None and not torch.cuda.is_initialized()
        child = os.fork()
        if child == 0:
            x, w = torch.ones(1, 2, 5, 5, device="cuda"), torch.ones(2, 1, 3, 3, device="cuda")
            os._exit(int(depthwise_inline.depthwise_conv2d(x, w).sum().item() != 162))
        assert os.waitpid(child, 0)[1] == 0
    """
    for _ in range(2):
        project.run(code, TORCH_CUDA_ARCH_LIST=None, CUDA_VISIBLE_DEVICES="0")


# --- what goes wrong -------------------------------------------------------------------------------------------------

FAILS = """
    import torch, depthwise_inline
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
    assert depthwise_inline.depthwise_conv2d(x, w).shape == (1, 2, 3, 3)
    for _ in range(2):
        try:
            depthwise_inline._load_library()
        except RuntimeError as error:
            message = str(error)
    status = depthwise_inline.status()
    assert status.path == "error" and status.reason == message, status
    print(message)
"""


@needs_compiler
@pytest.mark.parametrize("name", ("stand_in.cu", "operators.cpp", "stand_in.cuh"))
def test_failing_build(project, name):
    """A short message with the place, then the log; the import works, and mending the file mends it."""
    path = project.kernels / name
    text = path.read_text()
    path.write_text("#pragma once\nint broken = ;\n" + text)
    mend = f"""
    import pathlib
    pathlib.Path({str(path)!r}).write_text({text!r})
    depthwise_inline.precompile()
    assert depthwise_inline._load_library().call() == 3
    """
    out, err = project.run(FAILS + mend)
    assert err.count("compiling the operators") == 2  # not again for every use
    first, place, log = out.splitlines()
    assert first == "depthwise_inline: compiling the operators for sm_90 failed:"
    assert re.search(rf"kernels/{name}[:(]2\b.*error", place)
    log = Path(log.removeprefix("The whole output is in "))
    assert "broken" in log.read_text()


@needs_compiler
def test_failing_specialisation(project):
    path = project.kernels / "operators.cpp"
    path.write_text(path.read_text().replace("return launch<3>()", "return launch<3>(nonsense)"))
    code = """
        import torch, depthwise_inline
        library = depthwise_inline._load_library()
        assert library.call() == -1 and library.call() == -1
        error = depthwise_inline._specialisation_error(RuntimeError("could not build stand_in_k3"))
        assert isinstance(error, RuntimeError) and "nonsense" in str(error), error
        try:
            depthwise_inline.precompile(depthwise_inline.DepthwiseConv2d(2, 3), (1, 2, 5, 5))
        except RuntimeError as error:
            print(error)
    """
    out, err = project.run(code)
    assert "compiling stand_in_k3 for sm_90 failed" in out
    assert err.count("compiling stand_in_k3") == 2


def test_missing_kernels(project):
    shutil.rmtree(project.kernels)
    out, _ = project.run(FAILS)
    assert f"the folder {project.kernels} with the CUDA sources is missing" in out
    assert "copy kernels/ to lie beside depthwise_inline.py" in out


def path_without(project, *names):
    """PATH less these programs."""
    tools = project.folder / "tools"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if tool.name not in names and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    return str(tools)


def test_missing_cxx(project):
    out, _ = project.run(FAILS, CXX="/nonexistent/g++")
    assert "no C++ compiler: '/nonexistent/g++' (named by CXX) was not found" in out
    out, _ = project.run(FAILS, CXX=None, PATH=path_without(project, "c++"))
    assert "no C++ compiler: 'c++' (CXX is not set) was not found" in out
    assert "apt-get install g++" in out


@needs_compiler
def test_cxx_refused_by_nvcc(project):
    compiler = project.folder / "g++-99"
    compiler.write_text('#!/bin/sh\nexec c++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    compiler.chmod(0o755)
    out, _ = project.run(FAILS, CXX=str(compiler), CC=None)
    assert "unsupported GNU version" in out.splitlines()[1]


@needs_compiler
def test_wrong_cuda_home_and_ninja_off_path(project):
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("the package ninja is not installed")
    project.run(USE, CUDA_HOME="/nonexistent", PATH=path_without(project, "ninja"))


def test_bad_architecture_list(project):
    out, _ = project.run(FAILS, TORCH_CUDA_ARCH_LIST="Hoover")
    assert "expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', but got 'Hoover'" in out


def test_missing_ninja(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if importlib.util.find_spec("ninja"):  # the package, without PATH
        assert os.access(Path(depthwise_inline._ninja_folder()) / "ninja", os.X_OK)
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BuildError, match="pip install ninja"):
        depthwise_inline._ninja_folder()


def fake_nvcc(folder, version):
    """A folder with an nvcc that says it is of this version."""
    script = folder / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\necho "release {version[:-2]}, V{version}"\necho compute_75\necho compute_90\n')
    script.chmod(0o755)
    return folder


def test_missing_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(depthwise_inline, "_nvcc_roots", lambda: iter([tmp_path]))
    with pytest.raises(BuildError, match=r'no CUDA compiler .* pip install "cuda-toolkit\[nvcc,cccl\]'):
        depthwise_inline._find_compiler()
    assert depthwise_inline.status().compiler.startswith("none: depthwise_inline: no CUDA compiler")


def test_nvcc_of_another_major_version(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(depthwise_inline, "_CUDA_BUILD", True)
    old, new = fake_nvcc(tmp_path / "old", "11.8.89"), fake_nvcc(tmp_path / "new", "13.1.66")
    monkeypatch.setattr(depthwise_inline, "_nvcc_roots", lambda: iter([old]))
    with pytest.raises(BuildError) as caught:
        depthwise_inline._find_compiler()
    assert "built with CUDA 13.0 and needs nvcc 13" in str(caught.value)
    assert f"found only nvcc 11.8.89 in {old}" in str(caught.value)
    assert str(caught.value).endswith('pip install "cuda-toolkit[nvcc,cccl]==13.*"')
    monkeypatch.setattr(depthwise_inline, "_nvcc_roots", lambda: iter([old, new]))
    assert depthwise_inline._find_compiler().root == new


def test_order_of_compilers(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setattr(depthwise_inline, "_SYSTEM_CUDA", tmp_path / "system")
    roots = list(depthwise_inline._nvcc_roots())
    assert roots[:2] == [tmp_path / "home", tmp_path / "path"] and tmp_path / "system" in roots[2:]


@needs_compiler
def test_wrapper_script_on_path(monkeypatch, tmp_path):
    """The tree of the compiler that a wrapper calls, not the tree that the wrapper lies in."""
    real = depthwise_inline._find_compiler()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real.nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    *_, root = depthwise_inline._nvcc_roots()
    assert root.samefile(real.root)


@needs_compiler
def test_compiler_package_alone(project):
    """Build with the compiler from Python's packages: no CUDA_HOME, no nvcc on PATH, no system toolkit."""
    packages = [root for root in depthwise_inline._nvcc_roots() if root.parent.name == "nvidia"]
    if not any((root / "bin" / "nvcc").is_file() for root in packages):
        pytest.skip("the package cuda-toolkit[nvcc,cccl] is not installed")
    code = """
        import os, pathlib, depthwise_inline
        depthwise_inline._SYSTEM_CUDA = pathlib.Path("/nonexistent")
        os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
        depthwise_inline.precompile()
        assert depthwise_inline._load_library().call() == 3
        print(depthwise_inline.status().compiler)
    """
    hidden = {"TORCH_CUDA_ARCH_LIST": None, "CUDA_HOME": None, "CUDA_PATH": None}
    out, _ = project.run(code, **hidden, PATH=path_without(project, "nvcc"))
    assert f"{os.sep}nvidia{os.sep}cu" in out


# --- cache folders that cannot be used -------------------------------------------------------------------------------


@needs_compiler
def test_unusable_cache_folder(project):
    """Not a folder: a private one instead, with a warning; gone when the process ends."""
    (project.folder / "file").write_text("")
    code = USE + "    print(depthwise_inline.status().library)\n"
    out, err = project.run(code, TORCH_EXTENSIONS_DIR=str(project.folder / "file"), TMPDIR=str(project.folder))
    assert "the cache cannot be used" in err and "set TORCH_EXTENSIONS_DIR" in err
    assert Path(out.strip()).is_relative_to(project.folder) and not Path(out.strip()).exists()


@needs_compiler
def test_no_home_to_write_in(project):
    (project.folder / "file").write_text("")
    home = {"HOME": str(project.folder / "file" / "home"), "TORCH_EXTENSIONS_DIR": None, "XDG_CACHE_HOME": None}
    _, err = project.run(USE, **home)
    assert "the cache cannot be used" in err


@needs_compiler
def test_read_only_cache_folder(project):
    """What is there is used; what is missing is built elsewhere."""
    project.run("import torch, depthwise_inline")
    before, folder = project.libraries(), project.cache / "depthwise_inline"
    as_user = ()
    if os.getuid() == 0:  # whom permissions do not hold without this
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and setpriv is not there to change that")
        as_user = ("setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override")
    folder.chmod(0o555)
    try:
        _, err = project.run(USE, prefix=as_user)
    finally:
        folder.chmod(0o755)
    assert "compiling the operators" not in err and "compiling stand_in_k3" in err
    assert "the cache cannot be used" in err and "Permission denied" in err
    assert project.libraries() == before


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_foreign_cache_folder(project):
    folder = project.cache / "depthwise_inline"
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    _, err = project.run(USE)
    assert "belongs to another user" in err and not project.libraries()


def test_full_disk(tmp_path):
    def build(folder):
        raise RuntimeError("Error building extension: cc1plus: No space left on device")

    with pytest.raises(depthwise_inline._CacheUnusable, match="no space left on device"):
        depthwise_inline._build_in(tmp_path, "entry", "nothing", build)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


# --- the command line ------------------------------------------------------------------------------------------------


def command(project, *arguments, **environment):
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(project.cache), "CUDA_VISIBLE_DEVICES": ""} | environment
    env.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "depthwise_inline.py", *arguments]
    return subprocess.run(command, cwd=project.folder, env=env, capture_output=True, text=True, timeout=100)


def test_doctor_names_what_is_wrong(project):
    shutil.rmtree(project.kernels)
    done = command(project, "doctor", CXX="/nonexistent/g++")
    lines = {line[7:20].strip(): (line[:5].strip(), line[20:]) for line in done.stdout.splitlines()}
    assert done.returncode == 1, done.stdout + done.stderr
    names = ("torch", "GPU", "nvcc", "C++ compiler", "ninja", "sources", "cache", "kernels")
    assert tuple(lines) == names
    for name, words in (("GPU", "CUDA_VISIBLE_DEVICES"), ("C++ compiler", "set CXX"), ("sources", "copy kernels/")):
        assert lines[name][0] == "WRONG" and "To mend it: " in lines[name][1] and words in lines[name][1]
    assert lines["cache"] == ("ok", f"{project.cache}/depthwise_inline, 0 libraries")


def test_clean_empties_the_cache_alone(project):
    entry = project.cache / "depthwise_inline" / "operators-0"
    entry.mkdir(parents=True)
    (entry / "library.so").write_text("")
    (project.cache / "other").write_text("")
    done = command(project, "clean")
    assert done.returncode == 0 and done.stdout == f"removing 1 libraries in {project.cache}/depthwise_inline\n"
    assert [path.name for path in project.cache.iterdir()] == ["other"]
    assert command(project, "clean").returncode == 0
    done = command(project, "wash")
    assert done.returncode == 1 and "usage: python depthwise_inline.py doctor" in done.stderr


# --- architectures ---------------------------------------------------------------------------------------------------


def test_architectures(monkeypatch):
    gpus = (depthwise_inline._Gpu("NVIDIA A", (9, 0)), depthwise_inline._Gpu("NVIDIA B", (7, 5)))
    monkeypatch.setattr(depthwise_inline, "_CUDA_BUILD", True)
    monkeypatch.setattr(depthwise_inline, "_nvml_gpus", lambda: gpus)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert depthwise_inline._architectures() == ("7.5", "9.0")
    assert depthwise_inline.status().gpus == ("NVIDIA A (sm_90)", "NVIDIA B (sm_75)")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert depthwise_inline._architectures() == ()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0a+PTX")
    assert depthwise_inline._architectures() == ("8.0", "8.6", "9.0a+PTX")


def test_architecture_flags():
    compiler = depthwise_inline._Compiler(Path("/cuda"), "13.0.88", (75, 80, 90, 120))
    assert compiler.arch_flags(["8.0", "9.0a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    assert compiler.arch_flags(["13.0"]) == ["-gencode=arch=compute_120,code=compute_120"]  # newer than the compiler
    assert compiler.arch_flags(["6.1", "7.5"]) == ["-gencode=arch=compute_75,code=sm_75"]
    with pytest.raises(BuildError, match=r"compiles for sm_75 and newer, but the GPUs of this machine are 6\.1"):
        compiler.arch_flags(["6.1"])
