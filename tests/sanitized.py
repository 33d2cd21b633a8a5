"""Every tile of every kernel on small problems: what compute-sanitizer watches. Run by test_sanitizer.py."""

import sys

import reference
import test_emulated
from reference import Failures

import depthwise_inline


def main(prepare):
    """Runs the sample of test_emulated.py on the GPU; `prepare`: compiles what that needs, and runs nothing."""
    failures, sources = Failures(), {}
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
