"""Whether a plan is right for one model: what `tuned` asks of each that it may choose."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from portable_amp.autocast import maybe_autocast
from portable_amp.copies import Loss, one_line
from portable_amp.nested import slice_of
from portable_amp.numerics.islands import islands
from portable_amp.numerics.replay import Place
from portable_amp.numerics.report import ADVICE, SHORT_PRODUCTS, Report
from portable_amp.numerics.verify import verify

FEW = 4
"""Samples of the batch that are replayed."""
MOST_PARAMETERS = 300_000_000
"""More are not copied in float64: 8 bytes each, and as much for their gradients."""


class Proof:
    """Replays a model under one plan after another, with gradients where it trains."""

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Any,
        device: torch.device,
        *,
        loss: Loss,
        move: Callable[[Any, torch.memory_format], Any],
        budget_s: float,
    ) -> None:
        self.model, self.batch, self.device, self.loss = model, batch, device, loss
        self.move, self.budget_s = move, budget_s
        with contextlib.suppress(ValueError):  # no samples that could be counted
            self.batch = slice_of(batch, 0, FEW)
        count = sum(one.numel() for one in model.parameters())
        self.too_large = f"{count:,} parameters in float64" if count > MOST_PARAMETERS else ""

    def islands(self, dtype: torch.dtype, layout: torch.memory_format) -> tuple[str, ...]:
        """The modules to keep in float32; none where there is nothing to be kept, or all."""
        names: tuple[str, ...] = ()
        if not self.too_large:
            with contextlib.suppress(Exception):  # it fails as the step itself did
                names = islands(lambda names: self._report(dtype, layout, names))
        return () if "" in names else names

    def judge(
        self, dtype: torch.dtype, layout: torch.memory_format, names: tuple[str, ...]
    ) -> tuple[str, str]:
        """Why the plan is wrong, "" where it is not, and what was found out.

        Of modules that are alike, and are given alike, one is replayed.
        """
        if self.too_large:
            return "", f"not replayed: {self.too_large}"
        try:
            report = self._report(dtype, layout, names, sampled=True)
        except Exception as error:  # such as a model that takes no other number of samples
            return "", f"not replayed: {one_line(error)}"
        if not report.modules:
            return "", f"not replayed: {'; '.join(report.notes)}"
        # Shorter products are told, and accepted.
        wrong = [fault for fault in report.faults if fault.kind not in SHORT_PRODUCTS]
        if wrong:
            return f"replay finds it wrong: {wrong[0]}", ""
        short = "".join(f", but {ADVICE[kind]}" for kind in {one.kind for one in report.faults})
        return "", f"{report.modules} calls of modules replayed, right{short}"

    def _report(
        self,
        dtype: torch.dtype,
        layout: torch.memory_format,
        names: tuple[str, ...],
        **options: Any,
    ) -> Report:
        half = None if dtype is torch.float32 else dtype
        region = functools.partial(maybe_autocast, self.device, half, enabled=half is not None)
        return verify(
            self.model, self.batch, Place(self.device, region, dtype, layout, 1),
            loss=self.loss, move=self.move, plan="", fp32_modules=names,
            budget_s=self.budget_s, backward=self.model.training, **options,
        )  # fmt: skip
