"""The engines under test, with equal settings: this library, llama-server and llama-bench.

llama.cpp's tools come from `scripts/build_llama.sh --peers`: the unchanged release, with the library's flags and
backend. Both sides get the same threads, context, batch sizes, flash attention and layers on a GPU. Prompts are
token ids, and all of them differ. Those of a trained model are the ids of a text.
"""

from __future__ import annotations

import functools
import http.client
import json
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

import erllama
from benchmarks.measure import AbsentError, PeerError, Setup
from erllama.llama_ffi import build_info

N_BATCH, N_UBATCH = 2048, 512  # the defaults of both sides, set explicitly
SHORT_PROMPT = 16
PEERS = "scripts/build_llama.sh --peers"
ROOT = Path(__file__).resolve().parent.parent
SERVER_START_SECONDS = 300

Prompt = list[int]


class Piece(NamedTuple):
    """The time of a piece of a reply, by time.perf_counter, and the number of tokens up to it."""

    at: float
    n_tokens: int


class Reply(NamedTuple):
    """One reply, as its caller saw it.

    The engine reports `n_computed`, the number of computed prompt tokens, and `decode_seconds`, the time from the
    first token to the last.
    """

    asked: float
    pieces: list[Piece]
    n_computed: int
    decode_seconds: float

    @property
    def n_tokens(self) -> int:
        return self.pieces[-1].n_tokens

    @property
    def ended(self) -> float:
        return self.pieces[-1].at


def _options(setup: Setup, n_ctx: int, more: dict[str, object]) -> dict[str, object]:
    sizes = {"n_ctx": n_ctx, "n_threads": setup.threads, "n_batch": N_BATCH, "n_ubatch": N_UBATCH}
    return {**sizes, "flash_attn": True, "n_gpu_layers": setup.gpu_layers, **more}


@contextmanager
def open_model(setup: Setup, cache: erllama.Cache, n_ctx: int, **more: object) -> Iterator[erllama.Model]:
    """Load the model again, with `more` options."""
    options = _options(setup, n_ctx, more)
    with erllama.load_model(setup.model, cache=cache, **options) as model:  # type: ignore[arg-type]
        # The same as `ignore_eos` of llama-server: replies have the requested length.
        vocabulary = model._backend.vocabulary
        vocabulary.is_eog = np.zeros_like(vocabulary.is_eog)  # type: ignore[misc]
        yield model


def load_code(setup: Setup, cache: str, n_ctx: int, **more: object) -> str:
    """Return the code of `open_model` as text."""
    options = ", ".join(f"{name}={value!r}" for name, value in _options(setup, n_ctx, more).items())
    return f"erllama.load_model({setup.model.name!r}, cache={cache}, {options})"


class Engine(Protocol):
    """An engine that runs requests: this library in this process, or a server."""

    name: str
    command: str

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        """Return a greedy reply of `n_tokens`; append its pieces on arrival. None if `enough` ended it."""


class Ours:
    """This library."""

    name = "erllama"

    def __init__(self, setup: Setup, n_ctx: int, **more: object) -> None:
        self.command = load_code(setup, "erllama.Cache()", n_ctx, **more)
        with ExitStack() as opened:
            cache = opened.enter_context(erllama.Cache())
            self.model = opened.enter_context(open_model(setup, cache, n_ctx, **more))
            self._opened = opened.pop_all()

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        asked = time.perf_counter()
        n_come = 0
        with self.model.stream(prompt, max_tokens=n_tokens, temperature=0) as stream:
            for event in stream:
                if enough.is_set():
                    return None
                if isinstance(event, erllama.TextDelta):
                    n_come += len(event.tokens)
                    pieces.append(Piece(time.perf_counter(), n_come))
            done = stream.result()
        return Reply(asked, pieces, done.timings.prefill_tokens, done.timings.decode)

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class HttpServer:
    """A server in a separate process, which ends with the `with`, asked through llama-server's API.

    llama-server fails replies that are not UTF-8: those of random weights, and of trained models whose end of reply
    is ignored. So tokens that are not text by themselves are banned. With `ignore_eos` it checks a list of banned
    tokens anyway.

    Args:
        arguments: of the server, without its port.
        ours: the engine whose vocabulary determines the banned tokens.

    Attributes:
        command: of the server.
    """

    name: str

    def __init__(self, arguments: Sequence[str], ours: Ours) -> None:
        vocabulary = ours.model._backend.vocabulary
        self._forbidden = [[id, False] for id in range(ours.model.n_vocab) if not _is_text(vocabulary.piece(id))]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        arguments = [*arguments, "--port", str(self.port)]
        self.command = shlex.join(arguments)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        self._log.seek(0)
        raise PeerError(
            f"{self.name} did not start: {self.command}\n{self._log.read()[-3000:].decode(errors='replace')}"
        )

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        asked = time.perf_counter()
        # fmt: off
        body = json.dumps({
            "prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": True, "stream": True, "logit_bias": self._forbidden,
        })
        # fmt: on
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise PeerError(f"{self.name} answered {response.status}: {response.read().decode()}")
            chunks: list[tuple[float, bytes]] = []
            # Only record the time here: parsing JSON now would take time from the threads of the server.
            while chunk := response.read1(1 << 16):
                if enough.is_set():
                    return None
                chunks.append((time.perf_counter(), chunk))
                pieces.append(Piece(chunks[-1][0], len(chunks)))
        except (OSError, http.client.HTTPException) as error:
            raise PeerError(f"the connection to {self.name} failed: {error!r}") from error
        finally:
            connection.close()
        return self._read(asked, chunks)

    def _read(self, asked: float, chunks: list[tuple[float, bytes]]) -> Reply:
        """Return the reply from its chunks, which are server-sent events.

        Raises:
            PeerError: the server sent an error, or ended the reply early.
        """
        pieces: list[Piece] = []
        line, last = b"", {}
        for at, chunk in chunks:
            *lines, line = (line + chunk).split(b"\n")
            for text in lines:
                if text.startswith(b"data: "):
                    last = json.loads(text.removeprefix(b"data: "))
                    if "tokens_predicted" not in last:
                        raise PeerError(f"{self.name} failed: {last}")
                    if not pieces or last["tokens_predicted"] > pieces[-1].n_tokens:  # the last event repeats
                        pieces.append(Piece(at, last["tokens_predicted"]))
        if "timings" not in last:
            raise PeerError(f"{self.name} ended a reply without its timings: {line[-300:]!r}")
        timings = last["timings"]
        return Reply(asked, pieces, timings["prompt_n"], timings["predicted_ms"] / 1e3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Server(HttpServer):
    """llama-server.

    Args:
        n_ctx: total number of cells of all slots.
        more: further arguments.
    """

    name = "llama-server"

    def __init__(self, setup: Setup, ours: Ours, n_ctx: int, n_slots: int, more: Sequence[str] = ()) -> None:
        threads = str(setup.threads)
        # fmt: off
        arguments = [
            str(peers(setup) / "bin" / "llama-server"), "-m", str(setup.model), "--host", "127.0.0.1",
            "-t", threads, "-tb", threads, "-c", str(n_ctx), "-np", str(n_slots),
            "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-fa", "on", "-ngl", str(setup.gpu_layers), *more,
        ]
        # fmt: on
        super().__init__(arguments, ours)


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


class Prompts:
    """Prompts of token ids. All of them differ, so that caches find only the intended prefixes.

    Those of a trained model are parts of a text, which begin at random tokens. Others are random ids.
    """

    def __init__(self, setup: Setup | None = None) -> None:
        self._dice = np.random.default_rng(1)
        self._text = _text_ids(setup.model) if setup is not None and setup.real else None

    def of(self, n_tokens: int) -> Prompt:
        if self._text is None:
            ids: Prompt = self._dice.integers(5, 300, n_tokens).tolist()
        else:
            begin = self._dice.integers(len(self._text) - n_tokens)
            ids = self._text[begin : begin + n_tokens].tolist()
        return ids

    def many(self, n: int, n_tokens: int) -> list[Prompt]:
        return [self.of(n_tokens) for _ in range(n)]


@functools.cache
def _text_ids(model: Path) -> NDArray[np.int32]:
    """Return the tokens of the documentation, about 100,000."""
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    with erllama.load_model(model, vocab_only=True) as loaded:
        return loaded.tokenize(text)


def whole_cells(n_tokens: int) -> int:
    """Return the cells of a slot of llama-server for a sequence of this length, with one to spare."""
    return (n_tokens // 256 + 1) * 256


def ask(engine: Engine, prompt: Prompt, n_tokens: int) -> Reply:
    found = engine.reply(prompt, n_tokens, [], threading.Event())
    assert found is not None
    return found


def ask_together(engine: Engine, prompts: Sequence[Prompt], n_tokens: int) -> list[Reply]:
    """Return the replies to prompts that are sent at the same time.

    Raises:
        PeerError: a peer failed a request. The other requests have ended.
    """
    gate = threading.Barrier(len(prompts))

    def one(prompt: Prompt) -> Reply:
        gate.wait()
        return ask(engine, prompt, n_tokens)

    with ThreadPoolExecutor(len(prompts)) as callers:
        running = [callers.submit(one, prompt) for prompt in prompts]
    return [reply.result() for reply in running]


@functools.cache
def peers(setup: Setup) -> Path:
    """Return the directory of llama.cpp's tools. Builds them for the backend of the library if they are missing.

    Raises:
        AbsentError: the tools are missing and cannot be built.
    """
    if setup.peers is not None:
        if not (setup.peers / "bin" / "llama-server").exists():
            raise AbsentError(
                f"llama.cpp's tools are not in {setup.peers}; pass the directory that `{PEERS}` prints"
            )
        return setup.peers
    script = ROOT / "scripts" / "build_llama.sh"
    command = [str(script), "--peers", "--backend", build_info()["backend"]]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        raise AbsentError(f"llama.cpp's tools: `{PEERS}` failed; its output has the reason")
    found = Path(built.stdout.strip())
    if (source := json.loads((found / "build.json").read_text())["source"]) != build_info()["source"]:
        raise AbsentError(f"llama.cpp's tools are of {source}, and the library is of {build_info()['source']}")
    return found


def llama_bench_command(setup: Setup, *what: str, repeat: int) -> list[str]:
    """Return the command of llama-bench.

    Args:
        what: the test to run, such as ("-p", "0", "-n", "128").
    """
    # fmt: off
    return [
        str(peers(setup) / "bin" / "llama-bench"), "-m", str(setup.model), *what, "-fa", "1",
        "-t", str(setup.threads), "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-ngl", str(setup.gpu_layers),
        "-r", str(repeat), "-o", "json",
    ]
    # fmt: on


def llama_bench(setup: Setup, *what: str, repeat: int) -> tuple[str, list[float]]:
    """Run llama-bench in a separate process; return its command and the tokens per second of each repetition.

    Raises:
        PeerError: llama-bench failed.
    """
    command = llama_bench_command(setup, *what, repeat=repeat)
    finished = subprocess.run(command, capture_output=True, check=False)
    if finished.returncode:
        raise PeerError(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:].decode(errors='replace')}")
    (row,) = json.loads(finished.stdout)
    return shlex.join(command), [float(speed) for speed in row["samples_ts"]]
