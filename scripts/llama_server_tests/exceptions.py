"""The tests that llama-server passes and `erllama.server` does not: patterns of their names, and reasons."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

_ROUTER = "router: the server starts without a model and loads models from files on request"
_PAGE = "a web page: this server has none"
_VISION = "vision: models here read text"
_OPEN_CORS = "pages of any origin may call llama-server; here none may unless `cors_origins` lists it"
_END_OF_THINKING = "the prompt stays as the template writes it; the engine ends the thinking when the reply begins"
_BUILT_IN = "llama.cpp's built-in templates, by name: here a template is a text or a file"
_VERBOSE = "`__verbose`, the prompt as llama-server's log has it, in the answers of other APIs"
_IMAGE_STATUS = "an image is refused with 400, an error of the request; llama-server answers 500"
_TOOLS_UNSEEN = "tools are an error if the chat template does not write them: the model would not know them"
_TYPES = "a schema without `type` allows every type, as JSON Schema defines; `items` alone is no type"
_TWO_REPLIES = "two replies in a row at the end are no error: agents send them after a reply that was cut short"
_PROGRESS = "the engine reports no progress within a prompt"

EXCEPTIONS: Mapping[str, str] = {
    "test_basic.py::test_no_ui": _PAGE,
    "test_basic.py::test_server_model_aliases_and_tags": "tags of models: models here have names and aliases",
    "test_security.py::test_access_static_assets_without_api_key": _PAGE,
    "test_security.py::test_cors_options*": _OPEN_CORS,
    "test_security.py::test_cors_origins_*": _ROUTER,
    "test_security.py::test_cors_proxy_*": "MCP: a proxy for pages that call MCP servers",
    "test_security.py::test_local_media_file(*-True)": _VISION,
    "test_template.py::test_reasoning(deepseek*-off-*": _END_OF_THINKING,
    "test_template.py::test_reasoning(Qwen-QwQ*-off-*": _END_OF_THINKING,
    "test_template.py::test_reasoning(Cohere*-off-*": _END_OF_THINKING,
    "test_chat_completion.py::test_chat_template": _BUILT_IN,
    "test_chat_completion.py::test_apply_chat_template": _BUILT_IN,
    "test_chat_completion.py::test_chat_template_assistant_prefill*": _VERBOSE,
    "test_chat_completion.py::test_chat_template_continue_final_message_vllm_compat": _VERBOSE,
    "test_chat_completion.py::test_verbose_debug": _VERBOSE,
    "test_chat_completion.py::test_return_progress*": _PROGRESS,
    "test_chat_completion.py::test_completion_with_response_format(response_format1-*": _TYPES,
    "test_chat_completion.py::test_invalid_chat_completion_req(messages7)": _TWO_REPLIES,
    "test_compat_anthropic.py::test_anthropic_tool_result_with_image": _IMAGE_STATUS,
    "test_compat_anthropic.py::test_anthropic_vision_format_accepted": _IMAGE_STATUS,
    "test_compat_anthropic.py::test_anthropic_tool_use_basic": _TOOLS_UNSEEN,
    "test_compat_anthropic.py::test_anthropic_tool_streaming": _TOOLS_UNSEEN,
    "test_compat_anthropic.py::test_anthropic_streaming_content_block_indices": _TOOLS_UNSEEN,
    "test_compat_oai_responses.py::test_responses_stream_with_llama_telemetry": _PROGRESS,
    "test_template.py::test_reasoning(deepseek*-tools2)": _TOOLS_UNSEEN,
    "test_metrics.py::test_metrics_timings_on_prompt_progress": _PROGRESS,
}


def reason(test: str) -> str | None:
    """Return why a test that llama-server passes need not pass; None if it must.

    Args:
        test: such as "test_basic.py::test_no_ui".
    """
    # fnmatch reads brackets as a set of characters, and parametrized tests have brackets.
    plain = test.replace("[", "(").replace("]", ")")
    return next((why for pattern, why in EXCEPTIONS.items() if fnmatchcase(plain, pattern)), None)
