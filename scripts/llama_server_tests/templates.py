"""Short chat templates in place of those of models, which the wheel with llama.cpp's tests does not have.

Each is ours, and has the marks of the model's format that the tests look for. With the environment variable
`LLAMA_CPP_DIR`, a checkout of llama.cpp, the tests use the templates of that checkout instead.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CHATML = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
A call is a JSON object in <tool_call></tool_call> with "name" and "arguments".<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": \
{% if call.function.arguments is string %}{{ call.function.arguments }}\
{% else %}{{ call.function.arguments | tojson }}{% endif %}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
"""

_QWEN3 = (
    _CHATML
    + """{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
)
_QWQ = _CHATML + "<think>\n{% endif %}"

_DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'assistant' %}{{ '<｜Assistant｜>' }}
{%- set content = message.content or '' %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- content + '<｜end▁of▁sentence｜>' }}
{%- else %}{{ '<｜User｜>' + message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

_COMMAND_R7B = """\
{{- bos_token }}
{%- if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|END_OF_TURN_TOKEN|>{% endif %}
{%- for message in messages %}<|START_OF_TURN_TOKEN|>
{%- if message.role == 'assistant' %}<|CHATBOT_TOKEN|>
{%- if message.reasoning_content %}<|START_THINKING|>{{ message.reasoning_content }}<|END_THINKING|>{% endif %}
{%- if message.tool_calls %}<|START_ACTION|>[
{%- for call in message.tool_calls %}{"tool_name": "{{ call.function.name }}", \
"parameters": {{ call.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]<|END_ACTION|>
{%- else %}<|START_RESPONSE|>{{ message.content }}<|END_RESPONSE|>{% endif %}
{%- elif message.role == 'system' %}<|SYSTEM_TOKEN|>{{ message.content }}
{%- else %}<|USER_TOKEN|>{{ message.content }}
{%- endif %}<|END_OF_TURN_TOKEN|>
{%- endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"""

_LLAMA3 = """\
{{- bos_token }}<|start_header_id|>system<|end_header_id|>

Today Date: {{ strftime_now('%d %b %Y') }}
{%- for tool in tools or [] %}
{{ tool | tojson }}
{%- endfor %}<|eot_id|>
{%- for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}{"name": "{{ call.function.name }}", \
"parameters": {{ call.function.arguments | tojson }}}{% endfor %}
{%- else %}{{ message.content }}{% endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_TEMPLATES = {
    "Qwen-Qwen3-0.6B": _QWEN3,
    "Qwen-QwQ-32B": _QWQ,
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": _DEEPSEEK_R1,
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": _COMMAND_R7B,
    "meta-llama-Llama-3.1-8B-Instruct": _LLAMA3,
    "meta-llama-Llama-3.3-70B-Instruct": _LLAMA3,
}


def write_templates(folder: Path) -> None:
    """Write the templates into a folder: those of `LLAMA_CPP_DIR`, or ours."""
    checkout = os.environ.get("LLAMA_CPP_DIR")
    if checkout:
        shutil.copytree(Path(checkout) / "models" / "templates", folder, dirs_exist_ok=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in _TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(source)
