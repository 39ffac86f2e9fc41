"""Chat templates for the suite, in the shapes that models come with; none is of any model."""

from __future__ import annotations

# Roles in brackets, tools in the system prompt as JSON, results grouped into one turn, thinking cut from the past.
TAGGED = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is none or content is undefined -%}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' or 'text' in part -%}{{- part.text -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_query=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = (messages | length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|open|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {{- text_of(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- "# Functions\\n<functions>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</functions><|close|>\\n" }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|open|>system\\n' + text_of(messages[0].content) + '<|close|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|open|>' + message.role + '\\n' + text_of(message.content) + '<|close|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- set content = text_of(message.content) %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|open|>assistant' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\\n<call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|close|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (loop.previtem and loop.previtem.role != "tool") %}{{- '<|open|>user' }}{%- endif %}
        {{- '\\n<result>\\n' }}{{- text_of(message.content) }}{{- '\\n</result>' }}
        {%- if loop.last or (loop.nextitem.role != "tool") %}{{- '<|close|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|open|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# Headers between identifiers, a date, tools indented, one call at a time.
HEADERS = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model calls one tool at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|/header|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|end|>" }}
    {%- else %}
        {{- "<|header|>ipython<|/header|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""

# Strict turns, identifiers of nine characters, filters with attributes.
BRACKETS = """\
{%- if messages and messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS][" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("Identifiers of calls have length 9!") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}
        {{- message["content"] + eos_token }}
        {%- endgeneration %}
    {%- elif message["role"] == "tool" %}
        {{- '[RESULT]{"content": ' + message.content | string + ', "id": "' ~ message.tool_call_id ~ '"}[/RESULT]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

# Types of parameters written by macros that call themselves; channels.
TYPED = """\
{%- macro type_of(spec, required, is_nullable=false) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}{{- type_of(spec['items'], required) + "[]" -}}{%- else -%}any[]{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") -}}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\\n" -}}
        {%- for name, value in spec.properties | dictsort -%}
            {{- name -}}
            {%- if name not in (spec.required or []) -%}?{%- endif -%}
            {{- ": " ~ type_of(value, spec.required or []) -}}
            {%- if not loop.last -%}{{- ", " -}}{%- endif -%}
        {%- endfor -%}
        {{- "}" -}}
    {%- else -%}
        {{- spec.type | default("any") | upper | lower -}}
    {%- endif -%}
    {%- if is_nullable or spec.nullable -%}{{- " | null" -}}{%- endif -%}
{%- endmacro -%}
{%- set model_identity = model_identity | default("You are a helpful assistant.", true) -%}
{{- "<|start|>system<|message|>" + model_identity + "\\nReasoning: " + (reasoning_effort or "medium") + "<|end|>" -}}
{%- if tools -%}
    {{- "<|start|>developer<|message|>namespace functions {\\n" -}}
    {%- for tool in tools -%}
        {%- set tool = tool.function -%}
        {{- "// " + tool.description|default('', true)|trim + "\\ntype " + tool.name + " = (_: " -}}
        {{- type_of(tool.parameters or {}, []) -}}
        {{- ") => any;\\n" -}}
    {%- endfor -%}
    {{- "}<|end|>" -}}
{%- endif -%}
{%- set last = namespace(call=none, count=0) -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "thinking" in message and (message.tool_calls or loop.last) -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set last.call = call.function.name -%}
            {%- set last.count = last.count + 1 -%}
            {{- "<|start|>assistant to=functions." ~ call.function.name ~ "<|channel|>commentary json<|message|>" -}}
            {{- call.function.arguments | tojson(separators=(',', ':'), sort_keys=true) ~ "<|call|>" -}}
        {%- endfor -%}
        {%- if message.content -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" -}}
        {%- endif -%}
    {%- elif message.role == 'tool' -%}
        {%- if last.call is none -%}
            {{- raise_exception("A result comes before any call of message " ~ loop.index) -}}
        {%- endif -%}
        {{- "<|start|>functions." + last.call + " to=assistant<|message|>" ~ message.content|tojson ~ "<|end|>" -}}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""

# Documents, loops that end early, call blocks, filters of many kinds, whitespace kept or not.
MIXED = """\
{# What it writes means nothing. #}
{% macro turn(role, upper=false) %}
<{{ role | upper if upper else role }}>{{ caller(role | length) }}</{{ role }}>
{% endmacro %}
{%- with shown = documents | default([], true) %}
{% for document in shown -%}
    [{{ loop.index }}/{{ loop.length }}] {{ document.title | title }}: {{ document.text | replace("\\n", " ") }}
{% else -%}
    no documents
{% endfor -%}
{% endwith %}
{% filter trim %}   {{ (tools or []) | map(attribute="function.name") | unique | join(", ") }}   {% endfilter %}
{% for message in messages if message.role != "system" %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {%- call(length) turn(message['role'], upper=loop.first) -%}
        {{ length }}:{{ message.content | trim | capitalize }}{{ loop.cycle("a", "b") }}{{ loop.revindex }}
    {%- endcall %}
{% endfor %}
{% set summary %}
{{ messages | length }} messages, {{ messages | selectattr("role", "in", ["user", "tool"]) | list | count }} of users
{%- endset %}
{{ summary | indent(2, first=true) }}
{{ (messages | map(attribute="role") | list)[:3] }} {{ messages | rejectattr("content", "string") | list | length }}
{{ messages | map(attribute="content", default="-") | map("string") | map("length") | sort(reverse=true) | first }}
{{ "%s-%03d" | format("n", 7) }} {{ "%.2f" % 2.5 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ -7 % 3 }} {{ [1, 2] + [3] }}
{{ {"b": 1, "a": [true, none, 1.5]} | tojson(indent=2, sort_keys=true) }} {{ ("x" | safe) + "<y>" }} {{ 3.7 | int + 1 | round }}
{{ [3, 1, 2] | sum }} {{ [3, 1, 2] | max }} {{ "a,b,,c".split(",") }} {{ "abc"[::-1] }} {{ ["b", "A"] | sort | join }} {{ missing }}
{% if add_generation_prompt %}<assistant>{% endif %}
"""

SHORT = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}{{ eos_token }}"

ALL = {"tagged": TAGGED, "headers": HEADERS, "brackets": BRACKETS, "typed": TYPED, "mixed": MIXED, "short": SHORT}
