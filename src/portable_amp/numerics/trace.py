"""Records what a training loop computes, module by module, without a word in the loop.

Before a step is over, nothing waits for the device, and at its end one copy does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from portable_amp.copies import unwrapped
from portable_amp.errors import PortableAmpWarning, TraceError
from portable_amp.launchers import launcher
from portable_amp.notices import tell
from portable_amp.numerics.fingerprint import Sample, fp32_is_coarse, sample, stats
from portable_amp.numerics.follow import followed_by, in_backward
from portable_amp.numerics.pending import Pending
from portable_amp.numerics.tracefile import Stats, Writer


class Trace:
    """A recording, on inside of its `with` block; see `DeviceContext.trace`."""

    path: str
    """The file, with this process's rank in its name."""
    recorded: int
    """Steps in the file."""

    def __init__(
        self,
        model: torch.nn.Module | None,
        path: str | os.PathLike[str],
        *,
        steps: int | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        if steps is not None and (isinstance(steps, bool) or steps < 1):
            raise ValueError(f"steps={steps!r}: a number of steps from 1 on, or None: all")
        self.path = of_rank(path)
        self.recorded = 0
        self._limit = steps
        self._about = {"torch": torch.__version__, **(about or {})}
        self._any_root = model is None
        self._names: dict[int, tuple[str, torch.nn.Module]] = {}
        self._parameters: dict[int, str] = {}
        self._roots: list[tuple[str, torch.nn.Module]] = []
        self._state: dict[str, Sample] = {}
        """Parameters and buffers before the first step."""
        self._known = 0
        """Roots whose state that has."""
        self._coarse: list[torch.Tensor] = []
        self._pending: Pending | None = None
        self._stack: list[int] = []
        self._inside = False
        """In `backward`."""
        self._writer: Writer | None = None
        self._undo = contextlib.ExitStack()
        if model is not None:
            self._add_root(model)

    def __enter__(self) -> Trace:
        self._pid = os.getpid()
        self._undo.enter_context(followed_by(self))
        try:
            self._writer = Writer(self.path, self._about)
        except TraceError:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._writer and os.getpid() == self._pid:
            with self._guarded():
                if self._pending and self._pending.went_back:
                    self._finish()
                self._close("" if kind is None else kind.__name__)

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """A step ends here: for loops whose optimizer is none of `torch.optim`.

        Args:
            loss: the number to note for this step, in place of what backward() was called on.
        """
        if self._pending and self._on():
            self._pending.told = None if loss is None else torch.as_tensor(loss).detach().clone()
            if not self._pending.parameters:
                for _, root in self._roots:
                    for one in root.parameters():
                        self._note_gradient(one)
            with self._guarded():
                self._finish()

    def _on(self) -> bool:
        return self._writer is not None and os.getpid() == self._pid

    def _close(self, why: str) -> None:
        """Everything is as it was before; the file gets its name."""
        writer, self._writer = self._writer, None
        self._undo.close()
        self._pending = None
        self._names.clear()
        self._roots.clear()
        if writer:
            writer.close(why)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A disk that fills ends the trace, not the training."""
        try:
            yield
        except TraceError as error:
            writer, self._writer = self._writer, None
            self._close("")
            if writer:
                writer.abandon()
            tell(f"{error}. The trace ends here, and the training goes on.", PortableAmpWarning)

    def _add_root(self, model: torch.nn.Module) -> None:
        prefix = f"{type(model).__name__} {len(self._roots) + 1}: " if self._roots else ""
        outer, model = model, unwrapped(model)
        self._roots.append((prefix, model))
        for name, module in model.named_modules():
            self._names.setdefault(id(module), (prefix + name, module))
        self._names[id(outer)] = (prefix, outer)
        for name, one in model.named_parameters():
            self._parameters.setdefault(id(one), prefix + name)

    def _sampled_state(self) -> dict[str, Sample]:
        found = {}
        for prefix, root in self._roots:
            for name, one in (*root.named_parameters(), *root.named_buffers()):
                kept = None if torch.nn.parameter.is_lazy(one) else sample(one)
                if kept:
                    found[prefix + name] = kept
        return found

    def _begin(self) -> None:
        """The state before the first step, of the roots that were met so far."""
        self._known = len(self._roots)
        self._state = {**self._sampled_state(), **self._state}
        for _, root in self._roots:
            for one in root.parameters():
                if not (self._coarse or one.is_meta or torch.nn.parameter.is_lazy(one)):
                    self._coarse.append(fp32_is_coarse(one.device))

    def called(self, original: Any, module: Any, args: Any, kwargs: Any) -> Any:
        """A module is called: note what goes in and out, or let it be."""
        found = self._names.get(id(module))
        outermost = not self._stack
        if outermost and found is None:
            found = self._met(module)
        if (
            found is None
            or (outermost and not torch.is_grad_enabled())
            or not self._on()
            or in_backward()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        ):
            return original(module, *args, **kwargs)
        if outermost and self._pending and self._pending.stepped:
            with self._guarded():
                self._finish()
            if self._writer is None:
                return original(module, *args, **kwargs)
        if self._known < len(self._roots):
            self._begin()
        pending = self._pending = self._pending or Pending()
        call = pending.enter(found[0], module, self._stack[-1] if self._stack else None)
        if call is None:  # a wrapper of what is on the stack, or once too often
            return original(module, *args, **kwargs)
        call.inputs += pending.note((args, kwargs))
        self._stack.append(len(pending.step.calls) - 1)
        try:
            output = original(module, *args, **kwargs)
        finally:
            self._stack.pop()
        call.outputs += pending.note(output)
        return output

    def _met(self, module: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
        """The name of a root that was not known: a wrapper made since, or a new one."""
        inner = unwrapped(module)
        if inner is not module and id(inner) in self._names:
            self._names[id(module)] = self._names[id(inner)][0], module
        elif self._any_root and torch.is_grad_enabled() and _trains(module):
            self._add_root(module)
        return self._names.get(id(module))

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """An optimizer is about to step: its gradients are what it steps with."""
        if not self._pending or not self._on():
            return
        for group in optimizer.param_groups:
            for one in group["params"]:
                self._note_gradient(one, scaled=getattr(optimizer, "grad_scale", None) is not None)
            rate = group.get("lr")
            if isinstance(rate, torch.Tensor):
                rate = rate.detach().clone().reshape(1)
            self._pending.rates.append(rate if isinstance(rate, torch.Tensor) else float(rate or 0))

    def _note_gradient(self, parameter: torch.Tensor, scaled: bool = False) -> None:
        assert self._pending
        name = self._parameters.get(id(parameter))
        if name is not None and parameter.grad is not None:
            found = sample(parameter.grad)
            if found:
                self._pending.parameters[name] = found, scaled

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """It has stepped."""
        if self._pending:
            self._pending.stepped = self._pending.took = True

    def scaler_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """A gradient scaler is through with this optimizer, which has stepped or not."""
        pending = self._pending
        if pending and self._on():
            if not pending.parameters:  # it was skipped
                self.before_step(optimizer)
            pending.stepped = True

    @contextlib.contextmanager
    def going_back(self, tensors: Any) -> Iterator[None]:
        """The backward pass of these; tensors of a subclass come by twice."""
        outermost, self._inside = not self._inside, True
        if outermost and self._pending and self._on():
            self._pending.went_back = True
            one = tensors[0] if isinstance(tensors, (tuple, list)) and tensors else tensors
            if isinstance(one, torch.Tensor) and one.numel() == 1:
                self._pending.losses.append(one.detach().clone())
        try:
            yield
        finally:
            self._inside = not outermost

    def scaled(self, scaler: torch.amp.GradScaler) -> None:
        """A loss was scaled. Its scale is private to torch: `get_scale` waits for the device."""
        scale = getattr(scaler, "_scale", None)
        if self._pending and self._on() and scale is not None:
            self._pending.scale = scale.detach().clone()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        assert pending
        assert self._writer
        number = self.recorded + 1
        if not self.recorded:
            self._writer.state(0, _rows(self._state))
            self._state.clear()
        step = pending.finished(number)
        step.coarse = any(bool(one) for one in self._coarse)
        self._writer.step(step)
        self.recorded = number
        last = number == self._limit
        if last or not number & number - 1:
            self._writer.state(number, _rows(self._sampled_state()))
        if last:
            self._close("")


def _rows(samples: dict[str, Sample]) -> dict[str, Stats]:
    return dict(zip(samples, stats([*samples.values()]), strict=True))


def of_rank(path: str | os.PathLike[str]) -> str:
    """Each rank but the first has a file of its own: "out.trace.rank1"."""
    row = launcher()
    rank = os.environ.get(row.rank, "0") if row else "0"
    return os.fspath(path) if rank == "0" else f"{os.fspath(path)}.rank{rank}"


def _trains(module: torch.nn.Module) -> bool:
    return any(one.requires_grad for one in module.parameters())
