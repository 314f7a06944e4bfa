"""Any network: its map, its weights as matrices, and a way to run it with other weights.

A site is the weight of a ``Linear``, a ``Conv1d`` or ``Conv2d`` (in any number of groups), an ``Embedding``
or transformers' ``Conv1D``. A convolution's weight [out, in / groups, height, width] is the matrix [out, in /
groups * height * width], whose inputs are the unfolded patches. Recurrent layers are built out of ``Linear``s
(``recurrent``). All else is carried as it is: norms, biases, buffers like the statistics of BatchNorm, kinds
of layers that this list does not have.

What several modules share (tied embeddings, repeated layers) is found by identity: one site, and the other
names point to it. Roles and blocks are read from names and containers, for patterns and pictures; nothing
that is computed depends on them.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from rarefy.core.errors import ModelError, did_you_mean
from rarefy.core.nodes import Node, Shared
from rarefy.models.form import Form
from rarefy.models.hooks import hooked
from rarefy.models.map import Map, Param, Site
from rarefy.models.recurrent import class_name, unrolled
from rarefy.models.runner import Override
from rarefy.models.sources import ModuleSource, Source
from rarefy.numerics.ranges import Range

Watch = Callable[[Site, nn.Module, Tensor, Tensor], "Tensor | None"]

_IN_ATTENTION = r".*\b(attention|self|attn|self_attn|self_attention)\.({})"
ROLES: tuple[tuple[str, str], ...] = (
    (r"(.*\.)?word_embeddings", "embed"), (r"(.*\.)?position_embeddings", "positions"),
    (r"(.*\.)?relative_attention_bias", "positions"), (r"(.*\.)?token_type_embeddings", "token_types"),
    (_IN_ATTENTION.format("query|q|q_lin|q_proj"), "q"), (_IN_ATTENTION.format("key|k|k_lin|k_proj"), "k"),
    (_IN_ATTENTION.format("value|v|v_lin|v_proj"), "v"),
    (_IN_ATTENTION.format("output.dense|dense|out_lin|o|out_proj|o_proj"), "o"),
    (r"(.*\.)?(intermediate\.dense|lin1|ffn|linear1)", "up"),
    (r"(.*\.)?(output\.dense|lin2|ffn_output|linear2)", "down"),
    (r"(.*\.)?pooler(\.dense)?|pre_classifier", "pooler"),
    (r"(classifier|head|fc|score)(\.\w+)?", "head"),
    (r"(.*\.)?ih(_reverse)?", "ih"), (r"(.*\.)?hh(_reverse)?", "hh"), (r"(.*\.)?hr(_reverse)?", "hr"),
)


@dataclass(frozen=True)
class NetworkMap(Map):
    """Sites and params of any network, in the order of its definition.

    shared: names under which a site or param appears besides its own.
    """

    sites: tuple[Site, ...]
    params: tuple[Param, ...]
    blocks: int
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether any two modules share a weight."""
        return bool(self.shared)


class Network:
    """A network that runs: ``module`` is ours alone, float32, in eval mode, with the original weights.

    config: transformers' (None: the user's own network). files: what belongs into an export beside the
    weights (how images are prepared). ranges: of the inputs of layers that training rounded, by the layer's
    name; targets that round activations round these in the same codes, and ``run`` rounds nothing
    (``as_trained`` does).
    """

    def __init__(self, name: str, module: nn.Module, source: Source, form: Form, *, config: Any = None,
                 tokenizer: Callable[[], Any] | None = None, files: tuple[Path, ...] = (),
                 ranges: Mapping[str, Range] | None = None) -> None:
        self.name, self.module, self.source, self.form = name, module, source, form
        self.config, self.files = config, files
        self.map, self._users = map_network(module)
        self._make_tokenizer, self._tokenizer = tokenizer, None
        if not self.map.sites:
            raise ModelError(f"{name}: has no Linear, convolution or Embedding to compress")
        self.ranges = self._checked(ranges or {})

    @classmethod
    def from_module(cls, module: nn.Module, name: str = "", *, form: Form | None = None,
                    tokenizer: Any = None, ranges: Mapping[str, Range] | None = None) -> Network:
        """A network in memory. It is copied: the user's own is never changed."""
        config = getattr(module, "config", None)
        form = form if form is not None else _form_of(module)
        own = unrolled(copy.deepcopy(module))
        source = ModuleSource(own)  # before its numbers become float32: what they were counts
        own = own.float().eval().requires_grad_(False)
        for part in own.modules():  # what observes an input needs it unchanged
            if getattr(part, "inplace", False):
                setattr(part, "inplace", False)  # noqa: B010  modules declare their attributes as tensors
        return cls(name or class_name(module), own, source, form,
                   config=config if form.loader else None,
                   tokenizer=None if tokenizer is None else lambda: tokenizer, ranges=ranges)

    @property
    def parameters(self) -> int:
        """How many numbers the network holds, shared ones counted once."""
        return self.map.parameters

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of an encoder of text, loaded at the first use."""
        if self._tokenizer is None:
            if self._make_tokenizer is None:
                raise ModelError(f"{self.name}: has no tokenizer; pass tokenizer=..., or data as tensors")
            self._tokenizer = self._make_tokenizer()
        return self._tokenizer

    def weight(self, path: str) -> Tensor:
        """The matrix of a site, [out, in], float32."""
        site = self.map.by_path.get(path)
        if site is None:
            raise ModelError(f"{path}: no such weight{did_you_mean(path, list(self.map.by_path))}")
        return site.matrix(self.source.read(path).float())

    def param(self, path: str) -> Tensor:
        """A tensor that is no site; floats as float32, counters as they are."""
        known = [param.path for param in self.map.params]
        if path not in known:
            raise ModelError(f"{path}: no such param{did_you_mean(path, known)}")
        values = self.source.read(path)
        return values.float() if values.is_floating_point() else values

    def verify(self) -> None:
        """Refuse NaN and infinity by name."""
        for path in (*self.map.by_path, *(param.path for param in self.map.params)):
            self.source.check(path)

    def tensors(self, override: Override) -> dict[str, Tensor]:
        """What ``override`` puts in the place of weights, decoded once, as ``run`` takes it."""
        found: dict[str, Tensor] = {}
        for site in self.map.sites:
            match override(site.path):
                case None:
                    continue
                case Node() as node:
                    found[site.path] = site.stored(node.dense())
                case values:
                    found[site.path] = site.stored(values)
        return found

    def run(self, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
            ) -> Tensor:
        """The answer, [samples, classes or width]; ``tensors``: weights to use in place of the original's."""
        return self.form.answer(call(self.module, inputs, tensors or {}), inputs)

    def running(self, module: nn.Module) -> Network:
        """This network with another module that computes it: faster kernels in the place of layers."""
        other = copy.copy(self)
        other.module, other.ranges = module, {}
        return other

    def with_ranges(self, ranges: Mapping[str, Range]) -> Network:
        """This network with the ranges that training found, in place of its own."""
        other = copy.copy(self)
        other.ranges = self._checked(ranges)
        return other

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """While this lasts, ``run`` rounds the inputs of layers in the ranges that training found."""
        with hooked(before=[(self.module.get_submodule(layer), _rounds(span))
                            for layer, span in self.ranges.items()]):
            yield

    @contextmanager
    def watched(self, sites: Mapping[str, Site], watch: Watch) -> Iterator[None]:
        """While this lasts, ``watch`` sees input and output of every module that uses one of ``sites``.

        What it returns, if anything, takes the place of the output.
        """
        with hooked((user, lambda module, inputs, output, site=site: watch(site, module, inputs[0], output))
                    for path, site in sites.items() for user in self._users[path]):
            yield

    def _checked(self, ranges: Mapping[str, Range]) -> dict[str, Range]:
        layers = [site.layer for site in self.map.sites]
        for layer in ranges:
            if layer not in layers:
                raise ModelError(f"{self.name}: a range is for inputs of {layer!r}, which is no layer with "
                                 f"a weight{did_you_mean(layer, layers)}")
        return dict(ranges)

    def users(self, path: str) -> tuple[nn.Module, ...]:
        """The modules that use the weight of a site."""
        return self._users[path]


def _rounds(span: Range) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (span.rounded(inputs[0]), *inputs[1:])


TENSOR = "0"  # the name of an input that is passed by position


def call(module: nn.Module, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
    """Call a module with named inputs and some other weights."""
    args = tuple(value for name, value in inputs.items() if name == TENSOR)
    named = {name: value for name, value in inputs.items() if name != TENSOR}
    if not tensors:  # putting none in the place of others takes as long as a small network does
        return module(*args, **named)
    return functional_call(module, dict(tensors), args, named)


def tied(module: nn.Module, trees: Mapping[str, Node]) -> None:
    """Let layers that share a weight hold one tensor, in place; those that correct it keep their own, and so
    do those in whose place something else stands."""
    held = dict(module.named_parameters(remove_duplicate=False))
    for path, tree in trees.items():
        if isinstance(tree, Shared) and path in held and tree.path in held:
            place, _, key = path.rpartition(".")
            module.get_submodule(place)._parameters[key] = held[tree.path]


def _form_of(module: nn.Module) -> Form:
    """What can be told of a network in memory: transformers' say what they are, others are classifiers."""
    from rarefy.models.opening import form_of_config

    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return Form()
    return form_of_config(config, type(module).__name__)


def map_network(module: nn.Module) -> tuple[NetworkMap, dict[str, tuple[nn.Module, ...]]]:
    """The map of a network, and which modules use each site."""
    names = {id(part): name for name, part in module.named_modules()}
    owners: dict[int, str] = {}
    users: dict[str, list[nn.Module]] = defaultdict(list)
    sites: dict[str, Site] = {}
    blocks = _blocks(module)
    for part in module.modules():
        weight = part._parameters.get("weight")
        if weight is None or not isinstance(part, _KINDS) or weight.numel() == 0:
            continue
        name = names[id(part)]
        path = owners.setdefault(id(weight), f"{name}.weight" if name else "weight")
        users[path].append(part)
        if path not in sites:
            sites[path] = _site(path, name, part, weight, blocks)
    params, shared = [], {}
    for path, values in module.state_dict(keep_vars=True).items():
        owner = owners.setdefault(id(values), path)
        if owner != path:
            shared[path] = owner
        elif path not in sites:
            params.append(Param(path, tuple(values.shape)))
    count = len({site.block for site in sites.values()} - {None})
    return (NetworkMap(tuple(sites.values()), tuple(params), count, shared),
            {path: tuple(parts) for path, parts in users.items()})


_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, Conv1D)


def _site(path: str, name: str, part: nn.Module, weight: Tensor, blocks: Mapping[str, int]) -> Site:
    block = next((index for prefix, index in blocks.items() if name.startswith(prefix + ".")), None)
    kernel = tuple(weight.shape[1:]) if isinstance(part, nn.Conv1d | nn.Conv2d) else ()
    flipped = isinstance(part, Conv1D)
    matrix = weight.T if flipped else weight.flatten(1)
    return Site(path, _role(name, part), (matrix.shape[0], matrix.shape[1]), block, flipped, kernel)


def _role(name: str, part: nn.Module) -> str:
    for pattern, role in ROLES:
        if re.fullmatch(pattern, name):
            return role
    match part:
        case nn.Embedding():
            return "embed"
        case nn.Conv1d() | nn.Conv2d():
            if part.groups > 1 and part.groups == part.in_channels:
                return "depthwise"
            return "pointwise" if all(k == 1 for k in part.kernel_size) else "conv"
        case _:
            return "linear"


def _blocks(module: nn.Module) -> dict[str, int]:
    """Path and number of the outermost members of lists that are made of further modules."""
    found: dict[str, int] = {}
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        for key, member in part.named_children():
            path = f"{name}.{key}" if name else key
            inside = any(path.startswith(outer + ".") for outer in found)
            made_of_modules = any(member.children()) and not isinstance(member, nn.ModuleList | nn.Sequential)
            if made_of_modules and not inside:
                found[path] = len(found)
    return found
