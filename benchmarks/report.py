"""Reports of benchmarks: JSON, a table, and a page with plots."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

import erllama
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, n_cores
from benchmarks.plots import svg
from erllama.llama_ffi import build_info, devices

PAGE = """# Benchmarks

`make bench` compares this library with other tools and writes this page. It takes half an hour on an otherwise idle
machine. `make bench-quick` only checks that every scenario runs. `BENCH` passes further arguments, such as
`make bench BENCH="--shape 1.1b --runs 3 one agents"` or `--model your.gguf`; `python -m benchmarks --help` lists
them. With a GPU, `make setup BACKEND=cuda` and `make bench BENCH="--backend cuda"` fill the same table.

Each ratio compares two things that were measured one after the other, in alternating order, in one run. The table
shows the median of the runs' ratios and their range: the machine is shared, so the spread matters. llama.cpp's
tools are built from the unchanged release with the library's flags. Both sides get the same model, threads,
context, batch sizes and flash attention.
"""


def about() -> dict[str, str]:
    """Return the machine and the versions, without names of users or hosts."""
    found = {
        "processor": _processor(),
        "cores": str(n_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "erllama": erllama.__version__,
        "libllama": f"{build_info()['source']}, {build_info()['backend']}",
    }
    gpus = [device.description for device in devices() if device.kind in ("gpu", "igpu")]
    return found | ({"GPU": "; ".join(gpus)} if gpus else {})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def anonymous(text: str) -> str:
    """Return a text without directories of this machine: of an absolute path only the last name stays."""
    return re.sub(r"(?<![\w.~/])/(?:[^\s/'\"]+/)+", "", text)


def to_json(findings: Findings, setup: Setup, machine: Mapping[str, str]) -> str:
    """Return all findings as JSON, with the values of every run."""
    figures = [
        asdict(figure)
        | {"ratios": figure.ratios, "ratio": figure.ratio, "met": figure.met}
        | {
            "commands": [anonymous(command) for command in figure.commands],
            "notes": [anonymous(note) for note in figure.notes],
        }
        for figure in findings.figures
    ]
    content = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": dict(machine),
        "setup": {
            "model": setup.model.name,
            "threads": setup.threads,
            "runs": setup.runs,
            "quick": setup.quick,
            "gpu_layers": setup.gpu_layers,
        },
        "figures": figures,
        "plots": [asdict(plot) for plot in findings.plots],
        "absent": [anonymous(each) for each in findings.absent],
    }
    return json.dumps(content, indent=1) + "\n"


def from_json(text: str) -> tuple[Findings, dict[str, str]]:
    """Return the findings and the machine from the output of `to_json`."""
    content = json.loads(text)
    figures = [
        Figure(
            **{name: value for name, value in figure.items() if name not in ("ratios", "ratio", "met", "target")},
            target=Target(**figure["target"]) if figure["target"] else None,
        )
        for figure in content["figures"]
    ]
    plots = [Plot(**plot | {"lines": [Line(**line) for line in plot["lines"]]}) for plot in content["plots"]]
    return Findings(figures, plots, content["absent"]), content["machine"]


def table(findings: Findings) -> str:
    """Return a Markdown table with one row per figure."""
    rows = ["| What | Against | Ratio | Ours | Theirs | Target | Met |", "|---|---|---|---|---|---|---|"]
    for figure in findings.figures:
        ratio = f"**{_number(figure.ratio)}** ({_number(min(figure.ratios))} to {_number(max(figure.ratios))})"
        met = {True: "yes", False: "no", None: "-"}[figure.met]
        ours, theirs = (f"{_number(_median(values))} {figure.unit}" for values in (figure.ours, figure.theirs))
        what, peer = (text.replace("|", "\\|") for text in (figure.what, figure.peer))
        rows.append(f"| {what} | {peer} | {ratio} | {ours} | {theirs} | {figure.target or '-'} | {met} |")
    return "\n".join(rows)


def page(found: Sequence[tuple[str, Findings]], machine: Mapping[str, str], plots: str) -> str:
    """Return the page: for each model its table and its plots from the directory `plots`."""
    parts = [PAGE, "".join(f"- {name}: {value}\n" for name, value in machine.items())]
    for model, findings in found:
        parts.append(f"## {model}\n\n{table(findings)}\n")
        parts += [f"![{plot.title}]({plots}/{plot.name}.svg)\n" for plot in findings.plots]
        if findings.absent:
            parts.append("Not measured:\n\n" + "".join(f"- {anonymous(each)}\n" for each in findings.absent))
        parts.append("<details><summary>What was run</summary>\n")
        for figure in findings.figures:
            lines = [f"**{figure.what}**", *(anonymous(note) for note in figure.notes)]
            lines += [f"`{anonymous(command)}`" for command in figure.commands]
            parts.append("\n\n".join(lines) + "\n")
        parts.append("</details>\n")
    return "\n".join(parts)


def write(findings: Findings, setup: Setup, out: Path, docs: Path | None) -> None:
    """Write all reports to `out`, and the page and its plots also to `docs`, if given."""
    machine = about()
    out.mkdir(parents=True, exist_ok=True)
    found = to_json(findings, setup, machine)
    (out / "benchmarks.json").write_text(found)
    _write_page([(setup.model.stem, findings)], machine, out, ".")
    if docs is not None:
        _write_page([(setup.model.stem, findings)], machine, docs, "benchmarks")
        (docs / "benchmarks" / "benchmarks.json").write_text(found)


def _write_page(
    found: Sequence[tuple[str, Findings]], machine: Mapping[str, str], directory: Path, plots: str
) -> None:
    (directory / plots).mkdir(parents=True, exist_ok=True)
    (directory / "benchmarks.md").write_text(page(found, machine, plots))
    for _, findings in found:
        for plot in findings.plots:
            (directory / plots / f"{plot.name}.svg").write_text(svg(plot))


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values)))


def _number(value: float) -> str:
    """Return a number with three significant digits and without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}"
