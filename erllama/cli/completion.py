"""`erllama completion`: prints the script that lets a shell complete the command's words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from erllama._runtime.printing import echo

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for a shell.

    \b
      bash:  eval "$(erllama completion bash)"              in ~/.bashrc
      zsh:   eval "$(erllama completion zsh)"               in ~/.zshrc
      fish:  erllama completion fish > ~/.config/fish/completions/erllama.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None
    echo(completer(ctx.find_root().command, {}, "erllama", "_ERLLAMA_COMPLETE").source())
