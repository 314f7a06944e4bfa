"""Write the pages of ``docs/techniques`` from the techniques themselves.

    python -m rarefy.report.docs docs/techniques            # write them
    python -m rarefy.report.docs docs/techniques --check    # exit 1 if they would change

A page holds what the file's docstring says, its settings, and nothing that was typed twice. Measured
tables live in ``docs/techniques/measured/NAME.md``, written by the benchmarks; a page includes its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rarefy.report.catalogue import Entry, Setting, catalogue

NOTICE = "<!-- Written by `python -m rarefy.report.docs`; edit the docstring of the technique instead. -->"


def page(entry: Entry, measured: str = "") -> str:
    """One technique as Markdown. The docstring's indented equations become code blocks as they are."""
    parts = [NOTICE, f"# {entry.name}", entry.idea, entry.body]
    rows = [f"| `{s.name}` | `{_cell(s.type)}` | {_default(s)} | {_cell(s.meaning)} |"
            for s in entry.settings]
    if rows:
        parts += ["## Settings", entry.about,
                  "\n".join(["| name | type | default | |", "|---|---|---|---|", *rows])]
    facts = [f"- **Edits** {', '.join(f'`{name}`' for name in entry.edits)}" if entry.edits
             else "- **Is** a loss: `rarefy distill --objective`"]
    if entry.needs and not entry.edits:
        facts.append(f"- **Needs** of student and teacher: {', '.join(f'`{name}`' for name in entry.needs)}")
    elif entry.needs:
        facts.append(f"- **Needs** calibration evidence: {', '.join(f'`{name}`' for name in entry.needs)}")
    elif entry.scope == "training":
        facts.append("- **Works** while the network trains: a step of a recipe, with `training`; needs data "
                     "and a loss")
    else:
        facts.append("- **Needs** no data; uses calibration evidence where there is some")
    if entry.beats:
        fixture = "on handwritten digits" if entry.scope == "training" else "on the standard fixture"
        facts.append(f"- **Must beat** [`{entry.beats}`]({entry.beats}.md) {fixture}")
    facts.append(f"- **File** `src/rarefy/techniques/{entry.family}/{entry.name}.py`")
    parts += ["## Facts", "\n".join(facts), "## Source", entry.paper]
    if measured:
        parts += ["## Measured", measured.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def index(entries: tuple[Entry, ...]) -> str:
    """The table of all techniques."""
    rows = [f"| [{e.name}]({e.name}.md) | {e.family} | {_cell(e.idea)} |" for e in entries]
    return "\n\n".join([NOTICE, "# Techniques", "One file each under `src/rarefy/techniques`; "
                        "[adding one](../adding-a-technique.md) is adding a file.",
                        "\n".join(["| name | family | idea |", "|---|---|---|", *rows])]) + "\n"


def pages(folder: Path) -> dict[Path, str]:
    """Every page and its text."""
    entries = catalogue()
    written = {folder / "README.md": index(entries)}
    for entry in entries:
        table = folder / "measured" / f"{entry.name}.md"
        measured = table.read_text(encoding="utf-8") if table.exists() else ""
        written[folder / f"{entry.name}.md"] = page(entry, measured)
    return written


def _default(setting: Setting) -> str:
    return "required" if setting.default is None else f"`{setting.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description="Write docs/techniques from the techniques' docstrings.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    options = parser.parse_args()
    wanted = pages(options.folder)
    stale = [path for path, text in wanted.items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    orphans = [path for path in options.folder.glob("*.md") if path not in wanted]
    if options.check:
        for path in stale + orphans:
            print(f"{path}: out of date; run python -m rarefy.report.docs {options.folder}", file=sys.stderr)
        return 1 if stale or orphans else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in orphans:
        path.unlink()
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    print(f"{len(stale)} of {len(wanted)} pages written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
