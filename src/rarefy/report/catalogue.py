"""What techniques there are, read from their files.

A technique is one file under ``techniques/``: its stem is its name, its docstring is its manual, the
fields of its dataclass are its settings. This module reads exactly that, as text (``ast``), so that
listing the techniques imports none of them, and adding one needs no list to be edited.
"""

from __future__ import annotations

import ast
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rarefy.core.errors import RecipeError, did_you_mean

FOLDER = Path(__file__).resolve().parent.parent / "techniques"


@dataclass(frozen=True)
class Setting:
    """One field of a technique's dataclass. ``meaning`` is what the class docstring says after its name."""

    name: str
    type: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One technique as its file describes it. ``body``: the docstring between first line and paper."""

    name: str
    family: str
    idea: str
    body: str
    paper: str
    about: str
    settings: tuple[Setting, ...]
    edits: tuple[str, ...]
    needs: tuple[str, ...]
    beats: str
    scope: str = "leaf"

    @property
    def asks(self) -> str:
        """What it must be given besides a weight, in words."""
        return ", ".join(self.needs) or ("a training run" if self.scope == "training" else "no data")

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def catalogue(folder: Path = FOLDER) -> tuple[Entry, ...]:
    """Every technique found in ``folder``, by family and name."""
    files = sorted(p for p in folder.rglob("*.py") if not p.name.startswith("_"))
    return tuple(read_technique(path, folder) for path in files)


def find(name: str, folder: Path = FOLDER) -> Entry:
    """The technique called ``name``."""
    entries = {entry.name: entry for entry in catalogue(folder)}
    if name not in entries:
        hint = did_you_mean(name, list(entries)) or f"; there is {', '.join(entries)}"
        raise RecipeError(f"technique {name!r}: there is none of that name{hint}")
    return entries[name]


def read_technique(path: Path, folder: Path) -> Entry:
    """The entry of one file. A file without docstring, paper or technique class is an error."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    config = _config(tree)
    text = ast.get_docstring(tree)
    if text is None or config is None:
        raise RecipeError(f"{path.name}: a technique opens with a docstring and has one frozen dataclass "
                          "with `edits` and `needs`; move anything else out of techniques/")
    idea, _, rest = text.partition("\n")
    body, found, paper = rest.partition("\nPaper:")
    if not found:
        raise RecipeError(f"{path.name}: the docstring names no source; end it with `Paper: who year, what`")
    about, meanings = _manual(ast.get_docstring(config) or "", list(_fields(config)))
    settings = tuple(Setting(name, ast.unparse(field.annotation), _default(field.value), meanings[name])
                     for name, field in _fields(config).items())
    declared = {name: _names(value) for name, value in _constants(config).items()}
    return Entry(path.stem, str(path.parent.relative_to(folder)), idea.strip(), body.strip("\n"),
                 " ".join(paper.split()), about, settings, declared.get("edits", ()),
                 declared.get("needs", ()), next(iter(declared.get("beats", ())), ""),
                 next(iter(declared.get("scope", ())), "leaf"))


def _config(tree: ast.Module) -> ast.ClassDef | None:
    """The first dataclass that declares what it edits."""
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list)
    return next((node for node in classes if "edits" in _constants(node)), None)


def _annotated(config: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    """The annotated names of the class body: fields and class constants."""
    return {node.target.id: node for node in config.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


def _is_constant(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")


def _fields(config: ast.ClassDef) -> dict[str, ast.AnnAssign]:
    return {name: node for name, node in _annotated(config).items() if not _is_constant(node)}


def _constants(config: ast.ClassDef) -> dict[str, ast.expr]:
    return {name: node.value for name, node in _annotated(config).items()
            if _is_constant(node) and node.value is not None}


def _names(value: ast.expr) -> tuple[str, ...]:
    """Identifiers and strings inside an expression, in order: ``frozenset({"gram"})`` -> ("gram",)."""
    if isinstance(value, ast.Call):
        return tuple(name for argument in value.args for name in _names(argument))
    if isinstance(value, ast.Tuple | ast.List | ast.Set):
        return tuple(name for item in value.elts for name in _names(item))
    if isinstance(value, ast.Constant):
        return (str(value.value),) if value.value else ()
    return (ast.unparse(value),)


def _default(value: ast.expr | None) -> str | None:
    return None if value is None else ast.unparse(value)


def _manual(text: str, names: list[str]) -> tuple[str, dict[str, str]]:
    """Split a class docstring into what it says at large and ``field: meaning`` for every field."""
    meanings = dict.fromkeys(names, "")
    flat = " ".join(text.split())
    if not names:
        return flat, meanings
    pieces = re.split(rf"(?:^|(?<=[\s`]))`*({'|'.join(map(re.escape, names))})`*: ", flat)
    for name, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
        meanings[name] = meaning.strip()
    return pieces[0].strip(), meanings
