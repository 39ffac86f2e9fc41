"""The cost of encryption: saving and restoring the KV of a prompt with and without a key, in alternating runs.

Run as `python -m benchmarks.encryption`. Needs the extra `encryption`. A save packs the KV of each block and writes
it to the disk tier, up to `Cache.flush`. A restore looks the prompt up in a newly opened cache without a RAM tier,
reads the blocks and restores them into the context. Each line has the medians of the elapsed time and of the time
on processors, which other programs disturb less, and their ratios.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes
from erllama.cache.blocks import kvc
from erllama.cache.blocks.encryption import ContentKey, Encryption
from erllama.cache.blocks.key_file import create_key_file
from erllama.engine import Batch
from erllama.engine.backends.llama import LlamaBackend, LlamaOptions
from erllama.testing.models import SHAPE_135M, write_llama

BLOCK, SLICE = 256, 512
NAMESPACE = namespace_key({"benchmark": "encryption"})


class Cost(NamedTuple):
    """The elapsed time and the time on processors of an action, in milliseconds."""

    elapsed: float
    processor: float


def cost(function: Callable[[], object]) -> Cost:
    began, used = time.perf_counter(), time.process_time()
    function()
    return Cost((time.perf_counter() - began) * 1000, (time.process_time() - used) * 1000)


class Prompt:
    """A prompt whose KV is in sequence 0 of a backend."""

    def __init__(self, backend: LlamaBackend, n_tokens: int) -> None:
        self._backend = backend
        self.tokens = (3 + np.arange(n_tokens) * 7 % 250).astype(np.int32)
        self.blocks = Block.chain(token_bytes(self.tokens), NAMESPACE, BLOCK, SaveReason.COLD)
        for start in range(0, n_tokens, SLICE):
            positions = np.arange(start, min(start + SLICE, n_tokens), dtype=np.int32)
            output = np.zeros(len(positions), np.int8)
            output[-1] = 1
            sequences = np.zeros(len(positions), np.int32)
            backend.decode(Batch(self.tokens[positions], positions, sequences, output))

    def save(self, cache: Cache) -> None:
        for block in self.blocks:
            cache.save(block, self._backend.pack(0, block.start, block.end))
        cache.flush()

    def restore(self, cache: Cache) -> None:
        with cache.lookup(NAMESPACE, self.tokens) as match:
            assert match.n_tokens == len(self.tokens)
            with closing(cache.load_batches(match.blocks)) as batches:
                for batch in batches:
                    for loaded in batch:
                        self._backend.restore(1, loaded.block.start, loaded.block.end, loaded.payload)


def measure(prompt: Prompt, backend: LlamaBackend, parent: Path, key_file: Path | None) -> dict[str, Cost]:
    """Return costs by what was done."""
    directory = Path(tempfile.mkdtemp(dir=parent))
    found = {}
    with Cache(ram=0, disk=directory, key_file=key_file, watch=False) as cache:
        found["save"] = cost(lambda: prompt.save(cache))
    with Cache(ram=0, disk=directory, key_file=key_file, watch=False) as cache:
        found["restore"] = cost(lambda: prompt.restore(cache))
        backend.drop(1)
    shutil.rmtree(directory)
    payload = memoryview(backend.pack(0, 0, BLOCK))
    content_key = None if key_file is None else Encryption.of_file(key_file).current
    return found | files(parent, prompt.blocks[0], payload, content_key)


def files(parent: Path, block: Block, payload: memoryview, content_key: ContentKey | None) -> dict[str, Cost]:
    """Return the costs of writing and of reading one file, which is not made durable."""
    path = parent / "block.kvc"
    written = cost(lambda: kvc.write(path, block, payload, durable=False, content_key=content_key))
    read = cost(lambda: kvc.read(path, content_key))
    path.unlink()
    return {"write one file, without the backend": written, "read one file, without the backend": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (default: a generated one of 135M parameters)")
    parser.add_argument("--runs", type=int, default=9, help="alternating runs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="where to write (default: the directory for temporary files)")
    options = parser.parse_args()
    path: Path = options.model or write_llama(Path("build/135m-f32.gguf"), SHAPE_135M)
    settings = LlamaOptions(n_ctx=2 * options.tokens + BLOCK, n_sequences=3, n_threads=1)
    times: dict[str, dict[str, list[Cost]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(dir=options.dir) as parent:
        key_file = Path(parent) / "cache.key"
        create_key_file(key_file)
        backend = LlamaBackend(path, settings, path.name)
        prompt = Prompt(backend, options.tokens)
        n_bytes = len(backend.pack(0, 0, options.tokens))
        for run in range(options.runs + 1):
            for name, key in (("plain", None), ("encrypted", key_file)):
                for what, each in measure(prompt, backend, Path(parent), key).items():
                    if run:  # the first one warms up
                        times[what][name].append(each)
        backend.close()
    print(
        f"{options.tokens} tokens, {n_bytes / 1e6:.0f} MB: medians of {options.runs} runs (range), in milliseconds"
    )
    for what, by_name in times.items():
        print(what)
        for kind in Cost._fields:
            ms = {name: [getattr(each, kind) for each in found] for name, found in by_name.items()}
            medians = {name: statistics.median(values) for name, values in ms.items()}
            columns = [
                f"{name} {medians[name]:7.2f} ({min(values):.2f} to {max(values):.2f})"
                for name, values in ms.items()
            ]
            print(f"  {kind:10}", "   ".join(columns), f"  {medians['encrypted'] / medians['plain']:.2f}")


if __name__ == "__main__":
    main()
