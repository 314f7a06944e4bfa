"""Hooks that last as long as a ``with`` block: none is left behind, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Hook = tuple[nn.Module, Callable[..., Any]]


@contextmanager
def hooked(behind: Iterable[Hook] = (), before: Iterable[Hook] = ()) -> Iterator[None]:
    """While this lasts, functions are called with what modules do.

    behind: after a call, with (module, inputs, output); what is returned, if anything, takes the place of the
    output. before: ahead of it, with (module, inputs), and the place of the inputs.
    """
    handles = []
    try:
        for module, call in behind:
            handles.append(module.register_forward_hook(call))
        for module, call in before:
            handles.append(module.register_forward_pre_hook(call))
        yield
    finally:
        for handle in handles:
            handle.remove()
