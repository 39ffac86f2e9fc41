"""`erllama.llama_cpp.Llama` returns what `llama_cpp.Llama` returns, and its prompts are warm."""

from __future__ import annotations

import gc
import itertools
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import erllama
from erllama.llama_cpp import Llama, LlamaDiskCache, LlamaGrammar, LlamaRAMCache, LogitsProcessorList
from erllama.llama_cpp.chats import ChatRun, clean_messages
from erllama.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from erllama.llama_cpp.tool_prompting import needs_tool_prompt, with_tool_prompt
from erllama.testing.scripted import write_scripted
from support.chat.scripted_model import CALL, TOOLS, model_replying, user
from support.hub_server import serve_hub
from support.subprocesses import must_run

LONG = "The quick brown fox jumps over the lazy dog. " * 10
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def llama(tiny_gguf: Path) -> Iterator[Llama]:
    with erllama.Cache() as cache:
        llama = Llama(tiny_gguf, n_ctx=512, n_threads=1, cache=cache)
        yield llama
        llama.close()


@pytest.fixture
def abc(tmp_path: Path) -> Iterator[Llama]:
    """A model that counts: c follows b follows a, and the reply ends after d."""
    follows = {"a": "b", "b": "c", "c": "d", "\n": "a"}
    path = write_scripted(tmp_path / "abc.gguf", follows, chat_template=TEMPLATE)
    with erllama.Cache() as cache:
        llama = Llama(path, n_ctx=256, n_threads=1, cache=cache)
        yield llama
        llama.close()


# --- completions


def test_a_completion_has_the_keys_of_llama_cpp_python(llama: Llama) -> None:
    result: Any = llama("Once", max_tokens=5, seed=1)
    assert set(result) == {"id", "object", "created", "model", "choices", "usage"}
    assert (result["object"], result["model"]) == ("text_completion", llama.model_path)
    choice = result["choices"][0]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    n_prompt = len(llama.tokenize(b"Once"))
    assert result["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": 5, "total_tokens": n_prompt + 5}


def test_the_chunks_of_a_stream_make_up_the_whole_text(llama: Llama) -> None:
    whole: Any = llama("Once", max_tokens=20, seed=7)
    chunks: list[Any] = list(llama("Once", max_tokens=20, seed=7, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_reply_without_a_limit_ends_with_the_context_or_its_end_token(abc: Llama) -> None:
    assert text(abc("a", max_tokens=None, temperature=0)) == "bcd"
    assert abc.create_completion("a", max_tokens=-1, temperature=0)["choices"][0]["finish_reason"] == "stop"  # type: ignore[index]


def test_stop_strings_end_a_reply_and_echo_repeats_the_prompt(abc: Llama) -> None:
    result: Any = abc("a", stop=["d"], echo=True, temperature=0)
    assert (text(result), result["choices"][0]["finish_reason"]) == ("abc", "stop")
    assert text(abc("a", stop="c", temperature=0)) == "b"


def test_a_prompt_that_fills_the_context_is_a_value_error(llama: Llama) -> None:
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llama(list(range(3, 259)) * 2)


def test_seeds_are_derived_and_return_with_a_saved_state(llama: Llama) -> None:
    assert text(llama("Once", seed=5)) == text(llama("Once", seed=5))
    llama.set_seed(1337)
    state = pickle.loads(pickle.dumps(llama.save_state()))  # noqa: S301
    first, second = text(llama("Once")), text(llama("Once"))
    llama.load_state(state)
    assert text(llama("Once")) == first != second


def test_logprobs_have_one_item_per_token(abc: Llama) -> None:
    result: Any = abc("a", logprobs=2, temperature=0)
    logprobs = result["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"]) == (["b", "c", "d"], [1, 2, 3])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob > -0.1
        assert len(top) >= 2
    streamed: Any = list(abc("a", logprobs=2, temperature=0, stream=True))
    offsets = [c["choices"][0]["logprobs"]["text_offset"] for c in streamed if c["choices"][0]["logprobs"]]
    assert list(itertools.chain(*offsets)) == [1, 2, 3]


def test_a_grammar_constrains_the_reply(llama: Llama, tmp_path: Path) -> None:
    (tmp_path / "answer.gbnf").write_text('root ::= "yes" | "no"')
    for grammar in (LlamaGrammar.from_file(tmp_path / "answer.gbnf"), LlamaGrammar.from_string('root ::= "yes"')):
        assert text(llama("Once", grammar=grammar)) in ("yes", "no")
    schema = LlamaGrammar.from_json_schema('{"type": "object", "properties": {}, "additionalProperties": false}')
    assert text(llama("Once", grammar=schema, max_tokens=20)).replace(" ", "").startswith("{")
    with pytest.raises(ValueError, match="pass a LlamaGrammar"):
        llama("Once", grammar="root ::= x")  # type: ignore[arg-type]
    with pytest.raises(erllama.GrammarError):
        LlamaGrammar.from_string("root ::= (")


def test_callbacks_change_logits_and_end_replies(abc: Llama) -> None:
    token = abc.tokenize(b"x", add_bos=False)[0]
    seen = []

    def prefer(ids: Any, scores: Any) -> Any:  # noqa: ANN401
        seen.append(list(ids))
        scores[token] = 100.0
        return scores

    assert text(abc("a", logits_processor=LogitsProcessorList([prefer]), max_tokens=3, temperature=0)) == "xxx"
    assert seen[0] == abc.tokenize(b"a")
    for stream in (False, True):
        result: Any = abc("a", stopping_criteria=lambda ids, logits: len(ids) >= 3, temperature=0, stream=stream)
        chunks = list(result) if stream else [result]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "bc"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    biased = abc("a", logit_bias={token: 1000.0}, max_tokens=2, temperature=0)
    assert text(biased) == "xx"


def test_a_draft_model_leaves_the_reply_as_it_is(tmp_path: Path) -> None:
    path = write_scripted(tmp_path / "loop.gguf", {"a": "b", "b": "c", "c": "a"})
    replies = []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=4)):
        with erllama.Cache() as cache:
            llama = Llama(path, n_ctx=256, n_threads=1, cache=cache, draft_model=draft)
            replies.append(text(llama("abcabcabc", max_tokens=30, temperature=0)))
            llama.close()
    assert replies[0] == replies[1] == "abc" * 10


# --- chats


def test_a_chat_has_the_keys_of_llama_cpp_python(abc: Llama) -> None:
    result: Any = abc.create_chat_completion([{"role": "user", "content": "a"}], temperature=0, logprobs=True)
    assert set(result) == {"id", "object", "created", "model", "choices", "usage"}
    assert result["choices"][0]["message"] == {"role": "assistant", "content": "bcd"}
    assert [each["token"] for each in result["choices"][0]["logprobs"]["content"]] == ["b", "c", "d"]
    chunks: list[Any] = list(
        abc.create_chat_completion([{"role": "user", "content": "a"}], temperature=0, stream=True)
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert "".join(delta.get("content", "") for delta in deltas) == "bcd"
    assert (deltas[-1], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "stop")


def test_a_response_format_constrains_a_chat(llama: Llama) -> None:
    schema = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"]}
    strict = schema | {"additionalProperties": False}
    for format in (
        {"type": "json_object", "schema": strict},
        {"type": "json_schema", "json_schema": {"schema": strict}},
    ):
        result: Any = llama.create_chat_completion([user("a")], response_format=format, max_tokens=60)
        assert "".join(result["choices"][0]["message"]["content"].split()).startswith('{"ok":true')
    with pytest.raises(ValueError, match="json_object"):
        llama.create_chat_completion([user("a")], response_format={"type": "json"})


def test_tool_calls_are_in_the_message_and_in_the_stream() -> None:
    with model_replying(f"<think>hm</think>Well. {CALL}") as model:
        run = ChatRun(model, "m", [user("time?")], {"tools": TOOLS}, on_end=lambda tokens: None)
        choice = run.whole()["choices"][0]
        message = choice["message"]
        assert (message["content"], message["reasoning_content"], choice["finish_reason"]) == (
            "Well.",
            "hm",
            "tool_calls",
        )
        function = {"name": "get_time", "arguments": '{"city": "Oslo"}'}
        assert message["function_call"] == function
        assert [call["function"] for call in message["tool_calls"]] == [function]
        deltas: list[Any] = [chunk["choices"][0] for chunk in run.chunks()]
        calls = [call for each in deltas for call in each["delta"].get("tool_calls", [])]
        assert [(call["index"], call["function"]) for call in calls] == [(0, function)]
        assert deltas[-1]["finish_reason"] == "tool_calls"


def test_a_template_without_tools_gets_them_in_messages() -> None:
    call = '{"name": "get_time", "arguments": {"city": "Oslo"}}'
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '\t' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\t' }}{% endif %}"
    )
    with model_replying(call, template=template) as model:
        options: dict[str, Any] = {"tools": TOOLS}
        assert needs_tool_prompt(model, options)
        messages, options = with_tool_prompt(model, [user("time?")], options)
        assert "get_time" in str(messages[0]["content"])
        reply: Any = ChatRun(model, "m", messages, options, on_end=lambda tokens: None).whole()
        calls = reply["choices"][0]["message"]["tool_calls"]
        assert calls[0]["function"]["arguments"] == '{"city": "Oslo"}'
        result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "noon"}
        messages, _ = with_tool_prompt(
            model, clean_messages([user("time?"), reply["choices"][0]["message"], result]), {"tools": TOOLS}
        )
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert (messages[1]["content"], messages[2]["content"]) == (call, "The function returned: noon")


# --- token by token


def test_generate_goes_on_after_the_end_and_takes_sent_tokens(abc: Llama) -> None:
    ids = abc.tokenize(b"a")
    letters = {letter: abc.tokenize(letter.encode(), add_bos=False)[0] for letter in "abcd\n"}
    end = abc.token_eos()
    generator = abc.generate(ids, temp=0.0)
    assert list(itertools.islice(generator, 4)) == [letters["b"], letters["c"], letters["d"], end]
    assert abc.n_tokens == len(ids) + 3
    generator.close()
    generator = abc.generate(ids, temp=0.0)
    assert next(generator) == letters["b"]
    assert generator.send([letters["\n"]]) == letters["a"]
    generator.close()
    assert list(abc.generate(ids, grammar=LlamaGrammar.from_string('root ::= "bc"'))) == [
        letters["b"],
        letters["c"],
        end,
    ]


def test_generate_fills_the_context_and_ends(abc: Llama) -> None:
    tokens = list(abc.generate(abc.tokenize(b"a"), temp=0.0))
    assert len(tokens) == 256 - len(abc.tokenize(b"a"))


def test_eval_and_sample_continue_the_present_tokens(abc: Llama) -> None:
    abc.eval(abc.tokenize(b"a"))
    abc.eval(abc.tokenize(b"b", add_bos=False))
    assert abc.input_ids.tolist() == list(abc.eval_tokens) == abc.tokenize(b"ab")
    assert abc.detokenize([abc.sample(temp=0.0)]) == b"c"
    assert abc.detokenize([abc.sample(temp=0.0, idx=abc.n_tokens - 2)]) == b"b"
    abc.n_tokens -= 1
    assert abc.detokenize([abc.sample(temp=0.0)]) == b"b"
    abc.reset()
    with pytest.raises(ValueError, match="call eval first"):
        abc.sample()
    with pytest.raises(erllama.Unsupported, match="logits are not kept"):
        _ = abc.scores


def test_tokens_become_bytes_and_bytes_tokens(llama: Llama) -> None:
    ids = llama.tokenize("Grüße".encode())
    assert ids[0] == llama.token_bos()
    assert llama.detokenize(ids) == "Grüße".encode()
    assert llama.tokenizer().decode(llama.tokenizer().encode("Grüße")) == "Grüße"
    assert (llama.n_ctx(), llama.n_vocab(), llama.n_embd()) == (512, llama.erllama_model.n_vocab, 64)
    assert llama.metadata["general.architecture"] == "llama"
    assert all(isinstance(value, str) for value in llama.metadata.values())
    with pytest.raises(erllama.PromptError, match="not bytes"):
        llama.tokenize("text")  # type: ignore[arg-type]


# --- embeddings


def test_embeddings_are_pooled_as_asked(tiny_gguf: Path, llama: Llama) -> None:
    rows = llama.embed("Once")  # the file names no pooling, so there is a vector for each token
    assert np.shape(rows) == (len(llama.tokenize(b"Once")), 64)
    with erllama.Cache() as cache:
        mean = Llama(tiny_gguf, n_ctx=256, n_threads=1, embedding=True, pooling_type=1, cache=cache)
        result: Any = mean.create_embedding(["Once", "Twice"])
        assert np.allclose(result["data"][0]["embedding"], np.mean(rows, axis=0), atol=1e-4)
        n_tokens = len(mean.tokenize(b"Once")) + len(mean.tokenize(b"Twice"))
        assert result["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        assert np.isclose(np.linalg.norm(mean.embed("Once", normalize=True)), 1)
        assert mean.pooling_type() == 1
        mean.close()


# --- caches and lifetime


def test_prompts_are_warm_after_a_restart(tiny_gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.setenv("ERLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("erllama._model.default_cache._default_cache", None)
    for expected in (None, "disk"):
        llama = Llama(tiny_gguf, n_ctx=1024, n_threads=1)
        llama(LONG, max_tokens=1)
        hit = llama.erllama_model.last_cache_hit
        assert hit is not None
        assert hit.tier == expected
        llama.close()
        llama.erllama_model.cache.close()  # as the end of the process does


def test_set_cache_shares_prompts_between_models(tiny_gguf: Path, tmp_path: Path) -> None:
    for make in (LlamaRAMCache, lambda: LlamaDiskCache(str(tmp_path / "kv"), 1 << 24)):
        cache = make()
        for warm in (False, True):
            llama = Llama(tiny_gguf, n_ctx=1024, n_threads=1, cache=erllama.Cache())
            llama.set_cache(cache)
            llama(LONG, max_tokens=1)
            hit = llama.erllama_model.last_cache_hit
            assert hit is not None
            assert (hit.tokens > 0) == warm
            llama.erllama_model.cache.flush()
            assert cache.cache_size > 0
            llama.close()
        with pytest.raises(erllama.Unsupported, match="set_cache is enough"):
            cache[(1, 2)] = None
        cache.close()


def test_a_llama_that_is_dropped_unloads_without_a_warning(tiny_gguf: Path) -> None:
    llama = Llama(tiny_gguf, n_ctx=256, n_threads=1, cache=erllama.Cache())
    before = len(erllama.list_models())
    del llama
    gc.collect()
    deadline = time.monotonic() + 60
    while len(erllama.list_models()) >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(erllama.list_models()) == before - 1


def test_a_llama_is_pickled_as_its_options(tiny_gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.setenv("ERLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("erllama._model.default_cache._default_cache", None)
    llama = Llama(str(tiny_gguf), n_ctx=256, n_threads=1)
    copy = pickle.loads(pickle.dumps(llama))  # noqa: S301
    assert text(copy("Once", temperature=0)) == text(llama("Once", temperature=0))
    for each in (llama, copy):
        each.close()
    llama.erllama_model.cache.close()


def test_from_pretrained_downloads_one_matching_file(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_gguf.read_bytes()
    files = {"a-Q4_0.gguf": b"GGUF other", "b/a-Q8_0.gguf": content, "README.md": b"# A model"}
    with serve_hub(files, tmp_path / "home", monkeypatch) as server, erllama.Cache() as cache:
        options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "cache": cache}
        llama = Llama.from_pretrained(server.repository, "*Q8_0.gguf", ["README*"], tmp_path / "here", **options)
        assert Path(llama.model_path) == tmp_path / "here" / "b" / "a-Q8_0.gguf"
        assert text(llama("Once", temperature=0, max_tokens=2))
        llama.close()
        assert (tmp_path / "here" / "README.md").read_bytes() == files["README.md"]
        Llama.from_pretrained(server.repository, "b/*", cache_dir=tmp_path / "cache", **options).close()
        assert list((tmp_path / "cache").glob("models--org--repo/snapshots/*/b/a-Q8_0.gguf"))
        for pattern, problem in (("*.bin", "no model"), ("*.gguf", "several models")):
            with pytest.raises(erllama.DownloadError, match=problem):
                Llama.from_pretrained(server.repository, pattern)


# --- under the name llama_cpp


def test_the_module_is_installed_under_the_name_llama_cpp() -> None:
    use = "import llama_cpp, llama_cpp.llama_grammar as g; assert llama_cpp.LlamaGrammar is g.LlamaGrammar; "
    use += "from llama_cpp import Llama; from llama_cpp.llama_chat_format import Llava15ChatHandler; "
    use += "assert Llama.__module__ == 'erllama.llama_cpp.llama'; print(llama_cpp.__version__)"
    assert must_run(f"import erllama.llama_cpp; erllama.llama_cpp.install(); {use}").strip() == "0.3.36"
    path = must_run("import runpy; runpy.run_module('erllama.llama_cpp', run_name='__main__')").strip()
    assert must_run(f"import sys; sys.path.insert(0, {path!r}); {use}").strip() == "0.3.36"


def test_names_of_libllama_functions_are_explained() -> None:
    import erllama.llama_cpp

    with pytest.raises(AttributeError, match="no bindings"):
        _ = erllama.llama_cpp.llama_model_default_params


def text(completion: Any) -> str:  # noqa: ANN401
    return str(completion["choices"][0]["text"])
