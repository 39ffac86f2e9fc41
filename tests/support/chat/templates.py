"""Chat templates in the forms that model files contain, written for the tests."""

from __future__ import annotations

# Roles in brackets, tools as JSON in the system prompt, results in one turn, thinking removed from earlier turns.
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
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
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
        {{- '[RESULT]{"content": ' + message.content | string }}
        {{- ', "id": "' ~ message.tool_call_id ~ '"}[/RESULT]' }}
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
{{- "<|start|>system<|message|>" + model_identity -}}
{{- "\\nReasoning: " + (reasoning_effort or "medium") + "<|end|>" -}}
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
            {{- "<|start|>assistant to=" ~ call.function.name ~ "<|channel|>commentary json<|message|>" -}}
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
{{ messages | length }} messages
{{ messages | selectattr("role", "in", ["user", "tool"]) | list | count }} of users
{%- endset %}
{{ summary | indent(2, first=true) }}
{{ (messages | map(attribute="role") | list)[:3] }} {{ messages | rejectattr("content", "string") | list | length }}
{{ messages | map(attribute="content", default="-") | map("string") | map("length") | sort(reverse=true) | first }}
{{ "%s-%03d" | format("n", 7) }} {{ "%.2f" % 2.5 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 10 }}
{{ -7 % 3 }} {{ [1, 2] + [3] }}
{{ {"b": 1, "a": [true, none, 1.5]} | tojson(indent=2, sort_keys=true) }}
{{ ("x" | safe) + "<y>" }} {{ 3.7 | int + 1 | round }}
{{ [3, 1, 2] | sum }} {{ [3, 1, 2] | max }} {{ "a,b,,c".split(",") }}
{{ "abc"[::-1] }} {{ ["b", "A"] | sort | join }} {{ missing }}
{% if add_generation_prompt %}<assistant>{% endif %}
"""

SHORT = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endfor %}{{ eos_token }}"

ALL = {"tagged": TAGGED, "headers": HEADERS, "brackets": BRACKETS, "typed": TYPED, "mixed": MIXED, "short": SHORT}

# --- hostile ones

# Templates that try to reach more than data.
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by items": "{{ ''['__class__']['__mro__'] }}",
    "class of a dict": "{{ messages[0].__class__ ~ messages.__class__.__base__ }}",
    "attr filter": "{{ ''|attr('__class__')|attr('mro')() }}",
    "attr by name": "{{ [''] | map('attr', '__class__') | list }}",
    "attribute of map": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "attribute of sort": "{{ ['', 'a'] | sort(attribute='__class__') }}",
    "attribute of selectattr": "{{ [raise_exception] | selectattr('run.__globals__') | first }}",
    "attribute of sum": "{{ [range] | sum('__class__') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "run of a function": "{{ raise_exception.run.__globals__ }}{{ strftime_now.run(1) }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "globals of joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace class": "{{ namespace.__init__.__globals__ }}",
    "namespace internals": "{% set n = namespace(a=1) %}{{ n._Namespace__attrs ~ n.attributes ~ n.__class__ }}",
    "namespace items": "{% set n = namespace(a=1) %}{{ n['__class__'] ~ n['attributes'] }}",
    "dunder set on a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "dunder given to a namespace": "{{ namespace({'__class__': 1}) }}",
    "template reference": "{{ self._TemplateReference__context.environment }}",
    "self": "{{ self.__init__ }}",
    "context": "{{ context.environment ~ environment.filters }}",
    "loop internals": "{% for i in [1] %}{{ loop._iterable ~ loop._recurse ~ loop.__init__ }}{% endfor %}",
    "loop class": "{% for i in [1] %}{{ loop['__class__'].__init__.__globals__ }}{% endfor %}",
    "macro internals": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "macro environment": "{% macro m() %}{% endmacro %}{{ m._environment.filters }}",
    "caller internals": "{% macro m() %}{{ caller._func.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "method internals": "{{ ''.split.owner ~ ''.split.run.__globals__ }}",
    "method self": "{{ messages.count.__self__.append(1) }}",
    "str.format": "{{ '{0.__class__}'.format(1) }}",
    "str.format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "str.format by attr": "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "str.format by map": "{{ (['{0.__class__}'] | map(attribute='format') | list)[0](1) }}",
    "str.format of a safe text": "{{ ('{0.__class__}'|safe).format(1) }}",
    "generator frames": "{{ (messages | map('string')).gi_frame.f_globals }}",
    "generator code": "{{ (messages | select)['gi_code'] }}",
    "undefined internals": "{{ missing._undefined_obj }}",
    "undefined class": "{{ missing.__class__.__init__.__globals__ }}",
    "exceptions": "{{ missing._fail_with_undefined_error.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'os' import system %}{{ system }}",
    "extends": "{% extends '/etc/passwd' %}",
    "block": "{% block a %}{{ super() }}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ ''.__class__ }}{% endautoescape %}",
    "do": "{% do messages.append(1) %}",
    "append": "{{ messages.append({}) }}",
    "pop": "{{ messages.pop() }}",
    "clear": "{{ messages[0].clear() }}",
    "update": "{{ messages[0].update(role='x') }}",
    "setdefault": "{{ messages[0]['setdefault']('x', 1) }}",
    "set an attribute": "{% set messages[0].role = 1 %}",
    "set an attribute of a message": "{% set m = messages[0] %}{% set m.role = 1 %}",
    "hooks as filters": "{{ [1] | map('(each)') | list }}",
    "hooks as names": "{{ 1 | (each) }}",
    "filters that are not there": "{{ 1 | xmlattr }}",
    "pprint": "{{ messages | pprint }}",
    "bytes": "{{ 'a'.encode().hex() }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "translate": "{{ 'a'.maketrans('a', 'b') }}",
    "type of a number": "{{ (1).real.__class__ }}",
    "builtins": "{{ __builtins__ ~ __import__('os') }}",
}


def grown(expression: str, *, start: str = "'x'", times: int = 99, then: str = "", twice: bool = False) -> str:
    """Return a template that grows one or two values step by step and then uses them."""
    template = "{% set n = namespace(s=" + start + ", t=" + start + ") %}"
    template += f"{{% for i in range({times}) %}}{{% set n.s = {expression} %}}"
    if twice:
        template += "{% set n.t = " + expression.replace("n.s", "n.t") + " %}"
    return template + "{% endfor %}" + then


def without_end(body: str) -> str:
    """Return a template that runs a statement ten thousand million times."""
    return "{% for a in range(100000) %}{% for b in range(100000) %}" + body + "{% endfor %}{% endfor %}"


# Templates that take too much time, memory or depth.
BOMBS = {
    "nested loops": without_end(""),
    "loops that write": without_end("x"),
    "loops that write little": without_end("{{ '' }}"),
    "loops of ifs": without_end("{% if a %}{% endif %}" * 500),
    "loops in a block": "{% set x %}" + without_end("x") + "{% endset %}",
    "recursive loops": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "wide recursive loops": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive macros": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "wide recursive macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(47) }}",
    "mutual recursion": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "recursion by call blocks": "{% macro m() %}{% call m() %}{% endcall %}{{ caller() }}{% endmacro %}{{ m() }}",
    "recursion by caller": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "doubling with ~": grown("n.s ~ n.s"),
    "doubling with +": grown("n.s + n.s"),
    "doubling a list": grown("n.s + n.s", start="[1]"),
    "doubling with join": grown("n.s.join([n.s, n.s])", start="'xy'"),
    "doubling with a block": "{% set n = namespace(s='x') %}{% for i in range(99) %}"
    "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "doubling with a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + grown("m(n.s)"),
    "lists of lists, written": grown("[n.s, n.s]", start="[1]", times=60, then="{{ n.s }}"),
    "lists of lists, as JSON": grown("[n.s, n.s]", start="[1]", times=60, then="{{ n.s | tojson }}"),
    "lists of lists, compared": grown("[n.s, n.s]", start="[1]", times=60, then="{{ n.s == n.t }}", twice=True),
    "lists of lists, searched": grown(
        "[n.s, n.s]", start="[1]", times=60, then="{{ n.s in [n.t] | select }}", twice=True
    ),
    "tuples of tuples, hashed": grown("(n.s, n.s)", start="(1,)", times=60, then="{{ {n.s: 1} }}"),
    "tuples of tuples, looked up": grown("(n.s, n.s)", start="(1,)", times=60, then="{{ {}[n.s] ~ {}.get(n.s) }}"),
    "deep tuples, hashed": grown("(n.s,)", start="(1,)", times=99999, then="{{ {n.s: 1} }}"),
    "deep tuples as names": grown("(n.s,)", start="(1,)", times=99999, then="{{ [1] | map(n.s) | list }}"),
    "deep lists, written": grown("[n.s]", start="[1]", times=99999, then="{{ n.s }}"),
    "deep lists, compared": grown("[n.s]", start="[1]", times=99999, then="{{ n.s == n.t }}", twice=True),
    "deep dicts, as JSON": grown("{'a': n.s}", start="{}", times=99999, then="{{ n.s | tojson(indent=1) }}"),
    "itself in a namespace": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "multiplied text": "{{ 'a' * 10**10 }}",
    "multiplied from the left": "{{ 10**10 * 'a' }}",
    "multiplied list": "{{ [0] * 10**10 }}",
    "multiplied in steps": "{{ 'a' * 10**4 * 10**4 * 10**4 }}",
    "multiplied in a comparison": "{{ 'a' * 10**9 == 'b' }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{{ 9 ** 999 ** 999 }}",
    "shifting by squares": grown("n.s * n.s", start="3", times=60, then="{{ n.s }}"),
    "sums of large numbers": grown("n.s + n.s", start="2**4000", times=9999),
    "large float": "{{ 1e308 * 10 ** 400 }}",
    "overflow": "{{ (1e400) | int }}",
    "number of many digits": "{{ " + "9" * 5000 + " }}",
    "number of many hexadecimal digits": "{{ 0x" + "f" * 5000 + " }}",
    "text of many digits": "{{ ('9' * 10**6) | int }}",
    "text of many digits, as a float": "{{ ('9' * 10**6) | float }}",
    "wide number": "{{ '%1000000000d' % 1 }}",
    "wide number by a filter": "{{ '%1000000000d' | format(1) }}",
    "wide number by a test": "{{ '%1000000000d' is odd }}",
    "wide number from arguments": "{{ '%*d' % (10**9, 1) }}",
    "precise number": "{{ '%.1000000000f' % 1 }}",
    "many conversions": "{{ '%s' * 10**6 % (1,) }}",
    "many large conversions": "{{ ('%(a)s' * 200) % {'a': 'x' * 10**7} }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "rjust": "{{ 'a'.rjust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**10) }}",
    "center filter": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "indent of many lines": "{{ ('\\n' * 10**7) | indent(200, blank=true) }}",
    "wordwrap": "{{ ('a' * 10**6) | wordwrap(1) }}",
    "replace nothing by much": "{{ ('a' * 10**5).replace('', 'x' * 10**5) }}",
    "replace filter": "{{ ('a' * 10**5) | replace('a', 'x' * 10**5) }}",
    "join by much": "{{ ('x' * 10**5).join(['a'] * 10**5) }}",
    "join filter": "{{ ('a' * 10**5) | join('x' * 10**5) }}",
    "JSON, indented far": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "JSON, indented by much": "{{ [[[1]]] | tojson(indent='x' * 10**8) }}",
    "JSON, separated by much": "{{ ([1] * 10**5) | tojson(separators=('x' * 10**6, 'y')) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "range": "{{ range(10**9) | list }}",
    "sum of ranges": grown("n.s + range(99999) | list", start="[]", times=99999),
    "split into much": "{% set s = 'a ' * 10**7 %}{% for i in range(99) %}{{ s.split() | length }}{% endfor %}",
    "split by a letter": "{% set s = 'a' * 10**7 %}{% for i in range(99) %}{{ s.split('a') | length }}{% endfor %}",
    "lines of much": "{% set s = '\\n' * 10**7 %}{% for i in range(99) %}{{ s.splitlines() | length }}{% endfor %}",
    "letters of much": "{% set s = 'é' * 10**7 %}{% for i in range(99) %}{{ s | list | length }}{% endfor %}",
    "title of much": "{% set s = 'a-' * 10**7 %}{% for i in range(99) %}{{ s | title | length }}{% endfor %}",
    "copies kept": "{% set t = 'é' * 10**7 %}" + grown("n.s + [t ~ i]", start="[]"),
    "slices kept": "{% set t = 'é' * 10**7 %}" + grown("[n.s, t[i:]]", start="[]"),
    "lists kept": grown("[" + "0, " * 500 + "n.s]", start="[]", times=100_000),
    "namespaces kept": "{% set n = namespace() %}" + without_end("{% set n.s = namespace(s=n.s) %}"),
    "sort of equal texts": "{% set s = 'a' * 10**6 %}"
    + grown(
        "n.s + [s ~ '']", start="[]", times=60, then=without_end("{% set x = n.s | sort(case_sensitive=true) %}")
    ),
    "search in much": "{% set s = 'a' * 10**7 %}" + without_end("{{ '' if s.find('b') else 1 }}"),
    "comparing much": "{% set s = 'a' * 10**7 %}{% set t = 'a' * 10**7 %}" + without_end("{{ '' if s == t }}"),
    "in a long list": "{% set s = range(100000) | list %}" + without_end("{{ '' if 'x' in s }}"),
    "colliding keys": grown("n.s + [(i * (2**61 - 1), 1)]", start="[]", times=100_000, then="{{ dict(n.s) }}"),
    "colliding values": grown(
        "n.s + [i * (2**61 - 1)]",
        start="[]",
        times=9999,
        then="{% for i in range(999) %}{{ n.s | unique | list | length }}{% endfor %}",
    ),
    "urlize": "{{ ('http://' * 10**5) | urlize }}",
    "striptags": "{{ ('<' * 10**6) | striptags }}",
    "xmlattr": "{{ {'a': 'x' * 10**8} | xmlattr }}",
    "lorem ipsum": "{{ lipsum(10**6) }}",
    "wide date": "{{ strftime_now('%1000000000d') }}",
    "long date": "{{ strftime_now('%c' * 10**6) }}",
    "precise rounding": "{{ 1.5 | round(10**9, 'ceil') }}",
    "rounded text": "{{ 'a' | round(9, 'ceil') }}",
    "long attribute": "{{ [1] | map(attribute='a.' * 10**7) | list }}",
    "long name of an attribute": "{{ messages['a' * 10**7].x }}",
    "long error": "{{ raise_exception('é' * 10**7) }}",
    "stripping many letters": "{{ ('ab' * 10**6).strip('xyzab' * 10**6) }}",
    "arguments by the million": "{{ dict(*(range(10**5) | list)) }}",
    "output": "{% set s = 'a' * 10**7 %}{% for i in range(10**5) %}{{ s }}{% endfor %}",
    "filters of filters": "{{ 'a' | map(" + "'map', " * 500 + "'list') | list | string }}",
}

# Templates that stop at the limits of memory and depth.
_LARGE = ("deep", "doubling", "join", "letters", "lists of", "multiplied", "replace", "split", "title", "tuples of")
_LARGE += ("JSON", "copies", "many large", "output", "slices")
LARGE = {name: source for name, source in BOMBS.items() if name.startswith(_LARGE)}

# Templates that are too costly or impossible to parse or compile.
SOURCES: dict[str, str] = {
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "dicts": "{{ " + "{1:" * 50_000 + "1" + "}" * 50_000 + " }}",
    "not": "{{ " + "not " * 50_000 + "1 }}",
    "minus": "{{ " + "-" * 1 + " -" * 50_000 + "1 }}",
    "if else": "{{ " + "1 if 1 else " * 20_000 + "1 }}",
    "sums": "{{ " + "1 + " * 50_000 + "1 }}",
    "filters": "{{ 1" + " | string" * 20_000 + " }}",
    "attributes": "{{ a" + ".a" * 100_000 + " }}",
    "items": "{{ a" + "[0]" * 50_000 + " }}",
    "calls": "{{ a" + "()" * 50_000 + " }}",
    "powers": "{{ " + "2 ** " * 20_000 + "2 }}",
    "comparisons": "{{ 1" + " < 1" * 20_000 + " }}",
    "concatenations": "{{ 1" + " ~ 1" * 50_000 + " }}",
    "targets": "{% for " + "(" * 50_000 + "a" + ")" * 50_000 + " in b %}{% endfor %}",
    "ifs": "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
    "loops": "{% for a in b %}" * 50 + "{% endfor %}" * 50,
    "macros": "{% macro a() %}" * 5_000 + "{% endmacro %}" * 5_000,
    "generations": "{% generation %}" * 5_000 + "{% endgeneration %}" * 5_000,
    "many expressions": "{{ a }}" * 30_000,
    "many statements": "".join(f"{{% set v{i} = 1 %}}" for i in range(10_000)),
    "no end": "{% if a %}" * 10,
    "no end of a comment": "{#" * 50_000,
    "no end of a text": "{{ '" + "a" * 100_000,
    "odd letters": "{{ \x00 \ud800 }}",
    "two of a name": "{% macro m(a, a) %}{% endmacro %}",
    "break outside": "{% break %}",
    "assigned loop": "{% for loop in [1] %}{{ loop.index }}{% endfor %}",
    "keyword twice": "{{ dict(a=1, a=2) }}",
    "100 MB": "x" * 100_000_000,
}
