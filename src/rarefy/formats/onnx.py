"""Nodes as pieces of an ONNX graph: the codes that a tree holds, and the operators that read them.

A weight becomes the smallest piece that its consumer can run. Where the weight is a matrix that multiplies,

    Quantized   MatMulNBits (2, 4 or 8 bits), QuantizeLinear and MatMulIntegerToFloat, or DequantizeLinear
    Product     two products          Sum    a sum of products
    others      the weight, computed by the graph from what is stored (Cast, Sub, Mul, Gather, MatMul)

and runtimes compute the last kind once, when they load. No code is rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rarefy.core.codebooks import Clustered, Hashed
from rarefy.core.errors import TargetError
from rarefy.core.nodes import Dense, Masked, Node, Product, Quantized, Shared, Sum
from rarefy.core.tensors import CP, Tucker
from rarefy.formats.integers import Integers, integers, packed
from rarefy.numerics.ranges import SMALLEST, Rows

Compute = Literal["float", "dynamic", "static"]
ROWS = Rows()
MICROSOFT = "com.microsoft"
OPSET = 21  # DequantizeLinear of 4-bit integers; everything else is older
PIP = "pip install 'rarefy[onnx]'"
BLOCKS = (16, 32, 64, 128, 256)  # columns under one scale that MatMulNBits knows


def onnx_package() -> Any:
    """The ``onnx`` package, or a TargetError with the line that installs it."""
    try:
        import onnx
    except ImportError:
        raise TargetError(f"writing ONNX files needs the package onnx; {PIP}") from None
    return onnx


@dataclass(eq=False)
class Graph:
    """A graph under construction: operators in order, and the constants they read.

    contrib: written for ONNX Runtime, with operators that only it has; else for OpenVINO, whose patterns of
    compressed weights are met (and which gets shifts of bytes wrong). accuracy: of ``MatMulNBits`` (0:
    float32; 4: it may round activations to 8 bits, which is faster). notes: what went over larger than it is
    stored. alike: a word that values share which have as many rows as each other.
    """

    contrib: bool = True
    accuracy: int = 0
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    made: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    alike: dict[str, str] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, name: str = "", domain: str = "", outputs: int = 1,
            **attributes: Any) -> str:
        """One operator; the name of its first output, ``name`` if given."""
        first = name or self.free(op)
        names = [first, *(f"{first}.{k}" for k in range(1, outputs))]
        self.nodes.append(onnx_package().helper.make_node(op, list(inputs), names, name=first, domain=domain,
                                                          **attributes))
        return first

    def free(self, stem: str) -> str:
        """A name that nothing has."""
        return f"rarefy.{stem}.{len(self.nodes)}"

    def constant(self, name: str, values: Tensor | NDArray[Any] | Sequence[int]) -> str:
        """A stored tensor, in its own type; sequences are int64."""
        made = tensor(name, np.array(values, np.int64) if isinstance(values, Sequence) else values)
        while self.constants.setdefault(name, made) != made:  # a shared weight in another layout
            name = made.name = f"{name}_"
        return name

    def four_bits(self, name: str, codes: Tensor, *, signed: bool) -> str:
        """A stored tensor of 4-bit integers, two a byte."""
        onnx = onnx_package()
        kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
        data = packed((codes.reshape(1, -1) ^ 8) if signed else codes.reshape(1, -1), 4)
        self.constants[name] = onnx.helper.make_tensor(name, kind, list(codes.shape), data.tobytes(),
                                                       raw=True)
        return name


def tensor(name: str, values: Tensor | NDArray[Any]) -> Any:
    """A TensorProto with the same numbers. 8-bit floats are stored as float16, which holds them exactly."""
    onnx = onnx_package()
    if isinstance(values, np.ndarray):
        return onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
    values = values.detach().contiguous()
    if values.dtype == torch.bfloat16:
        raw = values.view(torch.int16).numpy().tobytes()
        return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, list(values.shape), raw, raw=True)
    if values.is_floating_point() and values.element_size() == 1:
        values = values.to(torch.float16)
    return onnx.numpy_helper.from_array(values.numpy(), name)


def as_float(graph: Graph, value: str) -> str:
    """A value as float32."""
    return graph.add("Cast", value, to=onnx_package().TensorProto.FLOAT)


# ---- weights -------------------------------------------------------------------------------------------


def weight(graph: Graph, node: Node, name: str) -> str:
    """The matrix [out, in] as a float32 value, computed from what is stored."""
    found = integers(node)
    if found is not None:
        return _decompressed(graph, found, name)
    match node:
        case Shared(of=of):
            return weight(graph, of, name)
        case Dense(values=values):
            stored = graph.constant(name, values)
            return stored if values.dtype == torch.float32 else as_float(graph, stored)
        case Product(left=left, right=right):
            first = weight(graph, left, f"{name}.left")
            return graph.add("MatMul", first, weight(graph, right, f"{name}.right"))
        case Sum(terms=terms):
            total = weight(graph, terms[0], f"{name}.0")
            for k, term in enumerate(terms[1:], 1):
                total = graph.add("Add", total, weight(graph, term, f"{name}.{k}"))
            return total
        case Clustered() if _smaller(node):
            return _clustered(graph, node, name)
        case Hashed() if _table_bytes(prod(node.size), 2 * node.buckets.numel(),
                                      2 * node.buckets.numel()) < 4 * prod(node.size):
            return _hashed(graph, node, name)
        case _:
            if not isinstance(node, Masked):
                graph.notes.append(f"{name}: a {type(node).__name__} has no smaller form here; stored as "
                                   "float32")
            return graph.constant(name, node.dense())


def _decompressed(graph: Graph, found: Integers, name: str) -> str:
    """``scale * (code - zero)``, in groups; symmetric codes are stored signed and need no zero point."""
    rows, columns = found.codes.shape
    found = found.widened(max(found.bits, 4))
    shape = (rows, columns // found.group, found.group)
    values = as_float(graph, _codes(graph, found, shape, f"{name}.codes"))
    if not found.symmetric:
        zero = found.zero.unsqueeze(-1)
        values = graph.add("Sub", values, _zero(graph, found, zero, f"{name}.zero"))
    values = graph.add("Mul", values, _scales(graph, found.scale.unsqueeze(-1), f"{name}.scale"))
    return graph.add("Reshape", values, graph.constant(f"{name}.shape", [rows, columns]))


def _scales(graph: Graph, scale: Tensor, name: str) -> str:
    """Scales as float32, stored as float16 where that holds them."""
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale):
        return graph.constant(name, scale)
    return as_float(graph, graph.constant(name, half))


def _codes(graph: Graph, found: Integers, shape: tuple[int, ...], name: str) -> str:
    codes = found.codes.reshape(shape)
    if found.bits == 4:
        return graph.four_bits(name, codes, signed=found.symmetric)
    return graph.constant(name, signed(codes) if found.symmetric else codes)


def _zero(graph: Graph, found: Integers, zero: Tensor, name: str) -> str:
    if not found.whole:
        return graph.constant(name, zero)
    whole = zero.to(torch.uint8)
    if found.bits == 4:
        return as_float(graph, graph.four_bits(name, whole, signed=False))
    return as_float(graph, graph.constant(name, whole))


def signed(codes: Tensor) -> Tensor:
    """8-bit codes as int8: the middle is zero."""
    return (codes ^ 128).view(torch.int8)


def _table_bytes(places: int, values: int, numbers: int) -> int:
    return places * (1 if values <= 256 else 2 if values <= 1 << 16 else 4) + 4 * numbers


def _places(graph: Graph, name: str, index: Tensor, values: int, rows: str = "") -> str:
    """Positions in a table, stored in the narrowest type, as int32; of all rows, or of those asked for."""
    if values <= 16:
        stored = graph.four_bits(name, index.to(torch.uint8), signed=False)
    else:
        kind = np.uint8 if values <= 256 else np.uint16 if values <= 1 << 16 else np.int32
        stored = graph.constant(name, index.numpy().astype(kind))
    if rows:
        stored = graph.add("Gather", stored, rows, axis=0)
    return graph.add("Cast", stored, to=onnx_package().TensorProto.INT32)


def _smaller(node: Clustered) -> bool:
    """Than as floats."""
    _, values, _ = node.codebook.shape
    return _table_bytes(node.index.numel(), values, node.codebook.numel()) < 4 * prod(node.shape)


def _clustered(graph: Graph, node: Clustered, name: str, rows: str = "") -> str:
    """The matrix, or some rows of it. rows: a value with their numbers."""
    books, values, width = node.codebook.shape
    places = _places(graph, f"{name}.index", node.index, values, rows)
    if books > 1:
        offset = np.arange(books, dtype=np.int32)[None] * values
        places = graph.add("Add", places, graph.constant(f"{name}.book", offset))
    book = graph.constant(f"{name}.codebook", node.codebook.float().reshape(books * values, width))
    found = graph.add("Gather", book, places, axis=0)
    shape = graph.constant(f"{name}.shape", list(node.shape))
    if rows:
        row = graph.constant(f"{name}.row", [node.shape[1]])
        shape = graph.add("Concat", graph.add("Shape", rows), row, axis=0)
    return graph.add("Reshape", found, shape)


def _hashed(graph: Graph, node: Hashed, name: str) -> str:
    """Buckets with both signs, and where each weight finds its own: runtimes have no such hash."""
    bucket, sign = node.places(torch.arange(node.size[0]))
    count = node.buckets.numel()
    index = bucket + count * (sign < 0)
    table = torch.cat([node.buckets.float(), -node.buckets.float()])
    return graph.add("Gather", graph.constant(f"{name}.buckets", table),
                     _places(graph, f"{name}.index", index, 2 * count), axis=0)


# ---- what uses weights ---------------------------------------------------------------------------------


def linear(graph: Graph, x: str, node: Node, name: str, compute: Compute = "float",
           rows: Rows = ROWS) -> str:
    """``x W^T`` for x [.., in]. compute: ``static`` expects ``x`` to come out of a DequantizeLinear, and
    multiplies 8-bit weights with one scale a row as they are; ``dynamic`` rounds ``x`` as ``rows`` says and
    any coarse weight to what integer kernels take."""
    if compute == "dynamic" and coarse(node):
        return _dynamic_linear(graph, x, node, name, rows)
    match node:
        case Product(left=left, right=right) if right.shape[0] * sum(node.shape) < prod(node.shape):
            inner = linear(graph, x, right, f"{name}.right")
            return linear(graph, inner, left, f"{name}.left")
        case Sum(terms=terms):
            total = linear(graph, x, terms[0], f"{name}.0", compute)
            for k, term in enumerate(terms[1:], 1):
                total = graph.add("Add", total, linear(graph, x, term, f"{name}.{k}", compute))
            return total
    found = integers(node)
    if found is not None and compute == "static" and found.bits == 8 and computable(node):
        return _static_linear(graph, x, found, name)
    block = None if found is None or not graph.contrib else _block(found)
    if found is not None and block is not None:
        return _blockwise(graph, x, found, block, name)
    match node:
        case Dense(values=values) if values.dtype == torch.float32 and name not in graph.constants:
            return graph.add("MatMul", x, graph.constant(name, values.T))
        case _:  # a head that is the embedding too is turned when the runtime loads it
            return graph.add("MatMul", x, graph.add("Transpose", weight(graph, node, name), perm=[1, 0]))


def coarse(node: Node) -> bool:
    """Whether a weight is stored in so few bits that 8 for its kernel lose little."""
    match node:
        case Quantized() | Clustered() | Hashed():
            return True
        case Masked(inner=inner) | Shared(of=inner):
            return coarse(inner)
        case _:
            return False


def computable(node: Node) -> bool:
    """Whether integer kernels take this weight: 8 bits at most, symmetric, one scale a row."""
    found = integers(node)
    return found is not None and found.symmetric and found.by_row


def _static_linear(graph: Graph, x: str, found: Integers, name: str) -> str:
    codes = graph.constant(f"{name}.codes", signed(found.codes).T)
    scale = graph.constant(f"{name}.scale", found.scale[:, 0])
    zero = graph.constant(f"{name}.zero", np.zeros(len(found.scale), np.int8))
    return graph.add("MatMul", x, graph.add("DequantizeLinear", codes, scale, zero, axis=1))


def _dynamic_linear(graph: Graph, x: str, node: Node, name: str, rows: Rows) -> str:
    """``x W^T`` in integers, every row of ``x`` rounded with a scale of its own."""
    onnx = onnx_package()
    rounded = graph.made.get((x, "rounded"))
    if rounded is None:  # q, k and v round their input once
        rounded = graph.made[(x, "rounded")] = _rounded_rows(graph, x, node.shape[1], rows)
    codes, scale = _eight_bits(graph, node, name, rows)
    zero = graph.constant(f"rarefy.middle{rows.middle}", np.array(rows.middle, np.uint8))
    if graph.contrib:
        one = graph.constant("rarefy.one", np.array(1, np.float32))
        product = graph.add("MatMulIntegerToFloat", rounded[0], codes, one, scale, zero, domain=MICROSOFT)
    else:
        product = graph.add("MatMulInteger", rounded[0], codes, zero)
        product = graph.add("Mul", graph.add("Cast", product, to=onnx.TensorProto.FLOAT), scale)
    return graph.add("Mul", product, rounded[1])


def _rounded_rows(graph: Graph, x: str, channels: int, rows: Rows) -> tuple[str, str]:
    """Codes of ``x`` [.., channels] and the scale of each row [.., 1], which is one block of channels."""
    last, middle, alike = graph.constant("rarefy.last", [-1]), rows.middle, graph.alike.get(x, x)
    if rows.factors is not None:
        x = graph.add("Mul", x, graph.constant(f"{x}.factors", 1 / rows.factors))
    ends = []
    for op, step in (("ReduceMax", 1 / (255 - middle)), ("ReduceMin", -1 / middle)):
        share = graph.constant(f"rarefy.{op}{middle}", np.array(step, np.float32))
        ends.append(graph.add("Mul", graph.add(op, x, last), share))
    scale = graph.add("Max", *ends, graph.constant("rarefy.least", np.array(SMALLEST, np.float32)))
    zeros = graph.made.get((alike, f"middle{middle}"))
    if zeros is None:  # the code of zero, once for every row, is the same for all values of a shape
        zero = graph.constant(f"rarefy.middle{middle}", np.array(middle, np.uint8))
        zeros = (graph.add("Expand", zero, graph.add("Shape", scale)),)
        graph.made[(alike, f"middle{middle}")] = zeros
    return graph.add("QuantizeLinear", x, scale, zeros[0], axis=-1, block_size=channels), scale


def _eight_bits(graph: Graph, node: Node, name: str, rows: Rows) -> tuple[str, str]:
    """A weight as int8 codes [in, out] and scales [out]: those it has, or what it is rounded to when the
    file is loaded, where its own are in groups or factors of the inputs come before them."""
    onnx = onnx_package()
    if rows.factors is None and computable(node):
        found = integers(node)
        assert found is not None
        scale = graph.constant(f"{name}.scale", found.scale[:, 0])
        found = found.widened(max(found.bits, 4))
        if found.bits == 8:
            return graph.constant(f"{name}.codes", signed(found.codes).T), scale
        stored = graph.four_bits(f"{name}.codes", found.codes, signed=True)
        return graph.add("Transpose", graph.add("Cast", stored, to=onnx.TensorProto.INT8), perm=[1, 0]), scale
    values = weight(graph, node, name)
    if rows.factors is not None:
        values = graph.add("Mul", values, graph.constant(f"{name}.factors", rows.factors))
    largest = graph.add("ReduceMax", graph.add("Abs", values), graph.constant("rarefy.last", [-1]))
    step = graph.constant("rarefy.step", np.array(1 / 127, np.float32))
    least = graph.constant("rarefy.least", np.array(SMALLEST, np.float32))
    scale = graph.add("Max", graph.add("Mul", largest, step), least)
    codes = graph.add("Cast", graph.add("Round", graph.add("Div", values, scale)), to=onnx.TensorProto.INT8)
    return (graph.add("Transpose", codes, perm=[1, 0]),
            graph.add("Reshape", scale, graph.constant("rarefy.last", [-1])))


def _block(found: Integers) -> int | None:
    """The block size under which ``MatMulNBits`` holds these groups; scales may have to be repeated."""
    if not found.whole and found.bits == 8:
        return None
    if found.by_row:  # what the scales that are repeated and the padding of the last block take together
        columns = found.codes.shape[1]
        return min(BLOCKS, key=lambda size: (-(-columns // size) * (size * found.bits + 32), -size))
    block = min(found.group & -found.group, BLOCKS[-1])
    return block if block >= BLOCKS[0] else None


def _blockwise(graph: Graph, x: str, found: Integers, block: int, name: str) -> str:
    rows, columns = found.codes.shape
    blocks = -(-columns // block)
    found = found.regrouped(block)
    codes = torch.nn.functional.pad(found.codes, (0, blocks * block - columns))
    data = packed(codes, found.bits).reshape(rows, blocks, block * found.bits // 8)
    inputs = [x, graph.constant(f"{name}.codes", data), _scales(graph, found.scale, f"{name}.scale")]
    if not found.whole:
        inputs.append(graph.constant(f"{name}.zero", found.zero))
    elif not found.symmetric:
        inputs.append(graph.constant(f"{name}.zero", packed(found.zero.to(torch.uint8), found.bits)))
    return graph.add("MatMulNBits", *inputs, domain=MICROSOFT, K=columns, N=rows, bits=found.bits,
                     block_size=block, accuracy_level=graph.accuracy)


@dataclass(frozen=True)
class Window:
    """How a convolution moves: ONNX's attributes, per spatial axis (pads: the starts, then the ends)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int = 1

    def along(self, axis: int) -> Window:
        """The part of it that moves along one spatial axis only."""
        count = len(self.kernel)

        def only(values: tuple[int, ...], rest: int) -> tuple[int, ...]:
            return tuple(v if k % count == axis else rest for k, v in enumerate(values))

        return Window(only(self.kernel, 1), only(self.strides, 1), only(self.pads, 0),
                      only(self.dilations, 1))


def convolution(graph: Graph, x: str, node: Node, window: Window, name: str, bias: Sequence[str] = (),
                input_scale: float | None = None) -> str:
    """A convolution by the matrix ``node`` [out, in / groups * kernel]; ``bias``: the name of one, or none.

    input_scale: of the DequantizeLinear that ``x`` comes from; then 8-bit weights are multiplied as such.
    """
    point = Window((1,) * len(window.kernel), (1,) * len(window.kernel), (0,) * len(window.pads),
                   (1,) * len(window.kernel))
    if input_scale is not None and computable(node):
        return _integer_convolution(graph, x, node, window, name, bias)
    match node:
        case Product(left=left, right=right) if window.groups == 1:
            inner = convolution(graph, x, right, window, f"{name}.right")
            return convolution(graph, inner, left, point, f"{name}.left", bias)
        case Tucker(left=left, core=core, right=right) if window.groups == 1:
            inner = convolution(graph, x, _turned(right), point, f"{name}.right")
            inner = convolution(graph, inner, core, window, f"{name}.core")
            return convolution(graph, inner, left, point, f"{name}.left", bias)
        case CP(factors=factors) if window.groups == 1 and len(factors) == 2 + len(window.kernel):
            inner = convolution(graph, x, _turned(factors[1]), point, f"{name}.1")
            for axis, factor in enumerate(factors[2:]):
                move = replace(window.along(axis), groups=factor.shape[1])
                inner = convolution(graph, inner, _turned(factor), move, f"{name}.{axis + 2}")
            return convolution(graph, inner, factors[0], point, f"{name}.0", bias)
    values = weight(graph, node, name)
    inside = node.shape[1] // prod(window.kernel)
    shaped = graph.add("Reshape", values,
                       graph.constant(f"{name}.kernel", [node.shape[0], inside, *window.kernel]))
    return _conv(graph, x, shaped, window, bias)


def _turned(node: Node) -> Node:
    """A factor with its axes exchanged: factors are small, and codes become float32."""
    match node:
        case Dense(values=values):
            return Dense(values.T.contiguous())
        case _:
            return Dense(node.dense().T.contiguous())


def _conv(graph: Graph, x: str, values: str, window: Window, bias: Sequence[str]) -> str:
    return graph.add("Conv", x, values, *bias, kernel_shape=list(window.kernel), strides=list(window.strides),
                     pads=list(window.pads), dilations=list(window.dilations), group=window.groups)


def _integer_convolution(graph: Graph, x: str, node: Node, window: Window, name: str,
                         bias: Sequence[str]) -> str:
    found = integers(node)
    assert found is not None
    found = found.widened(8)
    codes = signed(found.codes).reshape(len(found.codes), -1, *window.kernel)
    scale = graph.constant(f"{name}.scale", found.scale[:, 0])
    zero = graph.constant(f"{name}.zero", np.zeros(len(found.scale), np.int8))
    values = graph.add("DequantizeLinear", graph.constant(f"{name}.codes", codes), scale, zero, axis=0)
    return _conv(graph, x, values, window, bias)


def embedding(graph: Graph, index: str, node: Node, name: str) -> str:
    """Rows of ``node``, float32, decoding no others where the node's form allows."""
    found = integers(node)
    if found is not None and graph.contrib:
        return _integer_rows(graph, index, found, name)
    match node:
        case Dense(values=values):
            rows = graph.add("Gather", graph.constant(name, values), index, axis=0)
            return rows if values.dtype == torch.float32 else as_float(graph, rows)
        case Clustered() if _smaller(node) and node.codebook.shape[1] > 16:  # Gather takes no 4-bit numbers
            return _clustered(graph, node, name, index)
        case Product(left=left, right=right):
            inner = embedding(graph, index, left, f"{name}.left")
            return graph.add("MatMul", inner, weight(graph, right, f"{name}.right"))
        case Sum(terms=terms):
            total = embedding(graph, index, terms[0], f"{name}.0")
            for k, term in enumerate(terms[1:], 1):
                total = graph.add("Add", total, embedding(graph, index, term, f"{name}.{k}"))
            return total
        case _:
            return graph.add("Gather", weight(graph, node, name), index, axis=0)


def _integer_rows(graph: Graph, index: str, found: Integers, name: str) -> str:
    """Bytes of the rows asked for, taken apart there: a table of 4-bit codes is never unpacked whole.

    Codes and scales lie as ``MatMulNBits`` has them, so that a head which is the same matrix shares them.
    """
    rows, columns = found.codes.shape
    data = packed(found.codes, found.bits)
    if _block(found) == found.group:
        data = data.reshape(rows, columns // found.group, -1)
    codes = graph.add("Gather", graph.constant(f"{name}.codes", data), index, axis=0)
    last, parts = graph.constant(f"{name}.last", [-1]), []
    if found.bits < 8:
        mask = graph.constant(f"{name}.mask", np.array((1 << found.bits) - 1, np.uint8))
        for shift in range(0, 8, found.bits):
            by = graph.constant(f"{name}.shift{shift}", np.array(shift, np.uint8))
            part = graph.add("BitwiseAnd", graph.add("BitShift", codes, by, direction="RIGHT"), mask)
            parts.append(graph.add("Unsqueeze", part, last))
        codes = graph.add("Concat", *parts, axis=-1)
    groups = found.scale.shape[1]
    grouped = graph.constant(f"{name}.groups", np.array([-1, groups, found.group], np.int64))
    shape = graph.add("Concat", graph.add("Shape", index), graph.constant(f"{name}.row", [columns]), axis=0)
    flat = as_float(graph, _cut(graph, codes, columns, found.bits, name))
    values = graph.add("Reshape", flat, grouped)
    flat_index = graph.add("Reshape", index, graph.constant(f"{name}.flat", [-1]))
    if found.symmetric:
        middle = graph.constant(f"{name}.zero", np.array(1 << (found.bits - 1), np.float32))
        values = graph.add("Sub", values, middle)
    else:
        zero = graph.add("Gather", graph.constant(f"{name}.zero", found.zero), flat_index, axis=0)
        values = graph.add("Sub", values, graph.add("Unsqueeze", zero, last))
    scale = graph.add("Gather", _scales(graph, found.scale, f"{name}.scale"), flat_index, axis=0)
    values = graph.add("Mul", values, graph.add("Unsqueeze", scale, last))
    return graph.add("Reshape", values, shape)


def _cut(graph: Graph, codes: str, columns: int, bits: int, name: str) -> str:
    """Rows of exactly ``columns`` codes, [-1, columns], without the padding of the last byte."""
    per = 8 // bits
    whole = -(-columns // per) * per
    flat = graph.add("Reshape", codes, graph.constant(f"{name}.bytes", [-1, whole]))
    if whole == columns:
        return flat
    ends = (graph.constant(f"{name}.{end}", [at]) for end, at in (("from", 0), ("to", columns), ("axis", 1)))
    return graph.add("Slice", flat, *ends)
