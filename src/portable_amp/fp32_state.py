"""Torch's settings of how float32 is computed: new names (2.9+), old ones, and how both agree.

They are of the whole process. Where the two contradict each other torch raises, even when an old
name is only read (pytorch#189955).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from portable_amp.backends import BACKENDS, Backend

_Name = tuple[str, str]
"""Library and operation, as torch has the new names."""
_NAMES: tuple[_Name, ...] = tuple(
    (one.library, one.operation) for row in BACKENDS for one in row.float32 if one.library
)
_PARENTS: tuple[_Name, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""What those inherit that have no value of their own, from the top."""


def settings(row: Backend) -> dict[str, str]:
    """Operation -> what torch's setting says that it is computed in: "ieee", "tf32" or "bf16".

    It never raises. What has no setting in this torch is left out.

    >>> from portable_amp.backends import CPU
    >>> settings(CPU)["matmul"]
    'ieee'
    """
    found = {}
    for one in row.float32:
        if one.library and _has_names():
            found[one.operation] = _get((one.library, one.operation)).replace("none", "ieee")
        elif one.old:
            found[one.operation] = _by_old_name(one.old)
    return found


# Not by the public attributes of torch.backends: that of mkldnn sets another than it reads, and in
# all of them Python takes longer than torch. Tried on 2.9 to 2.15, and absent before.


def _has_names() -> bool:
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _get(name: _Name) -> str:
    return str(torch._C._get_fp32_precision_getter(*name))


def _put(name: _Name, value: str) -> None:
    torch._C._set_fp32_precision_setter(*name, value)


def _by_old_name(name: str) -> str:
    if name == "float32_matmul_precision":
        words = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
        return words[torch.get_float32_matmul_precision()]
    flag: Any = torch.backends
    for part in name.split("."):
        flag = getattr(flag, part, None)
    return "tf32" if flag else "ieee"


class State(NamedTuple):
    """All that a region may change."""

    names: dict[_Name, str]
    """The new names, each with its own value: "none" where it inherits."""
    matmul: str
    cudnn: bool
    onednn: bool | None
    """XPU's; None where torch is built without."""


def take() -> State:
    """The state as it is. It may be left as another, and is to be given or changed next."""
    names = _own_values() if _has_names() else {}
    onednn = getattr(torch.backends.mkldnn, "allow_tf32", None)
    try:
        return State(names, torch.get_float32_matmul_precision(), _cudnn(), onednn)
    except RuntimeError:  # the new names contradict
        for name in _NAMES:
            _put(name, "ieee")
    # Now only cuDNN's old name can: where it says that TF32 is allowed.
    try:
        cudnn = _cudnn()
    except RuntimeError:
        cudnn = True
    return State(names, torch.get_float32_matmul_precision(), cudnn, onednn)


def _cudnn() -> bool:
    return bool(torch.backends.cudnn.allow_tf32)


def _own_values() -> dict[_Name, str]:
    """What was set by each new name: reading one tells what it inherits, if it has none."""
    found = {}
    for name in _PARENTS:
        found[name] = _get(name)
        if found[name] != "none":
            _put(name, "none")
    return found | {name: _get(name) for name in _NAMES}


def give(state: State) -> None:
    """Set all of it."""
    torch.set_float32_matmul_precision(state.matmul)
    torch.backends.cudnn.allow_tf32 = state.cudnn
    if state.onednn is not None:
        torch.backends.mkldnn.allow_tf32 = state.onednn  # type: ignore[assignment]
    for name, value in state.names.items():  # last: the old names set these, too
        _put(name, value)


def ieee(state: State) -> State:
    """For every kind of device: one of the old names is of all of them."""
    names = state.names | dict.fromkeys(_NAMES if state.names else (), "ieee")
    return State(names, "highest", False, None if state.onednn is None else False)


def tf32(state: State, row: Backend) -> State:
    """For this kind of device; by both names, so that none contradicts."""
    mine = {(one.library, one.operation) for one in row.float32}
    old = {one.old for one in row.float32}
    matmul = state.matmul
    if "cuda.matmul.allow_tf32" in old:
        give(state)
        bf16 = bool(state.names) and _get(("mkldnn", "matmul")) == "bf16"
        matmul = "medium" if bf16 else "high"
    return State(
        {name: "tf32" if name in mine else value for name, value in state.names.items()},
        matmul,
        state.cudnn or "cudnn.allow_tf32" in old,
        None if state.onednn is None else state.onednn or "mkldnn.allow_tf32" in old,
    )
