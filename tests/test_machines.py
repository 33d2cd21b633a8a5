"""What users' machines lack or do wrong: compilers, cache folders, GPUs. And the commands that say so.

As in test_build.py, the situations are brought about around a copy of the module, in processes of their own.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from stand_in import USE, needs_compiler

import depthwise_inline
from depthwise_inline import BuildError

IMPORT = "import torch, depthwise_inline"

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


def path_without(project, *names):
    """PATH less these programs."""
    tools = project.folder / "tools"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if tool.name not in names and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    return str(tools)


def script(path, text):
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- builds that fail ------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", ("stand_in.cu", "operators.cpp", "stand_in.cuh"))
def test_failing_build(project, name):
    """A short message with the place, then the log; the import works, and mending the file mends it."""
    project.add_cuda()
    path = project.kernels / name
    text = path.read_text()
    path.write_text("#pragma once\nint broken = ;\n" + text)
    mend = f"""
    import pathlib
    pathlib.Path({str(path)!r}).write_text({text!r})
    depthwise_inline.precompile()
    assert depthwise_inline._load_library() is not None
    """
    out, err = project.run(FAILS + mend)
    assert err.count("compiling the operators") == 2  # not again for every use
    first, place, log = out.splitlines()
    assert first == "depthwise_inline: compiling the operators for sm_90 failed:"
    assert re.search(rf"kernels/{name}[:(]2\b.*error", place)
    assert "broken" in Path(log.removeprefix("The whole output is in ")).read_text()


def test_failure_at_first_use_is_kept(project):
    code = """
        import torch, depthwise_inline
        calls = []
        depthwise_inline._obtain = lambda *arguments: calls.append(arguments) or 1 / 0
        for _ in range(2):
            try:
                depthwise_inline._load_library()
            except Exception as error:
                assert str(error) == "division by zero"
        assert len(calls) == 1
    """
    project.run(code, TORCH_CUDA_ARCH_LIST=None)


@needs_compiler
def test_failing_specialisation(project):
    """The library gets the message to throw, and does not ask again; precompile() tries again."""
    path = project.kernels / "operators.cpp"
    path.write_text(path.read_text().replace("return launch<3>()", "return launch<3>(nonsense)"))
    code = """
        import ctypes, torch, depthwise_inline
        library = depthwise_inline._load_library()
        library.last_message.restype = ctypes.c_char_p
        assert library.call() == -1 and library.call() == -1
        print(library.last_message().decode())
        try:
            depthwise_inline.precompile(depthwise_inline.DepthwiseConv2d(2, 3), (1, 2, 5, 5))
        except RuntimeError as error:
            assert str(error).startswith("depthwise_inline: compiling stand_in_k3 for sm_90 failed:")
    """
    out, err = project.run(code)
    first, place, log = out.splitlines()
    assert first == "depthwise_inline: compiling stand_in_k3 for sm_90 failed:" and "nonsense" in place
    assert "nonsense" in Path(log.removeprefix("The whole output is in ")).read_text()
    assert err.count("compiling stand_in_k3") == 2


@needs_compiler
def test_interrupted_specialisation(warm):
    """Ctrl-C while it compiles: an error now, and no hindrance for the next call."""
    shutil.rmtree(next(warm.cache.rglob("stand_in_k3-*/")))
    code = """
        import ctypes, os, signal, torch, depthwise_inline
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        library, compile = depthwise_inline._load_library(), depthwise_inline._compile

        def interrupted(folder, *rest):
            os.kill(os.getpid(), signal.SIGINT)
            compile(folder, *rest)

        depthwise_inline._compile = interrupted
        assert library.call() == -1
        library.last_message.restype = ctypes.c_char_p
        print(library.last_message().decode())
        depthwise_inline._compile = compile
        assert library.call() == 3
    """
    out, err = warm.run(code)
    assert (
        out == "depthwise_inline: compiling stand_in_k3 was interrupted by KeyboardInterrupt()\n" and "Error" not in err
    )


@needs_compiler
def test_library_that_does_not_load(project):
    """As where the C++ compiler is newer than the C++ library in use."""
    path = project.kernels / "operators.cpp"
    path.write_text(path.read_text() + "extern int absent;\nint* use_absent() { return &absent; }\n")
    out, err = project.run(FAILS)
    first, reason, _ = out.splitlines()
    assert first == "depthwise_inline: compiling the operators for sm_90 failed:"
    assert "the library does not load: " in reason and "undefined symbol: absent" in reason
    assert "cannot be used" not in err


# --- compilers and sources -------------------------------------------------------------------------------------------


def test_missing_kernels(project):
    shutil.rmtree(project.kernels)
    out, _ = project.run(FAILS)
    assert f"the folder {project.kernels} with the CUDA sources is missing" in out
    assert "copy kernels/ to lie beside depthwise_inline.py" in out


def test_missing_cxx(project):
    out, _ = project.run(FAILS, CXX="/nonexistent/g++")
    assert "no C++ compiler: '/nonexistent/g++' (named by CXX) was not found" in out
    out, _ = project.run(FAILS, CXX=None, PATH=path_without(project, "c++"))
    assert "no C++ compiler: 'c++' (CXX is not set) was not found" in out
    assert "apt-get install g++" in out


@needs_compiler
def test_cxx_refused_by_nvcc(project):
    project.add_cuda()
    compiler = script(project.folder.parent / "g++-99", 'exec c++ -U__GNUC__ -D__GNUC__=99 "$@"')
    out, _ = project.run(FAILS, CXX=compiler, CC=None)
    assert "unsupported GNU version" in out.splitlines()[1]


@needs_compiler
def test_missing_ninja(project):
    without = path_without(project, "ninja")
    out, _ = project.run("import sys; sys.modules['ninja'] = None\n" + textwrap.dedent(FAILS), PATH=without)
    assert out.endswith("ninja was not found. To mend it: pip install ninja\n")


@needs_compiler
def test_wrapper_as_cuda_home_and_ninja_off_path(project):
    """CUDA_HOME=/usr/local, where nvcc is a script; ninja in Python's packages alone."""
    if importlib.util.find_spec("ninja") is None:
        pytest.skip("the package ninja is not installed")
    wrapper = script(project.folder / "local" / "bin" / "nvcc", f'exec {depthwise_inline._find_compiler().nvcc} "$@"')
    project.run(USE, CUDA_HOME=wrapper.parent.parent, PATH=path_without(project, "ninja", "nvcc"))


@needs_compiler
@pytest.mark.parametrize("places", (1, 2))
def test_compiler_package_alone(project, places):
    """Build with the compiler from Python's packages: no CUDA_HOME, no nvcc on PATH, no system toolkit. The package of
    the runtime may lie elsewhere, as in an environment that is given a compiler on top of the system's torch."""
    root = next((root for root in depthwise_inline._package_roots() if (root / "bin" / "nvcc").is_file()), None)
    if root is None:
        pytest.skip("the package cuda-toolkit[nvcc,cccl] is not installed")
    if places == 2:
        own = project.folder.parent / "packages" / "nvidia" / root.name
        without = shutil.ignore_patterns("cuda_runtime.h", "libcudart*")
        shutil.copytree(root, own, copy_function=os.symlink, ignore=without)
    code = f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(project.folder.parent / "packages")!r})
        import depthwise_inline
        depthwise_inline._SYSTEM_CUDA = pathlib.Path("/nonexistent")
        os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
        depthwise_inline.precompile()
        assert depthwise_inline._load_library().call() == 3
        print(depthwise_inline.status().compiler)
    """
    hidden = {"TORCH_CUDA_ARCH_LIST": None, "CUDA_HOME": None, "CUDA_PATH": None}
    out, _ = project.run(code, **hidden, PATH=path_without(project, "nvcc"))
    assert out.endswith(f" in {own if places == 2 else root}\n")


@needs_compiler
def test_where_nvcc_is_looked_for(monkeypatch, tmp_path):
    """The best place first; what is not there or only a wrapper of something else does not mislead."""
    real = depthwise_inline._find_compiler()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setattr(depthwise_inline, "_SYSTEM_CUDA", tmp_path / "system")
    wrapper = script(tmp_path / "wrapper" / "nvcc", f'exec {real.nvcc} "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    home, path, *packages, system, on_path = depthwise_inline._nvcc_candidates()
    assert [home, path, system] == [tmp_path / name / "bin" / "nvcc" for name in ("home", "path", "system")]
    assert all("nvidia" in nvcc.parts for nvcc in packages) and on_path == wrapper
    assert depthwise_inline._ask_nvcc(wrapper).root.samefile(real.root)
    assert depthwise_inline._find_compiler().version


def fake_nvcc(folder, version):
    """An nvcc that says it is of this version."""
    return script(folder / "bin" / "nvcc", f"echo release {version[:-2]}, V{version}\necho compute_75\necho compute_90")


def test_missing_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(depthwise_inline, "_CUDA_BUILD", True)
    monkeypatch.setattr(depthwise_inline, "_nvcc_candidates", lambda: iter([tmp_path / "nvcc"]))
    with pytest.raises(BuildError, match=r'no CUDA compiler .* pip install "cuda-toolkit\[nvcc,cccl\]==13\.\*"'):
        depthwise_inline._find_compiler()
    assert depthwise_inline.status().compiler.startswith("none: depthwise_inline: no CUDA compiler")
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # whose packages bring no nvcc
    with pytest.raises(BuildError, match=r"no CUDA compiler .* install the CUDA toolkit 12\.8 and set CUDA_HOME"):
        depthwise_inline._find_compiler()


def test_nvcc_of_another_major_version(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(depthwise_inline, "_CUDA_BUILD", True)
    old, new = fake_nvcc(tmp_path / "old", "11.8.89"), fake_nvcc(tmp_path / "new", "13.1.66")
    monkeypatch.setattr(depthwise_inline, "_nvcc_candidates", lambda: iter([old]))
    with pytest.raises(BuildError) as caught:
        depthwise_inline._find_compiler()
    assert "built with CUDA 13.0 and needs nvcc 13" in str(caught.value)
    assert f"found only nvcc 11.8.89 in {tmp_path / 'old'}" in str(caught.value)
    assert str(caught.value).endswith('pip install "cuda-toolkit[nvcc,cccl]==13.*"')
    monkeypatch.setattr(depthwise_inline, "_nvcc_candidates", lambda: iter([old, new]))
    assert depthwise_inline._find_compiler().root == tmp_path / "new"


# --- cache folders that cannot be used -------------------------------------------------------------------------------


@needs_compiler
def test_cache_folder_that_is_none(project):
    """A private one instead, with a warning; gone when the process ends."""
    (project.folder / "file").write_text("")
    code = textwrap.dedent(USE) + "print(depthwise_inline.status().library)\n"
    out, err = project.run(code, TORCH_EXTENSIONS_DIR=project.folder / "file", TMPDIR=project.folder)
    assert (
        f"the cache {project.folder}/file/depthwise_inline cannot be used" in err and "set TORCH_EXTENSIONS_DIR" in err
    )
    assert Path(out.strip()).is_relative_to(project.folder) and not Path(out.strip()).exists()


@needs_compiler
@pytest.mark.parametrize("home", ("file/home", None))
def test_no_home_to_write_in(project, home):
    """A home below a file; or none, for a user whom the system does not know, as in containers."""
    (project.folder / "file").write_text("")
    code = """
        import pwd
        def unknown(uid):
            raise KeyError(uid)
        pwd.getpwuid = unknown
        import torch, depthwise_inline
        assert depthwise_inline._library is not None
    """
    hidden = {"TORCH_EXTENSIONS_DIR": None, "XDG_CACHE_HOME": None}
    before = set(project.folder.iterdir())
    _, err = project.run(code, HOME=home and project.folder / home, **hidden)
    assert re.search(r"the cache \S.* cannot be used", err) and (home or "this user has no home folder" in err)
    assert {path.suffix for path in set(project.folder.iterdir()) - before} <= {".out", ".err"} | {""}
    assert not (project.folder / "~").exists()


@needs_compiler
def test_read_only_cache_folder(warm):
    """What is there is used; what is missing is built elsewhere."""
    folder = warm.cache / "depthwise_inline"
    shutil.rmtree(next(folder.glob("stand_in_k3-*/")))
    before, as_user = warm.libraries(), ()
    if os.getuid() == 0:  # whom permissions do not hold without this
        if shutil.which("setpriv") is None:
            pytest.skip("root can write everywhere, and setpriv is not there to change that")
        as_user = ("setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override")
    folder.chmod(0o555)
    try:
        _, err = warm.run(USE, prefix=as_user)
    finally:
        folder.chmod(0o755)
    assert "compiling the operators" not in err and "compiling stand_in_k3" in err
    assert f"the cache {folder} cannot be used" in err and "Permission denied" in err
    assert warm.libraries() == before


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_foreign_cache_folder(project):
    folder = project.cache / "depthwise_inline"
    folder.mkdir(parents=True)
    os.chown(folder, 12345, 12345)
    _, err = project.run(IMPORT)
    assert "belongs to another user" in err and not project.libraries()
    done = command(project, "doctor")
    assert re.search("^WRONG  cache .*belongs to another user.*To mend it: ", done[1], re.MULTILINE)


def mounting(options, folder):
    """What gives a command a file system of its own in this folder; skips where that is not permitted."""
    folder.mkdir()
    prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    return prefix


@needs_compiler
def test_full_disk(project):
    """The cache's, while the compiler writes; that of temporary files; both."""
    project.add_cuda()
    full = project.folder / "full"
    code = """
        import os, tempfile, torch, depthwise_inline
        assert depthwise_inline._library is not None
        full, cache = os.environ["TORCH_EXTENSIONS_DIR"], os.path.abspath("cache")
        os.environ.update(TORCH_EXTENSIONS_DIR=cache, TMPDIR=full)
        assert depthwise_inline._load_library().call() == 3
        os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.tempdir = full
        depthwise_inline._private_root.cache_clear()
        try:
            depthwise_inline._obtain("other", "other", (), ("#include <cuda_fp16.h>",))
        except RuntimeError as error:
            print(error)
        assert not list(depthwise_inline._cache_root().rglob("library.so"))
    """
    out, err = project.run(code, prefix=mounting("size=1m", full), TORCH_EXTENSIONS_DIR=full)
    unusable = (
        rf"the cache {full}/depthwise_inline cannot be used \(.*[Nn]o space left on device\); compiling in a temp"
    )
    assert len(re.findall(unusable, err)) == 2 and len(project.libraries()) == 1
    assert re.search(rf"neither {full}/depthwise_inline nor a temporary folder can be used \(.*[Nn]o space left", out)
    assert "set TORCH_EXTENSIONS_DIR" in out


@needs_compiler
def test_cache_from_which_nothing_can_be_loaded(project):
    _, err = project.run(IMPORT + "; depthwise_inline._load_library()", prefix=mounting("noexec", project.cache))
    assert f"the cache {project.cache}/depthwise_inline cannot be used" in err
    assert "compiling in a temporary folder" in err


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path):
    """Code that lets a process find the GPUs of the variable GPUS, such as 9.0 7.5, and no others."""
    source = tmp_path / "nvml.c"
    source.write_text(
        textwrap.dedent("""
            #include <stdio.h>
            #include <stdlib.h>
            #include <string.h>
            static const char* gpu(long index) { return getenv("GPUS") + 4 * index; }
            int nvmlInit_v2() { return 0; }
            int nvmlShutdown() { return 0; }
            int nvmlDeviceGetCount_v2(unsigned* count) { *count = (strlen(getenv("GPUS")) + 1) / 4; return 0; }
            int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = (void*)(long)index; return 0; }
            int nvmlDeviceGetName(void* device, char* name, unsigned size) {
              snprintf(name, size, "NVIDIA %ld", (long)device);
              return 0;
            }
            int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
              return sscanf(gpu((long)device), "%d.%d", major, minor) != 2;
            }
            """)
    )
    library = source.with_name("libnvidia-ml.so.1")
    cxx = [*depthwise_inline._cxx_command(), "-x", "c"]
    subprocess.run([*cxx, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    return f"import ctypes; ctypes.CDLL({str(library)!r})\n"


GPUS = """
    import torch, depthwise_inline
    status = depthwise_inline.status()
    assert not torch.cuda.is_initialized()
    print(status.path, *status.gpus, *status.architectures, sep=", ")
    print(status.reason)
"""


@needs_compiler
def test_gpus(warm, driver):
    """One build for the GPUs of a machine, whichever a process is shown; machines with others have their own."""
    code, on = driver + textwrap.dedent(GPUS), {"TORCH_CUDA_ARCH_LIST": None, "CUDA_VISIBLE_DEVICES": None}
    out, err = warm.run(code, GPUS="9.0", **on)
    assert out.startswith("cuda, NVIDIA 0 (sm_90), 9.0\nthe operator library is loaded") and "compiling" not in err
    out, err = warm.run(code, GPUS="9.0 7.5", **on)
    assert out.startswith("cuda, NVIDIA 0 (sm_90), NVIDIA 1 (sm_75), 7.5, 9.0\n")
    assert err.count("compiling the operators for sm_75, sm_90, once") == 1
    libraries = warm.libraries()
    for visible in ("1", "0,1", "GPU-1234"):
        out, err = warm.run(code, GPUS="9.0 7.5", **on | {"CUDA_VISIBLE_DEVICES": visible})
        assert out.startswith("cuda, ") and "compiling" not in err
    for hidden in ("", "-1", "2", "none", "-1,0"):
        out, err = warm.run(code, GPUS="9.0 7.5", **on | {"CUDA_VISIBLE_DEVICES": hidden})
        assert out.startswith("pytorch\nno GPU is visible to this process"), hidden
    assert warm.libraries() == libraries
    _, err = warm.run(code, GPUS="7.5", **on)
    assert "for sm_75, once" in err and libraries.items() < warm.libraries().items()


@needs_compiler
def test_architecture_list_without_the_gpu(warm, driver):
    code = driver + textwrap.dedent(GPUS)
    out, _ = warm.run(code, GPUS="7.5", CUDA_VISIBLE_DEVICES=None)
    assert out.startswith("error, NVIDIA 0 (sm_75), 9.0\n")
    assert "TORCH_CUDA_ARCH_LIST=9.0 has no code for NVIDIA 0 (sm_75). To mend it: unset it" in out
    out, _ = warm.run(code, GPUS="9.0", CUDA_VISIBLE_DEVICES=None)
    assert out.startswith("cuda, ")


@needs_compiler
def test_gpu_too_old_for_the_compiler(project, driver):
    code = driver + textwrap.dedent(FAILS)
    out, _ = project.run(code, GPUS="3.5", TORCH_CUDA_ARCH_LIST=None, CUDA_VISIBLE_DEVICES=None)
    assert re.search(r"nvcc \S+ compiles for sm_\d+ and newer, but the GPUs of this machine are 3\.5", out)


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
    assert "there is no GPU to build for" in out and "set TORCH_CUDA_ARCH_LIST" in out
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


def test_other_systems(project):
    out, _ = project.run("import sys, torch; sys.platform = 'win32'\n" + textwrap.dedent(FAILS))
    assert out == "depthwise_inline: the kernels are built on Linux alone, but this is win32\n"


def test_bad_architecture_list(project):
    out, _ = project.run(FAILS, TORCH_CUDA_ARCH_LIST="Hoover")
    assert "expected TORCH_CUDA_ARCH_LIST like '8.0;9.0+PTX', but got 'Hoover'" in out


def test_architecture_flags(monkeypatch):
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
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0a+PTX")
    assert depthwise_inline._architectures() == ("8.0", "8.6", "9.0a+PTX")


# --- the command line ------------------------------------------------------------------------------------------------


def command(project, *arguments, driver="", **environment):
    """Exit status, stdout and stderr of python depthwise_inline.py."""
    run = f"""
        import runpy, sys
        sys.argv = ["depthwise_inline.py", *{arguments}]
        runpy.run_path("depthwise_inline.py", run_name="__main__")
    """
    process = project.start(driver + textwrap.dedent(run), **{"TORCH_CUDA_ARCH_LIST": None} | environment)
    return process.wait(), *process.output()


def found(out):
    """What doctor says: name, then ok or WRONG, and the rest of the line."""
    return {line[7:20].strip(): (line[:5].strip(), line[20:]) for line in out.splitlines()}


def test_doctor_names_what_is_wrong(project):
    shutil.rmtree(project.kernels)
    (project.folder / "file").write_text("")
    wrong = {"CXX": "/nonexistent/g++", "TORCH_EXTENSIONS_DIR": project.folder / "file"}
    status, out, err = command(project, "doctor", **wrong)
    lines = found(out)
    names = ("Python", "torch", "driver", "GPU", "nvcc", "C++ compiler", "ninja", "sources", "cache", "kernels")
    assert status == 1 and tuple(lines) == names, out + err
    for name, words in (
        ("GPU", "CUDA_VISIBLE_DEVICES"),
        ("C++ compiler", "set CXX"),
        ("sources", "copy kernels/"),
        ("cache", "set TORCH_EXTENSIONS_DIR"),
    ):
        assert lines[name][0] == "WRONG" and "To mend it: " in lines[name][1] and words in lines[name][1]
    _, out, _ = command(project, "doctor", driver="import torch; torch.version.cuda = None\n")
    assert found(out)["torch"][0] == "WRONG" and "https://pytorch.org" in found(out)["torch"][1]


@needs_compiler
def test_doctor_with_a_gpu(warm, driver):
    """The real command. This driver shows a GPU that torch cannot use."""
    if torch.cuda.is_available():
        pytest.skip("here torch can use a GPU")
    on = {"GPUS": "9.0", "CUDA_VISIBLE_DEVICES": None}
    status, out, err = command(warm, "doctor", driver=driver, **on)
    lines = found(out)
    assert status == 1, out + err
    assert [name for name in lines if lines[name][0] == "WRONG"] == ["torch on GPU"], out
    assert "install a driver for CUDA" in lines["torch on GPU"][1] and lines["GPU"] == ("ok", "NVIDIA 0 (sm_90)")
    assert re.fullmatch(r".*/depthwise_inline, writable, 2 libraries, last built \w.*\d", lines["cache"][1])
    assert lines["torch"] == ("ok", f"{torch.__version__} for CUDA {torch.version.cuda}")


def test_clean_empties_the_cache_of_its_own_alone(project):
    """The folder may be a link, and hold what is not ours."""
    folder, cache = project.folder / "elsewhere", project.cache / "depthwise_inline"
    (folder / "the-kernels").mkdir(parents=True)
    project.cache.mkdir()
    cache.symlink_to(folder)
    for name in ("operators-0123456789abcdef0123", "stand_in_k3-0123456789abcdef0123.tmpab_1"):
        (folder / name).mkdir()
    (folder / "operators-0123456789abcdef0123" / "library.so").write_text("")
    for name in ("operators-0123456789abcdef0123.lock", "operators-0123456789abcdef0123.log", "depthwise_inline.py"):
        (folder / name).write_text("")
    done = subprocess.run(
        [sys.executable, "depthwise_inline.py", "clean"],
        cwd=project.folder,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(project.cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == f"removing 1 libraries in {cache}\n", done
    assert {path.name for path in folder.iterdir()} == {"the-kernels", "depthwise_inline.py"}
    assert command(project, "clean")[:2] == (0, f"removing 0 libraries in {cache}\n")
    status, _, err = command(project, "wash")
    assert status == 1 and "usage: python depthwise_inline.py doctor" in err
