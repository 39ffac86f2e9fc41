"""Codex: its configuration, and the commands of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scripts.agents.agent import FIRST_LINE, NEW_LINE, NOTES, Agent
from scripts.agents.models import Call, Script
from scripts.agents.packages import pinned_version

# As in docs/server/clients/codex.md.
CONFIGURATION = """\
model = "local"
model_provider = "erllama"
model_context_window = 32768
check_for_update_on_startup = false

[model_providers.erllama]
name = "erllama"
base_url = "http://127.0.0.1:8080/v1"
wire_api = "responses"

[analytics]
enabled = false

[feedback]
enabled = false
"""
_PATCH = f"""apply_patch <<'EOF'
*** Begin Patch
*** Update File: {NOTES}
@@
-{FIRST_LINE}
+{NEW_LINE}
*** End Patch
EOF"""


class Codex(Agent):
    """Codex, which speaks OpenAI's Responses API."""

    name = "codex"
    title = f"Codex {pinned_version('@openai/codex')}"

    def write_configuration(self, home: Path, url: str, n_ctx: int) -> None:
        folder = home / ".codex"
        folder.mkdir(exist_ok=True)
        text = CONFIGURATION.replace("http://127.0.0.1:8080", url).replace("32768", str(n_ctx))
        (folder / "config.toml").write_text(text)

    def command(self, packages: Path, prompt: str, *, continues: bool) -> list[str]:
        program = [str(packages / "node_modules" / ".bin" / "codex"), "exec", "--sandbox", "workspace-write"]
        return [*program, *(["resume", "--last"] if continues else []), "--json", prompt]

    def environment(self) -> Mapping[str, str]:
        return {}

    def script(self, work: Path) -> Script:
        return Script(
            first=(
                Call("The notes come first.", "exec_command", {"cmd": f"cat {NOTES}"}),
                Call("Now the first line.", "exec_command", {"cmd": _PATCH}),
                Call("A count shows that both lines are there.", "exec_command", {"cmd": f"wc -l {NOTES}"}),
                "I have replaced the first line. The notes still have two lines.",
            ),
            later=(
                Call("They ask for more, so I look again.", "exec_command", {"cmd": f"head -n 1 {NOTES}"}),
                "Nothing else has changed since.",
            ),
            without_tools="Notes with a new line",
        )
