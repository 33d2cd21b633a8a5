"""Python code in processes of its own, forked from one that has imported torch already: that import takes seconds."""

import atexit
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "pytest"])  # pytest: multiprocessing imports the main program again


class Process:
    """Runs code in a folder with this environment; stdout and stderr go to two files. With a prefix, such as setpriv
    and its options, a fresh interpreter runs it behind that command."""

    def __init__(self, code, folder, environment, output, prefix=()):
        self._files = [f"{output}.{name}" for name in ("out", "err")]
        for file in self._files:
            Path(file).write_text("")
        self._process = _CONTEXT.Process(target=_execute, args=(code, folder, environment, self._files, prefix))
        self._process.start()

    def wait(self, timeout=300):
        """The exit status; negative for a signal."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.output()}")
        return self._process.exitcode

    def kill(self):
        """kill -9"""
        self._process.kill()
        self._process.join()

    def output(self):
        """stdout and stderr so far."""
        return tuple(Path(file).read_text() for file in self._files)


def _execute(code, folder, environment, files, prefix):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if prefix:
        os.execvp(prefix[0], [*prefix, sys.executable, "-c", code])
    sys.argv = ["-c"]
    sys.path.insert(0, "")
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    sys.exit(status)
