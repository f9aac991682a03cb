"""Files of what was trained to draft for a model: weights, and a label that says for which.

Knows no drafter: each names the shapes that it expects. Looking for files loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from rayskip.errors import ModelError
from rayskip.model.checkpoint import tensors_fingerprint
from rayskip.model.files import read_headers, read_json

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = Path(__file__).parent / "shipped"
"""What comes with the package, one folder a model."""


@dataclass(frozen=True)
class Label:
    """What stands beside the weights, as KIND.json beside KIND.safetensors.

    base_tensors: fingerprint of the model it was trained on. tokens: that its head scores. steps: of training.
    agreement: share of held-out tokens where both choose the same.
    """

    KIND: ClassVar[str]

    base: str
    base_tensors: str
    tokens: int
    steps: int
    agreement: float


@dataclass(frozen=True)
class KangarooLabel(Label):
    """exit_layer: layers before the adapter."""

    KIND: ClassVar[str] = "kangaroo"

    exit_layer: int


@dataclass(frozen=True)
class MedusaLabel(Label):
    """heads: tokens drafted. agreement: the first head's."""

    KIND: ClassVar[str] = "medusa"

    heads: int


TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
"""What a label's fields may hold, by how they are annotated."""

LabelT = TypeVar("LabelT", bound=Label)


def find_trained(
    kind: type[LabelT], base: Path | None, folder: Path | None, key: str = "decode.draft.path"
) -> tuple[LabelT, Path]:
    """The label and where it lies, both files whole; without a folder, what ships for the model in `base`.

    key: of the config that names the folder. Raises ModelError when there is none, or when it was made for another
    model.
    """
    fingerprint = tensors_fingerprint(base) if base else None
    folder = folder or _shipped(kind, fingerprint)
    if folder is None:
        raise ModelError(
            f"{key}: nothing ships for this model that drafts as {kind.KIND}; train it "
            f"(`rayskip train {kind.KIND}`) and name its folder"
        )
    names = (f"{kind.KIND}.json", f"{kind.KIND}.safetensors")
    if missing := [name for name in names if not (folder / name).is_file()]:
        below = sorted(folder.glob(f"*/{missing[0]}"))
        hint = f"did you mean {below[0].parent}?" if below else f"`rayskip train {kind.KIND}` makes one"
        raise ModelError(f"{key}: {folder} has no {missing[0]}; {hint}")
    label = _read_label(kind, folder / names[0], key)
    try:
        read_headers([folder / names[1]])
    except ModelError as error:
        raise ModelError(f"{key}: {folder / names[1]} is damaged ({error})") from error
    if fingerprint is not None and fingerprint != label.base_tensors:
        raise ModelError(f"{key}: {folder} was trained on {label.base}, {base} is another model")
    return label, folder


def _read_label(kind: type[LabelT], file: Path, key: str) -> LabelT:
    content = read_json(file)
    wanted = {field.name: TYPES[str(field.type)] for field in fields(kind)}
    if content.keys() != wanted.keys() or not all(
        type(value) in wanted[name] for name, value in content.items()
    ):
        told = ", ".join(f"{name} ({types[0].__name__})" for name, types in wanted.items())
        raise ModelError(f"{key}: {file} needs the keys {told} and no others")
    return kind(**content)


def load_trained(
    kind: type[LabelT], base: Path | None, folder: Path | None, key: str = "decode.draft.path"
) -> tuple[LabelT, dict[str, Tensor], Path]:
    """What `find_trained` finds, with its tensors. Raises ModelError as that does."""
    from safetensors.torch import load_file

    label, folder = find_trained(kind, base, folder, key)
    return label, load_file(folder / f"{kind.KIND}.safetensors"), folder


def check_shapes(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    key: str = "decode.draft.path",
) -> None:
    """Raises ModelError when a tensor is missing or has another shape. key: as in `find_trained`."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise ModelError(f"{key}: {folder} has no tensor {name} of shape {list(shape)}")


def save_trained(folder: Path, label: Label, tensors: Mapping[str, Tensor]) -> None:
    """Write what `load_trained` reads; weights in bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ready = {
        name: tensor.to(torch.int32 if name == "token_ids" else torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(ready, folder / f"{label.KIND}.safetensors")
    (folder / f"{label.KIND}.json").write_text(json.dumps(asdict(label), indent=2) + "\n")


def has_shipped(kind: type[Label], base: Path | None) -> bool:
    """Whether such a drafter comes with the package for the model in the folder `base`."""
    return base is not None and _shipped(kind, tensors_fingerprint(base)) is not None


def _shipped(kind: type[Label], fingerprint: str | None) -> Path | None:
    for label in sorted(SHIPPED.glob(f"*/{kind.KIND}.json")):
        if json.loads(label.read_text())["base_tensors"] == fingerprint:
            return label.parent
    return None
