"""The command `erllama`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import erllama
from erllama import _demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. A user's mistake gives one line, not a traceback."""
    parser = argparse.ArgumentParser(prog="erllama", description="Run GGUF models and keep prompts warm.")
    parser.add_argument("--version", action="version", version=f"erllama {erllama.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="read a prompt in one process, find it read in the next")
    demo.add_argument(
        "--model", type=Path, metavar="PATH", help="a GGUF file of your own (default: a small random one)"
    )
    demo.add_argument(
        "--tokens", type=_positive, default=1000, metavar="N", help="length of the prompt (default 1000)"
    )
    demo.add_argument(
        "--max-tokens", type=_positive, default=32, metavar="N", help="length of a reply (default 32)"
    )

    worker = commands.add_parser("demo-worker")  # run by `demo`
    worker.add_argument("step", choices=("cold", "warm"))
    worker.add_argument("model", type=Path)
    worker.add_argument("directory", type=Path)
    worker.add_argument("tokens", type=_positive)
    worker.add_argument("max_tokens", type=_positive)

    given = parser.parse_args(arguments)
    try:
        if given.command == "demo":
            return _demo.run(given.model, given.tokens, given.max_tokens)
        _demo.work(given.step, given.model, given.directory, given.tokens, given.max_tokens)
        return 0
    except erllama.Error as error:
        print(f"erllama: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
