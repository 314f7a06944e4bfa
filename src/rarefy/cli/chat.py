"""``rarefy chat``: try an exported file in its runtime, beside the original if wanted."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarefy.cli.options import Json
from rarefy.cli.terminal import dump, guarded, tell
from rarefy.core.errors import TargetError

if TYPE_CHECKING:
    from rarefy.runtimes.llamacpp import Session

Said = list[dict[str, str]]


@guarded
def chat(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that rarefy wrote, or a .gguf file.")],
    against: Annotated[str | None, typer.Option(
        "--against", metavar="MODEL", show_default=False, help="Let this model answer too.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(
        "--prompt", "-p", show_default=False, help="Answer this and leave. Repeat for several.")] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Tokens per answer at most.")] = 200,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; use no chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Talk to an exported file in llama.cpp, always with the most likely next token.

    A model that has a chat template is talked to; any other continues your text. Without a terminal, each
    line of standard input is a prompt.
    """
    from rarefy.runtimes.llamacpp import Session

    with ExitStack() as stack:
        paths = {"compressed": gguf_in(out)}
        if against is not None:
            paths["original"] = _original(against, stack)
        sessions = {name: stack.enter_context(Session(path)) for name, path in paths.items()}
        template = None if raw else _template(paths["compressed"])
        history: dict[str, Said] = {name: [] for name in sessions}
        for text in prompt or _typed(template is not None):
            answers = {name: _answer(name, session, text, history[name], template, most,
                                     echo=not as_json, label=len(sessions) > 1)
                       for name, session in sessions.items()}
            if as_json:
                dump({"prompt": text, **answers})
            if prompt:
                history = {name: [] for name in sessions}  # each stands alone


def gguf_in(path: Path) -> Path:
    """The one GGUF file that ``path`` is or holds."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not path.exists():
        raise TargetError(f"{path}: no such file or folder; pass what `rarefy compress -o` wrote")
    if len(found) != 1:
        raise TargetError(f"{path}: holds {len(found) or 'no'} .gguf files, not one; pass the file itself")
    return found[0]


def _original(ref: str, stack: ExitStack) -> Path:
    """A GGUF file of the original: its own, or one in F16 that lives as long as the chat."""
    from rarefy.export.gguf import export_gguf
    from rarefy.models.model import open_model

    path = Path(ref)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return gguf_in(path)
    model = open_model(ref)
    files = model.source.files()
    if len(files) == 1 and files[0].suffix == ".gguf":
        return files[0]
    tell(f"writing {model.name} as F16 for llama.cpp ...")
    target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "original.gguf"
    export_gguf(model, {}, {site.path: "F16" for site in model.map.sites}, target)
    return target


def _template(path: Path) -> Callable[[Said], str] | None:
    """What turns a conversation into the prompt the model was trained on; None when it has no template."""
    from rarefy.formats.gguf import read_gguf

    file = read_gguf(path)
    if "tokenizer.chat_template" not in file.metadata:
        return None
    from rarefy.models.vocabulary import gguf_tokenizer

    tokenizer: Any = gguf_tokenizer(file)

    def fill(said: Said) -> str:
        text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token or "")  # the runtime puts it there, once

    return fill


def _typed(conversation: bool) -> Iterator[str]:
    """Prompts from the terminal, or the lines of standard input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    tell(f"{'Say something' if conversation else 'Begin a text'}; an empty line or Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _answer(name: str, session: Session, text: str, said: Said, template: Callable[[Said], str] | None,
            most: int, *, echo: bool, label: bool) -> str:
    """One model's answer, shown as it comes."""
    said.append({"role": "user", "content": text})
    asked = text if template is None else template(said)
    pieces = []
    if echo and label:
        sys.stdout.write(f"[{name}] ")
    for piece in session.stream(asked, most, special=template is not None):
        pieces.append(piece)
        if echo:
            sys.stdout.write(_visible(piece))
            sys.stdout.flush()
    if echo:
        sys.stdout.write("\n")
    said.append({"role": "assistant", "content": "".join(pieces)})
    return "".join(pieces)


def _visible(text: str) -> str:
    """Without the control characters by which a model's text could steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
