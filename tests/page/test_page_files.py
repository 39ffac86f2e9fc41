"""The page and its files: headers, caching, who may load them, and what the files must never contain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

import erllama
from erllama.cache import Cache
from erllama.engine.backends.stub import StubBackend
from erllama.errors import OptionError
from erllama.server import ApiKey, ServerOptions
from erllama.server.page import files
from support.cli import write_replying_model
from support.http_server import RunningServer, running, serve_command
from support.paths import ROOT

STATIC = ROOT / "erllama" / "server" / "page" / "static"
NAMES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in NAMES if name.endswith(".js")]
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


@pytest.fixture(scope="module")
def model() -> Iterator[erllama.Model]:
    with Cache() as cache, erllama.load_backend(StubBackend(), id="stub", cache=cache) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: erllama.Model) -> Iterator[RunningServer]:
    with running(model, keys=(ApiKey(secret="right"),)) as server:
        yield server


# --- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in NAMES)])
def test_every_file_has_a_strict_policy_and_a_type(server: RunningServer, path: str) -> None:
    answer = httpx.get(server.url + path, timeout=120)
    assert answer.status_code == 200
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(types[Path(path).suffix or ".html"])
    assert answer.content == (STATIC / (Path(path).name or "index.html")).read_bytes()


def test_a_browser_keeps_the_files_and_asks_whether_they_changed(server: RunningServer) -> None:
    first = httpx.get(f"{server.url}/page/main.js", timeout=120)
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    again = httpx.get(f"{server.url}/page/main.js", headers={"if-none-match": f'W/"x", {etag}'}, timeout=120)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert "content-security-policy" in again.headers
    other = httpx.get(f"{server.url}/page/main.js", headers={"if-none-match": '"other"'}, timeout=120)
    assert (other.status_code, other.content) == (200, first.content)
    assert len({httpx.get(f"{server.url}/page/{name}", timeout=120).headers["etag"] for name in NAMES}) == len(
        NAMES
    )


# --- access ----------------------------------------------------------------------------------------


def test_the_files_need_no_key_and_the_api_does(server: RunningServer) -> None:
    assert httpx.get(server.url + "/", timeout=120).status_code == 200
    assert httpx.get(server.url + "/v1/models", timeout=120).status_code == 401
    assert httpx.get(server.url + "/erllama/status", timeout=120).status_code == 401


@pytest.mark.parametrize(
    "name", ["files.py", "..%2ffiles.py", "%2e%2e/files.py", "static/main.js", "", "main.js%00"]
)
def test_no_other_file_can_be_read(server: RunningServer, name: str) -> None:
    with server.connect() as client:
        client.sendall(f"GET /page/{name} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.split(b"\r\n")[0].split()[1] in (b"404", b"400")
    assert b"from __future__" not in answer


def test_a_page_under_a_foreign_name_gets_no_file(server: RunningServer) -> None:
    assert httpx.get(server.url + "/", headers={"host": "evil.example"}, timeout=120).status_code == 421
    assert (
        httpx.get(server.url + "/page/main.js", headers={"origin": "http://evil.example"}, timeout=120).status_code
        == 403
    )


def test_the_heartbeat_of_ollama_stays(server: RunningServer) -> None:
    answer = httpx.head(server.url + "/")
    assert answer.status_code == 200
    assert "content-security-policy" not in answer.headers


def test_without_the_page_only_the_status_remains(model: erllama.Model) -> None:
    with running(model, page=False) as server:
        refused = httpx.get(server.url + "/", timeout=120)
        assert refused.status_code == 405
        assert refused.json()["error"]["code"] == "method_not_allowed"
        assert httpx.head(server.url + "/").status_code == 200
        assert httpx.get(server.url + "/page/main.js", timeout=120).status_code == 404
        assert httpx.get(server.url + "/erllama/status", timeout=120).status_code == 200


def test_the_command_serves_the_page_unless_told_otherwise(tmp_path: Path) -> None:
    path = write_replying_model(tmp_path / "model.gguf", "Hi you")
    for arguments, statuses in (((), (200, 200)), (("--no-page",), (405, 404))):
        with serve_command(tmp_path, path, "--threads", 1, "--n-ctx", 512, "--in-process", *arguments) as server:
            assert (
                tuple(httpx.get(server.url + each, timeout=120).status_code for each in ("/", "/page/main.js"))
                == statuses
            )


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(OptionError, match="page"):
        ServerOptions.of({"page": "no"})


# --- content ---------------------------------------------------------------------------------------

# What turns text into markup or code, or leaves the server.
FORBIDDEN = [
    r"innerHTML",
    r"outerHTML",
    r"insertAdjacentHTML",
    r"setHTML",
    r"createContextualFragment",
    r"DOMParser",
    r"document\.write",
    r"\beval\b",
    r"\bFunction\(",
    r"set(?:Timeout|Interval)\(\s*[\"'`]",
    r"\bimport\(",
    r"srcdoc",
    r"\bWebSocket\b",
    r"XMLHttpRequest",
    r"sendBeacon",
    r"serviceWorker",
    r"@import",
    r"url\(",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_makes_markup_of_text_or_names_another_server(name: str) -> None:
    text = (STATIC / name).read_text()
    assert [each for each in FORBIDDEN if re.search(each, text)] == []
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w.-]+[^\s\"'`)]*", re.sub(r"(?m)^\s*//.*$", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of a namespace is the only address"


class _Tags(HTMLParser):
    """Collects the tags of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            self.texts.append((self.tags[-1][0], data))


def test_the_document_has_no_inline_script_or_style() -> None:
    document = _Tags((STATIC / "index.html").read_text())
    assert not [text for tag, text in document.texts if tag in ("script", "style")]
    for tag, attributes in document.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            place = attributes.get(name)
            if place and not place.startswith("#"):
                assert place.removeprefix("/page/") in NAMES, place


def test_every_import_and_every_id_of_the_scripts_exists() -> None:
    ids = {attributes.get("id") for _, attributes in _Tags((STATIC / "index.html").read_text()).tags}
    for name in SCRIPTS:
        text = (STATIC / name).read_text()
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(NAMES)
        for used in re.findall(r'(?:byId|\bon)\("([^"]+)"', text):
            assert used in ids or used.startswith(("setting-", "result-")), f"{name}: {used}"
        for imported, module in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', text):
            exported = set(
                re.findall(r"export (?:async )?(?:function\*?|class|const) (\w+)", (STATIC / module).read_text())
            )
            assert {each.strip() for each in imported.split(",") if each.strip()} <= exported, name


def test_the_server_has_every_file_of_the_folder() -> None:
    assert sorted(files.page_files()) == NAMES
