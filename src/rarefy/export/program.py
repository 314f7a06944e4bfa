"""A network as a program: the graph that ``torch.export`` sees, beside the same graph in ONNX.

Every value of the program has a name, and the value of that name in the ONNX graph is the same one. So the
program can be run here with other weights, each value watched or replaced on its way: ranges of activations
are gathered like that, and an exported file is compared with what its own codes should give.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from transformers import PreTrainedModel

from rarefy.core.errors import TargetError, did_you_mean
from rarefy.core.nodes import Node as Tree
from rarefy.formats.onnx import OPSET, PIP, onnx_package
from rarefy.models.map import Site
from rarefy.models.network import TENSOR, call, map_network
from rarefy.numerics.ranges import BINS, Range, entropy, percentile, range_of

POSITIONAL = "input"  # the file's name of an input that is passed by position
METHODS = ("minmax", "percentile", "entropy")
SAMPLED = 128  # rows of a batch that tell how rows are rounded best
Values = Mapping[str, Tensor]
Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Program:
    """``exported`` and ``proto`` are one graph. sites: by path. answer: name of the value that is the answer.
    key: what the network calls it. others: further answers, their values by the names that a file gives them;
    inputs: names that a file gives its inputs, by those of the graph, where they differ."""

    exported: Any
    proto: Any
    sites: Mapping[str, Site]
    answer: str
    key: str
    shared: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> dict[str, str]:
        """Which site the operators of the program multiply by, by the name of their result."""
        paths = self._paths()
        found = {}
        for node in self.exported.graph.nodes:
            weights = [paths[arg.name] for arg in node.args if isinstance(arg, Node) and arg.name in paths]
            for path in weights:
                if path in self.sites:
                    found[node.name] = path
        return found

    def trained(self, ranges: Mapping[str, Range]) -> dict[str, Range]:
        """Ranges of the inputs of layers, by layer, as those of what operators of the program read.

        TargetError: a layer that is none.
        """
        layers = {site.layer: path for path, site in self.sites.items()}
        for layer in ranges:
            if layer not in layers:
                raise TargetError(f"{layer}: no such layer{did_you_mean(layer, list(layers))}")
        spans = {layers[layer]: span for layer, span in ranges.items()}
        return {name: spans[path] for name, path in self.reads.items() if path in spans}

    def tensors(self, trees: Mapping[str, Tree]) -> dict[str, Tensor]:
        """The weights that trees stand for, as the state dict holds them."""
        return {path: self.sites[path].stored(tree.dense()) for path, tree in trees.items()}

    def _paths(self) -> dict[str, str]:
        """Name of a placeholder -> path in the state dict, the site's own for shared weights."""
        return {spec.arg.name: self.shared.get(spec.target, spec.target)
                for spec in self.exported.graph_signature.input_specs if spec.target is not None}

    def run(self, inputs: Values, tensors: Values, *, argument: Change | None = None,
            value: Change | None = None) -> Tensor:
        """The answer. tensors: weights in place of the program's own, as the state dict holds them.

        argument: changes what a multiplication by a site reads (called with the operator's name); value:
        changes any value once it is computed.
        """
        paths, own = self._paths(), {**self.exported.state_dict, **self.exported.constants}
        given = iter(inputs.values())
        arguments = []
        for spec in self.exported.graph_signature.input_specs:
            if spec.target is None:
                arguments.append(next(given))
            else:
                path = paths[spec.arg.name]
                arguments.append(tensors[path] if path in tensors else own[spec.target])
        walk = _Walk(self.exported.graph_module, self.reads, self.answer, argument, value)
        with torch.no_grad():
            walk.run(*arguments)
        assert walk.found is not None
        return walk.found


class _Walk(Interpreter):
    """Runs the program node by node."""

    def __init__(self, module: Any, reads: Mapping[str, str], answer: str, argument: Change | None,
                 value: Change | None) -> None:
        super().__init__(module)
        self.reads, self.answer, self.argument, self.value = reads, answer, argument, value
        self.found: Tensor | None = None

    def run_node(self, n: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self.argument is not None and n.name in self.reads:
            place = _activation(n)
            args = (*args[:place], self.argument(n.name, args[place]), *args[place + 1:])
        result = getattr(self, n.op)(n.target, args, kwargs)
        if isinstance(result, Tensor) and self.value is not None:
            result = self.value(n.name, result)
        if n.name == self.answer:
            self.found = result
        return result


def _activation(node: Node) -> int:
    """Which argument of an operator is no parameter: ``addmm`` has its bias first."""
    return 1 if "addmm" in str(node.target) else 0


def trace(module: nn.Module, inputs: Values, dynamic: tuple[int, ...] = (0,), *, fused: bool = False
          ) -> Program:
    """The program of a network in eval mode. inputs: an example, by name, or one that is passed by position
    (named ``"0"``). dynamic: their axes that may have any length. fused: transformers' attention is one
    operator, not its products: for ``runtimes.integer``."""
    example = {name: _two(values) for name, values in inputs.items()}
    shapes = {name: {axis: torch.export.Dim.DYNAMIC for axis in dynamic if axis < values.ndim}
              for name, values in example.items()}
    args = tuple(values for name, values in example.items() if name == TENSOR)
    named = {name: values for name, values in example.items() if name != TENSOR}
    with _quiet(), torch.no_grad():
        key = _key(call(module, example, {}))
    with _attention(module, "sdpa" if fused else "eager"):
        made = traced(module, args, named, tuple(shapes.values()) if args else shapes)
    found, _ = map_network(module)
    proto = made.model_proto
    return Program(made.exported_program, proto, found.by_path, proto.graph.output[0].name, key, found.shared)


def traced(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], shapes: Any) -> Any:
    """What PyTorch's exporter makes of a call; TargetError when it cannot."""
    onnx_package()
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise TargetError(f"tracing a network into ONNX needs the package onnxscript; {PIP}") from None
    with _quiet():
        try:
            made = torch.onnx.export(module, args, kwargs=dict(named) or None, dynamo=True, optimize=False,
                                     verbose=False, opset_version=OPSET, dynamic_shapes=shapes)
        except Exception as error:  # noqa: BLE001  whatever the exporter trips over
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TargetError(f"{type(module).__name__}: torch.export cannot trace it ({first[:200]}); "
                              "branches that depend on data have to be rewritten") from None
    assert made is not None
    return made


@contextlib.contextmanager
def _attention(module: nn.Module, how: str) -> Iterator[None]:
    """transformers' attention as plain products (``eager``) or as one operator. The exporter guards every row
    of the latter's scores against NaN, which takes a runtime more time than the softmax."""
    found = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        yield
        return
    before = found.config._attn_implementation
    found.set_attn_implementation(how)
    try:
        yield
    finally:
        found.set_attn_implementation(before)


def _two(values: Tensor) -> Tensor:
    """At least two samples: an axis of length one would be traced as fixed."""
    return torch.cat([values, values]) if values.shape[0] == 1 else values


def _key(out: Any) -> str:
    """What the network calls its first tensor."""
    match out:
        case Mapping():
            return str(next(key for key, value in out.items() if isinstance(value, Tensor)))
        case _:
            return "output"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, logs and warns of what concerns its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def activation_samples(program: Program, batches: Iterable[Values], tensors: Values, names: Iterable[str]
                       ) -> dict[str, tuple[Tensor, Tensor]]:
    """Of values of the program: some rows [rows, channels], and the largest magnitude of each channel."""
    wanted, kept, peaks = set(names), dict[str, list[Tensor]](), dict[str, Tensor]()

    def look(name: str, values: Tensor) -> Tensor:
        if name in wanted:
            rows = values.detach().flatten(0, -2)
            peak = rows.abs().amax(0)
            peaks[name] = peak if name not in peaks else torch.maximum(peak, peaks[name])
            kept.setdefault(name, []).append(rows[:: max(1, len(rows) // SAMPLED)])
        return values

    for batch in batches:
        program.run(batch, tensors, value=look)
    return {name: (torch.cat(parts), peaks[name]) for name, parts in kept.items()}


def activation_ranges(program: Program, batches: Iterable[Values], tensors: Values, names: Iterable[str],
                      method: str = "minmax", trained: Mapping[str, Range] | None = None
                      ) -> dict[str, Range]:
    """What values of the program span on ``batches``, run with the weights ``tensors``.

    method: minmax, percentile (0.9999 of all values), or entropy; the last two run the batches twice.
    trained: ranges in which operators, by name, read what they multiply.
    """
    trained = trained or {}

    def rounded(name: str, values: Tensor) -> Tensor:
        return trained[name].rounded(values) if name in trained else values

    if method not in METHODS:
        raise TargetError(f"ranges {method!r}: choose one of {', '.join(METHODS)}"
                          f"{did_you_mean(method, list(METHODS))}")
    wanted, batches = set(names), list(batches)
    if not batches:
        raise TargetError("static 8-bit activations need calibration inputs to find their ranges; pass some, "
                          "or compute='dynamic'")
    seen: dict[str, Range] = {}

    def span(name: str, values: Tensor) -> Tensor:
        if name in wanted and values.is_floating_point():
            now, before = range_of(values), seen.get(name)
            seen[name] = now if before is None else now.joined(before)
        return values

    for batch in batches:
        program.run(batch, tensors, argument=rounded, value=span)
    if method == "minmax":
        return seen
    counted = {name: torch.zeros(BINS) for name in seen}

    def count(name: str, values: Tensor) -> Tensor:
        if name in counted:
            low, high = _edges(seen[name], method)
            magnitude = values.abs() if method == "entropy" else values
            counted[name] += torch.histc(magnitude.float(), BINS, low, high)
        return values

    for batch in batches:
        program.run(batch, tensors, argument=rounded, value=count)
    narrowed = entropy if method == "entropy" else percentile
    return {name: narrowed(histogram, seen[name]) for name, histogram in counted.items()}


def _edges(seen: Range, method: str) -> tuple[float, float]:
    if method == "percentile":
        return seen.low, seen.high
    return 0.0, max(abs(seen.low), abs(seen.high))
