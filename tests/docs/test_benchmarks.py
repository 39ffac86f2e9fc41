"""Results of benchmarks: the table, the JSON file that can be read again, and the plots."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

sys.path.append(str(ROOT))

from benchmarks import plots, report
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, in_turn

SETUP = Setup(Path.home() / "models" / "m.gguf", 2, 3)


def figure(ours: list[float], theirs: list[float], target: Target | None = None) -> Figure:
    return Figure(
        "x", "what | it is", "a peer", "s", ours, theirs, target, (f"run {Path.home()}/m.gguf",), ("note",)
    )


def test_a_ratio_is_the_median_of_the_runs_ratios() -> None:
    found = figure([1.0, 9.0, 4.0], [2.0, 3.0, 4.0])
    assert (found.ratios, found.ratio, found.met) == ([0.5, 3.0, 1.0], 1.0, None)
    assert figure([1.0], [2.0], Target("<=", 0.5)).met is True
    assert figure([1.0], [2.0], Target(">=", 0.51)).met is False


def test_the_order_alternates_between_runs() -> None:
    order: list[str] = []
    ours, theirs = in_turn(lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0, 3)  # type: ignore[func-returns-value]
    assert "".join(order) in ("abbaab", "baabba")
    assert (ours, theirs) == ([1.0] * 3, [2.0] * 3)


def test_json_round_trips_and_names_no_local_directory() -> None:
    plot = Plot("p", "title", "x", "y", [Line("a", [(1.0, 2.0)])], log_x=True)
    findings = Findings(
        [figure([1.0, 2.0], [2.0, 2.0], Target("<=", 1.0)), figure([1.0], [3.0])], [plot], ["a peer"]
    )
    text = report.to_json(findings, SETUP, report.about())
    assert str(Path.home()) not in text
    again, machine = report.from_json(text)
    assert machine == report.about()
    assert [each.ratios for each in again.figures] == [each.ratios for each in findings.figures]
    assert [each.met for each in again.figures] == [True, None]
    assert report.table(again) == report.table(findings)
    assert [plots.svg(each) for each in again.plots] == [plots.svg(plot)]
    assert again.absent == ["a peer"]


def test_directories_are_left_out_of_commands() -> None:
    given = f"{ROOT}/scripts/run --model /srv/models/m.gguf --port 1/2 'a/b' {Path.home()}/x/server tokens/s"
    assert report.anonymous(given) == "run --model m.gguf --port 1/2 'a/b' server tokens/s"


def test_the_table_has_a_line_for_each_figure() -> None:
    findings = Findings([figure([1.0, 2.0], [2.0, 2.0], Target(">=", 1.0)), figure([0.000123], [1.0])])
    lines = report.table(findings).splitlines()
    assert len(lines) == 4
    assert "0.750" in lines[2]
    assert "| no |" in lines[2]
    assert "0.000123" in lines[3]
    assert all(line.replace("\\|", "").count("|") == 8 for line in lines)


def test_a_page_and_its_plots_are_written(tmp_path: Path) -> None:
    plot = Plot("p", "a plot", "x", "y", [Line("a", [(1.0, 2.0), (2.0, 3.0)])])
    report.write(Findings([figure([1.0], [2.0])], [plot], ["absent"]), SETUP, tmp_path / "out", tmp_path / "docs")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "(benchmarks/p.svg)" in page
    assert str(Path.home()) not in page
    assert (tmp_path / "docs" / "benchmarks" / "p.svg").is_file()
    assert (tmp_path / "out" / "benchmarks.json").is_file()


def test_an_unknown_scenario_is_refused_with_the_list_of_scenarios() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "agnets"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "unknown scenario 'agnets'" in finished.stderr
    assert "agents" in finished.stderr


@pytest.mark.parametrize("scenario", ["lookup", "restart", "turns", "memory", "outside", "startup"])
def test_scenarios_without_peers_run(tmp_path: Path, scenario: str) -> None:
    # One thread: several threads would spin while they wait for one another, and slow down other processes.
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--out", str(tmp_path), scenario]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    findings, _ = report.from_json((tmp_path / "benchmarks.json").read_text())
    assert findings.figures
    assert all(value > 0 for each in findings.figures for value in each.ratios)
