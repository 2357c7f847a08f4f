"""Where a program is tied to CUDA: one walk over its tree, with what each branch knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from portable_amp.migrate.apis import BY_NAME
from portable_amp.migrate.findings import Level
from portable_amp.migrate.guards import OTHERS, Knows, asks, is_device, text_of
from portable_amp.migrate.names import Scope, own, parameters
from portable_amp.migrate.regions import ARGUMENTS, CONTEXTS, DEFAULTS, Place
from portable_amp.migrate.rules import RULES
from portable_amp.migrate.source import Source

SCALER = ("torch.cuda.amp.GradScaler", "torch.amp.GradScaler")
BRINGS_TORCH = re.compile(
    r"(^|\W|_)(torch\w*|timm|transformers|diffusers|lightning\w*|accelerate|monai|kornia|fastai|ignite"
    r"|peft|trl|sentence_transformers|open_clip|ultralytics)(\W|_|$)|pytorch"
)
DEFAULT = re.compile(r"(?i)(^|_)(dev|devices?|gpus?|accelerator)\d*(_|$)|device$")
LEAVES = (ast.Return, ast.Continue, ast.Break)
Path = tuple[tuple[int, int], ...]
"""The branches around a place: of which choice, and which."""
AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Match:
    """One place, as the fixer needs it."""

    code: str
    node: ast.expr | ast.stmt
    level: Level
    name: str
    """What torch documents that is used there; "" where no name of torch's is."""
    scope: Scope
    statement: ast.stmt
    before: ast.stmt | None
    """The statement before it in the same block."""
    guarded: bool
    decorator: bool
    parameter: bool
    quoted: bool
    """In an f-string, whose quotes an edit could end."""
    call: ast.Call | None
    """The `.to(...)` or `torch.device(...)` whose argument it is, or the function it is given."""


@dataclass
class Found:
    """All that is in one text."""

    source: Source
    scope: Scope
    matches: list[Match] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """What says what is computed in, told of or not."""
    asked: set[str] = field(default_factory=set)
    """Types that isinstance is asked about."""


def detect(text: str) -> Found:
    """Every place in a text, whether it is to be told or not.

    Raises:
        SyntaxError: it is not Python.
    """
    source = Source(text)
    walk = _Walk(source)
    walk.block(source.tree.body)
    walk.drop_unmixed()
    walk.found.matches.sort(key=lambda match: source.span(match.node))
    return walk.found


class _Walk:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.scope = Scope(source.tree)
        self.found = Found(source, self.scope)
        self.knows: Knows = None
        self.silent = False
        self.others = False
        """Whether a branch before this one was for devices such as MPS."""
        self.body: ast.AST = source.tree
        self.statement: ast.stmt = ast.Pass()
        self.before: ast.stmt | None = None
        self.rest: Sequence[ast.stmt] = ()
        self.decorator = self.parameter = False
        self.quoted: ast.JoinedStr | None = None
        """The f-string around; up to Python 3.11 nothing in it has a place of its own."""
        self.done: set[int] = set()
        self.path: Path = ()
        self.old: list[tuple[Match, Path]] = []
        """Where a program uses the old names of float32's precision."""
        self.new: list[Path] = []
        """The branches in which it uses the new ones."""
        self.saved: set[str] = set()
        """Names of what this function has saved to, and so reads on the machine it ran on."""
        imports = (n for n in ast.walk(source.tree) if isinstance(n, (ast.Import, ast.ImportFrom)))
        self.has_torch = any(
            BRINGS_TORCH.search(f"{getattr(one, 'module', '')} {alias.name}")
            for one in imports
            for alias in one.names
        ) or any(isinstance(one, ast.Name) and one.id == "torch" for one in ast.walk(source.tree))
        for one in source.tree.body:
            marks = isinstance(one, ast.Assign) and "pytestmark" in map(_leaf, one.targets)
            if marks and self._needs(one):
                self.knows = "cuda"

    # Blocks and what they know.

    def block(self, statements: Sequence[ast.stmt]) -> None:
        """Statements in order; one that leaves where there is no CUDA guards those after it."""
        (knows, others, path), before = (self.knows, self.others, self.path), None
        for at, statement in enumerate(statements):
            self.statement, self.before, self.rest = statement, before, statements[at + 1 :]
            self.visit(statement)
            before = statement
            if isinstance(statement, ast.Assert) and not self._asks_torch(statement.test):
                self.knows = asks(statement.test, self.scope)[0] or self.knows
            if isinstance(statement, ast.If) and not statement.orelse:
                held, failed = asks(statement.test, self.scope)
                last = statement.body[-1]
                if held == "other" and (isinstance(last, LEAVES) or _skips(last)):
                    self.knows = failed or self.knows
                self.others |= isinstance(last, LEAVES) and _thinks(statement.test)
                if isinstance(last, LEAVES):
                    self.path = (*self.path, (id(statement.test), 1))
        self.knows, self.others, self.path = knows, others, path

    def visit(self, node: ast.AST) -> None:
        """Match a node, then what is in it."""
        if id(node) in self.done:
            return
        kind = getattr(self, f"on_{type(node).__name__.lower()}", None)
        if kind is None or not kind(node):
            self.inside(node)

    def inside(self, node: ast.AST) -> None:
        """What is in a node; a list of statements is a block."""
        statement, before = self.statement, self.before
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.block(value)
                self.statement, self.before = statement, before
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        self.visit(item)
            elif isinstance(value, ast.AST):
                self.visit(value)

    def branch(self, nodes: Sequence[ast.AST], knows: Knows, other: Sequence[ast.AST]) -> None:
        """Visit one branch; nothing is told where the other one thinks of other devices."""
        outer = self.knows, self.silent
        if knows:
            self.knows = knows
        if knows == "cuda" and any(map(_thinks, other)):
            self.silent = True
        if nodes and isinstance(nodes[0], ast.stmt):
            self.block([one for one in nodes if isinstance(one, ast.stmt)])
        else:
            for one in nodes:
                self.visit(one)
        self.knows, self.silent = outer

    def either(
        self, *ways: tuple[Sequence[ast.AST], Knows, Sequence[ast.AST]], test: ast.AST | None = None
    ) -> None:
        """Branches; what one of them does portably, the others do for other versions of torch."""
        told, others, path = [], self.others, self.path
        for at, (nodes, knows, other) in enumerate(ways):
            self.path = (*path, (id(test or ways[0][0]), at))
            start = len(self.found.matches)
            self.others = others or (test is not None and _thinks(test))
            self.branch(nodes, knows, other)
            self.others = others
            told.append((nodes, self.found.matches[start:]))
        self.path = path
        free = (node for nodes, matches in told if not matches for node in nodes)
        walked = (one for node in free for one in ast.walk(node))
        portable = {_leaf(one.func) for one in walked if isinstance(one, ast.Call)}
        for match in (match for _, matches in told for match in matches):
            if match.name.rpartition(".")[2] in portable:
                match.level, match.guarded = "info", True

    def on_if(self, node: ast.If) -> bool:
        held, failed = asks(node.test, self.scope)
        self._stop(node, node.test, held, node.body)
        leaves = not node.orelse and isinstance(node.body[-1], LEAVES)
        other = self.rest if leaves else node.orelse
        self._choice_of_two(node, other)
        self.visit(node.test)
        statement, before = self.statement, self.before
        self.either((node.body, held, other), (node.orelse, failed, node.body), test=node.test)
        self.statement, self.before = statement, before
        return True

    def on_ifexp(self, node: ast.IfExp) -> bool:
        held, failed = asks(node.test, self.scope)
        on, off = (node.orelse, node.body) if failed == "cuda" else (node.body, node.orelse)
        if self._choice(node.test, on, off):
            self.match("PAM204", node)
            self.done |= {id(on), id(off)}
        elif "cuda" in (held, failed) and self._device(on):
            self.done.add(id(on))
        self.visit(node.test)
        ways = ([node.body], held, [node.orelse]), ([node.orelse], failed, [node.body])
        self.either(*ways, test=node.test)
        return True

    def on_compare(self, node: ast.Compare) -> bool:
        """What is compared with a device is not put there."""
        for one in (node.left, *node.comparators):
            device = one.value if isinstance(one, ast.Attribute) and one.attr == "type" else one
            if self._device(device):
                self.done.add(id(device))
        return False

    def on_boolop(self, node: ast.BoolOp) -> bool:
        outer = self.knows
        for part in node.values:
            self.visit(part)
            held, failed = asks(part, self.scope)
            self.knows = (held if isinstance(node.op, ast.And) else failed) or self.knows
        self.knows = outer
        return True

    def on_while(self, node: ast.While) -> bool:
        self.visit(node.test)
        self.branch(node.body, asks(node.test, self.scope)[0], [])
        self.block(node.orelse)
        return True

    def on_try(self, node: ast.Try) -> bool:
        """A short attempt with a way out on other devices is a guard, too."""
        ways = [handler for handler in node.handlers if not isinstance(handler.body[-1], ast.Raise)]
        text = " ".join(ast.unparse(handler) for handler in ways)
        way_out = len(node.body) < 4 and bool(re.search(r"\bcpu\b|\.to\(|mps|xpu", text))
        if ways and isinstance(node.body[0], (ast.Import, ast.ImportFrom)):
            way_out = any(_catches_imports(handler) for handler in ways)
        handlers = [(handler.body, None, ()) for handler in node.handlers]
        self.either((node.body, "cuda" if way_out else None, ()), *handlers)
        for handler in node.handlers:
            if handler.type:
                self.visit(handler.type)
        self.block(node.orelse)
        self.block(node.finalbody)
        return True

    def on_functiondef(self, node: AnyFunction) -> bool:
        for decorator in node.decorator_list:
            self.decorator = True
            if self._needs(decorator):  # which asks, and uses nothing
                self.done |= {id(one) for one in getattr(decorator, "args", ())}
            self.visit(decorator)
            self.decorator = False
        outer = self.scope, self.knows, self.saved, self.body
        self.body = node
        self._defaults(node.args)
        if any(self._needs(decorator) for decorator in node.decorator_list):
            self.knows = "cuda"
        self.scope, self.saved = Scope(node, self.scope), set()
        if node.name not in ("cuda", "pin_memory"):  # the method itself, as modules have it
            self.block(node.body)
        self.scope, self.knows, self.saved, self.body = outer
        return True

    on_asyncfunctiondef = on_functiondef

    def on_lambda(self, node: ast.Lambda) -> bool:
        self._defaults(node.args)
        outer, self.scope = self.scope, Scope(node, self.scope)
        self.visit(node.body)
        self.scope = outer
        return True

    def on_classdef(self, node: ast.ClassDef) -> bool:
        outer = self.scope, self.knows
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        if any(self._needs(decorator) for decorator in node.decorator_list):
            self.knows = "cuda"
        self.scope = Scope(node, self.scope)
        self.block(node.body)
        self.scope, self.knows = outer
        return True

    # Single places.

    def on_import(self, node: ast.Import | ast.ImportFrom) -> bool:
        module = getattr(node, "module", None)
        names = [module] if module else [alias.name for alias in node.names]
        here = not getattr(node, "level", 0)
        if here and any(name == "apex" or name.startswith("apex.") for name in names):
            self.match("PAM105", node)
        return True

    on_importfrom = on_import

    def on_assert(self, node: ast.Assert) -> bool:
        if asks(node.test, self.scope)[0] == "cuda" and self._asks_torch(node.test):
            self.match("PAM601", node)
            self.done |= {id(one) for one in ast.walk(node.test)}
        return False

    def on_assign(self, node: ast.Assign | ast.AnnAssign) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node, ast.AnnAssign):
            self.done.add(id(node.annotation))
        for target in targets:
            self._default(_leaf(target), node.value)
        named = all(isinstance(target, ast.Name) for target in targets)
        if not named or not isinstance(node.value, ast.Attribute):
            return False
        # An alias is told where it is used.
        return self.scope.resolve(node.value) in (*BY_NAME, *SCALER, "torch.cuda.amp.autocast")

    on_annassign = on_assign

    def on_arg(self, node: ast.arg) -> bool:
        return True  # an annotation runs nothing

    def on_dict(self, node: ast.Dict) -> bool:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self._default(key.value, value)
        return False

    def on_constant(self, node: ast.Constant) -> bool:
        if isinstance(node.value, str) and re.fullmatch(r"torch\.cuda\.\w+Tensor", node.value):
            self.match("PAM205", node)
        return True

    def on_joinedstr(self, node: ast.JoinedStr) -> bool:
        outer, self.quoted = self.quoted, self.quoted or node
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self.inside(part)
        self.quoted = outer
        return True

    def on_attribute(self, node: ast.Attribute | ast.Name) -> bool:
        name = self.scope.resolve(node) or ""
        if name.startswith("torch.backends.") and name.endswith("fp32_precision"):
            self.new.append(self.path)
        if isinstance(getattr(node, "ctx", None), ast.Store) and BY_NAME.get(name) != "PAM701":
            return False
        if self.decorator and name in ("torch.cuda.amp.autocast", "torch.amp.autocast"):
            self.found.places.append(Place(name, node, self.scope))
            self.match("PAM101" if "cuda" in name else "PAM102", node, name)
        elif re.fullmatch(r"torch\.cuda\.\w+Tensor", name):
            if not self.scope.is_alias(node):  # told where it was made
                self.match("PAM205", node, name)
        elif name == "torch.nn.DataParallel":
            return True  # asked about, not used
        elif name in BY_NAME:
            self.match(BY_NAME[name], node, name)
        elif name.startswith("torch.cuda.amp.") and name.endswith(("autocast", "GradScaler")):
            self.match("PAM101" if "autocast" in name else "PAM103", node, name)
        else:
            return False
        return True

    on_name = on_attribute

    def on_subscript(self, node: ast.Subscript) -> bool:
        if _visible(node.slice) and "environ" in ast.unparse(node.value):
            self.match("PAM602", node)
        return False

    def on_call(self, node: ast.Call) -> bool:
        name = self.scope.resolve(node.func) or ""
        first = node.args[0] if node.args else None
        keywords = {one.arg: one.value for one in node.keywords}
        code = ""
        if name == "functools.partial" and first and self.scope.resolve(first):
            made = ast.copy_location(ast.Call(first, node.args[1:], node.keywords), node)
            return self.on_call(made)
        if name in (*ARGUMENTS, *DEFAULTS, *CONTEXTS):
            self.found.places.append(Place(name, node, self.scope))
        if name == "torch.cuda.amp.autocast":
            code = "PAM101"
        elif name == "torch.amp.autocast":
            code = "PAM102" if is_device(first or keywords.get("device_type")) else ""
        elif name in SCALER:
            device = first or keywords.get("device") if name == SCALER[1] else None
            off = getattr(keywords.get("enabled"), "value", None) is False
            code = "PAM103" if not off and (device is None or is_device(device)) else ""
            self.done |= {id(node.func)} if off else set()
        elif name in ("torch.amp.custom_fwd", "torch.amp.custom_bwd"):
            code = "PAM104" if is_device(first or keywords.get("device_type")) else ""
        elif name in ("torch.set_default_tensor_type", "torch.set_default_device"):
            told = first is not None and re.search(r"\bcuda\b", ast.unparse(first))
            code = "PAM205" if told else ""
        elif name == "torch.save" and len(node.args) > 1:
            self.saved.add(_leaf(node.args[1]))
        elif name == "torch.load":
            own = isinstance(first, ast.Name) and first.id in self.saved
            if len(node.args) < 2 and not {"map_location", None} & keywords.keys() and not own:
                code = "PAM502"
        elif name == "torch.device":
            code = (
                "PAM202" if is_device(first or keywords.get("device", keywords.get("type"))) else ""
            )
        elif name in BY_NAME:
            code = BY_NAME[name]
        if code:
            self.match(code, node, name)
            # What names it, and what it is given by name, is not told by itself.
            names = (
                one for one in node.args if isinstance(one, ast.Constant) or self.scope.resolve(one)
            )
            self.done |= {id(node.func), *map(id, names)}
            return False
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            asked = [one for kind in node.args[1:] for one in ast.walk(kind)]
            self.found.asked |= {self.scope.resolve(one) or "" for one in asked}
            self.done |= {id(one) for one in asked if _leaf(one) in ("autocast", "GradScaler")}
            for one in asked:  # False for what is elsewhere, and no crash
                name = self.scope.resolve(one) or ""
                if isinstance(one, ast.expr) and re.fullmatch(r"torch\.cuda\.\w+Tensor", name):
                    self.match("PAM205", one, level="warning")
        if name == "torch.device" and isinstance(first, ast.IfExp) and len(node.args) == 1:
            self.visit(first)
            if self.found.matches and self.found.matches[-1].node is first:
                self.found.matches[-1].call = node
        self._method(node, name, keywords)
        for key, value in keywords.items():
            self._keyword(node, name, key, value)
        for one in node.args:
            if name == "torch.distributed.init_process_group" and _is(one, "nccl"):
                self.match("PAM401", one)
            if _visible(one) and re.search(r"environ|getenv|putenv", ast.unparse(node.func)):
                self.match("PAM602", node)
        return False

    def _method(self, node: ast.Call, name: str, keywords: dict[str | None, ast.expr]) -> None:
        if _leaf(node.func) in ("get", "getattr", "getenv") and len(node.args) in (2, 3):
            key, otherwise = node.args[-2:]
            if isinstance(key, ast.Constant):
                self._default(str(key.value), otherwise)
        if not isinstance(node.func, ast.Attribute):
            return
        method, home = node.func.attr, self.scope.resolve(node.func.value)
        if method == "cuda" and not home and not _is_super(node.func.value):
            if self.has_torch or not node.args:
                self.match("PAM201", node)
                self.done |= {id(value) for value in keywords.values() if is_device(value)}
        elif method == "to" and not home and self.has_torch and any(map(is_device, node.args)):
            self.match("PAM202", next(filter(is_device, node.args)), call=node)
        elif method == "pin_memory" and not home and self.has_torch and not node.args:
            self.match("PAM503", node, level="error")
        elif method in ("add_argument", "option", "add_option", "Option"):
            words = [one.value for one in node.args if isinstance(one, ast.Constant)]
            default = keywords.get("default")
            option = " ".join(map(str, words)).replace("-", "_").replace(" ", "_")
            self._default(option, default, sure=True)

    def _keyword(self, call: ast.Call, name: str, key: str | None, value: ast.expr) -> None:
        if key == "map_location" and is_device(value):
            self.match("PAM501", value)
        elif name == "torch.random.fork_rng":
            return  # told the devices whose state it keeps, it touches no other
        elif key in ("device", "device_type") and is_device(value) and self.has_torch:
            self.match("PAM202", value, call=call)
        elif key == "pin_memory" and _is(value, True):
            self.match("PAM503", value)
        elif key == "backend" and _is(value, "nccl"):
            self.match("PAM401", value)

    def _defaults(self, arguments: ast.arguments) -> None:
        self.parameter = True
        for one, default in parameters(arguments):
            self._default(one.arg, default)
            if default is not None:
                self.visit(default)
        self.parameter = False

    def _default(self, name: str, value: ast.expr | None, *, sure: bool = False) -> None:
        """A variable, parameter or option of that name, with its value."""
        if value is None or not (self.has_torch or sure) or id(value) in self.done:
            return
        if DEFAULT.search(name) and (self._device(value) if self.parameter else is_device(value)):
            level: Level | None = "info" if self._falls_back(name) else None
            self.match("PAM203", value, level=level)
        elif DEFAULT.search(name) and isinstance(value, ast.IfExp):
            # Another device, or CUDA, whether it is there or not.
            held, failed = asks(value.test, self.scope)
            for one, known, other in (
                (value.body, held, value.orelse),
                (value.orelse, failed, value.body),
            ):
                others = isinstance(other, ast.Constant) and OTHERS.search(str(other.value))
                if self._device(one) and not known and others:
                    self.match("PAM203", one)
        elif name == "pin_memory" and _is(value, True):
            self.match("PAM503", value)
        elif "backend" in name and _is(value, "nccl"):
            self.match("PAM401", value)

    def _falls_back(self, name: str) -> bool:
        """Whether another device is taken where the default is not there."""
        tests = (one for one in own(self.body) if isinstance(one, ast.If))
        for one in tests:
            if not self._asks_torch(one.test):
                continue
            inner = [*ast.walk(one)]
            stored = [n for n in inner if isinstance(getattr(n, "ctx", None), ast.Store)]
            if any(_leaf(n) and name.endswith(_leaf(n)) for n in stored):
                return True
            returns = any(isinstance(n, ast.Return) for n in inner)
            if returns and any(_leaf(n) == name for n in ast.walk(one.test)):
                return True
        return False

    # What belongs together.

    def match(
        self,
        code: str,
        node: ast.expr | ast.stmt,
        name: str = "",
        level: Level | None = None,
        call: ast.Call | None = None,
    ) -> None:
        """Note a place, unless its branch knows what it does."""
        if id(node) in self.done:
            return
        self.done.add(id(node))
        if self.silent:
            return
        guarded = self.knows == "cuda" and RULES[code].cuda == "works"
        told: Level = "info" if guarded else level or RULES[code].level
        self.found.matches.append(
            Match(
                code, self.quoted or node, told, name, self.scope, self.statement, self.before,
                guarded, self.decorator, self.parameter, bool(self.quoted), call,
            )
        )  # fmt: skip
        if code == "PAM701":
            self.old.append((self.found.matches[-1], self.path))

    def drop_unmixed(self) -> None:
        """Old names are told where new ones may be used in the same run."""
        alone = [
            id(match) for match, path in self.old if not any(map(partial(_meet, path), self.new))
        ]
        self.found.matches = [one for one in self.found.matches if id(one) not in alone]

    def _device(self, node: ast.expr) -> bool:
        return is_device(text_of(node, self.scope))

    def _choice(self, test: ast.expr, one: ast.expr, other: ast.expr) -> bool:
        """Whether two values are CUDA and the CPU, and nobody thinks of a third."""
        pairs = (one, other), (other, one)
        two = any(self._device(a) and _is(text_of(b, self.scope), "cpu") for a, b in pairs)
        return two and not (self.others or _thinks(test))

    def _choice_of_two(self, node: ast.If, after: Sequence[ast.stmt]) -> None:
        """`if cuda: device = "cuda"`, `else: device = "cpu"`, is a ternary in four lines."""
        if len(node.body) != 1 or len(after) != 1:
            return
        both = node.body[0], after[0]
        if type(both[0]) is not type(both[1]) or not isinstance(both[0], (ast.Assign, ast.Return)):
            return
        values = [one.value for one in both if isinstance(one, (ast.Assign, ast.Return))]
        one, other = values
        if one and other and self._choice(node.test, one, other):
            self.match("PAM204", node.test)
            self.done |= {id(inner) for value in (one, other) for inner in ast.walk(value)}

    def _stop(self, node: ast.If, test: ast.expr, held: Knows, body: Sequence[ast.stmt]) -> None:
        last = body[-1]
        ends = isinstance(last, ast.Raise) or (
            isinstance(last, ast.Expr)
            and isinstance(last.value, ast.Call)
            and ast.unparse(last.value.func) in ("exit", "quit", "sys.exit", "os._exit")
        )
        if held == "other" and ends and not _skips(last) and self._asks_torch(test):
            self.match("PAM601", test)

    def _asks_torch(self, test: ast.AST) -> bool:
        return any(
            isinstance(one, ast.Call)
            and (self.scope.resolve(one.func) or "").startswith("torch.cuda")
            for one in ast.walk(test)
        )

    def _needs(self, node: ast.AST) -> bool:
        """Whether a decorator or mark lets something run only where there is CUDA."""
        text = ast.unparse(node)
        return bool(
            re.search(r"(?i)skip|requires?_|only", text) and re.search(r"(?i)cuda|gpu", text)
        )


def _meet(path: Path, other: Path) -> bool:
    """Whether both run, of two places: they are in no two branches of one choice."""
    arms = dict(other)
    return all(arms.get(choice, arm) == arm for choice, arm in path)


def _is(node: ast.AST | None, value: object) -> bool:
    return (isinstance(node, ast.Constant) and node.value is value) or (
        isinstance(node, ast.Constant) and isinstance(value, str) and node.value == value
    )


def _leaf(node: ast.AST) -> str:
    return str(getattr(node, "attr", getattr(node, "id", "")))


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else "Exception"
    return bool(re.search("Import|ModuleNotFound|Exception", caught))


def _thinks(test: ast.AST) -> bool:
    """Whether a test is about a device other than CUDA's."""
    return bool(OTHERS.search(ast.unparse(test)))


def _visible(node: ast.AST) -> bool:
    return _is(node, "CUDA_VISIBLE_DEVICES")


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )


def _skips(node: ast.AST) -> bool:
    return bool(re.search(r"(?i)skip", ast.unparse(node)))
