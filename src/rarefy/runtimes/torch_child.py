"""The child process that holds one exported program (``.pt2``) in PyTorch: what the user has today."""

from __future__ import annotations

import sys
from typing import Any

import torch

from rarefy.runtimes.child import Arrays, Input, serve


class Torch:
    """One program that ``torch.export`` saved."""

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        del exact  # it computes what the file says, always
        torch.set_num_threads(threads)
        program = _loaded(path)
        self.module = program.module()
        self.named = bool(program.example_inputs[1])  # traced with arguments by name, or by position
        self.version = f"torch {torch.__version__}"
        specs = program.graph_signature.input_specs
        values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        self.inputs = tuple(
            Input(name, str(values[name].dtype).removeprefix("torch."),
                  tuple(size if isinstance(size, int) else 0 for size in values[name].shape))
            for name in (spec.arg.name for spec in specs if spec.target is None))

    def run(self, inputs: Arrays) -> Arrays:
        values = {each.name: torch.from_numpy(inputs[each.name].copy()) for each in self.inputs}
        with torch.inference_mode():
            found = self.module(**values) if self.named else self.module(*values.values())
        first = found if isinstance(found, torch.Tensor) else next(iter(
            found.values() if hasattr(found, "values") else found))
        return {"output": first.numpy()}


def _loaded(path: str) -> Any:
    """A program that answers with a class of transformers can be read only after that class is known."""
    try:
        return torch.export.load(path)
    except Exception:  # noqa: BLE001  any that deserializing raises; the second try tells
        import transformers.modeling_outputs  # noqa: F401

        return torch.export.load(path)


if __name__ == "__main__":
    sys.exit(serve(Torch))
