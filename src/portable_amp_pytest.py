"""The pytest plugin: the fixture `amp_machine` runs a test once for each machine it is to work on.

A module of its own, for pytest loads it in every project: nothing is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from portable_amp.testing import Played

DEFAULT = "t4,a100,mi250,arc-a770,m1-macos13,cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--amp-machines` and `--amp-live`, and the setting `amp_machines`."""
    parser.addini("amp_machines", "machines the amp_machine fixture plays", default=DEFAULT)
    group = parser.getgroup("portable-amp")
    group.addoption(
        "--amp-machines",
        metavar="NAMES",
        help="machines the amp_machine fixture plays: names from portable-amp's catalogue with "
        f"commas between, or 'all' (default: the setting amp_machines, or {DEFAULT})",
    )
    group.addoption(
        "--amp-live",
        action="store_true",
        help="play the machines' tensors too: the backend's own autocast rules on CPU numbers",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse unknown machines before anything runs."""
    if config.getoption("amp_machines"):
        _machines(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each machine, unless the test names its machines itself."""
    if "amp_machine" not in metafunc.fixturenames:
        return
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if re.search(r"\bamp_machine\b", str(names)):
            return
    metafunc.parametrize("amp_machine", _machines(metafunc.config), indirect=True)


@pytest.fixture
def amp_machine(request: pytest.FixtureRequest) -> Iterator[Played]:
    """The machine this test plays; `amp_machine.calls` is what was asked of its device."""
    from portable_amp import DeviceError
    from portable_amp.testing import play

    with contextlib.ExitStack() as stack:
        live = request.config.getoption("amp_live")
        try:
            played = stack.enter_context(play(request.param, live=live))
        except DeviceError as error:
            pytest.skip(f"{request.param}: {error}")
        yield played


def _machines(config: pytest.Config) -> list[str]:
    from portable_amp import MachineError
    from portable_amp.testing import MACHINES, machine

    asked = config.getoption("amp_machines") or config.getini("amp_machines")
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if "all" in names:
        return [row.key for row in MACHINES]
    try:
        return [machine(name).key for name in dict.fromkeys(names)]
    except MachineError as error:
        raise pytest.UsageError(f"--amp-machines: {error}") from None
