"""Every tile of every kernel on small problems: what compute-sanitizer watches. Run by test_sanitizer.py.

Inputs are made, and results compared, on the CPU: so no kernels but ours run, and all that they read was copied there
or written by them.
"""

import sys

import reference
import test_emulated
from reference import Failures, Tensors

import depthwise_inline


def run_on_gpu(run=reference.run):
    """`reference.run` for tensors on the CPU."""

    def moved(direction, problem, tensors, layout):
        there = Tensors(*(t if t is None else t.cuda() for t in tensors))
        return {name: result.cpu() for name, result in run(direction, problem, there, layout).items()}

    return moved


def main(prepare):
    """Runs the sample of test_emulated.py on the GPU; `prepare`: compiles what that needs, and runs nothing."""
    failures, sources = Failures(), {}
    reference.DEVICE, reference.run = "cpu", run_on_gpu()
    for shape, places in test_emulated.SAMPLE.items():
        problems = [*test_emulated.shape_problems(*shape, everything=False), *test_emulated.edge_problems(*shape[:2])]
        for layout, dtype in places:
            if prepare:
                sources |= reference.specialisations(problems, dtype, layout)
                continue
            for problem in problems if shape[2] == (1, 1) else problems[:3]:
                generator = reference.fresh_generator()
                reference.check(failures, problem, reference.make_tensors(problem, dtype, layout, generator), layout)
    if prepare:
        depthwise_inline._obtain_all(sources)
    else:
        print(f"checked {failures.checked}")
        failures.report()


if __name__ == "__main__":
    main(sys.argv[1:] == ["prepare"])
