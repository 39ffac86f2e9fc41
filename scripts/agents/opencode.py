"""OpenCode: its configuration, and the commands of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scripts.agents.agent import FIRST_LINE, NEW_LINE, NOTES, Agent
from scripts.agents.models import Call, Script
from scripts.agents.packages import pinned_version

# As in docs/server/clients/opencode.md.
CONFIGURATION = """\
{
  "$schema": "https://opencode.ai/config.json",
  "model": "erllama/local",
  "small_model": "erllama/local",
  "enabled_providers": ["erllama"],
  "autoupdate": false,
  "share": "disabled",
  "provider": {
    "erllama": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "erllama",
      "options": {"baseURL": "http://127.0.0.1:8080/v1"},
      "models": {
        "local": {
          "name": "Local model",
          "reasoning": true,
          "interleaved": {"field": "reasoning_content"},
          "limit": {"context": 32768, "output": 4096}
        }
      }
    }
  }
}
"""


class OpenCode(Agent):
    """OpenCode, which speaks OpenAI's chat completions."""

    name = "opencode"
    title = f"OpenCode {pinned_version('opencode-linux-x64')}"

    def write_configuration(self, home: Path, url: str, n_ctx: int) -> None:
        folder = home / ".config" / "opencode"
        folder.mkdir(parents=True, exist_ok=True)
        text = CONFIGURATION.replace("http://127.0.0.1:8080", url).replace("32768", str(n_ctx))
        (folder / "opencode.json").write_text(text)

    def command(self, packages: Path, prompt: str, *, continues: bool) -> list[str]:
        program = str(packages / "node_modules" / "opencode-linux-x64" / "bin" / "opencode")
        return [program, "run", "--format", "json", *(["--continue"] if continues else []), prompt]

    def environment(self) -> Mapping[str, str]:
        names = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD")
        return {f"OPENCODE_DISABLE_{name}": "true" for name in names}

    def script(self, work: Path) -> Script:
        path = str(work / NOTES)
        edit = {"filePath": path, "oldString": FIRST_LINE, "newString": NEW_LINE}
        count = {"command": f"wc -l {NOTES}", "description": "Counts the lines of the notes"}
        return Script(
            first=(
                Call("The notes come first.", "read", {"filePath": path}),
                Call("Now the first line.", "edit", edit),
                Call("A count shows that both lines are there.", "bash", count),
                "I have replaced the first line. The notes still have two lines.",
            ),
            later=(
                Call("They ask for more, so I look again.", "read", {"filePath": path}),
                "Nothing else has changed since.",
            ),
            without_tools="Notes with a new line",
        )
