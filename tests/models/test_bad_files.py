"""Invalid model files: each raises one typed error, and the process survives."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

import erllama
from support.paths import TESTS
from support.subprocesses import must_run, run_python


def refused(path: Path | str, **options: object) -> str:
    with pytest.raises(erllama.ModelLoadError) as caught:
        erllama.load_model(path, **options)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.gguf")
    assert "does not exist" in refused("/no/such/directory/model.gguf")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "directory" in refused(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert "empty" in refused(path)


@pytest.mark.parametrize("content", [b"GGU", b"PK\x03\x04 a zip", b"\0" * 4096, b"{}"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    assert "not a GGUF file" in refused(path)


def test_an_impossible_file_name_is_refused() -> None:
    with pytest.raises(erllama.ModelLoadError):
        erllama.load_model("nul\0byte.gguf")
    for path in (None, 5, "", b"x.gguf"):
        with pytest.raises(erllama.OptionError, match="path"):
            erllama.load_model(path)  # type: ignore[arg-type]


def test_a_missing_part_of_a_split_model_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    first = tmp_path / "model-00001-of-00002.gguf"
    first.write_bytes(tiny_gguf.read_bytes())
    with (
        erllama.Cache(disk=tmp_path / "kv") as cache,
        pytest.raises(erllama.ModelLoadError, match="00002-of-00002"),
    ):
        erllama.load_model(first, cache=cache, n_threads=1)


def test_a_model_truncated_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """200 places, most of them in the header, which decides everything."""
    content = tiny_gguf.read_bytes()
    header = 10_000
    places = sorted(
        {*range(4, header, header // 150), *range(header, len(content), len(content) // 50), len(content) - 1}
    )
    assert len(places) >= 200
    path = tmp_path / "cut.gguf"
    with erllama.load_model(tiny_gguf, n_ctx=256, n_threads=1) as other:
        for place in places:
            path.write_bytes(content[:place])
            refused(path)
        assert other.complete("the other model lives", max_tokens=3).tokens


def test_tensors_beyond_the_end_of_the_file_are_named(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    assert "truncated" in refused(path)


FUZZ = """
import sys
from pathlib import Path
import erllama
sys.path.append(sys.argv[5])
from support.gguf.corruption import corrupted
source, target, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
content = Path(source).read_bytes()
header = 9500
loaded = refused = 0
for seed in range(first, last):
    print("seed", seed, flush=True)
    # Numbers are in the beginning, texts thereafter.
    target.write_bytes(corrupted(content, seed, 1200 if seed % 3 == 2 else header))
    try:
        with erllama.load_model(target, n_ctx=256, n_threads=1) as model:
            model.complete("hello", max_tokens=3)
        loaded += 1
    except erllama.Error:
        refused += 1
print(loaded, refused)
"""


def test_flipped_bytes_in_a_header_do_not_end_the_process(tiny_gguf: Path, tmp_path: Path) -> None:
    """The file is refused, or loads where the flip does not matter. The process never ends.

    `make fuzz` does the same for longer.
    """
    first = int(os.environ.get("ERLLAMA_FUZZ_FIRST", "0"))
    n = int(os.environ.get("ERLLAMA_FUZZ_N", "200"))
    output = must_run(FUZZ, tiny_gguf, tmp_path / "flipped.gguf", first, first + n, TESTS, timeout=60 + n)
    loaded, refused_count = map(int, output.splitlines()[-1].split())
    assert loaded + refused_count == n
    assert refused_count > n // 4
    assert loaded > n // 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"llama.attention.head_count", 0),
        (b"llama.attention.head_count_kv", 0),
        (b"llama.attention.head_count", 3),
        (b"llama.attention.head_count", 4),
        (b"llama.block_count", 0),
        (b"llama.block_count", 2**31),
        (b"llama.embedding_length", 0),
        (b"llama.context_length", 0),
        (b"llama.feed_forward_length", 0),
        (b"llama.rope.dimension_count", 0),
        (b"llama.rope.dimension_count", 7),
        (b"llama.vocab_size", 2**31),
        (b"tokenizer.ggml.eos_token_id", 2**31),
    ],
)
def test_impossible_sizes_are_refused(tiny_gguf: Path, tmp_path: Path, key: bytes, value: int) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    at = content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    assert struct.unpack_from("<I", content, at)[0] == 4, "an unsigned 32-bit value"
    struct.pack_into("<I", content, at + 4, value)
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    finished = run_python(
        """
        import sys, erllama
        try:
            with erllama.load_model(sys.argv[1], n_ctx=256, n_threads=1) as model:
                model.complete("hello", max_tokens=3)
        except erllama.Error as error:
            print(error)
        """,
        path,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"n_ctx": -5}, "at least 1"),
        ({"n_ctx": "4096"}, "pass a number of tokens"),
        ({"n_ctx": 2**40}, "at most"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": 1.5}, "integer"),
        ({"n_threads": 0}, "n_threads"),
        ({"n_gpu_layers": -2}, "n_gpu_layers"),
        ({"flash_attn": "on"}, "True, False or 'auto'"),
        ({"kv_type_k": "q8_1"}, "did you mean 'q8_0'"),
        ({"kv_type_v": "q8_0", "flash_attn": False}, "flash attention"),
        ({"rope_freq_base": 0}, "rope_freq_base"),
        ({"mmap": "yes"}, "True or False"),
        ({"cache": "kv"}, "erllama.Cache"),
        ({"id": 5}, "id=5"),
        ({"on_progress": 5}, "on_progress"),
        ({"n_ctxt": 5}, "did you mean 'n_ctx'"),
        ({"context_size": 5}, "it takes"),
    ],
)
def test_wrong_options_raise_typed_errors(tiny_gguf: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        erllama.load_model(tiny_gguf, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_the_smallest_context_is_rounded_up(tiny_gguf: Path) -> None:
    with erllama.load_model(tiny_gguf, n_ctx=1) as model:
        assert model.n_ctx == 256
        assert model.complete([5] * 256, max_tokens=5).finish_reason == "context_full"


def test_a_context_larger_than_memory_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(erllama.MemoryLimitExceeded, match="GiB are free; use n_ctx=32768, which fits"):
        erllama.load_model(tiny_gguf, n_ctx=2**30)
    assert "GiB" in refused(tiny_gguf, n_ctx=2**30, check_memory=False)


def test_a_load_can_be_cancelled(tiny_gguf: Path) -> None:
    with pytest.raises(erllama.LoadCancelled):
        erllama.load_model(tiny_gguf, on_progress=lambda _: False, id="once", n_threads=1)
    with erllama.load_model(tiny_gguf, id="once", n_ctx=256, n_threads=1) as model:
        assert model.id == "once"


def test_a_prompt_longer_than_the_context_is_refused(tiny: erllama.Model) -> None:
    with pytest.raises(erllama.PromptTooLong, match="1025 tokens and the context holds 1024"):
        tiny.complete("x" * 1024)
    assert tiny.complete("x" * 1023, max_tokens=5).finish_reason == "context_full"


def test_token_ids_outside_the_vocabulary_are_refused(tiny: erllama.Model) -> None:
    for ids in ([5, -1], [5, 320], [2**31], [-(2**63)]):
        with pytest.raises(erllama.PromptError, match="outside the vocabulary"):
            tiny.complete(ids)
    with pytest.raises(erllama.PromptError, match="outside the vocabulary"):
        tiny.detokenize([320])
    with pytest.raises(erllama.PromptError, match="empty"):
        tiny.complete([])


def test_an_empty_text_is_refused_but_a_bos_alone_is_not(tiny: erllama.Model) -> None:
    with pytest.raises(erllama.PromptError, match="empty"):
        tiny.complete("")
    assert tiny.complete([1], max_tokens=2).context_tokens[0] == 1


def test_a_missing_binding_is_reported() -> None:
    must_run(
        """
        import sys
        sys.modules["erllama.llama_ffi._binding"] = None
        import erllama
        try:
            erllama.load_model("model.gguf")
        except erllama.LibraryNotBuilt as error:
            assert "make setup" in str(error), error
        else:
            raise SystemExit("not refused")
        from erllama.engine.backends.stub import StubBackend
        with erllama.load_backend(StubBackend()) as model:
            model.complete("other models live", max_tokens=3)
        """
    )


@pytest.mark.parametrize("where", ["/proc/erllama", "/dev/null/kv"])
def test_replies_do_not_need_a_usable_cache_directory(tiny_gguf: Path, where: str) -> None:
    with (
        erllama.Cache(disk=where, ram=0) as cache,
        erllama.load_model(tiny_gguf, cache=cache, n_ctx=256, n_threads=1) as model,
    ):
        assert model.complete("hello", max_tokens=3).cache.kind == "cold"
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert where in str(cache.disk_error)


def test_a_flipped_byte_in_a_cache_file_is_a_cache_miss(
    tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = [5 + i % 200 for i in range(150)]
    ask = {"max_tokens": 16, "temperature": 0.0, "reproducible": True}
    dice = random.Random(1)

    def answer(cache: erllama.Cache) -> erllama.Completion:
        with erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_ubatch=32, n_threads=1) as model:
            return model.complete(prompt, **ask)  # type: ignore[arg-type]

    with erllama.Cache(block_size=32, disk=tmp_path) as cache:
        cold = answer(cache)
    for _ in range(40):
        path = dice.choice(sorted(tmp_path.rglob("blocks/*.kvc")))
        content = bytearray(path.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
        caplog.clear()
        with erllama.Cache(block_size=32, disk=tmp_path, ram=0) as cache:
            reply = answer(cache)
            counters = cache.counters()
        assert reply.tokens == cold.tokens
        assert reply.text == cold.text
        if counters["corrupt_files"]:  # otherwise it is the tail of the reply, which the prompt does not need
            assert reply.cache.tokens < 149
            assert path.name in caplog.text
        else:
            assert reply.cache.kind == "exact"
            path.unlink()
    with erllama.Cache(block_size=32, disk=tmp_path) as cache:
        assert answer(cache).cache.kind == "exact", "the dropped block was saved again"
