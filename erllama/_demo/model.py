"""Path of the small model in the package, for demonstrations and first steps."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """Return the path of the demo model: a llama of 1.8 million parameters, two megabytes, with a chat template.

    The model tells short stories, adds and subtracts numbers below 100 with written-out thinking, calls a weather
    tool, and describes itself. docs/demo-model.md has its measured accuracy.

        with erllama.load_model(erllama.demo_model()) as model:
            print(model.chat([{"role": "user", "content": "What is 17 + 25?"}]).text)
    """
    return Path(__file__).parent.parent / "_data" / "demo.gguf"
