"""Sessions that clients suggest: one request at a time has a session, which is free again when it ends."""

from __future__ import annotations

from starlette.requests import Request

from erllama import Model
from erllama.server import ServedModel, ServerOptions
from erllama.server.application import make_server
from erllama.server.endpoints import Call, CallRecord
from erllama.server.replies.openai_errors import ERRORS
from erllama.server.replies.sessions import SessionHint
from support.chat.scripted_model import model_replying


def call_to(model: Model) -> Call:
    server = make_server(model, ServerOptions())
    return Call(Request({"type": "http"}), server, None, CallRecord("1", "/"), ERRORS)


def test_one_request_at_a_time_has_a_session() -> None:
    with model_replying("x") as model:
        call, served = call_to(model), ServedModel(model)
        first = SessionHint.claim(call, served, "k", None)
        assert first is not None
        assert SessionHint.claim(call, served, "k", None) is None
        for salt, name in (("salt", "k"), (None, "other")):
            assert SessionHint.claim(call, served, name, salt) is not None
        first.release()
        assert SessionHint.claim(call, served, "k", None) is not None


def test_a_request_that_is_dropped_releases_its_session() -> None:
    with model_replying("x") as model:
        call, served = call_to(model), ServedModel(model)
        dropped = SessionHint.claim(call, served, "k", None)
        del dropped
        assert call.server.claimed_sessions == set()
