"""Tables of the pages that could become outdated: options and defaults, calls, examples, the API reference."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import erllama
import erllama.cache
import erllama.engine
import erllama.testing
from erllama._model.requests.options import (
    ChatOptions,
    CompletionOptions,
    PinOptions,
    PrefillOptions,
    TemplateOptions,
)
from erllama.chat.request import ChatRequest
from erllama.engine import PhaseOptions, RequestOptions, SamplingOptions
from support.doc_pages import DOCS, tables
from support.paths import ROOT

# --- configuration ---------------------------------------------------------------------------------

CONFIGURATION = tables("docs/configuration.md")


def keywords(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def defaults(kind: type) -> dict[str, object]:
    """Return the defaults of a dataclass."""
    found = {}
    for field in fields(kind):
        made = field.default_factory
        found[field.name] = field.default if made is MISSING else made()
    return found


def of_requests() -> dict[str, object]:
    """Return the defaults of all request options, from every class of the engine that holds some."""
    phases = defaults(PhaseOptions)
    return {
        **defaults(RequestOptions),
        **defaults(SamplingOptions),
        "json_schema": None,
        "regex": None,
        "thinking": defaults(ChatRequest)["thinking"],
        "thinking_markers": phases["thinking"],
        "thinking_budget_tokens": phases["thinking_budget"],
        "thinking_budget_message": phases["budget_message"],
        "thinking_signing_key": phases["signing_key"],
        "tool_markers": phases["calls"],
        "tool_payload_markers": phases["payload"],
    }


def chosen(options: type, inherited: type | None = None) -> dict[str, object]:
    """Return the options that a TypedDict adds to its base, with their defaults."""
    old = set(inherited.__annotations__) if inherited else set()
    known = {**defaults(ChatRequest), **of_requests()}
    return {name: known[name] for name in options.__annotations__ if name not in old}


OPTIONS: Mapping[str, dict[str, object]] = {
    "load_model": keywords(erllama.load_model),
    "load_backend": keywords(erllama.load_backend),
    "Cache": keywords(erllama.Cache),
    "Policy": defaults(erllama.Policy),
    "Pressure": {**defaults(erllama.Pressure), "min_evict_bytes": "64MiB"},
    "Model.prefill": chosen(PrefillOptions),
    "Model.complete": chosen(CompletionOptions, PrefillOptions),
    "Model.chat": chosen(ChatOptions, CompletionOptions),
    "Model.pin": dict.fromkeys(PinOptions.__annotations__.keys() - TemplateOptions.__annotations__.keys()),
}


def literal(cell: str) -> object:
    quoted = re.fullmatch(r"`(.*)`", cell)
    assert quoted, cell
    return ast.literal_eval(quoted[1])


def name_of(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize("heading", OPTIONS)
def test_every_option_has_its_row_with_its_default(heading: str) -> None:
    rows = CONFIGURATION[heading]
    assert {name_of(row[0]): literal(row[1]) for row in rows} == OPTIONS[heading]
    for name, default, unit, _ in rows:
        assert unit or heading == "load_backend" or isinstance(literal(default), bool), f"{name} has no unit"


def test_options_of_other_methods_have_their_defaults() -> None:
    found = set()
    for row in CONFIGURATION["Other methods"]:
        named = re.fullmatch(r"`(\w+)\.(\w+)\((\w+)=\)`", row[0])
        assert named, row[0]
        owner, method, option = named.groups()
        parameters = inspect.signature(getattr(getattr(erllama, owner), method)).parameters
        assert parameters[option].default == literal(row[1]), row[0]
        found.add((method, option))
    for method, function in inspect.getmembers(erllama.Model, inspect.isfunction):
        if not method.startswith("_") and not inspect.iscoroutinefunction(function):
            for option in keywords(function):
                # `apply_chat_template` has one request option besides its own.
                assert (method, option) in found or option == "cache_salt", f"{method}({option}=) has no row"


def test_tables_of_other_pages_have_the_same_defaults() -> None:
    """A page that explains options may repeat their defaults, and they must be equal."""
    everything: dict[str, list[object]] = {}
    for options in OPTIONS.values():
        for name, default in options.items():
            everything.setdefault(name, []).append(default)
    n_checked = 0
    for page in ("docs/caching.md", "docs/memory-pressure.md"):
        for rows in tables(page).values():
            for row in rows:
                name = name_of(row[0])
                if name in everything and re.fullmatch(r"`.*`", row[1]):
                    assert literal(row[1]) in everything[name], (page, name)
                    n_checked += 1
    assert n_checked >= 20


def test_the_environment_is_what_the_build_reads() -> None:
    listed = {name_of(row[0]) for row in CONFIGURATION["Environment"]}
    sources = (ROOT / "setup.py").read_text() + (ROOT / "scripts" / "build_llama.sh").read_text()
    assert set(re.findall(r"\b(?:ERLLAMA_[A-Z_]+|LLAMA_CPP_DIR)\b", sources)) == listed
    for source in (ROOT / folder for folder in ("erllama", "engine", "cache", "llama_ffi")):
        for path in source.rglob("*.py"):
            # Of the tests below, and of the drop-in for llama-cpp-python.
            if path.name not in ("key_files.py", "service_manager.py", "default_cache.py", "environment.py"):
                assert "os.environ" not in path.read_text(), f"{path}: document it in docs/configuration.md"


def test_the_variables_of_the_stores_of_models_are_listed() -> None:
    from erllama.models.stores.environment import VARIABLES

    page = (DOCS / "models.md").read_text()
    assert [name for name in VARIABLES[:-1] if f"`{name}`" not in page] == []


def test_the_variable_for_a_key_of_the_server_is_listed() -> None:
    from erllama.server.conduct.key_files import VARIABLE

    for page in ("configuration.md", "cli.md", "server/running.md"):
        assert f"`{VARIABLE}`" in (DOCS / page).read_text()


def test_the_variable_of_the_service_manager_is_listed() -> None:
    from erllama.server.service_manager import VARIABLE

    assert f"`{VARIABLE}`" in (DOCS / "configuration.md").read_text()


def test_the_options_of_the_server_have_their_defaults() -> None:
    from erllama.server.settings.listening import ListenOptions
    from erllama.server.settings.options import ServerOptions

    options = {**defaults(ServerOptions), **defaults(ListenOptions), "access_log": "stderr", "model_dirs": ()}
    del options["keys"]
    rows = tables("docs/server/running.md")["Options"]
    assert {name_of(row[0]): literal(row[1]) for row in rows} == options


def test_the_configuration_file_of_the_page_is_valid(tmp_path: Path, tiny_gguf: Path) -> None:
    from erllama.server.settings.configuration import read_configuration
    from support.doc_pages import blocks

    (block,) = blocks("docs/server/running.md", "toml")
    (tmp_path / "erllama.toml").write_text(block.text)
    (tmp_path / "keys-of-the-team").write_text("one\n")
    (tmp_path / "keys-of-the-team").chmod(0o600)
    (tmp_path / "models").mkdir()
    for name in ("chat", "embeddings"):
        (tmp_path / "models" / f"{name}.gguf").symlink_to(tiny_gguf)
    found = read_configuration(tmp_path / "erllama.toml", {"AGENT_KEY": "k"})
    assert found.mistakes == ()
    assert [model.name for model in found.models] == ["chat", None]
    assert [key.name for key in found.keys] == ["agent", "keys-of-the-team:1"]


def test_the_metrics_of_the_server_are_listed() -> None:
    from prometheus_client import generate_latest

    from erllama.server.conduct.metrics import ServerMetrics

    text = generate_latest(ServerMetrics(list, lambda: 1).registry).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    of_server = ("vllm:", "erllama_http", "erllama_prefix", "erllama_reloads", "erllama_model_", "erllama_memory")
    expected = {name: kind for name, kind in kinds.items() if name.startswith(of_server)}
    expected["erllama_request_errors_total"] = "counter"
    rows = tables("docs/server/running.md")["Metrics"]
    assert {name_of(row[0]): row[1] for row in rows} == expected


# --- from Erlang to Python ------------------------------------------------------------------------

# The exports of the Erlang façade, and other calls of its guide.
FACADE = """
load_model/1 load_model/2 unload/1 unload_model/1 complete/2 complete/3 infer/4 cancel/1 status/1 evict/1 shutdown/1
models/0 list_models/0 model_info/1 tokenize/2 detokenize/2 apply_chat_template/2 embed/2 load_adapter/2
unload_adapter/2 set_adapter_scale/3 list_adapters/1 counters/0
prefill_only/2 phase/1 pending_len/1 queue_depth/1 queue_depth/0 last_cache_hit/1
"""
CACHE = """
erllama_cache_disk_srv:start_link/2 erllama_cache_disk_srv:save/3 erllama_cache_disk_srv:load/2
erllama_cache:get_counters/0 erllama_cache:evict_bytes/2 erllama_cache:gc/0
erllama_cache_meta_srv:start_link/0 erllama_cache_meta_srv:dump/0 erllama_cache_ram:start_link/0
"""
OTHERS = """
erllama_token erllama_done erllama_error erllama_thinking_end thinking_delta cancelled response_tokens parent_key
stop_sequences stop_sequence grammar thinking temperature seed reply finish_key finish_reason cache_hit_kind
committed_tokens model_path backend fingerprint fingerprint_mode quant_type quant_bits ctx_params_hash context_size
tier tier_srv policy n_ctx n_batch n_seq_max prefill_chunk_size min_tokens boundary_align_tokens interval_ms
high_watermark low_watermark evict_tiers pressure_source erllama_pressure evict_save_timeout_ms
"""
ROWS = [row for rows in tables("docs/erlang.md").values() for row in rows]


def test_every_erlang_call_has_its_row() -> None:
    listed = " ".join(row[0] for row in ROWS)
    calls = {f"erllama:{call}" for call in FACADE.split()} | set(CACHE.split())
    assert calls <= set(re.findall(r"`(\w+:\w+/\d)`", listed))
    assert set(OTHERS.split()) <= set(re.findall(r"\w+", listed))


def test_the_python_equivalents_of_calls_exist() -> None:
    n_found = 0
    options = {name for of in OPTIONS.values() for name in of}
    for row in ROWS:
        for code in re.findall(r"`([^`]+)`", " ".join(row[1:])):
            for name in re.findall(r"\b(?:erllama|cache|[A-Z]\w+)(?:\.\w+)+", code):
                resolve(name)
                n_found += 1
            for option in re.findall(r"(?<![\w.])(\w+)=", code):
                assert option in {*options, "id", "tiers", "n"}, code
    assert n_found > 70


def resolve(name: str) -> object:
    """Resolve a dotted name of the page. Fields of values count, too."""
    parts = name.split(".")
    found: object = erllama
    for part in parts[1:] if parts[0] == "erllama" else parts:
        if isinstance(found, type) and not hasattr(found, part):
            assert part in get_annotations(found), name
            return None
        found = getattr(found, part, None)
        assert found is not None or part == parts[-1], name
    return found


def get_annotations(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


# --- the API reference, and the examples -------------------------------------------------------------


def documented() -> set[str]:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))


@pytest.mark.parametrize("package", [erllama, erllama.cache, erllama.engine, erllama.models, erllama.testing])
def test_every_public_name_is_in_the_reference(package: ModuleType) -> None:
    """A name that several packages export is documented once."""
    for name in package.__all__:
        places = {f"{home}.{name}" for home in ("erllama", "erllama.cache", package.__name__)}
        assert places & documented() or name == "__version__", name


def test_everything_in_the_reference_is_public() -> None:
    modules = {"erllama.cache.kvc", "erllama.metrics", "erllama.testing.models", "erllama.testing.scripted"}
    for name in documented() - modules:
        home, _, last = name.rpartition(".")
        assert last in import_module(home).__all__, name


def test_every_public_name_has_a_docstring() -> None:
    for public in erllama.__all__:
        found = getattr(erllama, public)
        if not inspect.isclass(found) and not inspect.isfunction(found):
            continue
        assert found.__doc__, public
        for name, member in vars(found).items() if inspect.isclass(found) else ():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(getattr(found, name)), f"{public}.{name}"


def test_every_example_is_listed_by_its_number() -> None:
    rows = tables("docs/examples.md")["Examples"]
    listed = [name for row in rows for name in re.findall(r"examples/(\w+\.py)\)", row[2])]
    assert sorted(listed) == sorted(path.name for path in Path(ROOT / "examples").glob("[!_]*.py"))
    assert [row[0] for row in rows if row[0]] == [str(n) for n in range(19)]


# --- figures that sentences quote ---------------------------------------------------------------------


def ratio(shape: str, what: str, against: str) -> float:
    """Return the ratio of a row of docs/benchmarks.md, from the table of a model shape."""
    ((*_, found),) = (
        row[2:3]
        for heading, rows in tables("docs/benchmarks.md").items()
        for row in rows
        if heading.startswith(shape) and row[0].startswith(what) and row[1].startswith(against)
    )
    return float(re.findall(r"\*\*([\d.]+)\*\*", found)[0])


def test_figures_in_sentences_match_the_measured_table() -> None:
    pages = (ROOT / "README.md", DOCS / "comparison.md", DOCS / "serving.md")
    readme, comparison, serving = (" ".join(page.read_text().split()) for page in pages)
    small, large = (ratio(shape, "one stream, decode", "llama-bench") for shape in ("135M", "1.1B"))
    assert f"{small:.2f} of llama-bench's speed with a 135M model, {large:.2f} with a 1.1B one" in readme
    assert f"{small:.2f} of `llama-bench`'s speed in decoding (on the 1.1B shape {large:.2f})" in serving
    assert f"one stream of a small model, by {1 - small:.0%}".replace("%", " %") in comparison
    assert 0.15 < ratio("135M", "8 agents", "llama-server") < 0.25
    assert "a fifth of llama-server's time" in readme
    assert "a fifth of llama-server's time" in comparison
    turns = ratio("135M", "10 conversations in turn", "llama-server")
    assert f"within {abs(turns - 1):.0%}".replace("%", " %") in comparison
    assert f"1/{ratio('135M', 'a prompt of 2048 tokens after a restart', 'its cold'):.0f} of the time" in comparison
    assert ratio("135M", "4 conversations in turn", "llama-cpp-python") < 0.5
    assert "less than half of the time that llama-cpp-python took" in comparison
