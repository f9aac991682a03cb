"""One door to hardware: nothing above the backends asks what computes a model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rayskip

ROOT = Path(rayskip.__file__).parent
BACKENDS = "model/backends/"
OTHERS = ("train/", "evaluate/peers/")
"""Trained models are transformers' modules, and peers are other libraries."""
PRIVATE = (BACKENDS + "cpu/", BACKENDS + "cuda/")


def _imports(tree: ast.AST) -> set[str]:
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def _asks_for_hardware(tree: ast.AST) -> bool:
    """`x.device.type`, or anything of torch.cuda, torch.compile or the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
            if (owner, node.attr) in {("device", "type"), ("torch", "cuda"), ("torch", "compile")}:
                return True
    return False


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_backends_know_hardware(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    imports = _imports(tree)
    if not place.startswith(PRIVATE):
        assert place.startswith((BACKENDS, *OTHERS)) or not _asks_for_hardware(tree)
        private = {name for name in imports if name.startswith(("rayskip.model.backends.c",))}
        allowed = {"rayskip.model.backends.choose", "rayskip.model.backends.clock"}
        assert place == BACKENDS + "choose.py" or private <= allowed
    if not place.startswith(BACKENDS + "cpu/"):
        assert "ctypes" not in imports
