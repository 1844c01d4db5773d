"""`signal completion`: the script that makes a shell complete commands, run ids and model names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_INSTALL = {
    "bash": "echo 'eval \"$(signal completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(signal completion zsh)\"' >> ~/.zshrc",
    "fish": "signal completion fish > ~/.config/fish/completions/signal.fish",
}


@click.command(
    epilog="\b\nTo have it in every new shell:\n"
    + "\n".join(f"  {name:<5} {line}" for name, line in _INSTALL.items())
)
@click.argument("shell", type=click.Choice(tuple(_INSTALL)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root()
    try:
        script = kind(root.command, {}, "signal", "_SIGNAL_COMPLETE").source()
    except RuntimeError as error:
        # Click asks bash for its version, which takes a bash.
        raise click.ClickException(str(error)) from None
    click.echo(script)
