"""The options of llama-cpp-python are honoured or refused, and its chat formats render what it renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import erllama
from erllama.llama_cpp import Llama, constants, llama_chat_format
from erllama.llama_cpp.llama_chat_format import CHAT_FORMATS, template_of
from erllama.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from erllama.llama_cpp.loading import LEGACY, REFUSED, load_options
from erllama.llama_cpp.sampling import MinTokensLogitsProcessor, StoppingCriteriaList, sampling_options, seed_of
from erllama.testing.models import write_lora

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
OTHER_VALUES: dict[str, object] = {
    "attention_type": 1,
    "chat_handler": print,
    "lora_base": "base.gguf",
    "numa": True,
    "op_offload": True,
    "spm_infill": True,
    "tokenizer": object(),
    "n_parts": 2,
    "f16_kv": False,
    "low_vram": True,
    "mul_mat_q": False,
    "offload_kqv": False,
    "split_mode": 3,
    "rope_scaling_type": 3,
    "type_k": 12,
    "pooling_type": 4,
}


@pytest.mark.parametrize("name", [*REFUSED, *LEGACY])
def test_each_refused_option_has_a_value_that_is_tested(name: str) -> None:
    assert name in OTHER_VALUES


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_an_option_that_cannot_be_honoured_is_refused(tiny_gguf: Path, name: str, value: object) -> None:
    options: Any = {name: value, "n_gpu_layers": 1}
    with pytest.raises(ValueError, match=name):
        Llama(tiny_gguf, n_ctx=256, **options)


def test_unknown_options_and_missing_files_are_value_errors(tiny_gguf: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'n_ctx'"):
        Llama(tiny_gguf, n_ctxt=256)
    with pytest.raises(ValueError, match="does not exist"):
        Llama("nowhere.gguf")


def test_options_become_those_of_load_model(tiny_gguf: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora.gguf", seed=1)
    with erllama.Cache() as cache:
        llama = Llama(
            tiny_gguf,
            n_ctx=300,
            n_batch=64,
            n_threads=1,
            type_k=constants.GGML_TYPE_F32,
            kv_overrides={"general.name": "mine"},
            rope_freq_base=20000.0,
            lora_path=str(adapter),
            lora_scale=0.5,
            f16_kv=True,
            n_parts=-1,
            cache=cache,
        )
        model = llama.erllama_model
        assert (llama.n_ctx(), llama.context_params.n_ctx, llama.context_params.n_batch) == (512, 512, 64)
        assert model.info.kv_type_k == "f32"
        assert llama.metadata["general.name"] == "mine"
        assert [each.scale for each in model.adapters] == [0.5]
        llama.close()


def test_a_load_is_not_refused_for_its_memory(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python lets the system decide, and `Llama` has no option for the check."""
    monkeypatch.setattr("erllama.models.fit.available_memory", lambda: 0)
    with erllama.Cache() as cache:
        llama = Llama(tiny_gguf, n_ctx=256, n_threads=1, cache=cache)
        assert llama.n_ctx() == 256
        llama.close()


def test_n_ctx_0_is_the_training_context(tiny_gguf: Path) -> None:
    with erllama.Cache() as cache, erllama.load_model(tiny_gguf, vocab_only=True, cache=cache) as model:
        n_ctx_train = model.info.n_ctx_train
    values: dict[str, Any] = {**_defaults(), "n_ctx": 0}
    assert load_options(tiny_gguf, values)["n_ctx"] == n_ctx_train


def _defaults() -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(Llama.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_the_defaults_ask_for_the_models_own_values(tiny_gguf: Path) -> None:
    options = load_options(tiny_gguf, _defaults())
    assert not [name for name in options if name.startswith(("rope_freq", "yarn_"))]
    assert (options["flash_attn"], options["n_gpu_layers"], options["n_ctx"]) == ("auto", 0, 512)


def test_vocab_only_tokenizes(tiny_gguf: Path) -> None:
    llama = Llama(tiny_gguf, vocab_only=True, cache=erllama.Cache())
    assert llama.detokenize(llama.tokenize(b"Hello")) == b"Hello"
    with pytest.raises(erllama.VocabularyOnly):
        llama("Hello")
    llama.close()


def test_sampling_arguments_become_options() -> None:
    found = sampling_options(10, 64, None, temp=-1.0)
    assert found["samplers"] == ("penalties",)
    assert "temperature" not in found
    assert sampling_options(10, 64, None, temp=0.0)["temperature"] == 0
    assert sampling_options(10, 64, None, top_k=-1)["top_k"] == 0
    mirostat = sampling_options(10, 64, None, mirostat_mode=2, mirostat_tau=4.0)
    assert (mirostat["mirostat"], mirostat["mirostat_tau"], mirostat["temperature"]) == (2, 4.0, 1.0)
    for name, value in (("tfs_z", 0.5), ("penalize_nl", False)):
        with pytest.raises(ValueError, match=name):
            sampling_options(10, 64, None, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mirostat_mode with"):
        sampling_options(10, 64, None, mirostat_mode=1, logits_processor=lambda ids, scores: scores)
    assert (seed_of(7), seed_of(-1), seed_of(constants.LLAMA_DEFAULT_SEED), seed_of(2**32)) == (7, None, None, 0)


def test_callback_lists_apply_their_functions_in_order() -> None:
    ids = np.array([1, 2], np.intc)
    assert StoppingCriteriaList([lambda i, s: False, lambda i, s: len(i) == 2])(ids, np.zeros(3, np.single))
    minimum = MinTokensLogitsProcessor(1, 2)
    assert minimum(ids, np.zeros(3, np.single))[2] == -np.inf
    assert minimum(np.append(ids, ids[:1]), np.zeros(3, np.single))[2] == 0


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
         "<|im_start|>assistant\nA<|im_end|>\n"
         "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"),
        ("llama-2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]"),
        ("llama-3", "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral-instruct", "[INST] U [/INST]A</s>[INST] V [/INST]"),
        ("gemma", "<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
         "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n"),
        ("zephyr", "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n"),
        ("alpaca", "S\n\n### Instruction: U\n\n### Response: A</s>### Instruction: V\n\n### Response:"),
    ],
)  # fmt: skip
def test_a_chat_format_renders_its_prompt(name: str, prompt: str) -> None:
    assert erllama.render_chat_template(template_of(name), MESSAGES) == prompt


def test_formats_have_default_system_messages_and_formatters() -> None:
    assert "helpful assistant" in erllama.render_chat_template(CHAT_FORMATS["qwen"], MESSAGES[1:2])
    assert "curious user" in erllama.render_chat_template(CHAT_FORMATS["vicuna"], MESSAGES[1:2])
    assert llama_chat_format.format_mistral_instruct(messages=MESSAGES[1:2]).prompt == "[INST] U [/INST]"
    config = {"chat_template": CHAT_FORMATS["chatml"], "bos_token": "<s>", "eos_token": "</s>"}
    formatter = llama_chat_format.hf_tokenizer_config_to_chat_formatter(config)
    response = formatter(messages=MESSAGES[1:2])
    assert response.prompt.endswith("<|im_start|>assistant\n<|im_end|>\n")
    assert response.stop == ["</s>", "<s>"]
    with pytest.raises(ValueError, match="eos_token"):
        llama_chat_format.hf_tokenizer_config_to_chat_formatter({"chat_template": "x", "bos_token": ""})


def test_other_formats_and_image_handlers_are_refused(tiny_gguf: Path) -> None:
    with pytest.raises(ValueError, match="leave it out"), erllama.Cache() as cache:
        Llama(tiny_gguf, n_ctx=256, n_threads=1, chat_format="functionary", cache=cache)
    assert erllama.list_models() == []
    with pytest.raises(erllama.Unsupported, match="text only"):
        llama_chat_format.Llava15ChatHandler(clip_model_path="clip.gguf")


def test_prompt_lookup_proposes_what_followed_earlier() -> None:
    find = LlamaPromptLookupDecoding.find_candidate_pred_tokens
    assert find(np.array([1, 2, 3, 4, 1, 2], np.intc), 2, 2).tolist() == [3, 4]
    assert find(np.array([5, 2, 9, 1, 2], np.intc), 2, 5).tolist() == [9, 1, 2]
    assert find(np.array([1, 2, 3], np.intc), 2, 2).tolist() == []
