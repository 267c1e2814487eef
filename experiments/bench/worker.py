"""One peer's process: builds the work, then runs and times it once for each line on standard input."""

import importlib
import json
import os
import sys
import time


def main(framework, spec):
    """Answers on what was standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**facts):
        print(json.dumps(facts), file=answers, flush=True)

    try:
        _serve(framework, spec, answer)
    except Exception as error:
        # Not left to standard error: there the last line is often a hint of JAX's, or a library's farewell.
        answer(error=": ".join([type(error).__name__, *str(error).splitlines()[:1]]))
        raise


def _serve(framework, spec, answer):
    run, facts = importlib.import_module(f"bench.{framework}").build(spec)
    # A GPU that was idle takes a while to reach its clock rates.
    began, runs = time.perf_counter(), 0
    while runs < spec.get("warmup", 2) or time.perf_counter() - began < 0.5:
        run()
        runs += 1
    answer(**(facts() if callable(facts) else facts))
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        answer(seconds=time.perf_counter() - began)
    if hasattr(run, "close"):  # what it wrote goes with it
        run.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
