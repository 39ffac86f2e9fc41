"""python -m benchmarks: compare this library with other tools."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import erllama
from benchmarks import (
    decoding,
    grammar,
    llama_cpp_python,
    load,
    neighbours,
    reading,
    report,
    sampling,
    startup,
    ticks,
    writing,
)
from benchmarks.engines import AbsentError
from benchmarks.measure import Findings, Setup, n_cores, spread
from erllama.llama_ffi import build_info
from erllama.testing.models import SHAPES, Quantization, write_llama

SCENARIOS: dict[str, Callable[[Setup], Findings]] = {
    **decoding.SCENARIOS,
    **load.SCENARIOS,
    **neighbours.SCENARIOS,
    **reading.SCENARIOS,
    **writing.SCENARIOS,
    **ticks.SCENARIOS,
    **startup.SCENARIOS,
    **sampling.SCENARIOS,
    **grammar.SCENARIOS,
    **llama_cpp_python.SCENARIOS,
}
QUANTIZATION: dict[str, Quantization] = {"1.1b": "Q4_0"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("scenario", nargs="*", help=f"scenarios to run. Default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--model", type=Path, help="a GGUF file. Default: a generated model of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="shape of the generated model")
    parser.add_argument("--runs", type=int, default=5, help="number of pairs of runs")
    parser.add_argument("--threads", type=int, default=n_cores(), help="threads of both sides")
    parser.add_argument("--backend", help="fail unless libllama was built for this backend, for example cuda")
    parser.add_argument("--peers", type=Path, help="the directory that `scripts/build_llama.sh --peers` printed")
    parser.add_argument("--llama-cpp-python", type=Path, help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF file with 128,256 tokens, for grammars")
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="directory for JSON, Markdown and plots"
    )
    parser.add_argument("--docs", type=Path, help="also update the page and the plots in this directory")
    parser.add_argument(
        "--quick", action="store_true", help="only check that every scenario runs, with a tiny model"
    )
    options = parser.parse_args()
    unknown = [name for name in options.scenario if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown scenario {unknown[0]!r}; choose from {', '.join(SCENARIOS)}")
    backend = build_info()["backend"]
    if options.backend is not None and options.backend != backend:
        parser.error(f"libllama was built for {backend}; `make setup BACKEND={options.backend}` builds it again")
    with tempfile.TemporaryDirectory() as place:
        setup = Setup(
            model=(options.model or _generated(Path(place), "tiny" if options.quick else options.shape)).resolve(),
            threads=options.threads,
            runs=2 if options.quick else options.runs,
            quick=options.quick,
            backend=backend,
            peers=options.peers,
            llama_cpp_python=options.llama_cpp_python,
            vocabulary=options.vocabulary,
        )
        print(f"erllama {erllama.__version__}, {build_info()}, {setup.threads} threads, {setup.model.name}")
        findings = Findings()
        for name in options.scenario or SCENARIOS:
            findings.add(_run(name, setup))
        report.write(findings, setup, options.out, options.docs)
        print(f"\n{report.table(findings)}\nJSON, Markdown and plots: {options.out}")
    return 0


def _run(name: str, setup: Setup) -> Findings:
    print(f"\n{name}")
    try:
        found = SCENARIOS[name](setup)
    except AbsentError as error:
        print(f"  missing: {error}")
        return Findings(absent=[f"{name}: {error}"])
    for figure in found.figures:
        met = {True: "met", False: "NOT met", None: "no target"}[figure.met]
        target = f" ({figure.target}: {met})" if figure.target else ""
        print(f"  {figure.what}: {spread(figure.ratios, 3)} of {figure.peer}{target}")
        print(f"    ours {spread(figure.ours)} {figure.unit}; theirs {spread(figure.theirs)} {figure.unit}")
        for note in figure.notes:
            print(f"    {note}")
        for command in figure.commands:
            print(f"    $ {command}")
    for each in found.absent:
        print(f"  missing: {each}")
    return found


def _generated(place: Path, shape: str) -> Path:
    path = place / f"{shape}.gguf"
    print(f"generating a {shape}-shaped model with random weights")
    return write_llama(path, SHAPES[shape], quantization=QUANTIZATION.get(shape, "Q8_0"))


if __name__ == "__main__":
    sys.exit(main())
