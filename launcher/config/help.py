"""The help of a command that takes a run's options: the usual ones first, all of them in sections with --help-all."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from launcher.base.output import echo

USUAL = ("image", "nodes", "gpu", "recipe", "steps", "data", "tokenizer", "partition", "time", "local")
SECTIONS = {
    "Run": "nodes gpu recipe steps batch_size seq_len gpus_per_node local name runs_dir settings env config",
    "Data": "data tokenizer data_part init_from checkpoint_every keep checkpoint_dir",
    "Slurm": "partition time account qos reservation nodelist exclude segment constraint sbatch",
    "Container": "image runtime python mount",
    "Checks": "check force retries proved threshold max_spread baseline",
    "Output": "",  # and every option that no section names
}
ALL = "launcher.help_all"


class RunOption(click.Option):
    """One that every command of runs has; the others are a command's own. What takes a path completes paths."""

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [item for item in super().shell_complete(context, incomplete) if item.type == "plain"]
        kind = {"DIR": "dir", "FILE": "file", "PROFILE": "file", "RECIPE": "file"}.get(self.metavar or "")
        return or_path(found, incomplete, kind) if kind else found


def or_path(found: list[CompletionItem], incomplete: str, kind: str) -> list[CompletionItem]:
    """A shell then completes files or directories itself; `kind`: "file" or "dir"."""
    return found or [CompletionItem(incomplete, type=kind)]


class RunCommand(click.Command):
    """A command with `run_options`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        about: Any = {"callback": _help_all, "help": "Show all options, in sections."}
        self.params.append(click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, **about))

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        found = [p for p in self.get_params(context) if isinstance(p, click.Option) and not p.hidden]
        named = {option.name or "": option for option in found}
        sections = {title: [named[n] for n in names.split() if n in named] for title, names in SECTIONS.items()}
        placed = {option for options in sections.values() for option in options}
        sections["Output"] = [option for option in found if option not in placed]
        own = [option for option in found if not isinstance(option, RunOption)]
        usual = [named[name] for name in USUAL if name in named]
        short = {"Usual options": usual, f"Options of {context.info_name}": own}
        for title, options in (sections if context.meta.get(ALL) else short).items():
            with formatter.section(title):
                records = [record for option in options if (record := option.get_help_record(context))]
                formatter.write_dl(records, col_max=26)
        if not context.meta.get(ALL):
            rest = {title: [o for o in options if o not in (*usual, *own)] for title, options in sections.items()}
            with formatter.section("More options (see --help-all)"):
                names = {title: ", ".join(max(o.opts, key=len) for o in options) for title, options in rest.items()}
                formatter.write_dl([(title, text) for title, text in names.items() if text])


def _help_all(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        context.meta[ALL] = True
        echo(*context.get_help().split("\n"))
        context.exit()
