"""The tests of llama-cpp-python that do not apply to `erllama.llama_cpp`, with the reasons."""

from __future__ import annotations

EXCEPTIONS = {
    "test_real_model": "calls libllama's functions through ctypes; erllama has no such bindings",
    "test_real_llama": "expects the answer of Qwen3.5-0.8B to a question; the model in its place gives another one",
    "test_ram_cache_exact_prompt_hit_matches_fresh": (
        "expects a call of load_state for a hit; erllama restores blocks without one"
    ),
}


def reason(name: str) -> str | None:
    """Return why a test does not apply; None if it does."""
    return next((why for begin, why in EXCEPTIONS.items() if name.split("[")[0] == begin), None)
