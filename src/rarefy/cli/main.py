"""``rarefy``: compress a trained network under a budget, with proof.

    rarefy inspect MODEL                                      where its bytes are
    rarefy plan MODEL --to 160MB                              a dry run
    rarefy compress MODEL --to 160MB --for llama.cpp -o OUT   do it, measure it, report it
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from rarefy import __version__
from rarefy.cli.bench import bench
from rarefy.cli.chat import chat
from rarefy.cli.compress import compress
from rarefy.cli.doctor import doctor
from rarefy.cli.evaluate import evaluate
from rarefy.cli.exits import exits
from rarefy.cli.export import export
from rarefy.cli.inspect import inspect
from rarefy.cli.plan import plan
from rarefy.cli.recipe import run
from rarefy.cli.techniques import techniques
from rarefy.cli.terminal import EXIT_CODES, quiet_others, set_debug
from rarefy.cli.training import distill, finetune

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES) + "."

app = typer.Typer(
    name="rarefy", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EPILOG,
    help="Give it a trained network and a budget: it returns the best network that fits, with proof.",
    context_settings={"help_option_names": ["-h", "--help"]})


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"rarefy {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Print the version and leave.")] = False,
) -> None:
    """What holds for every command."""
    set_debug(debug)
    quiet_others()


for command in (inspect, plan, compress, finetune, distill, exits, run, evaluate, bench, export, chat,
                techniques, doctor):
    app.command()(command)


def main() -> None:
    """The console script. ``--debug`` belongs to the program and is accepted behind a command too."""
    arguments = sys.argv[1:]
    if "--debug" in arguments[1:]:
        arguments.remove("--debug")
        arguments.insert(0, "--debug")
    # SIGTERM ends like an exception, so that staged files are removed and children ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # torch reads it at its first allocation: large tensors in large pages halve the time spent in the kernel
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app(args=arguments, prog_name="rarefy")


if __name__ == "__main__":
    main()
