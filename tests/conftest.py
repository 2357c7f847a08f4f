from __future__ import annotations

import gc
import os
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import support
from portable_amp.autocast import entered

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("default"), max_examples=400)
# For the nights: hours, of which test_example_fuzz.py takes half.
settings.register_profile("nightly", settings.get_profile("default"), max_examples=16_000)
# For tools/mutation: the same few examples each time, and no look for smaller ones.
settings.register_profile(
    "mutation",
    settings.get_profile("default"),
    max_examples=25,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
# Weights that are not there are refused at once, and not after a minute of attempts to reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_finish() -> None:
    """Whatever was imported stays: each gc.collect() would look through a million objects of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Or libraries whose objects are left at the end complain of a leak."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _before_monkeypatch() -> Iterator[None]:
    """What a test puts in place of a function of a back end does not outlive it."""
    owners = [torch.cuda, torch.xpu, torch.mps, torch.backends.mps]
    owners += [torch.accelerator] if hasattr(torch, "accelerator") else []
    before = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
    ]
    yield
    for owner, name, value in before:
        assert getattr(owner, name, None) is value, f"a test left another {owner.__name__}.{name}"


@pytest.fixture(autouse=True)
def _fresh(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Each test starts with nothing told, no settings, and leaves autocast as it found it."""
    for name in support.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    # Whoever runs the tests is not to find their plans among his own.
    monkeypatch.setenv("PORTABLE_AMP_CACHE", str(tmp_path_factory.getbasetemp() / "plans"))
    support.forget()
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in support.KINDS}
    yield
    support.forget()
    assert not entered.regions, "a test left a region open"
    for kind in support.KINDS:
        assert not torch.is_autocast_enabled(kind), f"a test left {kind} autocast on"
        assert torch.get_autocast_dtype(kind) is dtypes[kind], f"a test left {kind} another dtype"
