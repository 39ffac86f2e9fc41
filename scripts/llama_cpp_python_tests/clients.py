"""Runs LangChain's ChatLlamaCpp, LlamaIndex's LlamaCPP and the command `llm` with llm-gguf on the drop-in.

    python -m scripts.llama_cpp_python_tests.clients

Needs the environment of `make test-llama-cpp-python`, and the real models. Raises an error if a library does not
work. Prints the replies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import erllama.llama_cpp
from erllama._model.default_cache import default_cache
from scripts.real_models import fetched_models

QUESTION = "What is the capital of France? Answer with one word."


def _langchain(model: str) -> str:
    from langchain_community.chat_models import ChatLlamaCpp
    from langchain_core.messages import HumanMessage

    # LangChain's defaults of RoPE are Llama 2's; 0 stands for the model's own.
    options = {"n_ctx": 1024, "n_batch": 256, "rope_freq_base": 0, "rope_freq_scale": 0}
    chat = ChatLlamaCpp(model_path=model, temperature=0, max_tokens=80, **options)
    whole = chat.invoke([HumanMessage(QUESTION)]).content
    streamed = "".join(str(chunk.content) for chunk in chat.stream([HumanMessage(QUESTION)]))
    if whole != streamed:
        raise AssertionError(f"LangChain's stream differs: {streamed!r}, not {whole!r}")
    tool = {
        "type": "function",
        "function": {
            "name": "get_capital",
            "description": "The capital of a country.",
            "parameters": {
                "type": "object",
                "properties": {"country": {"type": "string"}},
                "required": ["country"],
            },
        },
    }
    choice = {"type": "function", "function": {"name": "get_capital"}}
    calls = chat.bind_tools([tool], tool_choice=choice).invoke([HumanMessage(QUESTION)]).tool_calls
    if [call["name"] for call in calls] != ["get_capital"] or list(calls[0]["args"]) != ["country"]:
        raise AssertionError(f"LangChain read the calls {calls}")
    chat.client.close()
    return f"{whole!r}, calls {calls[0]['name']}({calls[0]['args']})"


def _llamaindex(model: str) -> str:
    from llama_index.llms.llama_cpp import LlamaCPP

    llm = LlamaCPP(model_path=model, temperature=0.0, max_new_tokens=16, context_window=1024, verbose=False)
    whole = llm.complete("The capital of France is").text
    streamed = "".join(str(piece.delta) for piece in llm.stream_complete("The capital of France is"))
    if whole != streamed:
        raise AssertionError(f"LlamaIndex's stream differs: {streamed!r}, not {whole!r}")
    if llm.metadata.context_window != 1024:
        raise AssertionError(f"LlamaIndex has a context of {llm.metadata.context_window} tokens")
    llm._model.close()
    return repr(whole)


def _llm_gguf(model: str) -> str:
    """Run the command, which imports `llama_cpp` through PYTHONPATH."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gguf"
        path.mkdir()
        (path / "models.json").write_text(json.dumps({"smol": {"path": model, "aliases": [], "n_ctx": 1024}}))
        shim = str(Path(erllama.llama_cpp.__file__).parent / "path")
        variables = {
            **os.environ,
            "LLM_USER_PATH": folder,
            "ERLLAMA_CACHE_DIR": f"{folder}/cache",
            "PYTHONPATH": os.pathsep.join(filter(None, [shim, os.environ.get("PYTHONPATH")])),
        }
        command = [str(Path(sys.executable).parent / "llm"), "-m", "gguf/smol", QUESTION]
        finished = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
        if not finished.stdout.strip() or not list(Path(folder, "cache").rglob("index.db")):
            raise AssertionError(f"llm wrote {finished.stdout!r}, {finished.stderr!r}")
        return repr(finished.stdout.strip())


def main() -> int:
    """Run each library and print its reply."""
    erllama.llama_cpp.install()
    model = next(str(path) for path in fetched_models(generate=True) if path.name.startswith("smollm2"))
    runs: dict[str, Callable[[str], str]] = {
        "LangChain ChatLlamaCpp": _langchain,
        "LlamaIndex LlamaCPP": _llamaindex,
        "llm-gguf": _llm_gguf,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ERLLAMA_CACHE_DIR"] = folder
        for name, run in runs.items():
            sys.stdout.write(f"{name}: {run(model)}\n")
            sys.stdout.flush()
        default_cache().close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
