"""`erllama completion`: the script that makes a shell complete the command's words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from erllama._runtime.printing import say

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script.

    \b
      bash:  eval "$(erllama completion bash)"              in ~/.bashrc
      zsh:   eval "$(erllama completion zsh)"               in ~/.zshrc
      fish:  erllama completion fish > ~/.config/fish/completions/erllama.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(ctx.find_root().command, {}, "erllama", "_ERLLAMA_COMPLETE").source())
