"""A pytest plugin for runs of examples: `-p support.few_examples` makes Hypothesis try 10 inputs instead of 100."""

from hypothesis import settings

settings.register_profile("few", max_examples=10)
settings.load_profile("few")
