"""A decoder as transformers' own modules, taken apart by running its own forward.

Its layers are intercepted, so that the forward tells what it does before them (embeddings, positions, masks: the
arguments of each layer) and after them (norm, head, scales and caps), whatever the model. Attention and masks come
to us through the interfaces that transformers has for it. Does not know how attention is computed, nor pages.

Shapes: N tokens, d hidden, R rows of outputs, V vocabulary, Hq query heads, Hkv key-value heads, D head dim of
queries and keys, Dv of values.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from rayskip.errors import ModelError, first_line
from rayskip.model.backends.base import Linear

INTERFACE = "rayskip"
"""Our name among transformers' implementations of attention."""

Attend = Callable[["Asked"], Tensor]
"""Answers what a layer asks of attention: [N, Hq, Dv]."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """What a layer asks of attention. q [N, Hq, D], k [N, Hkv, D], v [N, Hkv, Dv], turned to their places. scale:
    of q.k. sinks: a score for each query head that belongs to no key. visible: transformers' word on which keys a
    query sees, None where it has not asked us for it. others: names of what else it wants."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    visible: Visible | None
    others: tuple[str, ...]


@dataclass(frozen=True)
class Visible:
    """A mask as transformers describes it: function(batch, head, query, key), of indices, says what is seen."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def window(self, positions: int) -> int | None:
        """How many of the last positions a query sees, its own included, in a text of so many; None: all.

        Raises ModelError where it sees others.
        """
        key, zero = torch.arange(positions), torch.tensor(0)

        def seen(query: int) -> Tensor:
            return torch.as_tensor(self.function(zero, zero, torch.tensor(query), key)).expand(positions)

        width = int(seen(positions - 1).sum())
        places = {0, 1, width - 1, width, width + 1, positions // 2, positions - 1}
        for query in places & set(range(positions)):
            if not torch.equal(seen(query), (key <= query) & (key > query - width)):
                raise ModelError("its attention sees other tokens than the last so many")
        return None if width == positions else width


@dataclass(frozen=True)
class Inputs:
    """x [N, d]: states before the first layer. calls: of each layer, its arguments but the states."""

    x: Tensor
    calls: list[Call]


class _Now(threading.local):
    """What this thread runs. attend: answers attention. intercept: stands for a layer: (index, states, its other
    arguments) -> states."""

    attend: Attend | None = None
    intercept: Callable[[int, Tensor, Call], Tensor] | None = None


_now = _Now()


class _Enough(Exception):
    """Ends a forward of which all is known."""


class _NoCache(Cache):
    """Keeps nothing: keys and values go to our pages."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return query_length, 0


class Modules:
    """A causal LM of transformers, and how it runs layer by layer. Thread-safe.

    config: of its language part. layers: its decoder layers.
    """

    def __init__(self, model: Any, windows: Sequence[int | None] = ()) -> None:
        """windows: positions that each layer sees, None: all. Raises ModelError for a model that cannot be taken
        apart."""
        self.windows = windows
        self.model, self.config = model, model.config.get_text_config()
        self.layers: list[nn.Module] = _layers(model, self.config)
        self.embed: Tensor = model.get_input_embeddings().weight
        _check_forward(model)
        self._forwards = [layer.forward for layer in self.layers]
        self._wrap: Callable[[Tensor], Any] = _WRAPS[0]
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._called, index)
        self._find_wrap()

    @property
    def size(self) -> int:
        """Weights that a token runs through, as if it ran through all experts."""
        return self.total

    @property
    def total(self) -> int:
        """Weights of all layers."""
        return sum(
            weight.numel() for layer in self.layers for weight in layer.parameters() if weight.dim() > 1
        )

    @property
    def varied(self) -> int:
        """So many first layers have every kind of layer, by the shapes of their weights."""
        kinds = [
            tuple((name, weight.shape) for name, weight in layer.named_parameters()) for layer in self.layers
        ]
        return 1 + max(kinds.index(kind) for kind in kinds)

    def inputs(self, token_ids: Tensor, positions: Tensor, whole: bool = False) -> Inputs:
        """What the forward makes of tokens [N] at their positions [N] before its layers run.

        whole: go on after the last layer, which tells no more, and takes the head's time.
        """
        states: list[Tensor] = []
        calls: list[Call] = []

        def keep(index: int, x: Tensor, call: Call) -> Tensor:
            if index != len(calls) or (states and x is not states[-1]):
                raise ModelError("it does more between its layers than to run one after the other")
            states.append(x)
            calls.append(call)
            if len(calls) == len(self.layers) and not whole:
                raise _Enough
            return x

        with _set(intercept=keep), suppress(_Enough):
            self._forward(token_ids, positions)
        if len(calls) != len(self.layers):
            raise ModelError(f"it runs {len(calls)} of {len(self.layers)} layers")
        return Inputs(states[0][0], calls)

    def run_layer(self, index: int, x: Tensor, call: Call, attend: Attend) -> Tensor:
        """States [N, d] after a layer."""
        args, kwargs = call
        with _set(attend=attend):
            y = self._forwards[index](x.unsqueeze(0), *args, **kwargs)
        y = y[0] if isinstance(y, tuple | list) else y
        return y.squeeze(0)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """Logits [R, V] of states [R, d] after the last layer."""
        zeros = torch.zeros(len(x), dtype=torch.long, device=x.device)
        last = len(self.layers) - 1
        with _set(intercept=lambda index, states, call: x.unsqueeze(0) if index == last else states):
            return self._forward(zeros, zeros).logits.squeeze(0)  # type: ignore[no-any-return]

    def reference_logits(self, token_ids: Tensor) -> Tensor:
        """Logits [N, V] of one text [N] by transformers alone, its own attention included."""
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            positions = torch.arange(len(token_ids), device=token_ids.device).unsqueeze(0)
            found = self.model(input_ids=token_ids.unsqueeze(0), position_ids=positions, use_cache=False)
            return found.logits.squeeze(0)  # type: ignore[no-any-return]
        finally:
            self.model.set_attn_implementation(own)

    def exchange_products(
        self, make: Callable[[Tensor, Tensor | None], Linear | None]
    ) -> dict[nn.Module, Linear]:
        """Have linear layers computed by what `make` gives for their weight and bias, if anything; by module."""
        made: dict[nn.Module, Linear] = {}
        for module in self.model.modules():
            if type(module) is nn.Linear and (product := make(module.weight, module.bias)) is not None:
                made[module] = product
                module.forward = partial(_product, product)  # type: ignore[method-assign]
        return made

    def _forward(self, token_ids: Tensor, positions: Tensor) -> Any:
        return self.model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=_NoCache(),
            use_cache=True,
        )

    def _called(self, index: int, *args: Any, **kwargs: Any) -> Any:
        if _now.intercept is None:
            return self._forwards[index](*args, **kwargs)
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop("hidden_states")
        return self._wrap(_now.intercept(index, x, (args, kwargs)))

    def _find_wrap(self) -> None:
        """What a layer returns beside its states is told by what the forward can read."""
        two = torch.arange(2, device=self.embed.device)
        failed: list[Exception] = []
        for wrap in _WRAPS:
            self._wrap = wrap
            try:
                self.inputs(two, two, whole=True)
            except Exception as error:  # of whatever a forward does with what it cannot read
                failed.append(error)
            else:
                return
        first = failed[0]
        if isinstance(first, ModelError):
            raise first
        raise ModelError(
            f"its forward fails when its layers are left out ({type(first).__name__}: {first_line(first)})"
        ) from first


_WRAPS: tuple[Callable[[Tensor], Any], ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None))


def _product(product: Linear, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out]."""
    return product(x.reshape(-1, product.in_features).contiguous()).reshape(
        *x.shape[:-1], product.out_features
    )


def _check_forward(model: Any) -> None:
    """Raises ModelError where a text's positions cannot be told."""
    forwards = [inspect.signature(part.forward).parameters for part in (model, model.get_decoder())]
    if not any("position_ids" in parameters for parameters in forwards):
        raise ModelError("its forward takes no positions")


def _layers(model: Any, config: Any) -> list[nn.Module]:
    count = config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ModelError(f"it has no list of {count} layers")


@contextmanager
def _set(**what: Any) -> Iterator[None]:
    before = {name: getattr(_now, name) for name in what}
    vars(_now).update(what)
    try:
        yield
    finally:
        vars(_now).update(before)


READ = frozenset(
    {"dropout", "scaling", "softcap", "s_aux", "sliding_window", "position_ids", "use_cache", "past_key_values",
     "is_causal", "cache_position"}
)  # fmt: skip
"""What attention may be told beside the mask: all is in `Asked`, or said by the mask, or of no matter here."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, N, D], key [1, Hkv, N, D], value [1, Hkv, N, Dv] -> [1, N, Hq, Dv]."""
    if _now.attend is None:
        raise ModelError("a layer asks for attention where no layer runs")
    q, k, v = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    scale = kwargs.get("scaling")
    visible = attention_mask if isinstance(attention_mask, Visible) else None
    others = {
        name
        for name, value in kwargs.items()
        if name not in READ and value is not None and value is not False
    }
    asked = Asked(
        q, k, v,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        kwargs.get("softcap"), kwargs.get("s_aux"), visible, tuple(sorted(others)),
    )  # fmt: skip
    return _now.attend(asked).unsqueeze(0), None


def _mask(mask_function: Callable[..., Tensor], **_: Any) -> Visible:
    return Visible(mask_function)


AttentionInterface.register(INTERFACE, _attention)
AttentionMaskInterface.register(INTERFACE, _mask)
