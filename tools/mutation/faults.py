"""Which faults are made: cosmic-ray's operators and five of our own, over one module's source."""

from __future__ import annotations

import ast
import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import cosmic_ray.operators.binary_operator_replacement as binary
import cosmic_ray.operators.comparison_operator_replacement as comparison
import cosmic_ray.operators.unary_operator_replacement as unary
import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.operators import boolean_replacer, break_continue
from cosmic_ray.operators.exception_replacer import ExceptionReplacer
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.remove_decorator import RemoveDecorator
from cosmic_ray.operators.zero_iteration_for_loop import ZeroIterationForLoop
from parso.python.tree import Name, String
from parso.tree import BaseNode, NodeOrLeaf

Positions = Iterator[tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True)
class Fault:
    """One change to a module that its tests should notice."""

    operator: str
    line: int
    """Where it begins, from 1."""
    was: str
    """The lines that it changes, without their indentation."""
    becomes: str
    source: str
    """The whole module with the fault in it."""


class Own(Operator):
    """An operator of ours; cosmic-ray runs no self-test on it."""

    @classmethod
    def examples(cls) -> tuple[()]:
        """None."""
        return ()


class DropStatement(Own):
    """`call()`, `a.b = c`, `a[b] = c`, `a += 1`, `del a` and `raise` become `pass`."""

    def mutation_positions(self, node: NodeOrLeaf) -> Positions:
        """Each such statement."""
        if node.type != "simple_stmt":
            return
        what = node.children[0]
        last = what.children[-1] if what.type == "atom_expr" else what
        call = last.type == "trailer" and last.children[0] == "("
        written = what.type == "expr_stmt" and (
            what.children[0].type == "atom_expr"
            or (what.children[1].type == "operator" and what.children[1].value != "=")
        )
        if call or written or what.type in ("del_stmt", "raise_stmt") or what == "raise":
            yield what.start_pos, what.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        """Say `pass`; the lines below stay where they are."""
        old = node.children[0]
        prefix = old.get_first_leaf().prefix
        lines = old.get_code(include_prefix=False).count("\n")
        node.children[0] = Name("pass" + " \\\n" * lines, old.start_pos, prefix)
        return node


def parted(children: list[NodeOrLeaf]) -> list[list[NodeOrLeaf]]:
    """What stands between commas; each part with the comma behind it."""
    parts: list[list[NodeOrLeaf]] = [[]]
    for child in children:
        parts[-1].append(child)
        if child == ",":
            parts.append([])
    return [part for part in parts if part]


class DropPart(Own):
    """One of several things in a list goes, with its comma."""

    def lists(self, node: NodeOrLeaf) -> list[list[NodeOrLeaf]]:
        """The parts of `node` that may go."""
        raise NotImplementedError

    def mutation_positions(self, node: NodeOrLeaf) -> Positions:
        """Each part."""
        for part in self.lists(node):
            yield part[0].start_pos, part[-1].end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        """Take it out; its line breaks stay."""
        gone = self.lists(node)[index]
        at = next(n for n, child in enumerate(node.children) if child is gone[0])
        lines = "".join(child.get_code() for child in gone).count("\n")
        node.children[at : at + len(gone)] = [Name("", gone[0].start_pos, "\n" * lines)]
        return node


_OPTIONAL = ("get", "getattr", "next", "pop", "max", "min", "sum", "range", "round")


class DropArgument(DropPart):
    """Of a call: a named or starred argument, or the default that `get` and such take."""

    def lists(self, node: NodeOrLeaf) -> list[list[NodeOrLeaf]]:
        """Those arguments."""
        if node.type == "trailer" and node.children[0] == "(" and len(node.children) == 3:
            return [[node.children[1]]] if node.children[1].type == "argument" else []
        if node.type != "arglist" or node.parent is None or node.parent.type != "trailer":
            return []
        parts = parted(node.children)
        named = [part for part in parts if part[0].type == "argument"]
        called = node.parent.get_previous_sibling()
        word = called.children[-1] if called.type == "trailer" else called
        return parts[-1:] if not named and word.get_code().strip() in _OPTIONAL else named


class DropElement(DropPart):
    """Of a tuple, list, set or dictionary that is written out."""

    def lists(self, node: NodeOrLeaf) -> list[list[NodeOrLeaf]]:
        """Its elements."""
        if node.type not in ("testlist_comp", "dictorsetmaker"):
            return []
        if node.children[-1].type in ("comp_for", "sync_comp_for"):
            return []
        return parted(node.children) if any(child == "," for child in node.children) else []


class ChangeString(Own):
    """A name, a key, a spelling: a string without a space in it."""

    def mutation_positions(self, node: NodeOrLeaf) -> Positions:
        """Each of them."""
        if isinstance(node, String) and not any(c.isspace() for c in node.value):
            yield node.start_pos, node.end_pos

    def mutate(self, node: String, index: int) -> String:
        """Put a letter before it."""
        quote = min(at for at in (node.value.find(q) for q in "'\"") if at >= 0)
        at = quote + (3 if node.value[quote : quote + 3] in ("'''", '"""') else 1)
        return String(node.value[:at] + "X" + node.value[at:], node.start_pos, node.prefix)


class ReplaceIn(Own):
    """`in` becomes `not in`, and the reverse."""

    def mutation_positions(self, node: NodeOrLeaf) -> Positions:
        """Each of them."""
        if node.type == "comparison":
            for word in node.children[1::2]:
                if word.get_code().split() in (["in"], ["not", "in"]):
                    yield word.start_pos, word.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        """Exchange it."""
        found = [
            n
            for n in range(1, len(node.children), 2)
            if node.children[n].get_code().split() in (["in"], ["not", "in"])
        ]
        old = node.children[found[index]]
        new = " not in" if old.get_code().split() == ["in"] else " in"
        node.children[found[index]] = Name(new, old.start_pos)
        return node


_BINARY = (
    "Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr"
)
_COMPARISON = "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE GtE_Lt"
_UNARY = "Not USub Invert"

OPERATORS: tuple[Operator, ...] = (
    DropStatement(),
    DropArgument(),
    DropElement(),
    ChangeString(),
    ReplaceIn(),
    *(getattr(binary, f"ReplaceBinaryOperator_{name}")() for name in _BINARY.split()),
    *(getattr(comparison, f"ReplaceComparisonOperator_{name}")() for name in _COMPARISON.split()),
    *(getattr(unary, f"ReplaceUnaryOperator_Delete_{name}")() for name in _UNARY.split()),
    boolean_replacer.ReplaceTrueWithFalse(),
    boolean_replacer.ReplaceFalseWithTrue(),
    boolean_replacer.ReplaceAndWithOr(),
    boolean_replacer.ReplaceOrWithAnd(),
    boolean_replacer.AddNot(),
    break_continue.ReplaceBreakWithContinue(),
    break_continue.ReplaceContinueWithBreak(),
    NumberReplacer(),
    ExceptionReplacer(),
    ZeroIterationForLoop(),
    RemoveDecorator(),
)


_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Lt: ast.GtE, ast.Gt: ast.LtE,
    ast.NotEq: ast.Eq, ast.IsNot: ast.Is, ast.NotIn: ast.In, ast.GtE: ast.Lt, ast.LtE: ast.Gt,
}  # fmt: skip


class _Meaning(ast.NodeTransformer):
    """Without what changes nothing while the program runs: annotations, docstrings, wording."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and any(c.isspace() for c in node.value):
            return ast.Constant("wording")
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        if any(c.isspace() for part in parts for c in str(part)):
            return ast.Constant("wording")
        return self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        # `not a is b` is `a is not b`, and `not not a` is `a` in a condition.
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            what = node.operand
            if isinstance(what, ast.UnaryOp) and isinstance(what.op, ast.Not):
                return what.operand
            if isinstance(what, ast.Compare) and len(what.ops) == 1:
                what.ops = [_OPPOSITE[type(what.ops[0])]()]
                return what
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        # Which class is raised is promised, and whether; the words are not.
        if isinstance(node.exc, ast.Call):
            return ast.Raise(node.exc.func)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.Pass()
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        # For the type checker alone.
        if isinstance(node.func, ast.Name) and node.func.id in ("cast", "TypeVar", "overload"):
            return ast.Constant(None)
        return self.generic_visit(node)


def meaning(source: str) -> str:
    """What `source` does, wording apart; equal where two do the same by construction."""
    return ast.dump(_Meaning().visit(ast.parse(source)))


def changed_lines(before: str, after: str) -> tuple[int, str, str]:
    """The first line that differs, from 1, blank ones aside; what stands there before and after."""
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    blocks = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    first, last = blocks[0], blocks[-1]

    def joined(lines: list[str]) -> str:
        return " ".join(" ".join(lines).replace("\\", " ").split())

    blank = itertools.takewhile(lambda line: not line.strip(), old[first[1] : last[2] - 1])
    line = first[1] + len([*blank]) + 1
    return line, joined(old[first[1] : last[2]]), joined(new[first[3] : last[4]])


def parts(node: NodeOrLeaf) -> Iterator[tuple[NodeOrLeaf, str, object]]:
    """All that an operator may change about a node, to put it back."""
    if isinstance(node, BaseNode):
        yield node, "children", list(node.children)
        for child in node.children:
            yield from parts(child)
    else:
        yield node, "value", node.value
        yield node, "prefix", node.prefix


def changes(tree: BaseNode, operator: Operator) -> Iterator[str]:
    """The code of `tree` with each of the operator's changes; as cosmic-ray does, but parsed once.

    A change that the operator cannot make, such as `except a.b`, is left out.
    """
    for node in list(ast_nodes(tree)):
        for index, _ in enumerate(list(operator.mutation_positions(node))):
            holder = node.parent or node
            kept = [(holder, "children", list(holder.children)), *parts(node)]
            try:
                new = operator.mutate(node, index)
                at = next((n for n, child in enumerate(holder.children) if child is node), None)
                if at is not None and new is not node:
                    holder.children[at : at + 1] = [] if new is None else [new]
                yield tree.get_code()
            except AttributeError:
                pass
            finally:
                for thing, name, value in kept:
                    setattr(thing, name, value)


def faults(source: str) -> Iterator[Fault]:
    """Every fault in a module that changes what it does by construction, each once."""
    statements = [child.get_code() for child in parso.parse(source).children]
    for n, text in enumerate(statements):
        before, behind = "".join(statements[:n]), "".join(statements[n + 1 :])
        seen = {meaning(text)}
        tree = parso.parse(text)
        for operator in OPERATORS:
            for changed in changes(tree, operator):
                try:
                    means = meaning(changed)
                except (SyntaxError, ValueError):
                    continue
                if means in seen:
                    continue
                seen.add(means)
                line, was, becomes = changed_lines(text, changed)
                yield Fault(
                    type(operator).__name__,
                    before.count("\n") + line,
                    was,
                    becomes,
                    before + changed + behind,
                )
