"""Whether a test asks for CUDA, and so what its branches know."""

from __future__ import annotations

import ast
import re
from typing import Literal

from portable_amp.migrate.names import Scope

Knows = Literal["cuda", "other"] | None
"""Only on CUDA; only where it is not; or nothing."""
DEVICE = re.compile(r"cuda(:\d+)?")
OTHERS = re.compile(r"\b(mps|xpu|hpu|npu|mlu|accelerator)\b|_(mps|xpu|hpu|npu)\b|_(mps|xpu|npu)_")
AVAILABLE = {
    *("torch.cuda.is_available", "torch.cuda.device_count", "torch.cuda.is_initialized"),
    *("torch.cuda.is_bf16_supported", "torch.backends.cuda.is_built"),
}
ASKS = re.compile(r"(cuda|gpu)\w*avail|(is|has|supports?|use|with)_(cuda|gpu)", re.I)


def is_device(node: ast.AST | None) -> bool:
    """Whether an expression is text that names a CUDA device, put together or not."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(DEVICE.fullmatch(node.value))
    head: ast.AST | None = None
    if isinstance(node, ast.JoinedStr) and node.values:
        head = node.values[0]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        head = node.left
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        head = node.func.value if node.func.attr == "format" else None
    text = head.value if isinstance(head, ast.Constant) else None
    return isinstance(text, str) and text.startswith("cuda:")


def asks(test: ast.AST, scope: Scope, depth: int = 3) -> tuple[Knows, Knows]:
    """What is known where a test holds, and where it does not."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        held, failed = asks(test.operand, scope, depth)
        return failed, held
    if isinstance(test, ast.BoolOp):
        parts = [asks(part, scope, depth) for part in test.values]
        holding, failing = ([part[side] for part in parts] for side in (0, 1))
        if isinstance(test.op, ast.And):
            return _one({*holding} - {None}), _one({*failing})
        return _one({*holding}), _one({*failing} - {None})
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return _compares(test, scope)
    if isinstance(test, ast.Call):
        if isinstance(test.func, ast.Name) and test.func.id == "bool" and test.args:
            return asks(test.args[0], scope, depth)
        return ("cuda", "other") if _calls(test, scope) else (None, None)
    if isinstance(test, (ast.Name, ast.Attribute)):
        return _names(test, scope, depth)
    return None, None


def _one(known: set[Knows]) -> Knows:
    return known.pop() if len(known) == 1 else None


def _names(test: ast.Name | ast.Attribute, scope: Scope, depth: int) -> tuple[Knows, Knows]:
    """A flag such as `use_cuda`, `args.gpu`, `x.is_cuda`."""
    value = scope.value(test)
    if value is not None and depth:
        known = asks(value, scope, depth - 1)
        if any(known):
            return known
    name = scope.resolve(test)
    if name == "torch.version.cuda":
        return "cuda", "other"
    word = test.id if isinstance(test, ast.Name) else test.attr
    if name or not re.search(r"(?i)(^|_)(cuda|gpus?)(_|$)", word):
        return None, None
    away = re.match(r"(?i)(no|not|disable|without)_", word)
    return ("other", "cuda") if away else ("cuda", "other")


def _compares(test: ast.Compare, scope: Scope) -> tuple[Knows, Knows]:
    left, (right,), (op,) = test.left, test.comparators, test.ops
    counted = scope.value(left)  # cards = torch.cuda.device_count()
    if isinstance(counted, ast.Call) and scope.resolve(counted.func) in AVAILABLE:
        left = counted
    same = isinstance(op, (ast.Eq, ast.Is, ast.In))
    if not same and not isinstance(op, (ast.NotEq, ast.IsNot, ast.NotIn)):
        counts = isinstance(left, ast.Call) and _calls(left, scope)
        more = isinstance(op, (ast.Gt, ast.GtE))
        return (("cuda", None) if more else (None, "cuda")) if counts else (None, None)
    for side, counterpart in ((left, right), (right, left)):
        named = is_device(text_of(side, scope)) or getattr(side, "value", None) == "gpu"
        if named and not isinstance(counterpart, ast.Constant):
            return ("cuda", "other") if same else ("other", "cuda")
        # Who asks whether it is not the CPU has thought of more than CUDA.
        if isinstance(side, ast.Constant) and side.value == "cpu":
            return (None, "cuda") if same else ("cuda", None)
        if scope.resolve(side) == "torch.version.cuda":
            return (None, "cuda") if same else ("cuda", None)
        if isinstance(side, ast.Call) and _calls(side, scope):  # device_count() == 0
            return ("other", "cuda") if same else ("cuda", "other")
    return None, None


def text_of(node: ast.expr, scope: Scope) -> ast.expr:
    """`torch.device("cuda")` and its `.type` stand for their text."""
    device = node.value if isinstance(node, ast.Attribute) and node.attr == "type" else node
    if not isinstance(device, ast.Call) or scope.resolve(device.func) != "torch.device":
        return node
    return device.args[0] if device.args else node


def _calls(test: ast.Call, scope: Scope) -> bool:
    name = scope.resolve(test.func)
    if name and name.startswith("torch."):
        return name in AVAILABLE
    if isinstance(test.func, ast.Attribute) and test.func.attr == "startswith":
        return bool(test.args) and (
            is_device(test.args[0]) or getattr(test.args[0], "value", "") == "cuda:"
        )
    word = str(name or getattr(test.func, "attr", getattr(test.func, "id", "")))
    return bool(ASKS.search(word))
