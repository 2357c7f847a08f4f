from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import portable_amp
from portable_amp import choose
from portable_amp.backends import backend_for
from portable_amp.testing import machine

ROOT = Path(__file__).parents[2]


def test_torch_is_the_only_dependency() -> None:
    needed = importlib.metadata.requires("portable-amp") or []
    assert [name for name in needed if "extra ==" not in name] == ["torch>=2.4"]


def test_versions_agree() -> None:
    assert importlib.metadata.version("portable-amp") == portable_amp.__version__


def test_types_are_shipped() -> None:
    assert Path(portable_amp.__file__).with_name("py.typed").exists()


def test_every_public_name_exists_and_is_documented() -> None:
    for name in portable_amp.__all__:
        assert getattr(portable_amp, name).__doc__, name
    assert portable_amp.__all__ == sorted(portable_amp.__all__)


def test_the_scanner_starts_without_torch() -> None:
    code = (
        "import sys; from portable_amp.cli import main; code = main(['check', sys.argv[1]])\n"
        "assert code == 0 and 'torch' not in sys.modules\n"
        "import portable_amp; portable_amp.DeviceContext; assert 'torch' in sys.modules"
    )
    command = [sys.executable, "-c", code, __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'autocst'"):
        portable_amp.autocst  # noqa: B018
    assert {"DeviceContext", "__version__"} <= set(dir(portable_amp))


def test_it_works_without_numpy() -> None:
    code = (
        "import sys, warnings; sys.modules['numpy'] = None\n"
        "warnings.simplefilter('ignore'); import torch; warnings.simplefilter('error')\n"
        "from portable_amp import seed_everything, rng_state, set_rng_state, DeviceContext\n"
        "from portable_amp.doctor import training_step\n"
        "seed_everything(1); set_rng_state(rng_state())\n"
        "assert training_step(DeviceContext('cpu', precision='fp32'))['ok']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readmes_table_of_machines() -> None:
    rows = re.findall(r"^\|.*\(`(.+?)`\)(.*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 9
    for key, cells in rows:
        can = machine(key).capabilities
        told = [cell.strip() for cell in cells.strip(" |").split("|")]
        expected = []
        for request in ("auto", "fp16", "bf16"):
            plan = choose(request, can)
            scaler, fell = " + scaler" * plan.scaler, ", with a warning" * plan.fell_back
            expected.append(f"{plan.name}{scaler}{fell}")
        cache = backend_for(can.device_type).empty_cache
        assert told == [*expected, f"`torch.{cache}`" if cache else "nothing"], key


def test_importing_costs_little_beside_torch() -> None:
    code = (
        "from time import perf_counter as now; start = now(); import torch; between = now();"
        "import portable_amp; print((now() - between) / (between - start))"
    )
    ratios = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(ratios) < 0.05  # torch takes more than a second
