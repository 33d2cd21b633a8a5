"""The build: two stages, its cache, several processes and threads, and the compiler's report for every shipped kernel.

Most tests copy the module beside a small stand-in for kernels/ and import it in a process of its own with
TORCH_CUDA_ARCH_LIST set, so that none of this needs a GPU. What machines lack or do wrong: test_machines.py.
"""

import fcntl
import json
import os
import re
import shutil
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stand_in import MODULE, USE, Project, needs_compiler

import bench_report
import compiler_report
import depthwise_inline

# Budgets of DESIGN for two cores, in seconds.
COLD, WARM, SPECIALISATION = 15, 0.5, 4
COMPILED = {90: 40}  # specialisations in the ordinary run, each 1 s to 3 s of a core
COMPILED_ELSEWHERE = 4  # on every other architecture

ON_GPU = {"TORCH_CUDA_ARCH_LIST": None, "CUDA_VISIBLE_DEVICES": "0"}


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
    sizes = [*(case.sizes() for case in bench_report.load_cases().values()), *usual_problems()]
    problems = [(*problem[:14], float_weight) for problem in sizes for float_weight in (0, 1)]
    (shipped.folder / "problems.json").write_text(json.dumps(problems))
    code = """
        import itertools, json, torch, depthwise_inline
        where = depthwise_inline._DIRECTIONS, depthwise_inline._DTYPES, (False, True)
        problems = json.load(open("problems.json"))
        sources = {depthwise_inline._select(*problem)[1] for problem in itertools.product(*where, problems)}
        print(json.dumps(sorted(sources - {""})))
    """
    return json.loads(shipped.run(code)[0])


def compiled_apart(architecture, sources):
    """Reports of specialisations, compiled as one file; where some spill, which alone may not, as two, and so on."""
    report = compiler_report.compile_for(architecture, sources)
    if sources is None or len(sources) == 1 or not any(kernel.spill_bytes for kernel in report.kernels):
        return [report]
    middle = len(sources) // 2
    return [*compiled_apart(architecture, sources[:middle]), *compiled_apart(architecture, sources[middle:])]


def test_what_spills_in_company_is_compiled_apart(monkeypatch):
    """By a compiler that spills what is called so, and four of anything."""

    def compile_for(architecture, sources):
        spill_bytes = 8 * (len(sources) > 3 or "spills" in sources)
        kernels = [compiler_report.Kernel(source, 128, 0, 0, spill_bytes) for source in sources]
        return compiler_report.Report(architecture, 0.0, tuple(kernels), ())

    monkeypatch.setattr(compiler_report, "compile_for", compile_for)
    reports = compiled_apart("sm_90", ["a", "b", "c", "spills", "d", "e"])
    kernels = [kernel for report in reports for kernel in report.kernels]
    assert [kernel.name for kernel in kernels] == ["a", "b", "c", "spills", "d", "e"]
    assert [kernel.name for kernel in kernels if kernel.spill_bytes] == ["spills"]


@needs_compiler
@pytest.mark.parametrize("architecture", (75, 80, 90, 100, 120))
def test_no_shipped_kernel_spills(architecture, specialisations, request):
    """Nor has an instruction that no GPU executes. Stage 1 and about COMPILED specialisations of every kind; with
    --all-instances all of them.
    """
    if architecture not in depthwise_inline._find_compiler().known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    wanted = COMPILED.get(architecture, COMPILED_ELSEWHERE)
    step = 1 if request.config.getoption("--all-instances") else max(1, round(len(specialisations) / wanted))
    sources = specialisations[::step]
    assert sources
    parts = [None, *(sources[i :: os.cpu_count()] for i in range(min(os.cpu_count(), len(sources))))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda part: compiled_apart(f"sm_{architecture}", part), parts))
    reports = [report for of_part in found for report in of_part]
    assert all(report.kernels for report in reports)
    kernels = [kernel for report in reports for kernel in report.kernels]
    print(f"sm_{architecture}: {len(sources)} of {len(specialisations)} specialisations, {len(kernels)} kernels")
    bad = [f"{k.spill_bytes} bytes spilled: {k.name}" for k in kernels if k.spill_bytes]
    assert not bad, f"{len(bad)} of {len(kernels)} kernels:\n" + "\n".join(bad)
    assert not [text for report in reports for text in report.illegal]


@pytest.mark.parametrize(
    ("instruction", "is_illegal"),
    (
        ("LDGSTS.E.BYPASS.128 [R19+UR0], desc[UR1][R96.64], P6 ", True),
        ("LDGSTS.E [R21+UR0+0x200], desc[UR17][R10.64], P1 ", True),
        ("LDGSTS.E.BYPASS.128 [R21], desc[UR12][R12.64], P3 ", False),
        ("LDG.E.128.CONSTANT R28, desc[UR10][R14.64] ", False),
    ),
)
def test_illegal_instructions_are_found(instruction, is_illegal, tmp_path, monkeypatch):
    """By a disassembler of ours; first what ptxas 13.0 wrote of a kernel that an H100 refused."""
    tool = tmp_path / "nvdisasm"
    tool.write_text(f"#!/bin/sh\necho '        /*0f50*/  {instruction};  /* 0x000000005a0a7fae */'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = compiler_report._illegal_instructions(tmp_path / "any.cubin")
    assert found == ((instruction,) if is_illegal else ())


@needs_compiler
def test_no_benchmark_case_is_left_to_the_general_kernels(shipped):
    """The library as this C++ compiler made it; a GPU run of the suite asks the one it runs."""
    cases = {name: case.sizes() for name, case in bench_report.load_cases().items()}
    (shipped.folder / "cases.json").write_text(json.dumps(cases))
    out, _ = shipped.run("""
        import itertools, json, torch, depthwise_inline
        one_each = depthwise_inline._DIRECTIONS[:3]  # both gradients at once: "general" is one after the other
        where = one_each, (torch.float32, torch.float16, torch.bfloat16), (False, True)
        for (name, sizes), *where in itertools.product(json.load(open("cases.json")).items(), *where):
            if depthwise_inline._select(*where, sizes)[0] == "general":
                print(name, *where)
        print("done")
    """)
    assert out.strip() == "done"


@needs_compiler
def test_cache_follows_what_is_built(warm):
    """Sources, torch, the C++ compiler, architectures: a change of any builds anew, and leaves the old entry alone."""
    first = warm.libraries()
    _, err = warm.run(USE)
    assert "compiling" not in err and warm.libraries() == first

    header = warm.kernels / "stand_in.cuh"
    text = header.read_text()
    header.write_text(text + "// edited\n")
    _, err = warm.run(USE)
    assert err.count("depthwise_inline: compiling") == 2 and len(warm.libraries()) == 4
    header.write_text(text)

    other = warm.folder.parent / "g++"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 99.1 || exec c++ "$@"\n')
    other.chmod(0o755)
    processes = [
        warm.start("import torch; torch.__version__ = '9.9'; import depthwise_inline"),
        warm.start("import torch, depthwise_inline", CXX=other),
        warm.start("import torch, depthwise_inline", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"),
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = [process.output()[1] for process in processes]
    assert [line.count("depthwise_inline: compiling the operators for ") for line in lines] == [1, 1, 1]
    assert "for sm_80, sm_90+PTX, once" in lines[2]
    assert len(warm.libraries()) == 7 and warm.libraries().items() > first.items()
    _, err = warm.run(USE)
    assert "compiling" not in err


def test_cache_key(monkeypatch, tmp_path):
    """Everything a library depends on is in the name of its cache entry; nothing else is."""
    compiler = depthwise_inline._Compiler(tmp_path, "13.0.88", (75, 90))
    monkeypatch.setattr(depthwise_inline, "_kernels_folder", lambda: tmp_path)
    (tmp_path / "a.cuh").write_text("")

    def key(compiler=compiler, flags=("-gencode",), texts=("text",)):
        return depthwise_inline._cache_entries(compiler, flags)("any name", texts)

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


def test_what_is_cached_is_not_compiled_ahead(monkeypatch, tmp_path):
    compiler = depthwise_inline._Compiler(tmp_path, "13.0.88", (75, 90))
    monkeypatch.setattr(depthwise_inline, "_find_compiler", lambda: compiler)
    monkeypatch.setattr(depthwise_inline, "_kernels_folder", lambda: tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    sources = {"one": "text", "two": "text"}
    assert depthwise_inline._not_cached(sources) == sources
    entry = depthwise_inline._cache_entries(compiler, compiler.arch_flags(["9.0"]))("one", ["text"])
    (tmp_path / "cache" / "depthwise_inline" / entry).mkdir(parents=True)
    (tmp_path / "cache" / "depthwise_inline" / entry / "library.so").write_text("")
    assert depthwise_inline._not_cached(sources) == {"two": "text"}
    (tmp_path / "edited.cuh").write_text("")
    assert depthwise_inline._not_cached(sources) == sources


def test_what_a_killed_builder_left_is_removed(tmp_path):
    (tmp_path / "entry.lock").write_text("")
    for name in ("entry", "entry.tmp123"):  # an entry without its library, and a build that did not end
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.o").write_text("half")

    def build(folder):
        (folder / "library.so").write_text("whole")

    library = depthwise_inline._build_in(tmp_path, "entry", "nothing", build)
    assert library.read_text() == "whole"
    assert {path.name for path in tmp_path.rglob("*")} == {"entry", "entry.lock", "library.so"}


# --- several processes -----------------------------------------------------------------------------------------------


@needs_compiler
def test_killed_builder(project):
    """kill -9 while it compiles: another that waited for it, and any later one, build at once."""
    root = project.cache / "depthwise_inline"
    builder = project.start(USE)
    deadline = time.monotonic() + 60
    while not list(root.glob("stand_in_k3-*.tmp*/build.ninja")):
        assert time.monotonic() < deadline, builder.output()
        time.sleep(0.01)
    waiting = project.start(USE)
    time.sleep(0.5)
    assert len(project.libraries()) == 1 and "compiling" not in waiting.output()[1]
    builder.kill()
    assert waiting.wait(60) == 0, waiting.output()
    assert waiting.output()[1].count("depthwise_inline: compiling stand_in_k3") == 1
    assert len(project.libraries()) == 2 and not list(root.glob("*.tmp*"))


@needs_compiler
def test_processes_at_once_build_once(project):
    """As torchrun starts them."""
    processes = [project.start(USE) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8, [process.output() for process in processes]
    errors = "".join(process.output()[1] for process in processes)
    assert errors.count("compiling the operators") == 1 and errors.count("compiling stand_in_k3") == 1


def test_lock_is_given_back_although_a_forked_process_holds_the_file(tmp_path):
    """A DataLoader may start its workers while another thread builds."""
    with depthwise_inline._exclusive(tmp_path / "lock") as locked:
        assert locked
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with open(tmp_path / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


FORK = """
    import os, sys, torch, depthwise_inline
    from torch.utils.data import DataLoader
    assert depthwise_inline._library is not None and not torch.cuda.is_initialized()

    class Convolved(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return depthwise_inline.depthwise_conv2d(torch.ones(2, 5, 5), torch.ones(2, 1, 3, 3))

    batch, = DataLoader(Convolved(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert batch.sum() == 4 * 162
    child = os.fork()
    if child == 0:
        os._exit(int(not works_in_child()))
    assert os.waitpid(child, 0)[1] == 0
"""


@needs_compiler
def test_forked_processes(warm):
    """A build in the parent, then workers, and a child that loads and builds for itself."""
    shutil.rmtree(warm.cache)
    warm.run("works_in_child = lambda: depthwise_inline._load_library().call() == 3\n" + textwrap.dedent(FORK))


@pytest.mark.gpu
def test_import_leaves_cuda_to_forked_processes(tmp_path):
    """A cold and a warm import, each followed by a fork whose child uses the GPU."""
    project = Project(tmp_path, shipped=True)
    code = """
        def works_in_child():
            x, w = torch.ones(1, 2, 5, 5, device="cuda"), torch.ones(2, 1, 3, 3, device="cuda")
            return depthwise_inline.depthwise_conv2d(x, w).sum().item() == 162
    """
    for _ in range(2):
        project.run(textwrap.dedent(code) + textwrap.dedent(FORK), **ON_GPU)


# --- several threads, several copies ---------------------------------------------------------------------------------


@needs_compiler
def test_first_use_in_threads(warm):
    """From Python's threads and from ones that Python did not start: one builds, the others wait, none deadlocks."""
    shutil.rmtree(next(warm.cache.rglob("stand_in_k3-*/")))
    code = """
        import threading, torch, depthwise_inline
        library, compile = depthwise_inline._load_library(), depthwise_inline._compile
        other = 'extern "C" void depthwise_inline_launch() {}'
        sums, compiling = [], threading.Lock()

        def alone(*arguments):
            assert compiling.acquire(blocking=False), "two builds at once, which share the environment"
            compile(*arguments)
            compiling.release()

        depthwise_inline._compile = alone
        threads = [threading.Thread(target=lambda: sums.append(library.call_from_threads(3))) for _ in range(2)]
        threads.append(threading.Thread(target=depthwise_inline._load_specialisation, args=("other", other)))
        for thread in threads:
            thread.start()
        sums.append(library.call())
        for thread in threads:
            thread.join()
        assert sorted(sums) == [3, 9, 9] and "other" in depthwise_inline._specialisations, sums
    """
    _, err = warm.run(code)
    assert err.count("compiling stand_in_k3") == err.count("compiling other") == 1


@needs_compiler
def test_two_names_and_reloads(warm):
    """One library, and a builder that works, also after the copy that set it is gone."""
    shutil.rmtree(next(warm.cache.rglob("stand_in_k3-*/")))
    code = """
        import gc, importlib, sys, torch, depthwise_inline
        first = sys.modules.pop("depthwise_inline")
        import depthwise_inline as second
        assert second is not first and second._library_path == first._library_path
        importlib.reload(second)
        library = first._library
        del sys.modules["depthwise_inline"], second
        gc.collect()
        assert library.call() == 3 and first._load_library() is library
    """
    _, err = warm.run(code)
    assert err.count("compiling") == 1


COPIES = """
    import importlib.util, sys, torch
    modules = []
    for name, folder in (("one", "."), ("two", "copy")):
        spec = importlib.util.spec_from_file_location(name, f"{folder}/depthwise_inline.py")
        modules.append(importlib.util.module_from_spec(spec))
        sys.modules[name] = modules[-1]
        spec.loader.exec_module(modules[-1])
    one, two = modules
    x, w = torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3)
    assert one.depthwise_conv2d(x, w).sum() == two.depthwise_conv2d(x, w).sum() == 162
"""


@needs_compiler
def test_two_copies_share_one_library(shipped):
    """Two projects in one process, each with its copy: the operators are registered once."""
    copy = shipped.folder / "copy"
    shutil.copytree(shipped.kernels, copy / "kernels")
    shutil.copy(MODULE, copy)
    code = """
        assert one._library_path == two._library_path
        assert one.status().path == two.status().path == "pytorch"
        kernels = torch._C._dispatch_dump("depthwise_inline::forward")
        assert kernels.count("\\nCUDA: registered") == 1 and "CUDA (inactive)" not in kernels, kernels
    """
    shipped.run("import depthwise_inline")
    _, err = shipped.run(textwrap.dedent(COPIES) + textwrap.dedent(code))
    assert "compiling" not in err


@needs_compiler
def test_two_versions_in_one_process(warm):
    """With other operators: CPU tensors work, and for the rest the second one says so."""
    copy = warm.folder / "copy"
    shutil.copytree(warm.kernels, copy / "kernels")
    text = MODULE.read_text()
    (copy / "depthwise_inline.py").write_text(text.replace("int multiplier=1)", "int factor=1)"))
    code = """
        assert one._library is not None and one.status().path == "pytorch"
        assert two._library is None and two.status().path == "error"
        print(two.status().reason)
    """
    out, _ = warm.run(textwrap.dedent(COPIES) + textwrap.dedent(code))
    assert "the operators of another version" in out and "keep one version" in out


def test_nothing_is_built_during_capture(project):
    """Not even the library: CUDA tensors can be there before it, where the import could not build it."""
    code = """
        import os, torch
        os.environ["TORCH_CUDA_ARCH_LIST"] = ""
        import depthwise_inline
        os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
        torch.cuda.is_initialized = torch.cuda.is_current_stream_capturing = lambda: True
        torch.cuda.device_count = lambda: 0
        try:
            depthwise_inline._load_library()
        except RuntimeError as error:
            print(error)
        assert depthwise_inline._library_error is None
    """
    out, err = project.run(code)
    assert "nothing is built while a CUDA graph is captured" in out and "call precompile() before" in out
    assert "compiling" not in err and not project.cache.exists()


# --- on a GPU --------------------------------------------------------------------------------------------------------

# The import sees no GPU, so that the first CUDA tensor finds nothing loaded.
LATE = """
    import os, torch
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import depthwise_inline
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    assert depthwise_inline._library is None
    x, w = torch.ones(1, 2, 5, 5, device="cuda"), torch.ones(2, 1, 3, 3, device="cuda", requires_grad=True)
"""


@pytest.mark.gpu
def test_first_use_under_compile(shipped):
    """Forward and backward of a compiled function load and build what they need, when they run."""
    code = """
        function = torch.compile(depthwise_inline.depthwise_conv2d, fullgraph=True, backend="aot_eager")
        out = function(x, w)
        out.sum().backward()
        assert out.sum().item() == 162 and w.grad.sum().item() == 162, (out, w.grad)
        assert depthwise_inline._library is not None
    """
    shipped.run(textwrap.dedent(LATE) + textwrap.dedent(code), **ON_GPU)


@pytest.mark.gpu
def test_first_use_during_capture(shipped):
    """An error that says what to do, and no harm to what comes after."""
    code = """
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                depthwise_inline.depthwise_conv2d(x, w)
        except RuntimeError as error:
            print(error)
        assert depthwise_inline._library is None
        assert depthwise_inline.depthwise_conv2d(x, w).sum().item() == 162
    """
    out, _ = shipped.run(textwrap.dedent(LATE) + textwrap.dedent(code), **ON_GPU)
    assert "call precompile() before" in out


@pytest.mark.gpu
def test_failing_specialisation_names_its_error(shipped):
    """In the forward pass, with gradients and without, and in the backward pass, in a thread of autograd's."""
    code = """
        import torch, depthwise_inline
        x = torch.ones(1, 2, 56, 56, device="cuda", requires_grad=True)
        w = torch.ones(2, 1, 3, 3, device="cuda", requires_grad=True)
        obtain, broken = depthwise_inline._obtain, True

        def build(name, what, cpp, cuda):
            return obtain(name, what, cpp, [text + broken * "int broken = ;" for text in cuda])

        depthwise_inline._obtain = build
        for grad in (True, False):
            try:
                with torch.set_grad_enabled(grad):
                    depthwise_inline.depthwise_conv2d(x, w)
            except RuntimeError as error:
                print("forward:", error)
        broken = False
        depthwise_inline.precompile()
        out = depthwise_inline.depthwise_conv2d(x, w).sum()
        broken = True
        try:
            out.backward(retain_graph=True)
        except RuntimeError as error:
            print("backward:", error)
        broken = False
        depthwise_inline.precompile()
        out.backward()
        assert w.grad.sum().item() == 2 * 9 * 54 * 54
    """
    out, err = shipped.run(code, **ON_GPU)
    errors = re.findall(
        r"^(forward|backward): depthwise_inline: compiling .* failed:\n.*error.*\nThe whole output is in ", out, re.M
    )
    assert errors == ["forward", "forward", "backward"], out + err
