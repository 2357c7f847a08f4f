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
    "stars": """
from torch.cuda.amp import *
with autocast(): pass  # PAM101
scaler = GradScaler()  # PAM103
@custom_fwd  # PAM104
def forward(x): ...
@custom_bwd  # PAM104
def backward(x): ...
""",
    "newer stars": """
from torch.amp import *
with autocast("cuda"): pass  # PAM102
scaler = GradScaler()  # PAM103
@custom_fwd(device_type="cuda")  # PAM104
def forward(x): ...
@custom_bwd(device_type="cuda:0")  # PAM104
def backward(x): ...
@custom_fwd(device_type="cpu")
def elsewhere(x): ...
""",
    "other stars": """
from elsewhere import *
from .amp import *
with autocast(): pass
scaler = GradScaler()
torch.cuda.synchronize()  # PAM302
""",
    "relative": """
from . import torch
from .torch import cuda
from .apex import amp
torch.cuda.synchronize()
cuda.synchronize()
""",
    "names of names": """
import torch.cuda.amp
import torch.nn.functional as F
from torch import cuda as first
second = first
third = second
wait = also = torch.cuda.synchronize
cache: object = torch.cuda.empty_cache
third.synchronize()  # PAM302
also()  # PAM302
wait()  # PAM302
cache()  # PAM301
here, there = torch.cuda.synchronize, torch.cuda.synchronize  # PAM302 PAM302
one, other = other, one
one.synchronize()
loop = back
back = loop
loop.synchronize()
torch.cuda = fake
other.thing = settle = torch.cuda.init  # PAM306
settle()  # PAM306
chosen = torch.cuda
if mac:
    chosen = torch.mps
chosen.synchronize()
""",
    "scopes": """
import torch
def outer():
    def inner():
        torch = fake
        torch.cuda.synchronize()
    async def later():
        torch = fake
    class Inner:
        torch = fake
        torch.cuda.synchronize()
        def method(self):
            torch.cuda.synchronize()  # PAM302
    wait = lambda torch: torch.cuda.synchronize()
    wait = lambda: torch.cuda.synchronize()  # PAM302
    wait = lambda: (torch := fake)
    torch.cuda.synchronize()  # PAM302
async def runs(torch):
    torch.cuda.synchronize()
""",
    "assigned": """
import torch
self.device = "cuda"  # PAM203
self.name = device = "cuda"  # PAM203
device = self.name = "cuda"  # PAM203
names[0] = "cuda"
names[0] = self.device = "cuda:0"  # PAM203
self.wait = torch.cuda.synchronize  # PAM302
self.scaler = torch.cuda.amp.GradScaler  # PAM103
self.region = torch.cuda.amp.autocast  # PAM101
scaler, region = torch.cuda.amp.GradScaler, torch.cuda.amp.autocast  # PAM103 PAM101
region = torch.cuda.amp.autocast
scaler = torch.amp.GradScaler
scaler = torch.cuda.amp.GradScaler
kinds = dict(scaler=torch.cuda.amp.GradScaler)  # PAM103
wrapped = torch.nn.DataParallel
event: torch.cuda.Event
event: "torch.cuda.FloatTensor" = None
def runs(event: torch.cuda.Event, *rest: torch.cuda.Event) -> None: ...
""",
    "options": """
import torch, os
device = args.get("device", "cuda")  # PAM203
device = getattr(args, "device", "cuda")  # PAM203
device = os.getenv("DEVICE", "cuda")  # PAM203
device = getattr(args, "device", "cpu")
value = getattr("device", "cuda", 3, 4)
value = get("device")
value = args.get(device, "cuda")
value = args.pop("device", "cuda")
value = args.get("mode", "cuda")
value = args.get("backend", "nccl")  # PAM401
value = args.get("pin_memory", True)  # PAM503
backend = "nccl"  # PAM401
dist_backend = "nccl"  # PAM401
dist_backend = "gloo"
mode = "nccl"
@click.option("--device", default="cuda")  # PAM203
@click.option("-d", "--gpu-id", default="cuda")  # PAM203
@click.option("--name", default="cuda")
@click.option("--train-device", help="cuda")
def command(**options): ...
parser.add_option("--train-device", default="cuda:0")  # PAM203
parser.add_option(3, "dev", default="cuda:0")  # PAM203
device = typer.Option("--device", default="cuda")  # PAM203
parser.add_argument("--dist-backend", default="nccl")  # PAM401
def runs(a, b=1, device="cuda", /, c="cuda", *gpus, dev="cuda", **dev2): ...  # PAM203 PAM203
def runs(device, c="cuda", *, dev, d="cuda"): ...
def runs(device=torch.device("cuda", 0)): ...  # PAM203
runs = lambda device="cuda": device  # PAM203
use = {"device": "cuda", **more, 3: "cuda", device: "cuda"}  # PAM203
""",
    "options without torch": """
import argparse
parser.add_argument("--device", default="cuda")  # PAM203
parser.add_argument("--dist-backend", default="nccl")  # PAM401
device = "cuda"
backend = "nccl"
model.cuda()  # PAM201
model.cuda(0)
x.pin_memory()
x = x.to("cuda")
x = make(device="cuda")
""",
    "torch without its import": """
x.to("cuda")  # PAM202
x.cuda(0)  # PAM201
def runs(x): return torch.ones(1)
""",
    "fallbacks": """
import torch
def checks_first(device="cuda"):  # PAM203 info
    if fast:
        device = "mps"
    if not torch.cuda.is_available():
        device = "cpu"
def checks_not(device="cuda"):  # PAM203 error
    if fast:
        device = "cpu"
def sets_another(device="cuda"):  # PAM203 error
    if not torch.cuda.is_available():
        speed = 0
def sets_nothing(device="cuda"):  # PAM203 error
    if not torch.cuda.is_available():
        print(self.x)
def returns(device="cuda"):  # PAM203 info
    if device == "cuda" and not torch.cuda.is_available():
        return None
def returns_for_another(device="cuda"):  # PAM203 error
    if kind == "cuda" and not torch.cuda.is_available():
        return None
def goes_on(device="cuda"):  # PAM203 error
    if device == "cuda" and not torch.cuda.is_available():
        pass
def sets_its_own(self, default_device="cuda"):  # PAM203 info
    if not torch.cuda.is_available():
        self.device = "cpu"
""",
    "versions": """
import torch
if hasattr(torch.amp, "GradScaler"):
    scaler = torch.amp.GradScaler(device.type)
else:
    scaler = torch.cuda.amp.GradScaler()  # PAM103 info
if new:
    scaler = torch.amp.GradScaler("cuda")  # PAM103 error
else:
    scaler = torch.cuda.amp.GradScaler()  # PAM103 error
if new:
    a = 1
else:
    scaler = torch.cuda.amp.GradScaler()  # PAM103 error
try:
    region = torch.autocast(device.type)
except TypeError:
    region = torch.cuda.amp.autocast()  # PAM101 info
region = torch.amp.autocast(kind) if new else torch.cuda.amp.autocast()  # PAM101 info
""",
    "attempts": """
import torch
try:
    model.cuda()  # PAM201 info
    x = x.cuda()  # PAM201 info
    y = y.cuda()  # PAM201 info
except RuntimeError:
    device = "cpu"
try:
    x = x.cuda()  # PAM201 error
    a = b
    b = a
    a = b
except RuntimeError:
    device = "cpu"
try:
    model.cuda()  # PAM201 error
except RuntimeError:
    print("cpu")
    raise
try:
    model.cuda()  # PAM201 error
except RuntimeError:
    print("no")
try:
    model.cuda()  # PAM201 info
except RuntimeError:
    x = x.to("xpu")
try:
    import one
    torch.cuda.init()  # PAM306 info
except ImportError:
    pass
try:
    from one import two
    torch.cuda.init()  # PAM306 info
except (OSError, ModuleNotFoundError):
    pass
try:
    import one
    torch.cuda.init()  # PAM306 info
except:
    pass
try:
    import one
    torch.cuda.init()  # PAM306 info
except Exception:
    pass
try:
    import one
    torch.cuda.init()  # PAM306 error
except OSError:
    device = "cpu"
try:
    import one
    torch.cuda.init()  # PAM306 error
except ImportError:
    raise
try:
    torch.cuda.init()  # PAM306 error
    import one
except ImportError:
    pass
""",
    "stops": """
import torch, sys, os
if not torch.cuda.is_available():  # PAM601
    print("no")
    exit()
if not torch.cuda.is_available():  # PAM601
    quit(1)
if not torch.cuda.is_available():  # PAM601
    sys.exit("no")
if not torch.cuda.is_available():  # PAM601
    os._exit(3)
if not torch.cuda.is_available():
    exit()
    print("no")
if not torch.cuda.is_available():
    warn("no")
if not torch.cuda.is_available():
    done = sys.exit
if torch.cuda.is_available():
    exit()
if not use_cuda:
    exit()
assert torch.cuda.device_count()  # PAM601
assert torch.cuda.device_count() > 1  # PAM601
assert not torch.cuda.is_available()
torch.cuda.synchronize()  # PAM302 error
assert use_cuda
torch.cuda.synchronize()  # PAM302 info
def skips():
    if not torch.cuda.is_available():
        raise unittest.SkipTest("no")
""",
    "leaving": """
import torch
for x in data:
    if not torch.cuda.is_available():
        print("no")
        continue
    x.cuda()  # PAM201 info
for x in data:
    if not torch.cuda.is_available():
        break
    x.cuda()  # PAM201 info
for x in data:
    if not torch.cuda.is_available():
        print("no")
    x.cuda()  # PAM201 error
for x in data:
    if slow:
        break
    x.cuda()  # PAM201 error
for x in data:
    if not torch.cuda.is_available():
        pytest.skip("no")
    x.cuda()  # PAM201 info
for x in data:
    if not torch.cuda.is_available():
        continue
    else:
        x.cuda()  # PAM201 info
    x.cuda()  # PAM201 error
while torch.cuda.is_available():
    x.cuda()  # PAM201 info
else:
    x.cuda()  # PAM201 error
while not torch.cuda.is_available():
    x.cuda()  # PAM201 error
while kind != "cpu":
    x.cuda()  # PAM201 info
first = torch.cuda.is_available() and x.cuda()  # PAM201 info
first = torch.cuda.is_available() or x.cuda()  # PAM201 error
first = not torch.cuda.is_available() or x.cuda()  # PAM201 info
first = torch.cuda.is_available() and fast and x.cuda() or y.cuda()  # PAM201 info PAM201 error
""",
    "marks": """
import pytest, torch
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="")
torch.cuda.get_device_name()  # PAM307 info
""",
    "other marks": """
import pytest, torch
pytestmark = pytest.mark.gpu
needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="")
torch.cuda.get_device_name()  # PAM307 error
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="")
def with_two():
    x.cuda()  # PAM201 info
@needs_cuda_only
class Together:
    def method(self):
        x.cuda()  # PAM201 info
@dataclass
class Apart:
    def method(self):
        x.cuda()  # PAM201 error
@pytest.mark.slow
def slow():
    x.cuda()  # PAM201 error
@requires_gpu
def with_one(x=x.cuda()):  # PAM201 error
    x.cuda()  # PAM201 info
@torch.no_grad()
def after(x):
    x.cuda()  # PAM201 error
x.cuda()  # PAM201 error
""",
    "visible": """
import os, torch
os.environ["CUDA_VISIBLE_DEVICES"]  # PAM602
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # PAM602
os.getenv("CUDA_VISIBLE_DEVICES")  # PAM602
os.putenv("CUDA_VISIBLE_DEVICES", "0")  # PAM602
os.environ["HOME"]
os.environ.get("HOME")
settings["CUDA_VISIBLE_DEVICES"]
print("CUDA_VISIBLE_DEVICES")
""",
    "names of float32's precision": """
import torch
import torch.backends.cudnn as cudnn
from torch import set_float32_matmul_precision as precise
from torch.backends import cuda, mkldnn
mm = torch.backends.cuda.matmul
torch.backends.fp32_precision = "ieee"
torch.set_float32_matmul_precision("high")  # PAM701 warning
precise("high")  # PAM701 warning
cudnn.allow_tf32 = False  # PAM701 warning
cuda.matmul.allow_tf32 = True  # PAM701 warning
mm.allow_tf32 |= True  # PAM701 warning
if torch.cuda.is_available():
    if torch.backends.mkldnn.allow_tf32: pass  # PAM701 warning
with cudnn.flags(enabled=False): pass  # PAM701 warning
cudnn.benchmark = mkldnn.enabled
def shadowed(torch): torch.set_float32_matmul_precision("high")
""",
    "new names of float32's precision, by an alias": """
import torch
from torch.backends import cudnn as dnn
def one():
    torch.backends.cuda.matmul.allow_tf32 = True  # PAM701
def other():
    if dnn.conv.fp32_precision == "tf32": pass
""",
    "old names of float32's precision alone": """
import torch
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
model.fp32_precision = "ieee"
hasattr(torch.backends, "fp32_precision")
""",
    "new names of float32's precision alone": """
import torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "ieee"
""",
    "either names of float32's precision, in other branches of one choice": """
import torch
if hasattr(torch.backends, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.cuda.matmul.allow_tf32 = True
""",
    "either, in a try": """
import torch
try:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
except AttributeError:
    torch.backends.cudnn.allow_tf32 = True
""",
    "either, after one that leaves": """
import torch
def precise():
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "ieee"
        return
    torch.set_float32_matmul_precision("highest")
""",
    "both, in branches of two choices": """
import torch
if new:
    torch.backends.fp32_precision = "ieee"
if high:
    torch.set_float32_matmul_precision("high")  # PAM701
""",
    "apex": """
import apex  # PAM105
import apex.amp as fast  # PAM105
import os, apex.amp  # PAM105
from apex.parallel import DistributedDataParallel  # PAM105
from apexlike import amp
import apexlike
""",
    "asked about": """
import torch
from torch.cuda.amp import GradScaler, autocast
isinstance(a, GradScaler)
isinstance(a, (autocast, torch.cuda.amp.GradScaler))
issubclass(a, torch.cuda.HalfTensor)  # PAM205 warning
isinstance(a, torch.nn.DataParallel)
isinstance(torch.cuda.amp.GradScaler(), b)  # PAM103
isinstance(a.cuda(), b)  # PAM201
other.isinstance(a, torch.cuda.HalfTensor)  # PAM205 error
if x.device == torch.device("cuda") or torch.device("cuda", 0).type != kind: pass
torch.device("cuda").type  # PAM202
torch.device("cuda").index == 0  # PAM202
""",
    "calls of every kind": """
import functools, io
import torch
torch.device(device="cuda")  # PAM202
torch.device(type="cuda", index=0)  # PAM202
torch.device(kind, "cuda")
torch.device(type=kind)
x.to(torch.float16, "cuda")  # PAM202
torch.to("cuda")
x = other(device_type="cuda")  # PAM202
x = other(map_location="cuda", device=kind)  # PAM501
x = other(backend="nccl", name="nccl")  # PAM401
x = other("nccl")
torch.distributed.init_process_group("gloo", "nccl")  # PAM401
torch.distributed.init_process_group("nccl", "env://")  # PAM401
x.cuda(device="cuda:1", memory_format=m)  # PAM201
x.pin_memory("cuda")
x.pin_memory()  # PAM503 error
torch.cuda.amp.pin_memory()
with torch.random.fork_rng(device_type="cuda"): pass
with torch.random.fork_rng(["cuda"], device_type="cuda"): pass
torch.set_default_tensor_type(torch.cuda.HalfTensor)  # PAM205
torch.set_default_tensor_type(torch.HalfTensor)
torch.set_default_tensor_type("torch.cuda.HalfTensor")  # PAM205
torch.set_default_device(torch.device("cuda"))  # PAM205 PAM202
torch.set_default_device(device)
functools.partial(torch.autocast, kind)
functools.partial(other, torch.autocast)
functools.partial()
partial(torch.cuda.synchronize)  # PAM302
first = io.BytesIO()
torch.save(first)
torch.load(first)  # PAM502
torch.save(model, second)
torch.save(model, self.third)
torch.load(second)
torch.load(self.third)  # PAM502
torch.load(fourth)  # PAM502
torch.load(fourth, weights_only=True)  # PAM502
def reads():
    torch.load(second)  # PAM502
    torch.save(model, fifth)
torch.load(fifth)  # PAM502
torch.amp.custom_fwd(device_type=kind)
torch.amp.custom_bwd("cuda")  # PAM104
where = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # PAM204
where = torch.device("cuda" if torch.cuda.is_available() else "cpu", 1)  # PAM204
where = other("cuda" if torch.cuda.is_available() else "cpu")  # PAM204
""",
    "choices": """
import torch
a = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")  # PAM204
a = torch.device("cpu") if args.slow else torch.device("cuda", 0)  # PAM204
a = torch.device("cuda") if torch.cuda.is_available() else other
a = other if not torch.cuda.is_available() else torch.device("cuda")
a = torch.device("cuda") if x.device.type != "cpu" else other
a = other if x.device.type == "cpu" else torch.device("cuda")
a = torch.device("cuda") if torch.cuda.is_available() else x.cuda()  # PAM201 error
a = torch.device("cuda") if fast else other  # PAM202 error
device = "xpu" if has_xpu() else "cuda"  # PAM203 error
device = "cuda" if fast else "mps"  # PAM203 error
device = "cuda" if fast else other
device = "cuda" if torch.cuda.is_available() else "mps"
device = "mps" if not torch.cuda.is_available() else "cuda"
if torch.cuda.is_available():  # PAM204
    device = torch.device("cuda", 1)
else:
    device = torch.device("cpu")
if not torch.cuda.is_available():  # PAM204
    device = "cpu"
else:
    device = "cuda"
if torch.cuda.is_available():
    device = "cuda"  # PAM203 info
    first = 1
else:
    device = "cpu"
if torch.cuda.is_available():
    device = "cuda"  # PAM203 info
else:
    device = "cpu"
    first = 1
if torch.cuda.is_available():
    device = "cuda"  # PAM203 info
else:
    device: str = "cpu"
if torch.backends.mps.is_available():
    device = "mps"
elif torch.cuda.is_available():
    device = "cuda"  # PAM203 info
else:
    device = "cpu"
def pick():
    if torch.cuda.is_available():
        return "cuda"
    print("no")
    return "cpu"
def pick_slowly():
    if torch.cuda.is_available():
        return torch.cuda.current_device()  # PAM306 info
    return "cpu"
def pick_either():
    if os.name == "posix":
        return "mps"
    if torch.cuda.is_available():  # PAM204
        return "cuda"
    return "cpu"
def pick_others_first():
    if torch.backends.mps.is_available():
        found = "mps"
    if torch.cuda.is_available():  # PAM204
        return "cuda"
    return "cpu"
""",
    "methods of the same name": """
import torch
class Net(torch.nn.Module):
    def cuda(self, device=None):
        self.x = self.x.cuda(device)
        return super().cuda(device)
    def pin_memory(self):
        self.x = self.x.cuda()
    def to(self, x):
        return super(Net, self).cuda()
    def more(self):
        return supers().cuda()  # PAM201
""",
    "handed on": """
import torch
for call in (torch.cuda.synchronize, torch.cuda.FloatTensor): pass  # PAM302 PAM205
call(torch.cuda.amp.autocast)  # PAM101
call(torch.cuda.amp.GradScaler)  # PAM103
call(torch.autocast)
call(torch.nn.DataParallel)
call(torch.cuda.amp.common)
call(torch.cuda.amp)
@torch.autocast  # PAM102
def region(x): ...
@torch.cuda.amp.autocast  # PAM101
def region(x): return torch.autocast
x.type(f"torch.cuda.{kind}Tensor")
x.type("torch.cuda.Tensors")
x.type(torch.FloatTensor)
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
        for code, level in re.findall(r"(PAM\d+)(?: ([a-z]+))?", line):
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


# A test -> the places beside it that run only where there is CUDA: in it, in its `else`, behind
# `if it: return`, and behind `if not it: return`.
ONLY_THERE, NOT_THERE = "then unless", "else after"
GUARDS = {
    **dict.fromkeys(
        (
            *(
                "torch.cuda.is_available()",
                "torch.cuda.device_count()",
                "torch.cuda.is_initialized()",
            ),
            *("torch.cuda.is_bf16_supported()", "torch.backends.cuda.is_built()"),
            *("bool(torch.cuda.is_available())", "bool(x.is_cuda)", "torch.version.cuda"),
            *("cards", "first", "second", "third", "cards != 0", "device_count() != 0"),
            *(
                "cuda_is_available()",
                "self.gpu_available()",
                "is_gpu(x)",
                "helper.supports_cuda()",
            ),
            *("has_gpu()", "with_cuda()", "use_gpu()", "x.is_cuda", "args.gpu", "args.gpus"),
            *("USE_CUDA", "self.use_gpu", "x.device.type == 'cuda'", "'cuda' == kind"),
            *("kind is 'cuda:0'", "'cuda' in kind", "kind == 'gpu'", "kind == f'cuda:{n}'"),
            *("kind == 'cuda:' + n", "kind == 'cuda:%d' % n", "kind == 'cuda:{}'.format(n)"),
            *("where == torch.device('cuda', 0)", "torch.device('cuda') == where"),
            *("where.type == torch.device('cuda').type", "kind.startswith('cuda', 0)"),
            *("kind.startswith('cuda:', 0)", "not (not first)", "first and use_gpu()"),
        ),
        ONLY_THERE,
    ),
    **dict.fromkeys(
        (
            *("not torch.cuda.is_available()", "not first", "args.no_cuda", "disable_gpu"),
            *("not_cuda", "without_gpu", "x.device.type != 'cuda'", "kind is not 'cuda'"),
            *("'cuda' not in kind", "cards == 0", "device_count() == 0", "0 == device_count()"),
            *("not first or not use_gpu()",),
        ),
        NOT_THERE,
    ),
    # There is CUDA where they hold, and may be where they do not; and the reverse.
    **dict.fromkeys(
        (
            *("first and fast", "fast and first", "device_count() > 1", "cards >= 2"),
            *("kind != 'cpu'", "x.device.type is not 'cpu'", "torch.version.cuda is not None"),
            *("device_count() > 0",),
        ),
        "then",
    ),
    **dict.fromkeys(
        (
            *("not (first and fast)", "device_count() < 2", "cards <= 1", "kind == 'cpu'"),
            *("torch.version.cuda is None", "torch.version.cuda == None", "not first or slow"),
        ),
        "else",
    ),
    **dict.fromkeys(
        (
            *("fast", "fast()", "first or fast", "first or slow()", "kind == other", "round > 1"),
            *("kind == 'mps'", "kind != 'mps'", "kind.endswith('cuda')"),
            *("kind.startswith(start)", "kind.startswith()", "bool()", "bool(fast)", "all(first)"),
            *("torch.device() == where", "len(kind) > 1", "0 < n < first", "torch.cuda"),
            *(
                "torch.cuda.is_current_stream_capturing()",
                "round_a == 0",
                "round_a",
                "barracuda",
                "one",
            ),
            *("kind == 'cuda_' + n", "kind == 'cuda:' - n", "kind == 'cuda:'.join(n)"),
            *("kind == print('cuda:')", "kind == ''.format('cuda:')", "kind == f'{n}cuda:'"),
            *("kind == n + 'cuda:'", "kind == f''", "fast or fast", "fast and slow", "-first"),
        ),
        "",
    ),
}
GUARDED = """
import torch, helper
from torch.cuda import device_count
cards = device_count()
first = torch.cuda.is_available()
second = first
third = second
one, other = other, one
round_a = round_b
round_b = round_a
def told():
    if {test}:
        x.cuda()  # then
    else:
        x.cuda()  # else
def after():
    if {test}:
        return
    x.cuda()  # after
def unless():
    if not ({test}):
        return
    x.cuda()  # unless
"""


@pytest.mark.parametrize("test", GUARDS)
def test_what_a_test_says_of_its_branches(test: str) -> None:
    text = GUARDED.format(test=test)
    found = {one.line: one.level for one in scan(text) if one.code == "PAM201"}
    places = {n: line.split("# ")[1] for n, line in enumerate(text.splitlines(), 1) if "# " in line}
    assert found.keys() == places.keys()
    assert {places[n] for n, level in found.items() if level == "info"} == {*GUARDS[test].split()}


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


NESTED = {
    "elif": lambda depth: "if a: pass\n" + "elif b: pass\n" * depth + "else: y.cuda()",
    "attribute": lambda depth: "y" + ".a" * depth + ".cuda()",
    "sum": lambda depth: "a + " * depth + "y.cuda()",
    "sign": lambda depth: "-" * depth + "y.cuda()",
    "argument": lambda depth: "f(" * depth + "y.cuda()" + ")" * depth,
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("depth", [50, 800, 3000, 20_000])
def test_what_is_nested_too_deeply_is_refused(kind: str, depth: int) -> None:
    refused = False
    try:
        codes = [one.code for one in scan(f"import torch\n{NESTED[kind](depth)}\n")]
    except SyntaxError:
        refused = True
    assert refused if depth > 5000 else refused or codes == ["PAM201"]
    assert not (refused and depth < 100)


def test_half_a_character_is_no_python() -> None:
    with pytest.raises(SyntaxError):
        scan("cuda = '\ud800'")


@pytest.mark.parametrize(
    "around",
    ["(a and {})", "(1 if a else {})", "(lambda: {})", "if a:\n{}", "while a:\n{}", "def f():\n{}",
     "class A:\n{}", "try:\n{}\nexcept E: pass"],
)  # fmt: skip
def test_what_is_nested_is_looked_at_once(around: str) -> None:
    text = "x.cuda()"
    for _ in range(24):  # twice each would be sixteen million times
        inner = text if "\n" not in around else "\n".join(f" {one}" for one in text.split("\n"))
        text = around.format(inner)
    assert [one.code for one in scan(f"import torch\n{text}\n")] == ["PAM201"]
