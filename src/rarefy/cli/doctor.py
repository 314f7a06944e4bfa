"""``rarefy doctor``: what this machine can run, and what brings the rest."""

from __future__ import annotations

from rarefy.cli.options import Json
from rarefy.cli.terminal import dump, guarded, show, table
from rarefy.report import words


@guarded
def doctor(*, as_json: Json = False) -> None:
    """Show runtimes, versions and accelerators, and the exact line that installs what is missing."""
    from rarefy.runtimes.present import machine, runtimes

    here, found = machine(), runtimes()
    if as_json:
        dump({"machine": here, "runtimes": found})
        return
    fast = ", ".join(here.instructions) or "none that speed up small integers"
    show(f"{here.processor}, {here.threads} threads, {words.size(here.memory)} memory")
    show(f"instructions: {fast}; energy counter: {'readable' if here.energy else 'none'}")
    show()
    table("", ("runtime", "runs", "versions", "devices", "install"),
          [(each.name, each.runs,
            ", ".join(f"{name} {text or 'missing'}" for name, text in each.packages.items()),
            ", ".join(each.devices), each.install or "-") for each in found])
