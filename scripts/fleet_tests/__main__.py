"""Tests a fleet under Ray Serve on this machine, and prints what it has measured. `make test-fleet` runs it.

    python -m scripts.fleet_tests [--conversations N] [--turns N] [TEST ...]

Runs in the environment with Ray. Ends with status 1 if a test fails.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from scripts.fleet_tests.cluster import ray_cluster
from scripts.fleet_tests.environment import Environment, free_port
from scripts.fleet_tests.kills import test_kill
from scripts.fleet_tests.mismatch import test_mismatch
from scripts.fleet_tests.reuse import test_reuse
from scripts.fleet_tests.scaling import test_scaling

TESTS = {"reuse": test_reuse, "kill": test_kill, "scaling": test_scaling, "mismatch": test_mismatch}


def main() -> int:
    """Run the tests; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.fleet_tests", description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"{', '.join(TESTS)}; all by default")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=6)
    options = parser.parse_args()
    unknown = set(options.tests) - set(TESTS)
    if unknown:
        parser.error(f"there is no test {sorted(unknown)[0]!r}; choose from {', '.join(TESTS)}")
    port, failed = free_port(), []
    with ray_cluster(port):
        for name in options.tests or TESTS:
            began = time.monotonic()
            print(f"== {name}", flush=True)
            try:
                with Environment(port, options.conversations, options.turns) as environment:
                    TESTS[name](environment)
            except Exception:
                traceback.print_exc()
                failed.append(name)
            print(
                f"== {name}: {'failed' if name in failed else 'passed'}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
