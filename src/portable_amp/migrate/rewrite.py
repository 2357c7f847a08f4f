"""What the fixer writes in place of a match: edits, and whether they are safe."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

from portable_amp.migrate.detect import Found, Match
from portable_amp.migrate.findings import Applicability, Edit
from portable_amp.migrate.guards import is_device
from portable_amp.migrate.regions import (
    CONTEXTS,
    Place,
    decide,
    dtype_of,
    precision_of,
    rearranged,
)


class Fix(NamedTuple):
    """The edits of one place. `{ctx}` in them stands for the name of a context."""

    how: Applicability = "advice"
    edits: tuple[Edit, ...] = ()
    imports: tuple[str, ...] = ()
    context: bool = False
    reason: str = ""
    """Why it is no more than that, where the rule itself does not say."""


class Rewriter:
    """Fixes for the matches of one text."""

    def __init__(self, found: Found) -> None:
        self.source, self.scope = found.source, found.scope
        codes = {match.code for match in found.matches}
        # Which card a process has, or which of two devices, is then decided elsewhere.
        self.several = bool(codes & {"PAM306", "PAM401"})
        self.chosen = "PAM204" in codes
        tree = found.source.tree
        self.names = {name for one in ast.walk(tree) for name in _device_names(one)}
        self.mains = [one for one in tree.body if isinstance(one, ast.If) and _is_main(one.test)]
        # "cuda:0" is not "cuda" where somebody compares text.
        self.compared = any(_compares_text(one) for one in ast.walk(tree))
        self.asked = found.asked
        self.computes = decide(found.places)
        made = {precision_of(one) for one in found.places if one.name in CONTEXTS}
        self.differ = sorted(made - {self.computes.precision})

    def fix(self, match: Match) -> Fix:
        """How to rewrite a match; advice where that takes a person."""
        make = getattr(self, f"_{match.code.lower()}", None)
        if make is None or match.guarded or match.quoted:
            return Fix()
        if self._is_partial(match) and match.code not in ("PAM101", "PAM102", "PAM103"):
            return Fix()
        fix: Fix = make(match)
        called = getattr(match.node, "func", match.node)
        unsure = match.scope.resolve(called) and not match.scope.sure(called)
        if fix.edits and (match.decorator or unsure):
            fix = fix._replace(how="unsafe")
        return fix

    def _device(self, match: Match) -> tuple[str, bool, Applicability]:
        """An expression for the device, whether it takes a context, and how safe that is."""
        reach = match.scope.device_names()
        if len(reach) == 1 and not match.decorator and not match.parameter:
            (name,) = reach
            defines = _targets(match.statement)
            if name not in defines and self._is_set_before(name, match):
                return name, False, "safe"
        elsewhere = (self.names | reach) - _targets(match.statement)
        unsafe = self.several or self.chosen or bool(elsewhere)
        return "{ctx}.device", True, "unsafe" if unsafe else "safe"

    def _is_set_before(self, name: str, match: Match) -> bool:
        home = match.scope.home(name)
        if home is None:
            return False
        values = [one for one in home.bound[name] if isinstance(one, ast.expr)]
        if not values:  # a parameter; None, or the CPU, may be its default
            return is_device(home.defaults.get(name)) or name not in home.defaults
        if all(CPU.fullmatch(ast.unparse(one)) for one in values):
            return False
        if home is match.scope:
            return any(one.lineno < match.node.lineno for one in values)
        # Set further out, and used when a function runs: in a program, not where it is imported.
        return not all(_within(one, self.mains) for one in values)

    def _put(self, match: Match, node: ast.expr) -> Fix:
        device, context, how = self._device(match)
        if context and match.call and not self._is_torch(match):
            device = f"str({device})"  # other people's functions were given text
        how = "unsafe" if context and self.compared else how
        return Fix(how, (Edit(*self.source.span(node), device),), (), context)

    def _is_torch(self, match: Match) -> bool:
        call = match.call
        assert call is not None
        name = match.scope.resolve(call.func) or ""
        return name.startswith("torch.") or (
            isinstance(call.func, ast.Attribute) and not name and call.func.attr in TENSOR_METHODS
        )

    def _is_partial(self, match: Match) -> bool:
        """Whether the call is that of functools.partial, with the function as argument."""
        node = match.node
        if not isinstance(node, ast.Call):
            return False
        return self.source.span(node)[0] != self.source.span(node.func)[0]

    def _context(self, match: Match) -> tuple[str, bool, Applicability]:
        """An expression for a context, whether it is that of the file, and how safe that is."""
        device, context, how = self._device(match)
        reach = match.scope.made_by(CONTEXTS)
        if len(reach) == 1:
            (name,) = reach
            if self._is_set_before(name, match):
                return name, False, how
        if context:
            return "{ctx}", True, how
        return f'{{DeviceContext}}({device}, precision="{self.computes.precision}")', False, how

    def _amp(self, match: Match, method: str) -> Fix:
        """Make a call that of a context's method, which knows the device and the dtype."""
        node = match.node
        if self.computes.doubt or not isinstance(node, ast.Call):
            return Fix(reason=self.computes.doubt)
        given = Place(match.name, node, match.scope).given()
        if not all(_first_card(given[one]) for one in ("device", "device_type") if one in given):
            return Fix()
        stays = dtype_of(given.get("dtype"), match.scope) == "fp32"
        dropped = {"device", "device_type", *([] if stays else ["dtype"])}
        start, end = self.source.span(node.func)
        context, shared, how = self._context(match)
        edits = (
            Edit(start, end, f"{context}.{method}"),
            *rearranged(self.source, node, match.name, dropped, end),
        )
        imports = ("DeviceContext",) if "{DeviceContext}" in context else ()
        fix = Fix(how, edits, imports, shared)
        if self.differ:
            return fix._replace(
                how="unsafe",
                reason=f"Unsafe to fix: {self.computes.precision} is computed here, and a context "
                f"of this file asks for {self.differ[0] or 'what is known only when it runs'}.",
            )
        return fix

    def _pam101(self, match: Match) -> Fix:
        return self._amp(match, "autocast")

    _pam102 = _pam101

    def _pam103(self, match: Match) -> Fix:
        fix = self._amp(match, "scaler")
        if fix.edits and self.computes.precision == "bf16":
            return fix._replace(
                how="unsafe",
                reason="Unsafe to fix: bf16 is computed here, for which a context's scaler is off, "
                "and so takes steps with infinite gradients, too.",
            )
        # It is torch.amp's GradScaler, and not the one of torch.cuda.
        asked = fix.edits and "torch.cuda.amp.GradScaler" in self.asked
        return fix._replace(how="unsafe") if asked else fix

    def _pam201(self, match: Match) -> Fix:
        call = match.node
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Attribute)
        keywords = {one.arg: one.value for one in call.keywords}
        which = call.args[0] if call.args else keywords.get("device")
        if which is not None and not _first_card(which):
            return Fix()
        if _does_not_wait(call):
            return self._late(match, call)
        device, context, how = self._device(match)
        end = self.source.span(call.func)[1]
        edits = [Edit(end - len("cuda"), end, "to")]
        if which is not None:
            edits.append(Edit(*self.source.span(which), device))
        else:
            opening = self.source.text.index("(", end) + 1
            more = ", " if call.keywords else ""
            edits.append(Edit(opening, opening, device + more))
        return Fix(how, tuple(edits), (), context)

    def _pam202(self, match: Match) -> Fix:
        node = match.node
        assert isinstance(node, ast.expr)
        named = node
        if isinstance(node, ast.Call):
            if len(node.args) + len(node.keywords) != 1:
                return Fix()
            named = node.args[0] if node.args else node.keywords[0].value
        if not _first_card(named):
            return Fix()
        late = match.call and _does_not_wait(match.call)
        return self._late(match, match.call) if match.call and late else self._put(match, node)

    def _late(self, match: Match, call: ast.Call) -> Fix:
        """Copies that nobody waits for: off CUDA the source may be gone, and ctx.to knows it."""
        assert isinstance(call.func, ast.Attribute)
        others = len(call.args) + len(call.keywords) - (call.func.attr == "to")
        _, context, how = self._device(match)
        if not context or others != 1:
            return Fix()
        start, end = self.source.span(call.func.value)
        edits = Edit(start, start, "{ctx}.to("), Edit(end, self.source.span(call)[1], ")")
        return Fix(how, edits, (), True)

    _pam501 = _pam202

    def _pam203(self, match: Match) -> Fix:
        assert isinstance(match.node, ast.expr)
        if not _first_card(match.node):
            return Fix()
        edit = Edit(*self.source.span(match.node), "str({ctx}.device)")
        return Fix("unsafe", (edit,), (), True)

    def _pam204(self, match: Match) -> Fix:
        node = match.node
        test = getattr(node, "test", None)
        if isinstance(test, ast.UnaryOp):
            test = test.operand
        if not isinstance(node, ast.IfExp) or not isinstance(test, ast.Call):
            return Fix()
        if match.scope.resolve(test.func) != "torch.cuda.is_available":
            return Fix()  # somebody else has a say
        ready = match.call or isinstance(node.body, ast.Call)
        device = "{ctx}.device" if ready else "str({ctx}.device)"
        return Fix("unsafe", (Edit(*self.source.span(match.call or node), device),), (), True)

    def _pam301(self, match: Match) -> Fix:
        node = match.node
        if not isinstance(node, ast.Call) or node.args or node.keywords:
            return Fix()
        edit = Edit(*self.source.span(node.func), "{clear_cache}")
        return Fix("safe", (edit,), ("clear_cache",))

    def _pam302(self, match: Match) -> Fix:
        node = match.node
        if not isinstance(node, ast.Call):
            return Fix()
        if not all(_first_card(one) for one in [*node.args, *(k.value for k in node.keywords)]):
            return Fix()
        edit = Edit(*self.source.span(node), "{ctx}.synchronize()")
        return Fix("unsafe" if self.several else "safe", (edit,), (), True)

    def _pam304(self, match: Match) -> Fix:
        before, lines = match.before, self.source.line_span(match.statement)
        alone = isinstance(match.statement, ast.Expr) and match.statement.value is match.node
        if not alone or lines is None or before is None:
            return Fix()
        if not (isinstance(before, ast.Expr) and isinstance(before.value, ast.Call)):
            return Fix()
        assert isinstance(match.node, ast.Call)
        mine, theirs = ([ast.dump(a) for a in one.args] for one in (match.node, before.value))
        if match.scope.resolve(before.value.func) not in SEEDS or mine != theirs:
            return Fix()
        return Fix("safe", (Edit(*lines, ""),))

    def _pam502(self, match: Match) -> Fix:
        assert isinstance(match.node, ast.Call)
        device, context, _ = self._device(match)
        last: list[ast.expr | ast.keyword] = [*match.node.args, *match.node.keywords]
        if not last:
            return Fix()
        at = max(self.source.span(one)[1] for one in last)
        return Fix("unsafe", (Edit(at, at, f", map_location={device}"),), (), context)


CPU = re.compile(r"((torch\.)?device\()?'cpu'\)?")
DEVICE_NAME = re.compile(r"(?i)(\w+_)?(device|dev)\d*")
OPTIONS = re.compile(r"(?i)(\w+\.)?_?(args|opts?|options|cfg|config|conf|flags|hparams|hps?)")
TENSOR_METHODS = (
    *("to", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "to_empty"),
    *("zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "tensor"),
)
SEEDS = ("torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")


def _targets(statement: ast.stmt) -> set[str]:
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {str(getattr(one, "id", getattr(one, "attr", ""))) for one in targets}


def _does_not_wait(call: ast.Call) -> bool:
    """Whether it names non_blocking, or has it by position: x.cuda(device, True)."""
    before = {"cuda": 1, "to": 2}.get(getattr(call.func, "attr", ""), len(call.args))
    return len(call.args) > before or any(one.arg == "non_blocking" for one in call.keywords)


def _first_card(node: ast.expr) -> bool:
    """Whether it is the device that a context has where there is CUDA."""
    return isinstance(node, ast.Constant) and node.value in ("cuda", "cuda:0", 0, None)


def _device_names(node: ast.AST) -> set[str]:
    """The name of a device that a node sets, or reads from the program's options."""
    if not isinstance(node, (ast.Name, ast.Attribute)):
        return set()
    name = node.id if isinstance(node, ast.Name) else node.attr
    option = isinstance(node, ast.Attribute) and OPTIONS.fullmatch(ast.unparse(node.value))
    told = option or isinstance(node.ctx, ast.Store)
    return {name} if told and DEVICE_NAME.fullmatch(name) else set()


def _is_main(test: ast.expr) -> bool:
    return "__name__" in ast.unparse(test)


def _within(node: ast.expr, blocks: list[ast.If]) -> bool:
    return any(one.lineno <= node.lineno <= (one.end_lineno or 0) for one in blocks)


def _compares_text(node: ast.AST) -> bool:
    """Whether something other than a device's type is compared with "cuda"."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return False
    pair = node.left, node.comparators[0]
    return any(
        isinstance(one, ast.Constant)
        and one.value == "cuda"
        and getattr(other, "attr", "") != "type"
        for one, other in (pair, pair[::-1])
    )
