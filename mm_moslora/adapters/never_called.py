"""Layers whose weight the module around them reads instead of calling them: an adapter there would do nothing."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def why_never_called(parent: nn.Module | None, name: str) -> str | None:
    """Why an adapter on a child of a module would do nothing, or nothing on some ways through it; None if it works.

    Args:
        parent: the module that holds the layer.
        name: of the layer in it.
    """
    if parent is None:
        return None
    kind: Any = type(parent)
    if not (isinstance(parent, nn.MultiheadAttention) or name in _read_in_place(kind)):
        return None
    where = "torch.nn" if isinstance(parent, nn.MultiheadAttention) else kind.__module__
    return (
        f"{where}.{kind.__name__} reads this layer's weight and never calls it, so an adapter here would do nothing in "
        "training and change the model when it is merged. Choose other targets, or leave it out (exclude_modules)."
    )


@functools.cache
def _read_in_place(kind: Any) -> frozenset[str]:
    """Names of the children that a class reads in place.

    transformers declares them where it matters for offloading (`force_accelerate_hooks`: dt_proj of Mamba). Otherwise
    the code tells: what `forward` reaches takes the child's weight, and calls it or hands it on nowhere.
    """
    declared: set[str] = set()
    function: Any = kind.forward
    while function is not None:
        if inspect.isfunction(function):
            names = inspect.getclosurevars(function).nonlocals.get("child_module_names", ())
            declared.update([names] if isinstance(names, str) else names)
        function = getattr(function, "__wrapped__", None)
    weights: set[str] = set()
    others: set[str] = set()
    for method in _methods(kind):
        _sort_uses(method, weights, others)
    return frozenset(declared | (weights - others))


def _methods(kind: Any) -> Iterator[ast.AST]:
    """Syntax trees of `forward` and of the methods that it calls, and these; none where there is no source."""
    todo, seen = ["forward"], {"forward"}
    while todo:
        function: Callable[..., Any] | None = getattr(kind, todo.pop(), None)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))) if function else None
        except (OSError, TypeError, SyntaxError):
            continue
        if tree is None:
            continue
        yield tree
        found = {node.attr for node in _own(tree) if inspect.isfunction(getattr(kind, node.attr, None))}
        todo += sorted(found - seen)
        seen |= found


def _own(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every `self.something`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node


def _sort_uses(tree: ast.AST, weights: set[str], others: set[str]) -> None:
    """Add the children whose weight is computed with to `weights`, and those used in any other way to `others`."""
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in _own(tree):
        use = around[node]
        if not isinstance(use, ast.Attribute):
            others.add(node.attr)  # called, or handed on to something that may call it
        elif use.attr == "weight" and not isinstance(around[use], ast.Attribute):  # no dtype, device or shape of it
            weights.add(node.attr)
        elif use.attr not in ("weight", "bias", "in_features", "out_features"):
            others.add(node.attr)
