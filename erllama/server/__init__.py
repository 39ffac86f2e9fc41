"""An HTTP server for the APIs of OpenAI, Anthropic, llama-server and Ollama, which agents and other clients use.

    import erllama, erllama.server

    application = erllama.server.app(erllama.load_model("model.gguf", process=True))

`application` is an ASGI application; `erllama serve` runs one with uvicorn. Needs `pip install 'erllama[server]'`.

Imports run one way: application -> APIs -> replies -> endpoints -> state -> pins -> models, options -> conduct.
"""

from __future__ import annotations

from erllama.checks import import_optional

for _module in ("starlette", "uvicorn"):
    import_optional(_module, needed_by=__name__, package=_module, install="'erllama[server]'")

from erllama.server.application import app  # noqa: E402
from erllama.server.conduct.keys import ApiKey  # noqa: E402
from erllama.server.models import ServedModel  # noqa: E402
from erllama.server.settings.options import ServerOptions  # noqa: E402

__all__ = ["ApiKey", "ServedModel", "ServerOptions", "app"]
