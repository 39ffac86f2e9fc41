"""Results of benchmarks: the table, the JSON file that can be read again, and the plots."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama.testing.models import write_gemma3
from support.paths import ROOT

sys.path.append(str(ROOT))

from benchmarks import engines, plots, reading, report
from benchmarks.measure import Figure, Findings, Line, PeerError, Plot, Runs, Setup, Target, in_turn

command = importlib.import_module("benchmarks.__main__")
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


def section(figures: list[Figure], plot_list: list[Plot] | None = None, title: str = "M, Q8_0") -> report.Section:
    found = report.section_of(replace(SETUP, title=title))
    found.scenarios["agents"] = Findings(figures, plot_list or [], ["a peer"], "2026-01-02")
    return found


def test_json_round_trips_and_names_no_local_directory() -> None:
    plot = Plot("p", "title", "x", "y", [Line("a", [(1.0, 2.0)])], log_x=True)
    given = section([figure([1.0, 2.0], [2.0, 2.0], Target("<=", 1.0)), figure([1.0], [3.0]), FAILED], [plot])
    text = report.to_json([given], report.about())
    assert str(Path.home()) not in text
    (again,), machine = report.from_json(text)
    assert machine == report.about()
    assert (again.title, again.setup, [*again.scenarios]) == (given.title, given.setup, ["agents"])
    found, expected = again.findings, given.findings
    assert [each.ratios for each in found.figures] == [each.ratios for each in expected.figures]
    assert [each.met for each in found.figures] == [True, None, None]
    assert report.table(found) == report.table(expected)
    assert [plots.svg(each) for each in found.plots] == [plots.svg(plot)]
    assert found.absent == ["a peer"]
    assert again.scenarios["agents"].measured == "2026-01-02"


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
    sections = [section([figure([1.0], [2.0])], [plot], title) for title in ("One, Q8_0", "Gemma 3 270M, Q4_K_M")]
    report.write(sections, report.about(), tmp_path, "benchmarks")
    page = (tmp_path / "benchmarks.md").read_text()
    assert str(Path.home()) not in page
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["One, Q8_0", "Gemma 3 270M, Q4_K_M"]
    assert re.findall(r"\((benchmarks/.*?)\)", page) == ["benchmarks/p.svg", "benchmarks/p-gemma-3-270m-q4-k-m.svg"]
    assert sorted(path.name for path in (tmp_path / "benchmarks").iterdir()) == [
        "benchmarks.json",
        "p-gemma-3-270m-q4-k-m.svg",
        "p.svg",
    ]
    assert report.read(tmp_path / "benchmarks")[0][1].title == "Gemma 3 270M, Q4_K_M"


def test_new_results_replace_those_of_the_same_model_and_scenario() -> None:
    order = ["one", "agents", "lookup"]
    old = section([figure([1.0], [2.0])])
    old.scenarios["one"] = Findings([figure([5.0], [5.0])])
    old.scenarios["gone"] = Findings([figure([5.0], [5.0])])
    new = section([figure([3.0], [2.0])])
    other = section([figure([4.0], [2.0])], title="")
    merged = report.merge([other, old], [new], order)
    assert [each.title for each in merged] == ["M, Q8_0", report.WITHOUT_MODEL], (
        "scenarios without a model come last"
    )
    assert [*merged[0].scenarios] == ["one", "agents"]
    assert [each.ratio for each in merged[0].findings.figures] == [1.0, 1.5]
    assert report.merge([], [new], order) == [new]
    merged[0].scenarios["one"].measured = "2026-01-05"
    page = report.page(merged, {}, ".")
    assert "model: m.gguf, threads: 2, measured: 2026-01-02 to 2026-01-05" in page
    assert "model: m.gguf, threads: 2, measured: 2026-01-02\n" in report.page([new], {}, ".")


# --- failures of peers ------------------------------------------------------------------------------


FAILED = Figure("x", "a row", "a peer", "s", (1.0, 3.0), Runs(failure="it answered 500:\n| bad | " + "x" * 500))


def test_a_failed_peer_is_a_row_of_the_table_and_of_the_page(tmp_path: Path) -> None:
    assert (FAILED.ratios, FAILED.ratio, FAILED.met) == ([], None, None)
    (row,) = report.table(Findings([FAILED])).splitlines()[2:]
    assert row.startswith("| a row | a peer | - | 2.00 s | failed: it answered 500: \\| bad \\| xxx")
    assert len(row) < 300
    assert row.replace("\\|", "").count("|") == 8
    report.write([section([FAILED, figure([1.0], [2.0])])], report.about(), tmp_path)
    assert "it answered 500" in (tmp_path / "benchmarks.md").read_text()


def test_a_peer_that_fails_is_not_measured_again() -> None:
    calls: list[str] = []

    def theirs() -> float:
        calls.append("b")
        if len(calls) == 2:
            raise PeerError("no UTF-8")
        return 1.0

    ours, peer = in_turn(lambda: 2.0, theirs, 4)
    assert (ours, peer.failure, calls) == ([2.0] * 4, "no UTF-8", ["b", "b"])
    found = Figure("x", "a row", "a peer", "s", ours, peer, Target("<=", 1.0))
    assert (found.failure, found.met) == ("no UTF-8", None)


def test_an_error_of_this_library_ends_the_run() -> None:
    def broken() -> float:
        raise PeerError("raised by the wrong side")

    with pytest.raises(PeerError):
        in_turn(broken, lambda: 1.0, 2)


def test_other_scenarios_run_after_a_peer_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: Setup) -> Findings:
        raise PeerError("llama-server did not start")

    def working(_: Setup) -> Findings:
        return Findings([figure([1.0], [2.0])])

    monkeypatch.setattr(command, "SCENARIOS", {"agents": failing, "one": working})
    for arguments in (["agents", "one"], ["--update", "one"]):
        monkeypatch.setattr(
            sys, "argv", ["benchmarks", "--model", str(tiny_gguf), "--out", str(tmp_path), *arguments]
        )
        assert command.main() == 0
        (found,), _ = report.read(tmp_path)
        assert found.title == "tiny"
        assert [each.failure for each in found.findings.figures] == ["llama-server did not start", ""]
        assert "failed: llama-server did not start" in capsys.readouterr().out


class Answering(BaseHTTPRequestHandler):
    """Answers as the class attribute `answer` says: a status, and a body."""

    answer = (200, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, b"does not match the expected Content-only format"), "answered 500: does not match"),
        ((200, b'data: {"error": {"code": 500}}\n\n'), "llama-server failed: {'error'"),
        ((200, b'data: {"tokens_predicted": 1}\n\n'), "ended a reply without its timings"),
        ((200, b""), "ended a reply without its timings"),
    ],
)
def test_an_error_of_llama_server_is_a_failure_of_the_peer(answer: tuple[int, bytes], message: str) -> None:
    server = object.__new__(engines.Server)
    server._forbidden = []
    with HTTPServer(("127.0.0.1", 0), type("Handler", (Answering,), {"answer": answer})) as peer:
        server.port = peer.server_port
        threading.Thread(target=peer.serve_forever, daemon=True).start()
        with pytest.raises(PeerError, match=re.escape(message)):
            engines.ask_together(server, [[1], [2]], 1)
        peer.shutdown()
    with pytest.raises(PeerError, match="the connection to llama-server failed"):
        engines.ask(server, [1], 1)


# --- models ----------------------------------------------------------------------------------------


def test_prompts_of_a_real_model_are_text(tiny_gguf: Path) -> None:
    with erllama.load_model(tiny_gguf, vocab_only=True) as model:
        real = engines.Prompts(replace(SETUP, model=tiny_gguf, real=True))
        first, second = real.of(200), real.of(200)
        assert len(first) == len(second) == 200
        assert first != second
        assert sum(character.isascii() for character in model.detokenize(first)) > 190
        assert engines.Prompts(replace(SETUP, model=tiny_gguf)).of(50) == engines.Prompts().of(50)


def test_a_windowed_model_may_resume_at_the_end_of_a_block(tmp_path: Path) -> None:
    path = write_gemma3(tmp_path / "window.gguf")
    prompt = np.random.default_rng(1).integers(5, 250, 2 * reading.BLOCK).tolist()
    with erllama.Cache() as cache, erllama.load_model(path, cache=cache, n_ctx=1024, n_threads=1) as model:
        reading._ask(model, prompt, None)
        model.evict()
        assert reading._ask(model, prompt, "ram").cache.tokens >= reading.BLOCK
        with pytest.raises(SystemExit, match="expected a prompt of 512 tokens from ram"):
            reading._ask(model, [*prompt[:9], 3, *prompt[10:]], "ram")


def test_models_are_chosen_by_shape_and_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = [tmp_path / "gemma-3-270m-q4_k_m.gguf"]
    fetched[0].touch()
    mine = tmp_path / "mine.gguf"
    mine.touch()
    monkeypatch.setattr(command, "fetched_models", lambda generate: fetched)
    gemma = "Gemma 3 270M, Q4_K_M"
    for arguments, expected in {
        "": ["135M-shaped, Q8_0", gemma],
        "--quick": ["Tiny-shaped, Q8_0"],
        "--real": [gemma],
        "--shape 1.1b --shape 135m": ["1.1B-shaped, Q4_0", "135M-shaped, Q8_0"],
        f"--shape 135m --real --model {mine}": ["135M-shaped, Q8_0", "mine", gemma],
    }.items():
        options = command._parser().parse_args(arguments.split())
        assert [subject.title for subject in command._subjects(options)] == expected


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
    (found,), _ = report.read(tmp_path)
    assert found.findings.figures
    assert all(value > 0 for each in found.findings.figures for value in each.ratios)
