"""Who may use a server, and how much: keys, limits, hosts, origins, sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import httpx
import pytest

import erllama
from erllama.cache import Cache
from erllama.errors import OptionError
from erllama.server import ApiKey, ServedModel
from erllama.server.conduct.errors import ApiError
from erllama.server.conduct.hosts import HostCheck
from erllama.server.conduct.rate_limits import RateLimits
from erllama.server.settings.listening import ListenOptions
from support.engine_models import GatedBackend
from support.http_server import CHAT, RunningServer, chat_body, read_until, request_bytes, running
from support.threads import wait_until

LONG = "the same words in every request " * 20


@pytest.fixture(scope="module")
def model() -> Iterator[erllama.Model]:
    with Cache(block_size=32) as cache, erllama.load_backend(GatedBackend(), id="stub", cache=cache) as model:
        yield model


@pytest.fixture(scope="module")
def plain(model: erllama.Model) -> Iterator[RunningServer]:
    with running(model, max_body_bytes=20000) as server:
        yield server


# --- keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic right"}, 401),
        ({"authorization": "Bearer right"}, 200),
        ({"authorization": "bearer  right"}, 200),
        ({"x-api-key": "right"}, 200),
        ({"x-api-key": "righ"}, 401),
        ({"x-api-key": "right\u00e9".encode("latin-1").decode("latin-1")}, 401),
    ],
)
def test_a_key_is_a_bearer_token_or_an_x_api_key(
    model: erllama.Model, headers: Mapping[str, str], status: int
) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with running(model, keys=(ApiKey(secret="right"), ApiKey(secret="other"))) as server:
        answer = httpx.post(server.url + CHAT, json=chat_body(max_tokens=1), headers=encoded, timeout=60)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_keys_with_salts_share_no_cached_kv(model: erllama.Model) -> None:
    keys = (ApiKey(secret="a", cache_salt="A"), ApiKey(secret="b", cache_salt="B"), ApiKey(secret="c"))

    def cached(server: RunningServer, key: str) -> int:
        answer = server.post(chat_body(LONG, max_tokens=1), headers={"x-api-key": key}).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    with running(model, keys=keys) as server:
        for key in "abc":
            assert cached(server, key) < 100  # the start of a chat, which requests without a salt share
            assert cached(server, key) > 500


def test_a_salt_in_the_body_does_not_leave_the_salt_of_the_key(model: erllama.Model) -> None:
    keys = (ApiKey(secret="a", cache_salt="A2"), ApiKey(secret="b", cache_salt="B2"))
    prompt = "salted " + LONG
    with running(model, keys=keys) as server:
        server.post(chat_body(prompt, max_tokens=1), headers={"x-api-key": "a"})
        for salt in ("A2", "2:A2", ""):
            answer = server.post(chat_body(prompt, max_tokens=1, cache_salt=salt), headers={"x-api-key": "b"})
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_key_uses_its_models_alone(model: erllama.Model) -> None:
    with Cache() as cache, erllama.load_backend(GatedBackend(), id="second", cache=cache) as second:
        keys = (ApiKey(secret="one", models=("second",)), ApiKey(secret="all"))
        with running([model, second], keys=keys) as server:

            def status(name: str, key: str) -> int:
                return server.post(chat_body(model=name, max_tokens=1), headers={"x-api-key": key}).status_code

            assert status("second", "one") == status("second", "all") == status("stub", "all") == 200
            assert status("stub", "one") == 403
            assert httpx.get(f"{server.url}/metrics", headers={"x-api-key": "one"}, timeout=120).status_code == 403


def test_a_name_for_all_others_shows_no_model_that_a_key_may_not_use(model: erllama.Model) -> None:
    with Cache() as cache, erllama.load_backend(GatedBackend(), id="second", cache=cache) as second:
        keys = (ApiKey(secret="one", models=("second",)), ApiKey(secret="none", models=()))
        with running([ServedModel(model, aliases=("*",)), second], keys=keys) as server:
            for key, name in (("one", "anything"), ("none", "anything"), ("none", "")):
                answer = server.post(chat_body(model=name, max_tokens=1), headers={"x-api-key": key})
                assert answer.status_code == 404
                assert "stub" not in answer.text


def test_a_key_for_a_model_that_is_not_served_is_an_error(model: erllama.Model) -> None:
    with pytest.raises(OptionError, match="'k' has the model 'gone'; the server has stub"):
        erllama.server.app(model, keys=(ApiKey(secret="s", name="k", models=("gone",)),))


def test_requests_over_the_limit_of_their_key_wait(model: erllama.Model) -> None:
    keys = (ApiKey(secret="few", requests_per_minute=2), ApiKey(secret="many"))
    with running(model, keys=keys) as server:
        answers = [server.post(chat_body(max_tokens=1), headers={"x-api-key": "few"}) for _ in range(3)]
        other = server.post(chat_body(max_tokens=1), headers={"x-api-key": "many"})
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "requests_per_minute"
    assert other.status_code == 200


def test_limits_refill_with_time() -> None:
    now = 0.0
    limits, key = RateLimits(lambda: now), ApiKey(secret="k", requests_per_minute=60, tokens_per_minute=600)
    for _ in range(60):
        limits.admit(key)
    with pytest.raises(ApiError, match="60 requests a minute; try again in 1 seconds"):
        limits.admit(key)
    now = 1.0
    limits.admit(key)
    limits.charge(key, 700)
    now = 2.0
    with pytest.raises(ApiError, match="600 tokens a minute") as refused:
        limits.admit(key)
    now += refused.value.retry_after or 0
    limits.admit(key)


# --- hosts and origins -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8080", 200),
        ("localhost.", 200),
        ("127.0.0.1:9", 200),
        ("[::1]", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7:8080", 200),
        ("evil.example", 421),
        ("evil.example:8080", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1@evil.example", 421),
        ("[::1].evil.example", 421),
        ("[evil.example]", 421),
        ("models.example", 200),
        ("MODELS.example:1", 200),
    ],
)
def test_the_host_header_names_this_machine(model: erllama.Model, host: str, status: int) -> None:
    with running(model, allowed_hosts=("models.example",)) as server:
        client = server.send(chat_body(max_tokens=1), headers={"host": host})
        assert int(read_until(client, b"\r\n").split()[1]) == status
        client.close()


def test_a_refused_host_is_an_error_in_the_form_of_the_api(model: erllama.Model) -> None:
    with running(model) as server:

        def ask(path: str, **headers: str) -> httpx.Response:
            return httpx.post(
                f"{server.url}{path}", json={}, headers={"host": "evil.example", **headers}, timeout=120
            )

        openai, ollama = ask("/v1/chat/completions"), ask("/api/chat")
        anthropic = ask("/v1/messages", **{"anthropic-version": "2023-06-01"})
    assert [each.status_code for each in (openai, ollama, anthropic)] == [421] * 3
    assert "--allowed-host" in openai.json()["error"]["message"]
    assert "--allowed-host" in ollama.json()["error"]
    assert anthropic.json()["type"] == "error"
    assert "--allowed-host" in anthropic.json()["error"]["message"]


def test_any_host_is_accepted_if_that_is_allowed() -> None:
    check = HostCheck(None, ("*",), (), None)  # type: ignore[arg-type]
    assert check._is_allowed("evil.example")


@pytest.mark.parametrize("allowed", [(), ("https://app.example",), ("*",)])
def test_pages_of_other_origins_are_refused_unless_allowed(model: erllama.Model, allowed: tuple[str, ...]) -> None:
    with running(model, cors_origins=allowed) as server:

        def ask(origin: str) -> httpx.Response:
            return server.post(chat_body(max_tokens=1), headers={"origin": origin})

        own = ask(server.url)
        assert own.status_code == 200
        app = ask("https://app.example")
        assert app.status_code == (200 if allowed else 403)
        assert ("access-control-allow-origin" in app.headers) == bool(allowed)
        assert ask("https://evil.example").status_code == (200 if allowed == ("*",) else 403)
        assert ask("null").status_code == (200 if allowed == ("*",) else 403)


def test_a_preflight_of_an_allowed_origin_is_answered(model: erllama.Model) -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with running(model, cors_origins=("https://app.example",)) as server:
        answer = httpx.options(server.url + CHAT, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx.options(server.url + CHAT, headers={**asked, "origin": "https://evil.example"})
        assert refused.status_code == 403


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_other_addresses_than_loopback_need_a_key(host: str, is_loopback: bool) -> None:
    options = ListenOptions(host=host)
    assert options.is_loopback == is_loopback
    options.check_keys(has_keys=True)
    ListenOptions(host=host, insecure=True).check_keys(has_keys=False)
    if not is_loopback:
        with pytest.raises(OptionError, match="--api-key-file"):
            options.check_keys(has_keys=False)


# --- bodies and connections ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "empty"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "not JSON"),
        (b"[]", 400, "object"),
        (b"null", 400, "object"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages is empty"),
        (b'{"messages": [{"content": "no role"}]}', 400, "messages[0].role"),
        (b'{"messages": [{"role": "user", "content": 1}]}', 400, "content"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}', 400, "top_p"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "nested"),
        (b'{"messages": "' + b"x" * 20000 + b'"}', 413, "20,000"),
    ],
)
def test_wrong_bodies_are_refused_with_the_reason(
    plain: RunningServer, body: bytes, status: int, text: str
) -> None:
    answer = plain.post(body)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"], answer.text


def test_a_wrong_field_is_named_by_its_path(plain: RunningServer) -> None:
    body = chat_body(stream_options={"include_usage": "yes"})
    error = plain.post(body).json()["error"]
    assert error["param"] == "stream_options.include_usage"
    assert error["type"] == "invalid_request_error"


def test_a_body_without_a_length_is_limited_as_it_arrives(plain: RunningServer) -> None:
    client = plain.connect()
    client.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    client.sendall(b"4e20\r\n" + b" " * 20000 + b"\r\n" + b"4e20\r\n" + b" " * 20000 + b"\r\n")
    assert b" 413 " in read_until(client, b"\r\n")
    client.close()


def test_a_body_that_does_not_arrive_is_a_timeout(model: erllama.Model) -> None:
    with running(model, body_timeout=0.1) as server:
        client = server.connect()
        client.sendall(request_bytes(chat_body())[:-3])
        answer = read_until(client, b"send it faster")
        assert b" 408 " in answer
        client.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat/comp", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: "])
def test_headers_that_do_not_arrive_end_the_connection(model: erllama.Model, sent: bytes) -> None:
    with running(model, listen={"header_timeout": 0.2}) as server:
        client = server.connect()
        client.sendall(sent)
        assert client.recv(100) == b""
        client.close()


def test_headers_of_a_second_request_are_limited_too(model: erllama.Model) -> None:
    with running(model, listen={"header_timeout": 1.0}) as server:
        client = server.send(chat_body(max_tokens=1))
        read_until(client, b'"timings"')
        client.sendall(b"GET /v1/mod")
        while client.recv(1000):
            pass
        client.close()


def test_headers_without_end_end_the_connection(model: erllama.Model) -> None:
    with running(model) as server:
        client = server.connect()
        client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n")
        with pytest.raises(OSError):
            client.sendall((b"x-filler: " + b"x" * 1000 + b"\r\n") * 50000)
        client.close()


def test_an_idle_connection_is_closed(model: erllama.Model) -> None:
    with running(model, listen={"idle_timeout": 0.2}) as server:
        client = server.send(chat_body(max_tokens=1))
        while client.recv(65536):
            pass
        client.close()


def test_an_unknown_path_or_method_is_an_error_of_the_api(plain: RunningServer) -> None:
    missing = httpx.get(plain.url + "/v1/nothing", timeout=120)
    wrong = httpx.get(plain.url + CHAT, timeout=120)
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/nothing" in missing.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/models/../../etc/passwd"]
)
def test_no_path_reaches_a_file(plain: RunningServer, path: str) -> None:
    client = plain.connect()
    client.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    answer = b""
    while part := client.recv(65536):
        answer += part
    assert b"root:" not in answer
    assert answer.split()[1] in (b"404", b"400"), answer
    client.close()


def test_chat_template_kwargs_and_templates_reach_no_file(plain: RunningServer) -> None:
    for options in ({"chat_template": "/etc/passwd"}, {"chat_template_kwargs": {"chat_template": "/etc/passwd"}}):
        answer = plain.post(chat_body(max_tokens=1, **options))
        assert "root:" not in answer.text


# --- errors of the engine --------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(model: erllama.Model) -> None:
    with running(model) as server:
        for stream in (False, True):
            answer = server.post(chat_body("x" * 5000, stream=stream))
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert error["code"] == "context_length_exceeded"
            assert error["n_prompt_tokens"] > 5000
            assert error["n_ctx"] == 4096


def test_a_full_queue_is_a_429_with_a_time_to_retry() -> None:
    backend = GatedBackend()
    with Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=1, max_pending=1) as small:
        with running(small) as server:
            backend.hold()
            busy = [server.send(chat_body("first", max_tokens=2))]
            wait_until(lambda: small.queue_depth == 1)
            busy.append(server.send(chat_body("waiting", max_tokens=2)))
            wait_until(lambda: small.pending == 1)
            for stream in (False, True):
                answer = server.post(chat_body(stream=stream))
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
            backend.release()
            for client in busy:
                assert b" 200 " in read_until(client, b"\r\n")
                client.close()


def test_an_error_after_the_first_byte_is_an_event() -> None:
    backend = GatedBackend()
    with Cache() as cache, erllama.load_backend(backend, cache=cache) as model, running(model) as server:
        client = server.send(chat_body(stream=True))
        assert b" 200 " in read_until(client, b'"content"')
        backend.abort(True)
        received = read_until(client, b"0\r\n\r\n")
        client.close()
    last = [line for line in received.splitlines() if line.startswith(b"data: ")][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"]


def test_ports_in_use_are_reported(plain: RunningServer) -> None:
    port = plain.address[1]
    with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1, port {port}"):
        ListenOptions(port=port).bind()
