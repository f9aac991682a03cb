"""What lies between products and attention, compiled: on a GPU a norm, a gate or a turn is one kernel in place of
two to eight, in prompts as in decode steps. Piece by piece, so that no product or attention is touched.

torch caches what it compiles on disk, for all processes. Does not know which device it is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rayskip.model.ops import Ops

_log = logging.getLogger(__name__)

PIECES = ("add_normalise", "gate", "turn")
"""Methods of Ops: a token's results depend on no other token."""


def compile_pieces(ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
    """Replace PIECES of `ops` by compiled ones, which compile when they are first called; where that does not work,
    nothing changes."""
    pieces = {name: _compiled(getattr(ops, name)) for name in PIECES}
    try:
        with torch.inference_mode():
            pieces["gate"](torch.zeros(3, 256, dtype=dtype, device=device))
    except Exception as error:  # whatever a compiler may raise
        _log.warning("torch.compile does not serve here (%s); norms and gates run uncompiled, slower", error)
    else:
        vars(ops).update(pieces)


def _compiled(piece: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.decorators import mark_unbacked  # takes seconds to import

    fused = torch.compile(piece, fullgraph=True)

    def call(*args: Any) -> Any:
        """One kernel for any number of tokens: else one token would get its own, and its sums perhaps another
        order."""
        for arg in args:
            if isinstance(arg, Tensor):
                mark_unbacked(arg, 0, shape_id="tokens")
        return fused(*args)

    return call
