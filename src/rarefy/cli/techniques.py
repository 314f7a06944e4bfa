"""``rarefy techniques``: what there is, read from the files under ``techniques/``."""

from __future__ import annotations

from typing import Annotated

import typer

from rarefy.cli.options import Json
from rarefy.cli.terminal import dump, guarded, show, table


@guarded
def techniques(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the techniques, or explain one: idea, paper, settings."""
    from rarefy.report.catalogue import catalogue, find

    if name is None:
        entries = catalogue()
        if as_json:
            dump([entry.as_dict() for entry in entries])
        else:
            table("", ("name", "family", "needs", "idea"),
                  [(e.name, e.family, e.asks, e.idea) for e in entries])
        return
    entry = find(name)
    if as_json:
        dump(entry.as_dict())
        return
    show(f"{entry.name} ({entry.family})\n\n{entry.idea}\n\n{entry.body}\n\nPaper: {entry.paper}")
    if entry.settings:
        show()
        table("Settings", ("name", "type", "default", "meaning"),
              [(s.name, s.type, s.default or "required", s.meaning) for s in entry.settings])
    show(f"\nEdits {', '.join(entry.edits)}; needs {entry.asks}.")
