"""What a name stands for: where torch has it, what hides it, and which one a fix may use."""

from __future__ import annotations

import importlib
import warnings

import pytest

from portable_amp.migrate.scan import scan

# Two places where torch has the same.
HOMES = (
    ("torch.cuda.amp.autocast_mode.autocast", "torch.cuda.amp.autocast"),
    ("torch.cuda.amp.autocast_mode.custom_fwd", "torch.cuda.amp.custom_fwd"),
    ("torch.cuda.amp.grad_scaler.GradScaler", "torch.cuda.amp.GradScaler"),
    ("torch.amp.autocast_mode.autocast", "torch.amp.autocast"),
    ("torch.amp.grad_scaler.GradScaler", "torch.amp.GradScaler"),
    ("torch.autocast", "torch.amp.autocast"),
    ("torch.GradScaler", "torch.amp.GradScaler"),
    ("torch.cuda.memory.empty_cache", "torch.cuda.empty_cache"),
    ("torch.cuda.random.manual_seed", "torch.cuda.manual_seed"),
    ("torch.cuda.streams.Event", "torch.cuda.Event"),
    ("torch.serialization.load", "torch.load"),
    ("torch.nn.parallel.DataParallel", "torch.nn.DataParallel"),
    ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.DataParallel"),
)


@pytest.mark.parametrize(("found", "documented"), HOMES)
def test_it_is_told_wherever_torch_has_it(found: str, documented: str) -> None:
    told = []
    for name in (found, documented):
        module, _, leaf = name.rpartition(".")
        text = f"from {module} import {leaf} as it\nit('cuda')\n"
        told.append([(one.line, one.code) for one in scan(text)])
        assert told[-1] == [(one.line, one.code) for one in scan(f"import torch\n{name}('cuda')")]
    assert told[0] == told[1] != []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (name.rpartition(".") for name in (found, documented))
        assert getattr(importlib.import_module(first[0]), first[2]) is getattr(
            importlib.import_module(second[0]), second[2]
        )


@pytest.mark.parametrize(
    "name", ["torch.cuda.amplifier.autocast", "torch.loads", "torch.autocasts"]
)
def test_what_begins_alike_is_not_told(name: str) -> None:
    assert scan(f"import torch\n{name}('cuda')") == []


@pytest.mark.parametrize("line", ["import torch", "import torch.cuda", "import os, torch.cuda.amp"])
def test_an_import_of_a_function_hides_a_name_around_it(line: str) -> None:
    text = f"torch = fake\ndef here():\n    {line}\n    torch.cuda.synchronize()\n"
    assert [one.code for one in scan(text)] == ["PAM302"]


HIDING = (
    *("torch = fake", "torch: object = fake", "other = torch = fake", "torch, other = fake"),
    *("import fake as torch", "from fake import torch", "from fake import cuda as torch"),
    *("import fake.cuda as torch", "for torch in fake: pass", "with fake as torch: pass"),
    *("def torch(): pass", "async def torch(): pass", "class torch: pass", "(torch := fake)"),
    "try: pass\n    except E as torch: pass",
)


@pytest.mark.parametrize("binding", HIDING)
def test_what_hides_torch_in_a_function(binding: str) -> None:
    text = "import torch\ndef run():\n    {}\n    torch.cuda.synchronize()\n"
    assert scan(text.format(binding)) == []
    assert [one.code for one in scan(text.format(binding.replace("torch", "other")))] == ["PAM302"]


@pytest.mark.parametrize(
    "parameters",
    [
        "torch",
        "a, torch=1",
        "torch, /",
        "a, torch=1, /",
        "*, torch",
        "*, a, torch=1",
        "*torch",
        "**torch",
    ],
)
def test_what_hides_torch_as_a_parameter(parameters: str) -> None:
    for text in ("def run({}): ", "async def run({}): ", "run = lambda {}: "):
        call = f"import torch\n{text}torch.cuda.synchronize()\n"
        assert scan(call.format(parameters)) == []
        assert len(scan(call.format(parameters.replace("torch", "other")))) == 1


TORCH, OTHER = "from torch.cuda.amp import autocast", "from other import autocast"
SURE = (
    (f"{TORCH}", True),
    (f"{TORCH}\nimport other\nother = 1", True),
    (f"if new:\n    {TORCH}\nelse:\n    from torch import autocast", True),
    (f"if new:\n    {TORCH}\nelse:\n    {OTHER}", False),
    (f"if new:\n    {OTHER}\nelse:\n    {TORCH}", False),
    (f"if new:\n    {TORCH}\nelse:\n    autocast = None", False),
    (f"if new:\n    autocast: object = pick()\nelse:\n    {TORCH}", False),
    (f"try:\n    {TORCH}\nexcept ImportError:\n    {OTHER}", True),
    (f"try:\n    {TORCH}\nexcept ImportError:\n    {OTHER}\nimport other", True),
    (f"try:\n    {TORCH}\nexcept ImportError:\n    autocast = None\nimport other", True),
    (f"try:\n    {OTHER}\nexcept ImportError:\n    {TORCH}", False),
)


@pytest.mark.parametrize(("imports", "sure"), SURE)
def test_a_name_that_may_be_something_else_is_unsafe_to_fix(imports: str, sure: bool) -> None:
    (found,) = scan(f"import torch\n{imports}\nwith autocast(): pass\n")
    assert found.fix == ("safe" if sure else "unsafe")


HERE = "{ctx}.device"
DEVICES = (
    ("def f(x, device):\n    x.cuda()", "device"),
    ("def f(x, dev):\n    x.cuda()", "dev"),
    ("def f(x, DEVICE):\n    x.cuda()", "DEVICE"),
    ("def f(x, where):\n    x.cuda()", HERE),
    ("def f(x, device, dev):\n    x.cuda()", HERE),
    ("def f(device, /, x):\n    x.cuda()", "device"),
    ("def f(x, *, device):\n    x.cuda()", "device"),
    ("async def f(x, device):\n    x.cuda()", "device"),
    ("f = lambda x, device: x.cuda()", "device"),
    ("def f(device, x=None):\n    x.cuda()", "device"),
    ("def f(device, /, x=None):\n    x.cuda()", "device"),
    ("def f(x, device='cuda'):\n    x.cuda()", "device"),
    ("def f(x, device=None):\n    x.cuda()", HERE),
    ("def f(a, device=None, x=1):\n    x.cuda()", HERE),
    ("def f(x, device='cuda', y=None):\n    x.cuda()", "device"),
    ("def f(x, device=None, y='cuda'):\n    x.cuda()", HERE),
    ("def f(x=1, device=None, /):\n    x.cuda()", HERE),
    ("def f(x=1, device=None, /, y=2):\n    x.cuda()", HERE),
    ("def f(x, *, device=None):\n    x.cuda()", HERE),
    ("def f(x, *, device, y=None):\n    x.cuda()", "device"),
    ("def f(x, *, y, device=None):\n    x.cuda()", HERE),
    ("device = pick()\ndef f(x):\n    x.cuda()", "device"),
    ("other = device = pick()\nx.cuda()", "device"),
    ("device: object = pick()\nx.cuda()", "device"),
    ("x.cuda()\ndevice = pick()", HERE),
    ("device = 'cpu'\nx.cuda()", HERE),
    ("device = 'cpu'\ndevice = pick()\nx.cuda()", "device"),
    ("class A:\n    device = pick()\n    y = x.cuda()", "device"),
    ("class A:\n    device = pick()\n    def f(self, x):\n        x.cuda()", HERE),
    ("def f(device):\n    pass\ndef g(x):\n    x.cuda()", HERE),
    ("def f(device):\n    class A:\n        y = x.cuda()", "device"),
)


@pytest.mark.parametrize(("program", "device"), DEVICES)
def test_which_device_a_fix_puts_it_on(program: str, device: str) -> None:
    (found,) = (one for one in scan(f"import torch\n{program}\n") if one.code == "PAM201")
    assert [edit.new for edit in found.edits] == ["to", device]


CONTEXTS = (
    ("ctx = DeviceContext(precision='fp16')", "ctx"),
    ("here: object = DeviceContext(precision='fp16')", "here"),
    ("here = portable_amp.context.DeviceContext(precision='fp16')", "here"),
    ("other, here = pick(), DeviceContext(precision='fp16')", "{ctx}"),
    ("here = pick()", "{ctx}"),
    ("here = there = DeviceContext(precision='fp16')", "{ctx}"),
    ("here = DeviceContext(precision='fp16')\nhere = pick()", "{ctx}"),
    ("def f():\n    here = DeviceContext(precision='fp16')", "{ctx}"),
    ("def f(here=DeviceContext(precision='fp16')):\n    pass", "{ctx}"),
)


@pytest.mark.parametrize(("program", "name"), CONTEXTS)
@pytest.mark.parametrize("head", ["", "def run():\n    "])
def test_which_context_a_fix_uses(program: str, name: str, head: str) -> None:
    imports = "import torch, portable_amp\nfrom portable_amp import DeviceContext\n"
    text = f"{imports}{program}\n{head}with torch.autocast('cuda'): pass\n"
    (found,) = (one for one in scan(text) if one.code == "PAM102")
    assert found.edits[0].new == f"{name}.autocast"
