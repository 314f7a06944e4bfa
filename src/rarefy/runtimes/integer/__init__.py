"""Inference in integers alone: what a processor without floating point computes.

    network = compiled(program, trees, calibration)       a CNN or an encoder, traced, its weights on int8
    network.answers(inputs)                                an interpreter, exact and slow
    Fake(network, program, trees).answers(inputs)          the same in floats that are rounded to 8 bits
    export_integer(network, program, path)                the same integers for ONNX Runtime's kernels

``steps`` says what is computed, ``compile`` finds the integers, ``network`` runs them, ``graph`` writes them
as ONNX. The arithmetic itself is in ``rarefy.numerics.fixed_point``.
"""

from rarefy.runtimes.integer.compile import compiled, multiplied
from rarefy.runtimes.integer.fake import Fake
from rarefy.runtimes.integer.graph import IntegerFile, export_integer
from rarefy.runtimes.integer.network import IntegerNetwork

__all__ = ["Fake", "IntegerFile", "IntegerNetwork", "compiled", "export_integer", "multiplied"]
