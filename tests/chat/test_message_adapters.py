"""What single families' templates ask of messages, and of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

import erllama
from erllama.chat.message_adapters import adapt_messages, alternate_roles, encode_arguments
from erllama.chat.messages import normalize_messages
from support.chat.tool_calls import TOOLS
from support.paths import SHARED
from support.scripted_backend import PieceVocabulary, ScriptedBackend, scripted_reply

Message = dict[str, object]
TEMPLATES = SHARED / "templates"
CONVERSATION: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I should look.",
        "tool_calls": [
            {"id": "call_0123456789", "type": "function",
             "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_0123456789", "name": "get_weather", "content": "rain"},
]  # fmt: skip


def model_with(template: str, output: str = "x") -> erllama.Model:
    vocabulary = PieceVocabulary(end="<|eog|>")
    backend = ScriptedBackend(
        vocabulary, scripted_reply(vocabulary, vocabulary.byte_tokens(output)), chat_templates={"default": template}
    )
    return erllama.load_backend(backend, cache=erllama.Cache())


def test_nine_letter_ids_are_generated_for_templates_that_need_them() -> None:
    messages = normalize_messages(CONVERSATION)
    changed = adapt_messages(messages, "{% if call.id|length != 9 %}")
    call, result = changed[1]["tool_calls"][0]["id"], changed[2]["tool_call_id"]  # type: ignore[index]
    assert call == result
    assert len(str(call)) == 9
    assert str(call).isalnum()
    assert adapt_messages(changed, "{% if call.id|length != 9 %}") == changed, "the same ids are kept"
    assert adapt_messages(messages, "{{ call.id }}") == messages == normalize_messages(CONVERSATION)


def test_developers_are_the_system_for_templates_without_that_role() -> None:
    messages = normalize_messages([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}])
    assert adapt_messages(messages, "{{ m.role }} {{ developer_token }}")[0] == {"role": "system", "content": "d"}
    for known in ("{% if m.role == 'developer' %}", '{% if m.role == "developer" %}'):
        assert adapt_messages(messages, known) == messages


def test_thinking_is_dropped_for_templates_that_allow_no_text_with_it() -> None:
    messages = normalize_messages(CONVERSATION)
    spoken = [messages[0], {**messages[1], "content": "Let me see."}, messages[2]]
    assert "reasoning_content" not in adapt_messages(spoken, "{{ message.thinking }}")[1]
    assert adapt_messages(messages, "{{ message.thinking }}") == messages
    assert adapt_messages(spoken, "{{ message.reasoning_content }} <thinking>") == spoken


def test_arguments_are_text_for_templates_that_concatenate_them() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ 'call: ' + c.function.arguments }}"
        "{% endfor %}{% endfor %}"
    )
    with model_with(template) as model:
        assert model.render_chat(CONVERSATION) == 'call: {"city": "Paris"}'
    with model_with(template.replace("'call: ' + c.function.arguments", "raise_exception('no')")) as model:
        with pytest.raises(erllama.TemplateError, match="no"):
            model.render_chat(CONVERSATION)
    assert encode_arguments(normalize_messages(CONVERSATION))[0] == CONVERSATION[0]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_opened_by_the_prompt_is_a_call(choice: str) -> None:
    template = "{{ messages[-1].content }}{% if tools %}{% endif %}\t>>>{# recipient #}"
    with model_with(template, ">>>get_weather\n" + '{"city": "Paris"}') as model:
        reply = model.chat(
            [{"role": "user", "content": "Q"}], tools=TOOLS, tool_format="functionary", tool_choice=choice
        )
        assert [(call.name, call.arguments) for call in reply.tool_calls] == [("get_weather", {"city": "Paris"})]
        assert reply.raw_tool_calls == (b'>>>get_weather\n{"city": "Paris"}',)
    with model_with(template, ">>>all\nhello") as model:
        reply = model.chat([{"role": "user", "content": "Q"}], tools=TOOLS, tool_format="functionary")
        assert (reply.text, reply.tool_calls) == ("hello", ())


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="the folder of templates beside the checkout is missing")
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_each_family_template_renders_a_call_and_its_result(path: Path) -> None:
    refused = {
        "Kimi-K2-Instruct": "append",  # changes a list, which the sandbox of transformers refuses
        "google-gemma-2-2b-it": "alternate",  # does not support tools
    }
    with model_with(path.read_text()) as model:
        if path.stem in refused:
            with pytest.raises(erllama.TemplateError, match=refused[path.stem]):
                model.render_chat(CONVERSATION)
            return
        tools = TOOLS if model._chat_requests.chats.templates.choose().uses("tools") else None
        text = model.render_chat([*CONVERSATION, {"role": "assistant", "content": "It rains."}], tools=tools)
        assert "It rains." in text


ALTERNATING = (
    "{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{%- for m in rest if m.role != 'tool' and not m.tool_calls %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def test_messages_of_one_role_are_joined_for_templates_that_refuse_them() -> None:
    beginning = [
        {"role": "developer", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    with model_with(ALTERNATING) as model:
        assert model.render_chat(beginning) == "[system]a\n\nb[user]c\n\nd"
        reply = [{"role": "assistant", "content": "e"}, {"role": "system", "content": "f"}]
        assert model.render_chat([*beginning, *reply]) == "[system]a\n\nb[user]c\n\nd[assistant]e[user]f"
        with pytest.raises(erllama.TemplateError, match="alternate"):
            model.render_chat([*beginning, reply[0], reply[0]])
    with model_with(ALTERNATING.replace("{{ raise_exception('roles must alternate') }}", "")) as model:
        assert "[user]c[user]d" in model.render_chat(beginning)


def test_messages_that_alternate_are_the_same_objects() -> None:
    messages = normalize_messages([{"role": "system", "content": "s"}, *CONVERSATION])
    assert all(a is b for a, b in zip(alternate_roles(messages), messages, strict=True))
