"""The time to save and restore KV on this machine's CPU, and on an RPC server of this machine beside it.

Run as `python -m benchmarks.packing`. Needs a libllama with RPC: `make setup RPC=1`.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from erllama.engine import Batch
from erllama.engine.backends.llama import LlamaBackend, LlamaOptions
from erllama.engine.backends.llama_library import rpc_server_program
from erllama.testing.models import SHAPE_135M, write_llama

N_TOKENS, BLOCK, SLICE = 2048, 256, 512


@contextmanager
def server() -> Iterator[str]:
    """Start a server with one thread on a free port. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [rpc_server_program(), "--port", str(port), "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(500):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def decode(backend: LlamaBackend, sequence: int, start: int, n: int) -> None:
    """Compute `n` tokens of a sequence, with logits for the last one."""
    positions = np.arange(start, start + n, dtype=np.int32)
    output = (positions == positions[-1]).astype(np.int8)
    tokens = (3 + positions * 7 % 250).astype(np.int32)
    backend.decode(Batch(tokens, positions, np.full(n, sequence, np.int32), output))


def milliseconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


def measure(backend: LlamaBackend) -> dict[str, float]:
    """Return times in milliseconds, by what was done. Sequence 0 has N_TOKENS tokens."""
    whole = backend.pack(0, 0, N_TOKENS)
    starts = range(0, N_TOKENS, BLOCK)
    blocks = [backend.pack(0, start, start + BLOCK) for start in starts]

    def restore_blocks() -> None:
        for start, block in zip(starts, blocks, strict=True):
            backend.restore(1, start, start + BLOCK, memoryview(block))
        backend.pack(1, N_TOKENS - 1, N_TOKENS)  # a server has no answer to what is restored: wait for it

    def restore_whole() -> None:
        backend.restore(2, 0, N_TOKENS, memoryview(whole))
        backend.pack(2, N_TOKENS - 1, N_TOKENS)

    def tokens() -> None:
        for i in range(16):
            decode(backend, 3, i, 1)

    found = {
        "save all tokens at once": milliseconds(lambda: backend.pack(0, 0, N_TOKENS)),
        f"save blocks of {BLOCK}": milliseconds(lambda: [backend.pack(0, s, s + BLOCK) for s in starts]),
        "save one token": milliseconds(lambda: backend.pack(0, 0, 1)),
        "restore all tokens at once": milliseconds(restore_whole),
        f"restore blocks of {BLOCK}": milliseconds(restore_blocks),
        "decode one token": milliseconds(tokens) / 16,
    }
    for sequence in (1, 2, 3):
        backend.drop(sequence)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (default: a generated one of 135M parameters)")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs (default: %(default)s)")
    options = parser.parse_args()
    path: Path = options.model or write_llama(Path("build/135m.gguf"), SHAPE_135M, quantization="Q8_0")
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with server() as address:
        places = {"CPU": {"devices": ()}, "RPC": {"rpc_servers": (address,)}}
        backends = {
            name: LlamaBackend(path, LlamaOptions(n_ctx=8192, n_sequences=4, n_threads=1, **place), path.name)
            for name, place in places.items()
        }
        for backend in backends.values():
            for start in range(0, N_TOKENS, SLICE):
                decode(backend, 0, start, SLICE)
        for _ in range(options.runs):
            for name, backend in backends.items():
                for what, ms in measure(backend).items():
                    times[what][name].append(ms)
        n_bytes = len(backends["CPU"].pack(0, 0, N_TOKENS))
        for backend in backends.values():
            backend.close()
    print(f"{N_TOKENS} tokens, {n_bytes / 1e6:.0f} MB: medians of {options.runs} runs (range), in milliseconds")
    for what, places_ms in times.items():
        columns = [
            f"{name} {statistics.median(ms):7.2f} ({min(ms):.2f} to {max(ms):.2f})"
            for name, ms in places_ms.items()
        ]
        print(f"{what:28}", "   ".join(columns))


if __name__ == "__main__":
    main()
