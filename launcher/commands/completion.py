"""`launcher completion`: the script by which a shell completes commands, options, files, partitions and runs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from launcher.base.output import as_json, echo_file, print_json


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@as_json
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print the completion script for bash, zsh or fish.

    \b
    launcher completion bash > ~/.local/share/bash-completion/completions/launcher
    launcher completion fish > ~/.config/fish/completions/launcher.fish
    echo 'eval "$(launcher completion zsh)"' >> ~/.zshrc
    """
    found = get_completion_class(shell)
    assert found is not None  # click has these three
    program = context.find_root().info_name or "launcher"
    maker = found(context.find_root().command, {}, program, "_LAUNCHER_COMPLETE")
    script = maker.source_template % maker.source_vars()  # not source(), which starts bash to see its version
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        echo_file(script)
