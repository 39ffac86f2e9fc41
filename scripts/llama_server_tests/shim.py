"""Starts a server with llama-server's arguments: llama-server itself, or ours.

    python -m scripts.llama_server_tests.shim --port 8080 --hf-repo ggml-org/test-model-stories260K ...

Names of models become stand-ins. Environment:

    LLAMA_SERVER_MODELS  folder of the stand-ins
    LLAMA_SERVER_PEER    path of llama-server, to start that one; empty for ours
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.llama_server_tests.stand_ins import stand_in

_MODEL_OPTIONS = ("--model", "--hf-repo", "--hf-file", "--model-url")


def main(arguments: Sequence[str]) -> None:
    """Start the server, and return when it has ended."""
    folder = Path(os.environ["LLAMA_SERVER_MODELS"])
    parsed, _ = _parser().parse_known_args(arguments)
    name = "/".join(str(each) for each in (parsed.hf_repo, parsed.hf_file, parsed.model) if each)
    model = stand_in(name, folder) if name else None
    peer = os.environ.get("LLAMA_SERVER_PEER", "")
    if peer:
        _run_peer(peer, arguments, model)
    else:
        _run_ours(parsed, model or stand_in("", folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--host", "--alias", "--api-key", "--pooling", "--chat-template", "--chat-template-file"):
        parser.add_argument(name)
    for name in ("--model", "--hf-repo", "--hf-file", "--model-url", "--reasoning", "--cors-origins"):
        parser.add_argument(name)
    for name in ("--port", "--seed", "--ctx-size", "--parallel", "--n-predict", "--batch-size", "--ubatch-size"):
        parser.add_argument(name, type=int)
    parser.add_argument("--temp", type=float)
    for name in ("--metrics", "--slots", "--kv-unified", "--embedding", "--reranking"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--lora", action="append", default=[])
    return parser


def _run_peer(peer: str, arguments: Sequence[str], model: Path | None) -> None:
    """Replace this process by llama-server, with the stand-in as its model."""
    given, skip = [], False
    for argument in arguments:
        if skip or argument == "--offline":
            skip = False
        elif argument in _MODEL_OPTIONS:
            skip = True
        else:
            given.append(argument)
    if model is not None:
        given += ["--model", str(model)]
    given += ["--threads", "1"]  # as ours
    os.execv(peer, [peer, *given])


def _run_ours(parsed: argparse.Namespace, path: Path) -> None:
    import uvicorn

    import erllama
    import erllama.server

    n_slots = parsed.parallel or 4
    n_ctx = parsed.ctx_size
    if n_ctx and not parsed.kv_unified:
        n_ctx //= n_slots  # llama-server gives each slot a part of the context; here all requests share it
    names = sorted((parsed.alias or "model").split(","))
    model = erllama.load_model(
        path,
        id=names[0],
        n_ctx=n_ctx,
        n_seq_max=n_slots,
        n_batch=parsed.batch_size or 2048,
        n_ubatch=parsed.ubatch_size or min(parsed.batch_size or 512, 512),
        n_threads=1,
    )
    for file in parsed.lora:
        model.load_adapter(file)
    served = erllama.server.ServedModel(
        model,
        aliases=(*names[1:], "*"),
        defaults=_defaults(parsed),
        pooling=parsed.pooling if parsed.embedding else None,
        file=path.name,
    )
    options: dict[str, object] = {"slots": parsed.slots, "metrics": parsed.metrics}
    if parsed.api_key:
        options["keys"] = (erllama.server.ApiKey(secret=parsed.api_key),)
    if parsed.cors_origins:
        options["cors_origins"] = tuple(parsed.cors_origins.split(","))
    application = erllama.server.app(served, **options)
    uvicorn.run(
        application,
        host=parsed.host or "127.0.0.1",
        port=parsed.port or 8080,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    model.unload()


def _defaults(parsed: argparse.Namespace) -> dict[str, object]:
    """Return the options of requests that the arguments set."""
    defaults: dict[str, object] = {}
    if parsed.temp is not None:
        defaults["temperature"] = parsed.temp
    if parsed.seed is not None and parsed.seed >= 0:
        defaults["seed"] = parsed.seed
    if parsed.n_predict is not None and parsed.n_predict >= 0:
        defaults["max_tokens"] = parsed.n_predict
    if parsed.chat_template_file:
        defaults["chat_template"] = Path(parsed.chat_template_file).read_text()
    elif parsed.chat_template and parsed.chat_template != "chatml":  # ours without a template in the file
        defaults["chat_template"] = _as_template(parsed.chat_template)
    if parsed.reasoning in ("on", "off"):
        defaults["thinking"] = parsed.reasoning == "on"
    return defaults


def _as_template(text: str) -> str:
    """Return a template's text, with a comment by which ours distinguishes it from the name of a template."""
    return text if "{" in text or " " not in text else text + "{# a template #}"


if __name__ == "__main__":
    main(sys.argv[1:])
