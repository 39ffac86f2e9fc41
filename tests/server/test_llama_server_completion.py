"""llama-server's `/completion`: what a client of llama.cpp's own API relies on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient
from support.llama_server import client_of, events, post, refused

import erllama
from erllama.server import ServedModel


@pytest.fixture
def client(tiny: erllama.Model) -> Iterator[TestClient]:
    with client_of(tiny) as client:
        yield client


def test_answer_has_the_reply_of_the_model(tiny: erllama.Model, client: TestClient) -> None:
    answer = post(client, "/completion", prompt="Once", n_predict=8, temperature=0, return_tokens=True)
    reply = tiny.complete("Once", max_tokens=8, temperature=0)
    assert answer["content"] == reply.text
    assert answer["tokens"] == list(reply.tokens)
    assert answer["stop"] is True
    assert answer["stop_type"] == ("limit" if reply.finish_reason == "length" else "eos")
    assert answer["tokens_evaluated"] == len(tiny.tokenize("Once"))
    assert answer["tokens_predicted"] == len(reply.tokens)
    assert answer["prompt"] == tiny.detokenize(tiny.tokenize("Once"), special=True)
    assert answer["truncated"] is False


def test_tokens_are_absent_unless_requested(client: TestClient) -> None:
    assert post(client, "/completion", prompt="Once", n_predict=2)["tokens"] == []


@pytest.mark.parametrize("n_probs", [0, 3])
def test_stream_has_the_same_text_as_the_answer(client: TestClient, n_probs: int) -> None:
    body = {"prompt": "Once", "n_predict": 12, "seed": 7, "n_probs": n_probs}
    *pieces, end = events(client, "/completions", **body)
    whole = post(client, "/completions", **body)
    assert "".join(each["content"] for each in [*pieces, end]) == whole["content"]
    assert [each["stop"] for each in [*pieces, end]] == [False] * len(pieces) + [True]
    assert sum(len(each["tokens"]) for each in pieces) == whole["tokens_predicted"] == end["tokens_predicted"]
    assert all(each["tokens"] for each in pieces)
    if n_probs:
        assert [len(each["completion_probabilities"]) for each in pieces] == [1] * len(pieces)


def test_probabilities_have_ids_texts_and_bytes(client: TestClient) -> None:
    answer = post(client, "/completion", prompt="Once", n_predict=4, n_probs=5, temperature=0, ignore_eos=True)
    assert len(answer["completion_probabilities"]) == 4
    for each in answer["completion_probabilities"]:
        assert len(each["top_logprobs"]) == 5
        assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"])
        assert each["id"] == each["top_logprobs"][0]["id"]
        assert bytes(each["bytes"]).decode("utf-8", "ignore") == each["token"]


def test_post_sampling_probabilities_sum_to_one(client: TestClient) -> None:
    body = {"prompt": "Once", "n_predict": 6, "seed": 1, "ignore_eos": True, "temperature": 0.7, "top_k": 4}
    answer = post(client, "/completion", **body, n_probs=10, post_sampling_probs=True)
    for each in answer["completion_probabilities"]:
        top = each["top_probs"]
        assert 1 <= len(top) <= 4
        assert sum(token["prob"] for token in top) == pytest.approx(1.0)
        assert {token["id"]: token["prob"] for token in top}[each["id"]] == each["prob"]


def test_post_sampling_probability_of_the_greedy_token_is_one(client: TestClient) -> None:
    body = {"prompt": "Once", "n_predict": 3, "temperature": 0, "ignore_eos": True}
    answer = post(client, "/completion", **body, n_probs=2, post_sampling_probs=True)
    assert [each["prob"] for each in answer["completion_probabilities"]] == [1.0] * 3


def test_post_sampling_probabilities_need_a_small_top_k(client: TestClient) -> None:
    error = refused(client, "/completion", prompt="Once", n_probs=2, post_sampling_probs=True, top_k=0)
    assert (error["code"], error["type"], error["param"]) == (501, "not_supported_error", "top_k")


def test_prompts_are_texts_tokens_or_both(tiny: erllama.Model, client: TestClient) -> None:
    ids = tiny.tokenize("Once").tolist()
    body = {"n_predict": 6, "temperature": 0}
    single = post(client, "/completion", prompt="Once", **body)["content"]
    assert post(client, "/completion", prompt=ids, **body)["content"] == single
    assert post(client, "/completion", prompt={"prompt_string": "Once"}, **body)["content"] == single
    several = post(client, "/completion", prompt=["Once", ids, {"prompt_string": "Once"}], **body)
    assert [(each["index"], each["content"]) for each in several] == [(0, single), (1, single), (2, single)]
    mixed = post(client, "/completion", prompt=[*ids, "ab"], **body)
    assert mixed["tokens_evaluated"] == len(ids) + 2


def test_several_replies_to_one_prompt_differ(client: TestClient) -> None:
    answers = post(client, "/completion", prompt="Once", n_predict=16, n_cmpl=2, seed=3, ignore_eos=True)
    assert [each["index"] for each in answers] == [0, 1]
    assert answers[0]["content"] != answers[1]["content"]
    assert [each["generation_settings"]["seed"] for each in answers] == [3, 4]


def test_settings_name_what_the_request_asked_for(client: TestClient) -> None:
    body = {"prompt": "Once", "n_predict": 3, "top_k": 7, "min_p": 0.2, "stop": ["zz"], "seed": 9}
    settings = post(client, "/completion", **body)["generation_settings"]
    assert {name: settings[name] for name in ("n_predict", "max_tokens", "top_k", "min_p", "stop", "seed")} == {
        **{"n_predict": 3, "max_tokens": 3, "top_k": 7},
        **{"min_p": 0.2, "stop": ["zz"], "seed": 9},
    }


def test_ignore_eos_excludes_every_end_token(tiny: erllama.Model, client: TestClient) -> None:
    answer = post(client, "/completion", prompt="Once", n_predict=2, ignore_eos=True)
    ends = {"bias": None, "token": tiny.info.special_tokens["eos"].id}
    assert ends in answer["generation_settings"]["logit_bias"]
    assert post(client, "/completion", prompt="Once", n_predict=2)["generation_settings"]["logit_bias"] == []


@pytest.mark.parametrize("form", ["pairs of ids", "pairs of texts", "mapping of ids", "mapping of texts"])
def test_biases_exclude_tokens_by_id_and_by_text(tiny: erllama.Model, client: TestClient, form: str) -> None:
    body = {"prompt": "Once", "n_predict": 1, "temperature": 0, "return_tokens": True}
    letters = [chr(code) for code in range(32, 127)]
    wanted = tiny.tokenize("q", add_special=False).tolist()[0]
    keys = [tiny.tokenize(each, add_special=False).tolist()[0] for each in letters] if "ids" in form else letters
    biases: object = [[key, 1000 if letter == "q" else False] for key, letter in zip(keys, letters, strict=True)]
    if "mapping" in form:
        biases = {str(key): 1000 if letter == "q" else -100 for key, letter in zip(keys, letters, strict=True)}
        if "texts" in form:
            biases = {key: value for key, value in biases.items() if not key.isdigit()}
    assert post(client, "/completion", **body, logit_bias=biases)["tokens"] == [wanted]


def test_stop_text_ends_the_reply_and_is_named(client: TestClient) -> None:
    body = {"prompt": "Once", "temperature": 0, "ignore_eos": True}
    text = post(client, "/completion", **body, n_predict=24)["content"]
    stop = next(letter for letter in text if letter.isprintable() and letter != "�")
    answer = post(client, "/completion", **body, n_predict=24, stop=[stop])
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", stop)
    assert answer["content"] == text[: text.index(stop)]


def test_grammar_and_schema_constrain_the_reply(client: TestClient) -> None:
    assert post(client, "/completion", prompt="Once", grammar='root ::= "yes"')["content"] == "yes"
    assert post(client, "/completion", prompt="Once", json_schema={"const": 42})["content"] == "42"


def test_wrong_grammar_is_an_error_of_the_request(client: TestClient) -> None:
    error = refused(client, "/completion", prompt="Once", grammar="root ::= (")
    assert (error["code"], error["type"]) == (400, "invalid_request_error")


def test_clients_may_send_every_sampling_option(client: TestClient) -> None:
    """A page of llama.cpp's sends all settings, also those of steps that do not run."""
    everything = {
        **{"temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
        **{"typical_p": 1, "xtc_probability": 0.5, "xtc_threshold": 0.6, "top_n_sigma": -1, "repeat_last_n": 64},
        **{"repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0.1, "dry_base": 1.75},
        **{"dry_allowed_length": 2, "dry_penalty_last_n": -1, "samplers": ["top_k", "infill", "typ_p"], "seed": -1},
        **{"mirostat": 0, "mirostat_tau": 4, "mirostat_eta": 0.2, "grammar": "", "cache_prompt": True, "id_slot": 0},
    }
    answer = post(client, "/completion", prompt="Once", n_predict=2, **everything)
    assert answer["generation_settings"]["samplers"] == ["top_k", "typ_p"]
    assert post(client, "/completion", prompt="Once", n_predict=2, **{**everything, "mirostat": 2})["content"]
    assert post(client, "/completion", prompt="Once", n_predict=2, **{**everything, "temperature": 0})["content"]


def test_response_fields_choose_and_unnest(client: TestClient) -> None:
    fields = ["content", "generation_settings/n_predict", "absent", "timings/absent"]
    answer = post(client, "/completion", prompt="Once", n_predict=3, response_fields=fields)
    assert sorted(answer) == ["content", "generation_settings/n_predict"]
    assert answer["generation_settings/n_predict"] == 3


def test_timings_count_cached_and_computed_tokens(client: TestClient) -> None:
    prompt = "The same beginning of every prompt, which is long enough to be kept."
    first = post(client, "/completion", prompt=prompt, n_predict=4, ignore_eos=True)["timings"]
    second = post(client, "/completion", prompt=prompt, n_predict=4, ignore_eos=True)["timings"]
    assert first["cache_n"] == 0
    assert second["cache_n"] > 0
    assert first["prompt_n"] == second["prompt_n"] + second["cache_n"]
    assert second["predicted_n"] == 4
    assert second["predicted_per_second"] == pytest.approx(3000 / second["predicted_ms"])


def test_one_token_has_no_rate(client: TestClient) -> None:
    timings = post(client, "/completion", prompt="Once", n_predict=1, ignore_eos=True)["timings"]
    assert (timings["predicted_n"], timings["predicted_per_second"]) == (1, 0.0)


def test_stream_has_timings_of_each_piece_on_request(client: TestClient) -> None:
    *pieces, _ = events(
        client, "/completion", prompt="Once", n_predict=5, ignore_eos=True, timings_per_token=True, n_probs=1
    )
    assert [each["timings"]["predicted_n"] for each in pieces] == [1, 2, 3, 4, 5]


def test_defaults_of_the_model_apply_where_a_request_has_none(tiny: erllama.Model) -> None:
    served = ServedModel(tiny, defaults={"max_tokens": 3, "seed": 42, "temperature": 0.5})
    with client_of(served) as client:
        settings = post(client, "/completion", prompt="Once")["generation_settings"]
        assert (settings["n_predict"], settings["seed"], settings["temperature"]) == (3, 42, 0.5)
        settings = post(client, "/completion", prompt="Once", n_predict=2, seed=1)["generation_settings"]
        assert (settings["n_predict"], settings["seed"], settings["temperature"]) == (2, 1, 0.5)
        assert client.get("/props").json()["default_generation_settings"]["params"]["seed"] == 42


def test_long_prompt_is_refused_with_both_numbers(tiny: erllama.Model, client: TestClient) -> None:
    error = refused(client, "/completion", prompt="x" * 3000, n_predict=1)
    assert (error["code"], error["type"]) == (400, "exceed_context_size_error")
    assert error["n_prompt_tokens"] == 3001
    assert error["n_ctx"] == tiny.n_ctx


def test_stream_refuses_before_its_first_byte(client: TestClient) -> None:
    error = refused(client, "/completion", prompt="x" * 3000, stream=True)
    assert error["type"] == "exceed_context_size_error"


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([1, 2, 99999], "prompt[2]"),
        (["x", [1, None]], "prompt[1]"),
        ({"prompt_string": "x", "multimodal_data": ["aGk="]}, "prompt"),
        (17, "prompt"),
        (None, "prompt"),
    ],
)
def test_wrong_prompt_is_refused_with_its_path(client: TestClient, prompt: object, param: str) -> None:
    error = refused(client, "/completion", prompt=prompt, n_predict=1)
    assert (error["code"], error["type"], error.get("param")) == (400, "invalid_request_error", param)


def test_adapters_of_one_request_are_refused(client: TestClient) -> None:
    error = refused(client, "/completion", prompt="Once", lora=[{"id": 0, "scale": 1.0}])
    assert (error["code"], error["param"]) == (501, "lora")


def test_time_limit_ends_a_reply_after_a_line(client: TestClient) -> None:
    grammar = 'root ::= "\\n" [a-z]+'
    body = {"prompt": "Once", "grammar": grammar, "n_predict": 400, "t_max_predict_ms": 1e-6}
    answer = post(client, "/completion", **body)
    assert answer["content"].startswith("\n")
    assert answer["stop_type"] == "limit"
    assert answer["tokens_predicted"] < 400
