"""Every tile of every kernel on small problems: what compute-sanitizer watches. Run by test_sanitizer.py.

Inputs are made, and results compared, on the CPU: so no kernels but ours run, and all that they read was copied there
or written by them.
"""

import itertools
import sys

import reference
import test_emulated
import torch
from reference import Failures, Tensors

import depthwise_inline


def on_gpu(run):
    """A function of `reference` that runs a direction, for tensors on the CPU."""

    def moved(direction, problem, tensors, *layout):
        there = Tensors(*(t if t is None else t.cuda() for t in tensors))
        return {name: result.cpu() for name, result in run(direction, problem, there, *layout).items()}

    return moved


def sample():
    """The sample of test_emulated.py, and its tall kernels: problems, layouts and dtypes."""
    for shape, places in test_emulated.SAMPLE.items():
        problems = test_emulated.shape_problems(*shape, everything=False)
        edges = test_emulated.edge_problems(*shape[:2])
        yield from itertools.product(problems + edges if shape[2] == (1, 1) else problems[:3], places)
    yield from itertools.product(test_emulated.TURNED, (("nchw", torch.float16), ("nhwc", torch.bfloat16)))


def prepare():
    """Compiles what the sample needs, and runs nothing."""
    sources = {}
    for problem, (layout, dtype) in sample():
        sources |= reference.specialisations([problem], dtype, layout)
    depthwise_inline._obtain_all(sources)


def run(part, parts):
    """Runs every parts-th problem on the GPU."""
    failures = Failures()
    reference.DEVICE, reference.run = "cpu", on_gpu(reference.run)
    reference.run_with_float_weight = on_gpu(reference.run_with_float_weight)
    for problem, (layout, dtype) in itertools.islice(sample(), part, None, parts):
        tensors = reference.make_tensors(problem, dtype, layout, reference.fresh_generator())
        reference.check(failures, problem, tensors, layout)
    print(f"checked {failures.checked}")
    failures.report()


if __name__ == "__main__":
    if sys.argv[1:] == ["prepare"]:
        prepare()
    else:
        run(*map(int, sys.argv[1:]))
