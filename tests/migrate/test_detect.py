"""What is found, and above all what is not: each line ends with the codes that it has to have."""

from __future__ import annotations

import re
import sys

import pytest

from portable_amp.migrate.rules import RULES
from portable_amp.migrate.scan import scan

PROGRAMS = {
    "autocast": """
import torch
import torch.cuda.amp as camp
from torch import amp, autocast, cuda
from torch.cuda.amp import autocast as fast, GradScaler as GS
from torch.cuda import amp as old
with torch.cuda.amp.autocast(): pass  # PAM101
with camp.autocast(False): pass  # PAM101
with fast(enabled=True): pass  # PAM101
with old.autocast(): pass  # PAM101
with cuda.amp.autocast(): pass  # PAM101
with torch.autocast("cuda"): pass  # PAM102
with autocast(device_type="cuda", dtype=torch.bfloat16): pass  # PAM102
with amp.autocast(f"cuda:{0}"): pass  # PAM102
with torch.autocast("cpu"): pass
with torch.autocast(kind): pass
with autocast(device_type=device.type): pass
scaler = GS()  # PAM103
scaler = torch.amp.GradScaler()  # PAM103
scaler = torch.amp.GradScaler("cuda", enabled=flag)  # PAM103
scaler = torch.amp.GradScaler("cpu")
scaler = torch.amp.GradScaler(device=kind)
scaler.scale(loss).backward()
scaler.step(optimizer)
torch.is_autocast_enabled("cuda")
""",
    "aliases": """
import torch
try:
    from torch.amp import autocast
except ImportError:
    from torch.cuda.amp import autocast
empty = torch.cuda.empty_cache
empty()  # PAM301
with autocast("cuda"): pass  # PAM102
def shadowed(autocast, torch):
    with autocast("cuda"): pass
    torch.cuda.empty_cache()
""",
    "decorators": """
import torch
from torch.cuda.amp import autocast, custom_fwd
@autocast()  # PAM101
def one(x): ...
@torch.autocast("cuda")  # PAM102
def two(x): ...
@autocast  # PAM101
def three(x): ...
@custom_fwd  # PAM104
def four(x): ...
""",
    "devices": """
import argparse
import torch
model = torch.nn.Linear(2, 2).cuda()  # PAM201
x = x.cuda(non_blocking=True)  # PAM201
x = x.to("cuda")  # PAM202
x = x.to(device="cuda:0")  # PAM202
x = x.to("cuda:%d" % rank)  # PAM202
x = torch.zeros(2, device=f"cuda:{rank}")  # PAM202
where = torch.device("cuda")  # PAM202
x.to(torch.device("cuda", 1))  # PAM202
device = "cuda"  # PAM203
self.device: str = "cuda"  # PAM203
settings = {"device": "cuda", "name": "cuda"}  # PAM203
def run(x, device="cuda"): ...  # PAM203
parser.add_argument("--device", default="cuda", help="cuda or cpu")  # PAM203
parser.add_argument("--backend", default="cuda")
device = "cuda" if torch.cuda.is_available() else "cpu"  # PAM204
device = torch.device("cpu" if not torch.cuda.is_available() else "cuda:0")  # PAM204
device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
x = x.cpu().to("cpu").to(device).to(torch.float16)
mode = "cuda"
cuda = True
print("cuda", f"on cuda:{rank}")
class Net(torch.nn.Module):
    def cuda(self, device=None):
        return super().cuda(device)
""",
    "calls": """
import os
import torch
import torch.distributed as dist
from apex import amp  # PAM105
x = torch.cuda.FloatTensor(2)  # PAM205
x.type("torch.cuda.HalfTensor")  # PAM205
torch.set_default_device("cuda")  # PAM205
torch.set_default_device("cpu")
torch.cuda.empty_cache()  # PAM301
torch.cuda.synchronize()  # PAM302
torch.cuda.max_memory_allocated()  # PAM303
torch.cuda.manual_seed_all(0)  # PAM304
start = torch.cuda.Event(enable_timing=True)  # PAM305
with torch.cuda.stream(side): pass  # PAM305
torch.cuda.set_device(0)  # PAM306
with torch.cuda.device(0): pass  # PAM306
torch.cuda.get_device_name(0)  # PAM307
dist.init_process_group("nccl")  # PAM401
dist.init_process_group(backend="nccl")  # PAM401
dist.init_process_group(backend="gloo")
model = torch.nn.DataParallel(model)  # PAM402
n = torch.cuda.device_count()  # PAM402
state = torch.load(path, map_location="cuda:0")  # PAM501
state = torch.load(path)  # PAM502
state = torch.load(path, "cpu")
state = torch.load(path, map_location=device)
state = torch.load(path, **options)
loader = DataLoader(data, pin_memory=True)  # PAM503
loader = DataLoader(data, pin_memory=False)
x = x.pin_memory()  # PAM503
assert torch.cuda.is_available(), "no GPU"  # PAM601
os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # PAM602
try: step()
except torch.cuda.OutOfMemoryError: pass  # PAM602
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = True
torch.manual_seed(0)
""",
    "guards": """
import torch
use_cuda = torch.cuda.is_available()
if torch.cuda.is_available():
    x = x.cuda()  # PAM201 info
    torch.cuda.synchronize()  # PAM302 info
else:
    x = x.cuda()  # PAM201 error
if use_cuda:
    x = x.cuda()  # PAM201 info
if device.type == "cuda" and fast:
    torch.cuda.empty_cache()
elif device.type == "mps":
    torch.mps.empty_cache()
if device.type == "cuda":
    torch.cuda.empty_cache()
elif device.type == "xpu":
    torch.xpu.empty_cache()
if not torch.cuda.is_available():  # PAM601 error
    raise SystemExit("no")
if args.no_cuda:
    x = x.cuda()  # PAM201 error
else:
    x = x.cuda()  # PAM201 info
x = x.cuda() if x.is_cuda else x  # PAM201 info
name = torch.cuda.is_available() and torch.cuda.get_device_name()  # PAM307 info
try:
    model.cuda()  # PAM201 info
except RuntimeError:
    model.to("cpu")
def leave():
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()  # PAM302 info
@pytest.mark.skipif(not torch.cuda.is_available(), reason="")
def test():
    x.cuda()  # PAM201 info
""",
    "two ways": """
import torch, functools, io
a = torch.device("cuda" if cards > 0 else "cpu")  # PAM204 info
b = "cpu" if args.slow else "cuda:0"  # PAM204 info
def pick():
    if torch.cuda.is_available():  # PAM204
        return "cuda"
    return "cpu"
def pick_of_three():
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
def pick_last():
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"
device = "mps" if has_mps() else "cuda" if torch.cuda.is_available() else "cpu"
device = "xpu" if has_xpu() else "cuda"  # PAM203 error
def falls_back(device="cuda"):  # PAM203 info
    if not torch.cuda.is_available():
        device = "cpu"
def does_not(device="cuda"):  # PAM203 error
    return torch.zeros(1, device=device)
if x.device.type == torch.device("cuda").type or x.device == torch.device("cuda"):
    x.cuda()  # PAM201 info
def checked(device):
    assert device.type == "cuda"
    torch.cuda.get_device_capability(device)  # PAM307 info
cards = torch.cuda.device_count()  # PAM402
if cards == 0:
    raise SystemExit
elif cards > 1:
    torch.cuda.set_device(1)  # PAM306 info
off = functools.partial(torch.autocast, "cuda", enabled=False)  # PAM102
wait = functools.partial(torch.cuda.synchronize)  # PAM302
buffer = io.BytesIO()
torch.save(model, buffer)
copy = torch.load(buffer)
def reader(pin_memory=True): ...  # PAM503 info
loader = dict(pin_memory=True, num_workers=2)  # PAM503 info
if torch.cuda.is_available():
    kind = torch.cuda.FloatTensor  # PAM205 info
else:
    kind = torch.FloatTensor
x = x.type(kind)
isinstance(x, torch.cuda.FloatTensor)  # PAM205 warning
class Batch:
    def pin_memory(self):
        return self.x.pin_memory()
""",
    "no torch": """
import numba.cuda
from pycuda import driver
x = model.to("cuda")
device = "cuda"
numba.cuda.synchronize()
""",
}


def expected(text: str) -> list[tuple[int, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for code, level in re.findall(r"(PAM\d+)(?: (\w+))?", line):
            found.append((number, f"{code} {level}".strip()))
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_found(name: str) -> None:
    text = PROGRAMS[name]
    wanted = expected(text)
    levels = {place: " " in code for place, code in wanted}
    found = [
        (one.line, f"{one.code} {one.level}" if levels.get(one.line) else one.code)
        for one in scan(text)
    ]
    assert found == wanted


def test_every_rule_is_among_the_examples() -> None:
    assert {code for text in PROGRAMS.values() for code in re.findall(r"PAM\d+", text)} == set(
        RULES
    )


PLACES = {
    "else": "if a:\n    pass\nelse:\n    x.cuda()",
    "elif": "if a:\n    pass\nelif b:\n    x.cuda()",
    "test of if": "if x.cuda():\n    pass",
    "for": "for a in b:\n    x.cuda()",
    "for else": "for a in b:\n    pass\nelse:\n    x.cuda()",
    "for iter": "for a in x.cuda():\n    pass",
    "while": "while a:\n    x.cuda()",
    "while test": "while x.cuda():\n    pass",
    "while else": "while a:\n    pass\nelse:\n    x.cuda()",
    "try": "try:\n    x.cuda()\nfinally:\n    pass",
    "except": "try:\n    pass\nexcept E:\n    x.cuda()",
    "except type": "try:\n    pass\nexcept x.cuda():\n    pass",
    "try else": "try:\n    pass\nexcept E:\n    pass\nelse:\n    x.cuda()",
    "finally": "try:\n    pass\nfinally:\n    x.cuda()",
    "with": "with a:\n    x.cuda()",
    "with item": "with a, x.cuda():\n    pass",
    "async with": "async def f():\n    async with a:\n        x.cuda()",
    "async for": "async def f():\n    async for a in b:\n        x.cuda()",
    "await": "async def f():\n    await x.cuda()",
    "match": "match x.cuda():\n    case _:\n        pass",
    "case": "match a:\n    case 1:\n        x.cuda()",
    "case guard": "match a:\n    case 1 if x.cuda():\n        pass",
    "default": "def f(a, b=x.cuda()):\n    pass",
    "kw default": "def f(*, a, b=x.cuda()):\n    pass",
    "posonly default": "def f(b=x.cuda(), /):\n    pass",
    "lambda default": "f = lambda a=x.cuda(): a",
    "lambda kw default": "f = lambda *, a=x.cuda(): a",
    "lambda": "f = lambda a: x.cuda()",
    "decorator": "@f(x.cuda())\ndef g():\n    pass",
    "decorator kw": "@f(a=x.cuda())\ndef g():\n    pass",
    "decorator bare": "@x.cuda()\ndef g():\n    pass",
    "class decorator": "@f(x.cuda())\nclass A:\n    pass",
    "decorator nested": "@f([x.cuda()])\ndef g():\n    pass",
    "base": "class A(f(x.cuda())):\n    pass",
    "metaclass": "class A(metaclass=f(x.cuda())):\n    pass",
    "class body": "class A:\n    y = x.cuda()",
    "method": "class A:\n    def f(self):\n        x.cuda()",
    "nested": "def f():\n    def g():\n        x.cuda()",
    "async def": "async def f():\n    x.cuda()",
    "return": "def f():\n    return x.cuda()",
    "yield": "def f():\n    yield x.cuda()",
    "raise": "raise E(x.cuda())",
    "raise from": "raise E from x.cuda()",
    "assert": "assert x.cuda()",
    "assert msg": "assert a, x.cuda()",
    "del": "del a[x.cuda()]",
    "assign": "y = x.cuda()",
    "ann": "y: int = x.cuda()",
    "aug": "y += x.cuda()",
    "walrus": "(y := x.cuda())",
    "target": "y[x.cuda()] = 1",
    "target2": "z = y[x.cuda()] = 1",
    "list": "[x.cuda()]",
    "tuple": "(x.cuda(), 1)",
    "set": "{x.cuda()}",
    "dict key": "{x.cuda(): 1}",
    "dict value": "{1: x.cuda()}",
    "dict star": "{**x.cuda()}",
    "listcomp": "[x.cuda() for a in b]",
    "comp iter": "[a for a in x.cuda()]",
    "comp if": "[a for a in b if x.cuda()]",
    "dictcomp": "{a: x.cuda() for a in b}",
    "genexp": "list(x.cuda() for a in b)",
    "arg": "f(x.cuda())",
    "kwarg": "f(a=x.cuda())",
    "star": "f(*x.cuda())",
    "starstar": "f(**x.cuda())",
    "attr": "x.cuda().y",
    "sub": "x.cuda()[0]",
    "slice": "y[x.cuda():1]",
    "binop": "1 + x.cuda()",
    "unary": "-x.cuda()",
    "bool": "a or x.cuda()",
    "compare": "1 < x.cuda()",
    "ifexp": "x.cuda() if a else b",
    "ifexp else": "b if a else x.cuda()",
    "ifexp test": "b if x.cuda() else c",
    "fstring": "f'{x.cuda()}'",
    "fformat": "f'{a:{x.cuda()}}'",
    "main": "if __name__ == '__main__':\n    x.cuda()",
    "return annot default": "def f(a: int = x.cuda()) -> int:\n    pass",
    "semicolon": "a; x.cuda()",
    "global stmt after": "def f():\n    global a\n    x.cuda()",
    "property": "class A:\n    @property\n    def cudax(self):\n        return x.cuda()",
    "def cuda": "def cuda(a=x.cuda()):\n    pass",
    "isinstance": "isinstance(x.cuda(), A)",
}
if sys.version_info >= (3, 11):
    PLACES["except star"] = "try:\n    pass\nexcept* E:\n    x.cuda()"


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_the_syntax_is_looked_at(place: str) -> None:
    text = f"import torch\n{PLACES[place]}\n"
    (line,) = [number for number, one in enumerate(text.split("\n"), 1) if "x.cuda()" in one]
    assert [(one.line, one.code) for one in scan(text)] == [(line, "PAM201")]


def test_nothing_in_an_f_string_is_rewritten() -> None:
    text = "import torch\nprint(f'{x.cuda()}', f" + repr("{d.to('cuda')}") + ")\n"
    assert [(one.code, one.fix, one.edits) for one in scan(text)] == [
        ("PAM201", "advice", ()),
        ("PAM202", "advice", ()),
    ]


def test_a_scaler_that_is_off_is_left_alone() -> None:
    text = "import torch\nfrom torch.cuda.amp import GradScaler\n"
    assert scan(text + "GradScaler(enabled=False)\ntorch.amp.GradScaler(enabled=False)\n") == []


def test_positions_count_code_points() -> None:
    (one,) = scan("import torch\ns = 'äöü写真'; x = y.cuda(\n)\n")
    assert (one.line, one.column, one.end_line, one.code) == (2, 18, 3, "PAM201")


def test_what_is_no_python_is_refused() -> None:
    with pytest.raises(SyntaxError):
        scan("import torch\nx = .cuda(\n")


def test_what_is_nested_too_deeply_is_refused_in_one_line() -> None:
    chain = "import torch\nif a: pass\n" + "elif b: pass\n" * 3000 + "else: y.cuda()\n"
    with pytest.raises(SyntaxError):
        scan(chain)
