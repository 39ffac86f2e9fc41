"""Makes the demo model: its text, its tokenizer, its training and its file.

    python -m scripts.demo_model

Nothing is downloaded and no text is copied: everything the model has read is
written by the generators here, from a seed. docs/demo-model.md tells what it
learns and how well.
"""
