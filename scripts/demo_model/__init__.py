"""Creates the demo model: its training text, its tokenizer, its weights and its file.

    python -m scripts.demo_model

The generators in this package write all of the training text from a seed. They
download no data and copy no text. docs/demo-model.md describes what the model
learns and how well.
"""
