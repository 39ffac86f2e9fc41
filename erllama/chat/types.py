"""The forms that chat modules pass to each other: roles and tool names."""

from __future__ import annotations

import re

ROLES = ("system", "developer", "user", "assistant", "tool")
# OpenAI's rule for tool names, and dots, which the built-in tools of some families have.
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
