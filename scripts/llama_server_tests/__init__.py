"""Runs llama.cpp's own tests of its server against llama-server and against `erllama.server`, and compares them.

`python -m scripts.llama_server_tests` is the runner; `shim` starts either server with llama-server's arguments;
`stand_ins` writes the models; `exceptions` lists the tests that only llama-server passes, each with a reason. The tests
come from the wheel that has the pinned source of llama.cpp. None of them is copied into this project.
"""
