"""Layers whose weight the module around them reads instead of calling them: an adapter there would do nothing."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NEVER = "reads this layer's weight and never calls it"
_SOMETIMES = "hands this layer's weight to a function where it can, and does not call the layer then"
_QUESTIONS = frozenset({"getattr", "hasattr", "isinstance", "len", "type"})
"""Functions that compute nothing with what they are given."""


def why_never_called(parent: nn.Module | None, name: str) -> str | None:
    """Why an adapter on a child of a module would do nothing, or nothing on some ways through it; None if it works.

    Args:
        parent: the module that holds the layer.
        name: of the layer in it.
    """
    if parent is None:
        return None
    kind: Any = type(parent)
    if isinstance(parent, nn.MultiheadAttention):
        where, does = "torch.nn", _NEVER
    elif (found := _read_in_place(kind).get(name)) is not None:
        where, does = kind.__module__, found
    else:
        return None
    return (
        f"{where}.{kind.__name__} {does}, so an adapter here would do nothing in training and change the model when it "
        "is merged. Choose other targets, or leave it out (exclude_modules)."
    )


@functools.cache
def _read_in_place(kind: Any) -> dict[str, str]:
    """The children that a class reads in place, by name, and what it does with them.

    transformers declares them where it matters for offloading (`force_accelerate_hooks`: dt_proj of Mamba). Otherwise
    the code tells: what `forward` reaches takes the child's weight, and calls it or hands it on nowhere. Or it gives
    the weight to a function on one way and calls the child on another: out_proj of every Mamba, which is called where
    the fused kernel is not installed.
    """
    declared: set[str] = set()
    function: Any = kind.forward
    while function is not None:
        if inspect.isfunction(function):
            names = inspect.getclosurevars(function).nonlocals.get("child_module_names", ())
            declared.update([names] if isinstance(names, str) else names)
        function = getattr(function, "__wrapped__", None)
    weights: set[str] = set()
    given: set[str] = set()
    others: set[str] = set()
    for method in _methods(kind):
        _sort_uses(method, weights, given, others)
    return dict.fromkeys(given & others, _SOMETIMES) | dict.fromkeys(declared | (weights - others), _NEVER)


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


def _sort_uses(tree: ast.AST, weights: set[str], given: set[str], others: set[str]) -> None:
    """Add the children whose weight is computed with to `weights`, and to `given` where that is an argument of a call;
    those used in any other way to `others`.
    """
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in _own(tree):
        use = around[node]
        if not isinstance(use, ast.Attribute):
            others.add(node.attr)  # called, or handed on to something that may call it
        elif use.attr == "weight" and not isinstance(around[use], ast.Attribute):  # no dtype, device or shape of it
            weights.add(node.attr)
            if _is_given(use, around):
                given.add(node.attr)
        elif use.attr not in ("weight", "bias", "in_features", "out_features"):
            others.add(node.attr)


def _is_given(use: ast.AST, around: dict[ast.AST, ast.AST]) -> bool:
    """Whether an expression is an argument of a call that may compute with it."""
    call = around[use]
    if isinstance(call, ast.keyword):
        call = around[call]
    return isinstance(call, ast.Call) and not (isinstance(call.func, ast.Name) and call.func.id in _QUESTIONS)
