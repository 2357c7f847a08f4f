"""What a type checker makes of the public names: mypy checks this file, and nothing runs it."""

from typing import assert_type

import torch

from portable_amp import DeviceContext, maybe_autocast


def length(name: str, *, twice: bool = False) -> int:
    return len(name) * (1 + twice)


ctx = DeviceContext("cpu")
assert_type(maybe_autocast("cpu", torch.bfloat16)(length)("ada", twice=True), int)
assert_type(maybe_autocast("cpu", "bf16")(length)("ada", twice=True), int)
assert_type(ctx.autocast()(length)("ada"), int)


@maybe_autocast("cpu", torch.bfloat16)
def decorated(name: str) -> list[str]:
    return [name]


assert_type(decorated("ada"), list[str])
