"""The small model that comes with erllama, for demonstrations and first steps."""

from __future__ import annotations

from pathlib import Path


def demo_model() -> Path:
    """The file of the demo model: a llama of 1.8 million parameters, two megabytes, with a chat template.

    It tells short stories, adds and subtracts numbers below 100 with its thoughts written
    out, calls a weather tool, and knows what it is; docs/demo-model.md tells how well.

        with erllama.load_model(erllama.demo_model()) as model:
            print(model.chat([{"role": "user", "content": "What is 17 + 25?"}]).text)
    """
    return Path(__file__).parent.parent / "_data" / "demo.gguf"
