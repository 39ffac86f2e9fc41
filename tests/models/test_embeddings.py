"""Embeddings and rankings: the results of libllama, in any batch and beside replies; invalid input is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama import llama_ffi
from erllama.engine import EmbeddingLimits
from erllama.engine.backends.stub import StubBackend
from erllama.llama_ffi import EmbeddingContext, LlamaError, LlamaModel
from erllama.testing.bert import BertShape, write_bert
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba

# Texts of many lengths, similar and different, and more than fit one decode.
TEXTS = ["a", "hello, world", "hello world", *(f"number {n}: " + "ab cd " * (n % 11) for n in range(90)), "a"]
# All in float32, so that a difference beyond rounding is a mistake.
EXACT: dict[str, object] = {"kv_type_k": "f32", "kv_type_v": "f32", "flash_attn": False, "n_threads": 1}
# Two sums of the same n float32 products, added in other orders, differ by at most 2 * n * 2**-24 of the sum of
# their magnitudes. These models chain about 20 sums of at most 100 products, of magnitudes of 1 to 3.
ROUNDING = 1e-4
# ggml's GELU reads a table of half precision, whose entries are 2**-11 of their value apart. An activation that
# differs in its last bit may read the neighbouring entry; 64 of them, with weights of 1/sqrt(64), may all do so.
GELU_ROUNDING = 64**0.5 * 2**-11


@pytest.fixture(scope="module")
def bert_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert.gguf", seed=1)


@pytest.fixture(scope="module")
def ranker_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "ranker.gguf", pooling="rank", seed=2)


@pytest.fixture
def bert(bert_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.load_model(bert_gguf, **EXACT) as model:  # type: ignore[arg-type]
        yield model


@pytest.fixture
def ranker(ranker_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.load_model(ranker_gguf, **EXACT) as model:  # type: ignore[arg-type]
        yield model


@pytest.fixture
def decoder(tiny_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.load_model(tiny_gguf, n_ctx=1024, **EXACT) as model:
        yield model


def directly(path: Path, pooling: str, texts: Sequence[str]) -> list[NDArray[np.float32]]:
    """Embed each text alone, through the binding."""
    with LlamaModel(path) as model:
        options = {"n_tokens": 512, "n_threads": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
        with EmbeddingContext(model, pooling=pooling, **options) as context:  # type: ignore[arg-type]
            tokens = [model.vocabulary.tokenize(text, parse_special=True) for text in texts]
            return [context.embed([each])[0].copy() for each in tokens]


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "none"])
@pytest.mark.parametrize("kind", ["bert", "decoder"])
def test_embeddings_are_those_of_libllama(
    kind: str, pooling: str, bert_gguf: Path, tiny_gguf: Path, request: pytest.FixtureRequest
) -> None:
    model: erllama.Model = request.getfixturevalue(kind)
    expected = directly(bert_gguf if kind == "bert" else tiny_gguf, pooling, TEXTS)
    found = model.embed(TEXTS, pooling=pooling, normalize=False)  # type: ignore[call-overload]
    assert len(found) == len(TEXTS)
    for row, alone in zip(found, expected, strict=True):
        assert row.dtype == np.float32
        np.testing.assert_allclose(row, alone, rtol=0, atol=GELU_ROUNDING)
    if (kind, pooling) != ("decoder", "cls"):  # where the first token sees itself alone
        one, other = (np.atleast_2d(found[at])[-1] for at in (1, 2))
        assert np.abs(one - other).max() > 5 * GELU_ROUNDING, "other texts have other embeddings"


def test_each_pooling_matches_its_definition(bert: erllama.Model) -> None:
    tokens = bert.embed(TEXTS[:5], pooling="none", normalize=False)
    assert [len(rows) for rows in tokens] == [len(bert.tokenize(text)) for text in TEXTS[:5]]
    for pooling, pool in {
        "mean": lambda rows: rows.mean(axis=0),
        "cls": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }.items():
        found = bert.embed(TEXTS[:5], pooling=pooling, normalize=False)  # type: ignore[call-overload]
        np.testing.assert_allclose(found, [pool(rows) for rows in tokens], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_file_sets_the_default_pooling(pooling: str, tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf", pooling=pooling)
    with erllama.load_model(path, n_threads=1) as model:
        asked = model.embed(TEXTS[:4], pooling=pooling)  # type: ignore[call-overload]
        assert np.array_equal(model.embed(TEXTS[:4]), asked)
        other = "cls" if pooling == "last" else "last"
        assert not np.allclose(model.embed(TEXTS[:4]), model.embed(TEXTS[:4], pooling=other))  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["bert", "decoder"])
def test_vectors_are_normalized_by_default(kind: str, request: pytest.FixtureRequest) -> None:
    model: erllama.Model = request.getfixturevalue(kind)
    plain, normalized = model.embed(TEXTS, normalize=False), model.embed(TEXTS)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.01
    np.testing.assert_allclose(normalized, plain / lengths, rtol=0, atol=ROUNDING)
    for rows in model.embed(TEXTS[:3], pooling="none"):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=ROUNDING)


def test_texts_and_their_tokens_have_the_same_embeddings(decoder: erllama.Model) -> None:
    one = decoder.embed("hello")
    ids = decoder.tokenize("hello")
    assert one.shape == (1, 64)
    for texts in (["hello"], ("hello",), ids, ids.tolist(), tuple(ids.tolist()), [ids], [ids.tolist()], ids[None]):
        assert np.array_equal(decoder.embed(texts), one), texts
    both = decoder.embed(["hello", ids])
    np.testing.assert_allclose(both[0], both[1], atol=ROUNDING)


def test_many_short_texts_take_one_decode(bert: erllama.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    embed = EmbeddingContext.embed

    def counting(self: EmbeddingContext, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        sizes.append(len(sequences))
        return embed(self, sequences)

    monkeypatch.setattr(EmbeddingContext, "embed", counting)
    bert.embed(["ab"] * 60)
    assert sizes == [60]
    bert.embed(["ab"] * 130)
    assert sizes[1:] == [64, 64, 2], "the number of sequences of a context"
    bert.embed(["a" * 100] * 10)
    assert sum(sizes[4:]) == 10
    assert max(sizes[4:]) == 5, "102 tokens each, and 512 per decode"


@pytest.mark.parametrize("write", [write_gemma3, write_mamba, write_lfm2])
def test_models_with_other_memory_kinds_embed(write: type[write_gemma3], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    texts = ["hello", "x" * 100, "hello"]
    with erllama.load_model(path, n_ctx=512, **EXACT) as model:
        found = model.embed(texts, pooling="last", normalize=False)
    np.testing.assert_allclose(found, directly(path, "last", texts), rtol=0, atol=1e-3)
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=ROUNDING)


def test_texts_up_to_the_context_size_are_accepted(decoder: erllama.Model) -> None:
    texts = ["x" * n for n in (10, 600, 700, 1023, 5)]
    found = decoder.embed(texts, pooling="last")
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(decoder.embed(text, pooling="last")[0], row, atol=ROUNDING)


def test_a_truncated_text_keeps_its_final_special_tokens(bert: erllama.Model) -> None:
    assert bert.n_ctx == 128
    begin, end = bert.tokenize("")[[0, -1]]
    cut = [begin, *bert.tokenize("ab " * 200, add_special=False)[:126], end]
    np.testing.assert_allclose(bert.embed("ab " * 200, truncate=True), bert.embed(cut), atol=GELU_ROUNDING)
    ids = [begin] * 200
    np.testing.assert_allclose(bert.embed([ids], truncate=True), bert.embed(ids[:128]), atol=GELU_ROUNDING)


def test_a_ranking_model_scores_pairs(ranker_gguf: Path, ranker: erllama.Model) -> None:
    documents = ["hello", "world, and so on", "what is this", "hello"]
    with LlamaModel(ranker_gguf) as model:
        vocabulary = model.vocabulary
        with EmbeddingContext(model, pooling="rank", n_tokens=128, flash_attn=False) as context:
            expected = []
            for document in documents:
                query, text = (vocabulary.tokenize(t, add_special=False) for t in ("what?", document))
                pair = [vocabulary.bos, *query, vocabulary.sep, *text, vocabulary.sep]
                expected.append(context.embed([np.array(pair, np.int32)])[0][0])
    scores = ranker.rerank("what?", documents)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=GELU_ROUNDING)
    assert np.diff(np.sort(scores[:3])).min() > 5 * GELU_ROUNDING, "other documents have other scores"
    assert np.abs(ranker.rerank("hello!", documents) - scores).max() > 5 * GELU_ROUNDING
    assert ranker.embed("hello", pooling="cls").shape == (1, 32)


# --- beside replies -----------------------------------------------------------------------------


def test_replies_continue_while_texts_are_embedded(decoder: erllama.Model) -> None:
    options = {"max_tokens": 900, "seed": 1, "banned_tokens": [2]}
    alone = decoder.complete("Once", **options)  # type: ignore[arg-type]
    expected = decoder.embed(TEXTS[:9], pooling="last")
    found: list[NDArray[np.float32]] = []
    embedded_at: list[float] = []

    def embed() -> None:
        for _ in range(5):
            found.append(decoder.embed(TEXTS[:9], pooling="last"))
            embedded_at.append(time.perf_counter())

    threads = [threading.Thread(target=embed) for _ in range(3)]
    tokens: list[tuple[float, int]] = []
    with decoder.stream("Once", **options) as stream:  # type: ignore[arg-type]
        for event in stream:
            if isinstance(event, erllama.TextDelta):
                if not tokens:
                    for thread in threads:
                        thread.start()
                tokens += [(time.perf_counter(), token) for token in event.tokens]
    for thread in threads:
        thread.join()
    assert tuple(token for _, token in tokens) == alone.tokens
    assert len(found) == 15
    for each in found:
        np.testing.assert_allclose(each, expected, atol=ROUNDING)
    assert embedded_at[0] < tokens[-1][0], "some texts were finished before the reply"


def test_embedding_and_ranking_work_with_asyncio(bert: erllama.Model, ranker: erllama.Model) -> None:
    async def ask() -> None:
        found = await asyncio.gather(*(bert.aembed(TEXTS) for _ in range(4)))
        expected = bert.embed(TEXTS)
        for each in found:
            assert np.array_equal(each, expected)
        assert np.array_equal(await ranker.arerank("a", ["b", "c"]), ranker.rerank("a", ["b", "c"]))
        assert [len(rows) for rows in await bert.aembed(["ab"], pooling="none")] == [4]
        with pytest.raises(erllama.OptionError, match="did you mean 'truncate'"):
            await bert.aembed("a", truncat=True)  # type: ignore[call-overload]

    asyncio.run(ask())


class Slow:
    """An embedder that computes nothing and waits until it is released."""

    limits = EmbeddingLimits(n_tokens=8, n_batch=4, n_sequences=2, pooling="mean")

    def __init__(self) -> None:
        self.go, self.began, self.done = threading.Semaphore(0), threading.Semaphore(0), list[str]()
        self.aborted = self.closed = False

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        self.began.release()
        assert self.go.acquire(timeout=120)
        if self.aborted:
            raise erllama.BackendError("aborted")
        self.done.append(bytes(texts[0].astype(np.uint8)).decode())
        return [np.full(2, len(text), np.float32) for text in texts]

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        raise NotImplementedError

    def abort(self) -> None:
        self.aborted = True
        self.go.release(100)

    def close(self) -> None:
        self.closed = True


class EmbeddingStub(StubBackend):
    def __init__(self) -> None:
        super().__init__()
        self.slow = Slow()

    def embedder(self) -> Slow:
        return self.slow


def test_embedding_calls_alternate_one_decode_at_a_time() -> None:
    backend = EmbeddingStub()
    with erllama.load_backend(backend) as model:
        first = threading.Thread(target=model.embed, args=(["aaaa", "bbbb", "cccc"],))
        first.start()
        assert backend.slow.began.acquire(timeout=120)
        second = threading.Thread(target=model.embed, args=(["xxxx", "yyyy"],))
        second.start()
        while not model._embeddings._decode_lock.n_waiting:
            time.sleep(0.001)
        backend.slow.go.release(100)
        first.join(120)
        second.join(120)
        assert backend.slow.done[:3] == ["aaaa", "xxxx", "bbbb"]
        assert sorted(backend.slow.done) == ["aaaa", "bbbb", "cccc", "xxxx", "yyyy"]
    assert backend.slow.closed


def test_unloading_ends_running_embedding_calls() -> None:
    backend = EmbeddingStub()
    model = erllama.load_backend(backend)
    caught: list[BaseException] = []

    def embed() -> None:
        try:
            model.embed(["aaaa", "bbbb"])
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=embed)
    thread.start()
    assert backend.slow.began.acquire(timeout=120)
    model.unload()
    thread.join(120)
    assert [type(error) for error in caught] == [erllama.ModelUnloaded]
    assert backend.slow.closed


def test_cancelling_a_task_ends_embedding_at_the_next_decode() -> None:
    backend = EmbeddingStub()

    async def cancel() -> None:
        task = asyncio.create_task(model.aembed(["aaaa", "bbbb", "cccc"]))
        while not backend.slow.began.acquire(blocking=False):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        backend.slow.go.release(100)

    with erllama.load_backend(backend) as model:
        asyncio.run(cancel())  # waits for the thread
        assert backend.slow.done == ["aaaa"]


def test_a_model_can_be_unloaded_while_libllama_embeds(tiny_gguf: Path) -> None:
    model = erllama.load_model(tiny_gguf, n_ctx=2048, n_threads=1)
    model.embed("a")
    caught: list[BaseException] = []

    def embed() -> None:
        try:
            while True:
                model.embed(["x" * 2000])
        except erllama.Error as error:
            caught.append(error)

    threads = [threading.Thread(target=embed) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    model.unload()
    for thread in threads:
        thread.join(120)
    assert [type(error) for error in caught] == [erllama.ModelUnloaded] * 3


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "error", "says"),
    [
        ([], erllama.PromptError, "there are no texts; pass at least one"),
        ("", erllama.PromptError, "text 0 is empty"),
        (["a", ""], erllama.PromptError, "text 1 is empty"),
        (["a", []], erllama.PromptError, "text 1 is empty"),
        ([[2, 141]], erllama.PromptError, "text 0: token id 141 at 1 is outside the vocabulary; ids are 0 to 140"),
        ([-1], erllama.PromptError, "token id -1"),
        (np.array([2**40]), erllama.PromptError, "outside the vocabulary"),
        (7, erllama.PromptError, "7 is neither text nor token ids"),
        (None, erllama.PromptError, "None is neither"),
        (b"bytes", erllama.PromptError, "neither text"),
        (["a", b"bytes"], erllama.PromptError, "text 1: b'bytes' is neither text"),
        ([1.5], erllama.PromptError, "1.5 is neither"),
        ([True], erllama.PromptError, "neither text nor a sequence of token ids"),
        (np.zeros((1, 2, 3), np.int32), erllama.PromptError, "neither text"),
        ("a" * 127, erllama.PromptTooLong, "129 tokens and the model embeds 128 at once; .*truncate=True"),
    ],
)
def test_inputs_that_are_not_text_are_refused(
    texts: object, error: type[erllama.Error], says: str, bert: erllama.Model
) -> None:
    with pytest.raises(error, match=says):
        bert.embed(texts)  # type: ignore[call-overload]
    assert bert.embed("a" * 126).shape == (1, 32), "the model continues to the last position"


def test_embedding_options_are_checked(bert: erllama.Model) -> None:
    for options, says in {
        "pooling='meen'": ({"pooling": "meen"}, "'none'; did you mean 'mean'"),
        "pooling='rank'": ({"pooling": "rank"}, "it takes 'mean', 'cls', 'last', 'none'"),
        "pooling=3": ({"pooling": 3}, "pooling=3"),
        "normalize=1": ({"normalize": 1}, "normalize must be True or False"),
        "truncate=None": ({"truncate": None}, "truncate must be True or False"),
        "normalise": ({"normalise": True}, "did you mean 'normalize'"),
    }.values():
        with pytest.raises(erllama.OptionError, match=says):
            bert.embed("a", **options)  # type: ignore[call-overload]


def test_an_encoder_model_refuses_completions(bert: erllama.Model) -> None:
    refused = {
        "complete": lambda: bert.complete("a"),
        "stream": lambda: bert.stream("a"),
        "prefill": lambda: bert.prefill("a"),
        "chat": lambda: bert.chat([{"role": "user", "content": "a"}]),
        "stream_chat": lambda: bert.stream_chat([{"role": "user", "content": "a"}]),
        "score": lambda: bert.score("a", "b"),
        "infill": lambda: bert.infill("a", "b"),
        "acomplete": lambda: asyncio.run(bert.acomplete("a")),
    }
    for name, call in refused.items():
        with pytest.raises(erllama.Unsupported, match=r"only encodes.* use embed"):
            pytest.fail(f"{name}: {call()}")
    bert.evict()
    assert bert.info.n_ctx == 128
    assert bert.detokenize(bert.tokenize("hello, world")) == "hello , world"
    assert bert.cached_prefix("hello") == 0


def test_ranking_arguments_are_checked(ranker: erllama.Model, bert: erllama.Model) -> None:
    with pytest.raises(erllama.Unsupported, match="does not rank: its file asks for pooling 'mean'"):
        bert.rerank("a", ["b"])
    with pytest.raises(erllama.Unsupported, match="use rerank"):
        ranker.embed("a")
    for query, documents, error, says in [
        ("", ["a"], erllama.PromptError, "the query is empty"),
        (3, ["a"], erllama.PromptError, "the query is 3"),
        ("a", [], erllama.PromptError, "there are no documents"),
        ("a", "document", erllama.PromptError, "pass a list of texts"),
        ("a", ["a", ""], erllama.PromptError, "document 1 is empty"),
        ("a", ["a", 3], erllama.PromptError, "document 1 is 3"),
        (
            "a",
            ["a", "b" * 200],
            erllama.PromptTooLong,
            "document 1 have 204 tokens together and the model takes 128",
        ),
    ]:
        with pytest.raises(error, match=says):
            ranker.rerank(query, documents)  # type: ignore[arg-type]


def test_a_backend_without_an_embedder_is_reported() -> None:
    with erllama.load_backend(StubBackend()) as model:
        for call in (lambda: model.embed("a"), lambda: model.rerank("a", ["b"])):
            with pytest.raises(erllama.Unsupported, match="its backend, StubBackend, has no `embedder`"):
                call()
        assert model.complete("a", max_tokens=1).tokens


def test_an_unloaded_model_refuses_to_embed(bert_gguf: Path) -> None:
    model = erllama.load_model(bert_gguf, n_threads=1)
    model.embed("a")
    model.unload()
    model.unload()
    for call in (
        lambda: model.embed("a"),
        lambda: model.rerank("a", ["b"]),
        lambda: asyncio.run(model.aembed("a")),
    ):
        with pytest.raises(erllama.ModelUnloaded):
            call()


def test_the_binding_refuses_inputs_that_abort_libllama(bert_gguf: Path) -> None:
    with LlamaModel(bert_gguf) as model:
        ids = np.full(4, 2, np.int32)
        with EmbeddingContext(model, pooling="mean", n_tokens=512, n_sequences=2, n_threads=1) as context:
            for sequences, says in [
                ([], "0 sequences"),
                ([ids] * 3, "3 sequences of 12 tokens"),
                ([np.empty(0, np.int32), ids], "a sequence of 0 to 4 tokens"),
                ([np.full(129, 2, np.int32)], "129 tokens; each must have 1 to 128"),
                ([np.full(513, 2, np.int32)], "513 tokens together"),
                ([np.array([2, 141], np.int32)], "token id 141 is outside"),
                ([np.array([-1], np.int32)], "token id -1 is outside"),
            ]:
                with pytest.raises(LlamaError, match=says):
                    context.embed(sequences)
            assert context.embed([ids])[0].shape == (32,)
        with pytest.raises(LlamaError, match="this context is closed"):
            context.embed([ids])
        for options in ({"pooling": "meen"}, {"n_tokens": 0}, {"n_sequences": 0}, {"n_sequences": 10**6}):
            with pytest.raises(LlamaError):
                EmbeddingContext(model, **{"pooling": "mean", "n_tokens": 64, **options})  # type: ignore[arg-type]
        with pytest.raises(LlamaError, match="GiB"):
            EmbeddingContext(model, pooling="mean", n_tokens=2**30)
        context = EmbeddingContext(model, pooling="mean", n_tokens=64)
    assert context.embed([ids])[0].shape == (32,), "the weights live as long as the embedder"
    context.close()


def test_generated_model_files_are_deterministic(tmp_path: Path) -> None:
    one, two = (write_bert(tmp_path / name, seed=3).read_bytes() for name in ("one", "two"))
    assert one == two
    assert one != write_bert(tmp_path / "three", seed=4).read_bytes()
    shape = BertShape(n_layer=1, n_ctx=64)
    with LlamaModel(write_bert(tmp_path / "small", shape)) as model:
        assert (model.shape.n_layer, model.shape.n_ctx_train) == (1, 64)
        assert llama_ffi.own_pooling(model) == "mean"


def test_embeddings_follow_the_models_rope_scaling(tmp_path: Path) -> None:
    """Unset values are the model's own. Values that are set change the meaning of positions."""
    path = write_llama(tmp_path / "model.gguf")
    text = "a few words, so that positions matter"
    rows = {}
    for name, options in {
        "own": {},
        "linear": {"rope_scaling": "linear", "rope_freq_scale": 0.25},
        "file": {
            "overrides": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        },
    }.items():
        with erllama.load_model(path, cache=erllama.Cache(), n_ctx=256, **options) as model:  # type: ignore[arg-type]
            rows[name] = model.embed(text)
    assert not np.allclose(rows["own"], rows["linear"], atol=ROUNDING)
    np.testing.assert_allclose(rows["file"], rows["linear"], atol=ROUNDING)
