"""What lies between products and attention, compiled: on a GPU a norm, a gate or a turn is one kernel in place of
two to eight, in prompts as in decode steps. Piece by piece, so that no product or attention is touched, and no sum
that a step may take in one call or in two.

torch caches what it compiles on disk, for all processes. Does not know which device it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rayskip.model.backends.torch import TorchBackend
from rayskip.model.spec import Experts


def compile_pieces(backend: TorchBackend) -> str | None:
    """Replace methods of a backend that has its weights, whose result for a token depends on no other, by compiled
    ones, and compile them for its model. Returns why not, where that does not work: then nothing changes."""
    spec, layers = backend.spec, backend.weights.layers
    new = backend.weights.embed.new_zeros
    widths = [spec.heads, spec.kv_heads, spec.kv_heads]
    q, k, _ = torch.split(new(3, sum(widths), spec.head_dim), widths, dim=1)  # strided as a layer's are
    mlps = [
        mlp
        for layer in layers
        for mlp in ((layer.mlp.each[0], layer.mlp.shared) if isinstance(layer.mlp, Experts) else (layer.mlp,))
        if mlp is not None
    ]
    gates = {(len(mlp.up.weight), mlp.activation, mlp.gated) for mlp in mlps}
    examples: dict[str, list[tuple[Any, ...]]] = {
        "normalise": [(new(3, spec.hidden), backend.weights.final_norm)],
        "gate": [(new(3, width), activation, gated) for width, activation, gated in gates],
        "turn": [(q, k, rope, new(3, dtype=torch.long)) for rope in backend.ropes.values()],
    }
    pieces = {name: _compiled(getattr(backend, name)) for name in examples}
    try:
        with torch.inference_mode():
            for name, own in examples.items():
                for example in own:
                    pieces[name](*example)
    except Exception as error:  # whatever a compiler may raise
        return f"norms and gates run uncompiled, which is slower: torch.compile does not serve here ({error})"
    vars(backend).update(pieces)
    return None


def _compiled(piece: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.decorators import mark_unbacked  # takes seconds to import

    def entry(*args: Any) -> Any:
        return piece(*args)

    entry.__code__ = entry.__code__.replace()  # torch counts what it compiles, up to a limit, by code object
    fused = torch.compile(entry, fullgraph=True, dynamic=False)

    def call(*args: Any) -> Any:
        """One kernel for any number of tokens: else one token would get its own, and its sums perhaps another
        order. And none for no token: what torch 2.11 compiles divides by their number."""
        if not len(args[0]):
            return piece(*args)
        for arg in args:
            if isinstance(arg, Tensor):
                mark_unbacked(arg, 0, shape_id="tokens")
        return fused(*args)

    return call
