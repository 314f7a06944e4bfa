"""The child process that holds one network in PyTorch: what the user has today.

An exported program (``.pt2``), or a language model as a folder or file that rarefy opens, in float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.runtimes.child import Arrays, Engine, Input, serve


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


class Writer:
    """A causal language model in float32."""

    def __init__(self, path: str, threads: int, exact: bool) -> None:
        del exact
        from rarefy.export.networks import load

        torch.set_num_threads(threads)
        self.network = load(path).eval().requires_grad_(False)
        self.version = f"torch {torch.__version__}"
        self.inputs: tuple[Input, ...] = (Input("input_ids", "int64", (0, 0)),)
        self.cache: Any = None

    def run(self, inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            out = self.network(input_ids=torch.from_numpy(inputs["input_ids"].copy()), use_cache=False)
        return {"logits": out.logits.numpy()}

    def begin(self) -> None:
        """An empty cache."""
        self.cache = None

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some tokens after those before."""
        with torch.inference_mode():
            out = self.network(input_ids=torch.from_numpy(tokens.copy())[None], past_key_values=self.cache,
                               use_cache=True)
        self.cache = out.past_key_values
        logits: NDArray[np.float32] = out.logits[0].numpy()
        return logits


def _opened(path: str, threads: int, exact: bool) -> Engine:
    return Torch(path, threads, exact) if Path(path).suffix == ".pt2" else Writer(path, threads, exact)


def _loaded(path: str) -> Any:
    """A program that answers with a class of transformers can be read only after that class is known."""
    try:
        return torch.export.load(path)
    except Exception:  # noqa: BLE001  any that deserializing raises; the second try tells
        import transformers.modeling_outputs  # noqa: F401

        return torch.export.load(path)


if __name__ == "__main__":
    sys.exit(serve(_opened))
