"""A causal language model as a graph that reads some tokens and the keys and values of those before them.

    input_ids [batch, new], attention_mask [batch, past + new], position_ids [batch, new],
    past_key_values.N.key, past_key_values.N.value [batch, heads, past, width]
        -> logits [batch, new, vocabulary], present.N.key, present.N.value [batch, heads, past + new, width]

The names are those that ONNX Runtime's and OpenVINO's own generators look for. In OpenVINO the keys and
values stay inside, as states that ``beam_idx`` reorders. Masks are computed in the graph, sliding windows
included; the past may be empty. Weights become pieces of the graph as in any other network (``export.onnx``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.errors import TargetError
from rarefy.core.nodes import Node
from rarefy.export.onnx import Exported, OnnxSettings, export_onnx
from rarefy.export.openvino import export_openvino, openvino_package
from rarefy.export.program import Program, traced
from rarefy.models.attending import said
from rarefy.models.families import head_width
from rarefy.models.network import map_network

INSIDE = "network."  # what the wrapper puts before the paths of weights
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
PARTS = ("key", "value")
Length = Any  # an int, or its symbol while a graph is traced
MASKED = -1e9   # added to the scores of what a token must not see: finite, so that a padded row has no NaN
FITS = 1e-4     # relative error of the graph's own arithmetic to the network's, where both are float32


class _Tensors:
    """A cache that is handed in as tensors and handed out as tensors: all that attention asks of one."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.held = list(past)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
               ) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, those before and the new ones."""
        for place, new in ((2 * layer_idx, keys), (2 * layer_idx + 1, values)):
            self.held[place] = torch.cat([self.held[place], new], dim=2)
        return self.held[2 * layer_idx], self.held[2 * layer_idx + 1]

    def get_seq_length(self, layer_idx: int = 0) -> Length:
        """Tokens so far."""
        return self.held[2 * layer_idx].shape[2]


class Cached(nn.Module):
    """A transformers language model whose cache goes in and out as tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        config: Any = network.config
        self.kinds = tuple(getattr(config, "layer_types", None) or ())
        self.window = int(getattr(config, "sliding_window", None) or 0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
                ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of every layer."""
        cache = _Tensors(past)
        seen = past[0].shape[2]
        full = self._mask(attention_mask, seen, input_ids.shape[1], 0)
        mask: Any = full
        if len(set(self.kinds)) > 1:
            sliding = self._mask(attention_mask, seen, input_ids.shape[1], self.window)
            mask = {kind: sliding if kind == "sliding_attention" else full for kind in set(self.kinds)}
        elif self.window and (not self.kinds or "sliding_attention" in self.kinds):
            mask = self._mask(attention_mask, seen, input_ids.shape[1], self.window)
        out = self.network(input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
                           past_key_values=cache, use_cache=True)
        return (out.logits, *cache.held)

    @staticmethod
    def _mask(real: Tensor, seen: Length, new: Length, window: int) -> Tensor:
        """What is added to scores [batch, 1, new, past + new]. window: how far back (0: any)."""
        query = torch.arange(new)[:, None] + seen
        key = torch.arange(real.shape[1])[None]
        visible = key <= query
        if window:
            visible = visible & (query - key < window)
        visible = visible[None, None] & (real[:, None, None] > 0)
        return torch.where(visible, 0.0, MASKED)


@dataclass(frozen=True)
class Layout:
    """The cache of a model: layers, heads of keys and values, channels of each."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Layout:
        """From transformers' configuration."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(config.num_hidden_layers, heads, head_width(config))

    def empty(self, batch: int = 1, length: int = 0) -> list[Tensor]:
        """Keys and values of no tokens, or zeros for some."""
        return [torch.zeros(batch, self.heads, length, self.width) for _ in range(2 * self.layers)]

    def names(self, pattern: str) -> list[str]:
        """Of the cache's tensors in a file, in order."""
        return [pattern.format(layer, part) for layer in range(self.layers) for part in PARTS]


@dataclass(frozen=True, eq=False)
class Decoder:
    """A traced language model. wrapped: the network with its cache as tensors."""

    wrapped: Cached
    program: Program
    layout: Layout


def trace_decoder(network: Any) -> Decoder:
    """Trace a transformers language model in float32; its weights are then known by reference only.

    TargetError where a family's attention cannot be written down with masks that are computed here.
    """
    if kind := said(network.config):
        raise TargetError(f"{type(network).__name__}: has {kind} attention, and graphs compute ordinary "
                          "attention; choose the native format")
    network.set_attn_implementation("eager")
    wrapped, layout = Cached(network.eval()), Layout.of(network.config)
    tokens = torch.arange(6).reshape(2, 3) % network.config.vocab_size
    seen = 4
    given = (tokens, torch.ones(2, seen + 3, dtype=torch.int64), torch.arange(3).expand(2, 3) + seen,
             layout.empty(2, seen))
    _check(wrapped, layout, tokens)
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free},
              [{0: free, 2: free} for _ in range(2 * layout.layers)])
    made = traced(wrapped, given, {}, shapes)
    found, _ = map_network(wrapped)
    _forget(made, {*found.by_path, *found.shared})
    graph = made.model_proto.graph
    names = ["input_ids", "attention_mask", "position_ids", *layout.names(PAST)]
    values = [each.name for each in graph.output]
    inputs = dict(zip((each.name for each in graph.input), names, strict=True))
    program = Program(made.exported_program, made.model_proto, found.by_path, values[0], "logits",
                      found.shared, dict(zip(layout.names(PRESENT), values[1:], strict=True)),
                      {own: name for own, name in inputs.items() if own != name})
    return Decoder(wrapped, program, layout)


def _check(wrapped: Cached, layout: Layout, tokens: Tensor) -> None:
    """The network with a cache as tensors is the network itself: at once, and one token after two."""
    with torch.no_grad():
        expected = wrapped.network(input_ids=tokens, use_cache=False).logits
        ones, places = torch.ones_like(tokens), torch.arange(3).expand(2, 3)
        _, *past = wrapped(tokens[:, :2], ones[:, :2], places[:, :2], layout.empty(2))
        last, *_ = wrapped(tokens[:, 2:], ones, places[:, 2:], past)
    error = float((last[:, 0] - expected[:, 2]).norm() / expected[:, 2].norm().clamp_min(1e-30))
    if not error <= FITS:
        raise TargetError(f"{type(wrapped.network).__name__}: its cache cannot be passed as tensors "
                          f"(relative error {error:.2g}); pass --for llama.cpp or --for torch")


def _forget(made: Any, sites: Collection[str]) -> None:
    """Leave the weights out of the traced graph, since every operator that reads one is replaced: they would
    be there twice, and a message holds 2 GB."""
    import onnx_ir

    for name, value in made.model.graph.initializers.items():
        if name in sites:
            kind, shape = value.const_value.dtype, value.const_value.shape
            value.const_value = onnx_ir.ExternalTensor("", None, None, kind, shape=shape, name=name)


def export_decoder(decoder: Decoder, trees: Mapping[str, Node], path: Path | str, *,
                   settings: OnnxSettings | None = None) -> Exported:
    """Write a language model: ``.onnx``, or ``.xml`` with the ``.bin`` beside it.

    trees: what to store for each site, by its path in the network; a site without one goes over as float32.
    """
    path = Path(path)
    held = {INSIDE + site: tree for site, tree in trees.items()}
    write = export_openvino if path.suffix == ".xml" else export_onnx
    done = write(decoder.wrapped, held, path, inputs={}, settings=settings, program=decoder.program)
    if path.suffix == ".xml":
        _keep_states(path, decoder.layout)
        size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
        return replace(done, bytes=size)
    return done


def _keep_states(path: Path, layout: Layout) -> None:
    """Keys and values as states of an OpenVINO model, reordered by ``beam_idx`` before each step."""
    openvino = openvino_package()
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = openvino.Core().read_model(path)
    beams = opset13.parameter([-1], dtype=openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beams])
    zero = opset13.constant(0, dtype=openvino.Type.i64)
    for name in layout.names(PAST):
        past = model.input(name)
        readers = past.get_target_inputs()
        chosen = opset13.gather(past, beams, zero)
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    pairs = dict(zip(layout.names(PAST), layout.names(PRESENT), strict=True))
    apply_make_stateful_transformation(model, pairs)
    _begin_empty(model, openvino, opset13)
    # the file that was read is still mapped: the new one takes its place when it is whole
    partial = path.with_name(f"{path.stem}.partial.xml")
    openvino.save_model(model, partial, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        partial.with_suffix(suffix).replace(path.with_suffix(suffix))


def _begin_empty(model: Any, openvino: Any, opset: Any) -> None:
    """States begin with no tokens, for as many texts as ``input_ids`` has."""
    shape = opset.shape_of(model.input("input_ids"), output_type="i64")
    batch = opset.gather(shape, opset.constant([0], dtype=openvino.Type.i64),
                         opset.constant(0, dtype=openvino.Type.i64))
    for each in model.get_ops():
        if each.get_type_name() == "ReadValue":
            rest = [size.get_min_length() for size in each.get_output_partial_shape(0)][1:]
            sizes = opset.concat([batch, opset.constant(rest, dtype=openvino.Type.i64)], axis=0)
            none = opset.broadcast(opset.constant(0.0, dtype=each.get_output_element_type(0)), sizes)
            each.set_arguments([none])
    model.validate_nodes_and_infer_types()
