"""A checkpoint in plain transformers, in a fresh process that knows nothing of this project.

transformers loads much that it should not (a missing tensor is made up, with a warning), so the child counts
what was missing or left over as a refusal.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rarefy.core.errors import TargetError
from rarefy.runtimes.verify import FLOAT, Agreement

LOADER = "AutoModelForCausalLM"
CHILD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from safetensors.torch import load_file, save_file
folder, loader, inputs, outputs, adapter = sys.argv[1:]
transformers.logging.set_verbosity_error()
network, told = getattr(transformers, loader).from_pretrained(
    folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32)
kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
wrong = [f"{kind} {name}" for kind in kinds for name in told[kind]]
assert not wrong, f"{len(wrong)} tensors do not fit, first {wrong[0]}"
if adapter:
    from peft import PeftModel
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        network = PeftModel.from_pretrained(network, adapter)
    lost = [str(each.message) for each in heard if "missing adapter keys" in str(each.message)]
    assert not lost, lost[0]
assert "rarefy" not in sys.modules
given = load_file(inputs)
with torch.no_grad():
    out = network.eval()(**given)
first = next(value for value in out.values() if isinstance(value, torch.Tensor))
save_file({"answer": first.float().contiguous()}, outputs, {"version": transformers.__version__})
"""


def answer(folder: Path | str, inputs: Mapping[str, Tensor], *, loader: str = LOADER,
           adapter: Path | str | None = None, timeout: float = 600.0) -> Tensor:
    """What transformers answers to ``inputs``; ``loader``: the name of its class."""
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place, "inputs.safetensors"), Path(place, "answer.safetensors")
        save_file({name: values.contiguous() for name, values in inputs.items()}, given)
        command = [sys.executable, "-I", "-c", CHILD, str(Path(folder).resolve()), loader, str(given),
                   str(found), "" if adapter is None else str(Path(adapter).resolve())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise TargetError(f"{folder}: transformers gave no answer within {timeout:g} seconds") from None
        if done.returncode or not found.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["it said nothing"]
            raise TargetError(f"{folder}: transformers refuses it: {lines[-1][:400]}")
        return load_file(found)["answer"]


def verify_checkpoint(folder: Path | str, inputs: Mapping[str, Tensor], expected: Tensor, *,
                      loader: str = LOADER, adapter: Path | str | None = None,
                      tolerance: float = FLOAT) -> Agreement:
    """Compare transformers' answer with ``expected``, our own; TargetError when they are too far apart."""
    found = answer(folder, inputs, loader=loader, adapter=adapter)
    return Agreement.of(found, expected, tolerance, "transformers").check(Path(folder))
