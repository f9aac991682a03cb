"""What transformers makes of a config: the sizes of its decoder, and whether that can run through its modules.

Found by running the model's own code on tensors without contents: no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rayskip.errors import ModelError, first_line
from rayskip.model.config import LENGTH_DEPENDENT_ROPES
from rayskip.model.families.parts import max_positions
from rayskip.model.hosted.facts import Facts
from rayskip.model.hosted.modules import INTERFACE, Asked, Call, Modules

TOKENS = 3


def facts_of(folder: Path) -> Facts:
    """Of the checkpoint in the folder. Raises ModelError where its decoder cannot run through its modules."""
    try:
        return _facts_of(hf_config(folder))
    except ModelError:
        raise
    except Exception as error:  # of a config's values, or of a forward, by whatever happens to fail on them
        raise ModelError(f"it cannot be taken apart ({type(error).__name__}: {first_line(error)})") from error


def _facts_of(config: Any) -> Facts:
    text = config.get_text_config()
    positions = _positions(text)
    modules = Modules(without_contents(config))
    token_ids = torch.zeros(TOKENS, dtype=torch.long, device="meta")
    inputs = modules.inputs(token_ids, token_ids)
    if inputs.x.dim() != 2 or len(inputs.x) != TOKENS:
        raise ModelError(f"its states of {TOKENS} tokens are {list(inputs.x.shape)}, not one a token")
    asked = [_asked(modules, index, inputs.x, call) for index, call in enumerate(inputs.calls)]
    heads, caps = {each.q.shape[1] for each in asked}, {each.softcap for each in asked}
    kv_heads = max(each.k.shape[1] for each in asked)
    if len(heads) > 1 or len(caps) > 1 or any(kv_heads % each.k.shape[1] for each in asked):
        raise ModelError("its layers differ in how many heads they have, or how they cap scores")
    windows = _windows(asked, positions)
    _check_cache(text, windows, positions)
    return Facts(
        model_type=text.model_type,
        hidden=inputs.x.shape[1],
        heads=asked[0].q.shape[1],
        kv_heads=kv_heads,
        head_dim=max(part.shape[2] for each in asked for part in (each.k, each.v)),
        vocab=text.vocab_size,
        max_positions=positions,
        scale=asked[0].scale,
        attn_softcap=asked[0].softcap,
        windows=windows,
    )


def hf_config(folder: Path) -> Any:
    """The config of the checkpoint in the folder."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _positions(config: Any) -> int:
    """How long a text may be. Raises ModelError where that is not said, or positions depend on it."""
    for parameters in _dicts(getattr(config, "rope_parameters", None)):
        if (kind := parameters.get("rope_type")) in (*LENGTH_DEPENDENT_ROPES, "dynamic"):
            raise ModelError(f"rope_type {kind!r} depends on the text's length and is not supported")
    if type(getattr(config, "max_position_embeddings", None)) is not int:
        raise ModelError("its config does not say how long a text may be (max_position_embeddings)")
    return max_positions(config)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """A dict, and those in it."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _dicts(inner)


def without_contents(config: Any) -> Any:
    """The causal LM of a config, of tensors on the device "meta"."""
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=INTERFACE, trust_remote_code=False
            )
    except KeyError as error:
        if INTERFACE not in str(error):
            raise
        raise ModelError("its attention is its own and not exchanged by transformers") from error
    return model.eval()


def _asked(modules: Modules, index: int, x: Tensor, call: Call) -> Asked:
    """What a layer asks of attention, on states [N, d]."""
    found: list[Asked] = []

    def answer(asked: Asked) -> Tensor:
        found.append(asked)
        return asked.q.new_empty(*asked.q.shape[:2], asked.v.shape[2])

    failed = ""
    try:
        modules.run_layer(index, x, call, answer)
    except Exception as error:  # after attention perhaps: experts are chosen by contents, and there are none
        failed = f" ({type(error).__name__}: {first_line(error)})"
    kind = _kind(modules.config, index)
    if not found:
        raise ModelError(f"layer {index}{kind} does not attend through transformers' interface{failed}")
    if len(found) > 1:
        raise ModelError(f"layer {index}{kind} attends {len(found)} times")
    asked = found[0]
    if asked.visible is None:
        raise ModelError(f"layer {index}{kind} has a mask of its own")
    if asked.sinks is not None:
        raise ModelError(f"layer {index}{kind} attends with sinks")
    if asked.others:
        raise ModelError(f"layer {index}{kind} attends with {', '.join(asked.others)}")
    return asked


def _check_cache(config: Any, windows: Sequence[int | None], positions: int) -> None:
    """Raises ModelError where transformers' own cache would forget what its masks let be seen."""
    for index, (layer, window) in enumerate(zip(DynamicCache(config=config).layers, windows, strict=False)):
        kept = getattr(layer, "sliding_window", None)
        if kept is not None and kept < positions and kept != window:
            raise ModelError(
                f"layer {index} sees {window or 'all'} positions by transformers' mask, and {kept} by its cache"
            )


def _kind(config: Any, index: int) -> str:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return f" ({kinds[index]})" if kinds and index < len(kinds) else ""


def _windows(asked: Sequence[Asked], positions: int) -> list[int | None]:
    known: dict[int, int | None] = {}
    for each in asked:
        assert each.visible is not None
        if id(each.visible) not in known:
            known[id(each.visible)] = each.visible.window(positions)
    return [known[id(each.visible)] for each in asked]
