"""python -m benchmarks: compare this library with other tools."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import erllama
from benchmarks import report
from benchmarks.measure import AbsentError, Figure, Findings, PeerError, Runs, Setup, n_cores, spread
from erllama.llama_ffi import build_info
from erllama.testing.models import SHAPES, Quantization, write_llama
from scripts.real_models import MODELS, fetched_models

# The modules with scenarios, in the order of the report. Each has a table SCENARIOS of functions by name.
MODULES = (
    "decoding",
    "load",
    "neighbours",
    "reading",
    "writing",
    "ticks",
    "streams",
    "isolation",
    "serving",
    "startup",
    "sampling",
    "grammar",
    "llama_cpp_python",
)
SCENARIOS: dict[str, Callable[[Setup], Findings]] = {
    name: scenario
    for module in MODULES
    for name, scenario in importlib.import_module(f"benchmarks.{module}").SCENARIOS.items()
}
# Scenarios that load no model. They run once.
MODEL_FREE = ("lookup", "turns", "startup", "sampling", "mask")
QUANTIZATION: dict[str, Quantization] = {"1.1b": "Q4_0"}
DEFAULT_SHAPE = "135m"
NAMES = {model.gguf: model.title for model in MODELS}


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        title: its name in reports.
        path: its GGUF file; None for a generated model.
        shape: the shape to generate; empty for a file.
    """

    title: str
    path: Path | None
    shape: str = ""


def main() -> int:
    options = _parser().parse_args()
    backend = build_info()["backend"]
    _check(options, backend)
    before = options.out if options.docs is None else options.docs / "benchmarks"
    sections, machine = report.read(before) if options.update else ([], {})
    print(f"erllama {erllama.__version__}, {build_info()}, {options.threads} threads")
    for setup, names in _runs(options, backend):
        print(f"\n{setup.title or report.WITHOUT_MODEL}")
        for name in names:
            section = report.section_of(setup)
            section.scenarios[name] = _run(name, setup)
            section.scenarios[name].measured = time.strftime("%Y-%m-%d", time.gmtime())
            # Written after each scenario: an interrupted run keeps its results.
            sections = report.merge(sections, [section], [*SCENARIOS])
            machine = report.about()
            report.write(sections, machine, options.out)
    if options.docs is not None:
        report.write(sections, machine, options.docs, "benchmarks")
    for section in sections:
        print(f"\n{section.title}\n\n{report.table(section.findings)}")
    print(f"\nJSON, Markdown and plots: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("scenario", nargs="*", help=f"scenarios to run. Default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a GGUF file; repeatable")
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", default=[], help="a generated model; repeatable"
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="the real models that `make real-models` fetched. Without --model, --shape and --real, "
        f"these and the shape {DEFAULT_SHAPE}",
    )
    parser.add_argument("--runs", type=int, default=5, help="number of pairs of runs")
    parser.add_argument("--threads", type=int, default=n_cores(), help="threads of both sides")
    parser.add_argument("--backend", help="fail unless libllama was built for this backend, for example cuda")
    parser.add_argument("--peers", type=Path, help="the directory that `scripts/build_llama.sh --peers` printed")
    parser.add_argument("--llama-cpp-python", type=Path, help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--vocabulary", type=Path, help="a GGUF file with 128,256 tokens, for grammars")
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="directory for JSON, Markdown and plots"
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="keep the results of other scenarios and models, in --docs or else --out",
    )
    parser.add_argument("--docs", type=Path, help="also update the page and the plots in this directory")
    parser.add_argument(
        "--quick", action="store_true", help="only check that every scenario runs, by default with a tiny model"
    )
    return parser


def _check(options: argparse.Namespace, backend: str) -> None:
    """End the program if the options name something that does not exist."""
    parser = _parser()
    if unknown := [name for name in options.scenario if name not in SCENARIOS]:
        parser.error(f"unknown scenario {unknown[0]!r}; choose from {', '.join(SCENARIOS)}")
    if missing := [path for path in options.model if not path.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    if options.real and not fetched_models(generate=True):
        parser.error("no real model is fetched; run `make real-models`")
    if options.backend is not None and options.backend != backend:
        parser.error(f"libllama was built for {backend}; `make setup BACKEND={options.backend}` builds it again")


def _subjects(options: argparse.Namespace) -> list[Subject]:
    """Return the models to measure, generated ones first."""
    shapes = list(options.shape)
    chosen = bool(options.model or shapes or options.real)
    if not chosen:
        shapes = ["tiny" if options.quick else DEFAULT_SHAPE]
    files = list(options.model)
    if options.real or not (chosen or options.quick):
        files += fetched_models(generate=True)
    generated = [Subject(f"{_name(shape)}-shaped, {_quantization(shape)}", None, shape) for shape in shapes]
    return generated + [Subject(NAMES.get(path.name, path.stem), path.resolve()) for path in files]


def _runs(options: argparse.Namespace, backend: str) -> Iterator[tuple[Setup, list[str]]]:
    """Yield the setup of each model and the scenarios to run with it; then those that need no model."""
    asked = options.scenario or list(SCENARIOS)
    with_model = [name for name in asked if name not in MODEL_FREE]
    setup = Setup(
        model=Path(),
        threads=options.threads,
        runs=2 if options.quick else options.runs,
        quick=options.quick,
        backend=backend,
        peers=options.peers,
        llama_cpp_python=options.llama_cpp_python,
        vocabulary=options.vocabulary,
    )
    for subject in _subjects(options) if with_model else []:
        with tempfile.TemporaryDirectory() as place:
            path = subject.path or _generated(Path(place), subject.shape)
            real = subject.path is not None
            yield replace(setup, model=path, title=subject.title, real=real), with_model
    if without := [name for name in asked if name in MODEL_FREE]:
        yield setup, without


def _run(name: str, setup: Setup) -> Findings:
    print(f"\n{name}")
    try:
        found = SCENARIOS[name](setup)
    except AbsentError as error:
        print(f"  missing: {error}")
        return Findings(absent=[f"{name}: {error}"])
    except PeerError as error:
        found = Findings([Figure(name, f"scenario {name}", "its peer", "", (), Runs(failure=str(error)))])
    for figure in found.figures:
        _print(figure)
    for each in found.absent:
        print(f"  missing: {each}")
    return found


def _print(figure: Figure) -> None:
    met = {True: "met", False: "NOT met", None: "no target"}[figure.met]
    target = f" ({figure.target}: {met})" if figure.target else ""
    if figure.failure:
        print(f"  {figure.what}: {figure.peer} failed: {figure.failure}")
    else:
        print(f"  {figure.what}: {spread(figure.ratios, 3)} of {figure.peer}{target}")
    print(f"    erllama {spread(figure.ours)} {figure.unit}; peer {spread(figure.theirs)} {figure.unit}")
    for note in figure.notes:
        print(f"    {note}")
    for command in figure.commands:
        print(f"    $ {command}")


def _name(shape: str) -> str:
    return shape.upper() if shape[0].isdigit() else shape.capitalize()


def _quantization(shape: str) -> Quantization:
    return QUANTIZATION.get(shape, "Q8_0")


def _generated(place: Path, shape: str) -> Path:
    path = place / f"{shape}.gguf"
    print(f"generating a {shape}-shaped model with random weights")
    return write_llama(path, SHAPES[shape], quantization=_quantization(shape))


if __name__ == "__main__":
    sys.exit(main())
