"""One module alone, given what the reference gave it; the modules inside answer as there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from portable_amp.memory import keep_buffers
from portable_amp.nested import map_tensors, tensors_in
from portable_amp.numerics.calls import (
    Call,
    Recorder,
    answered,
    floats,
    is_float,
    mapped,
    named_calls,
)
from portable_amp.numerics.rounding import Wide

Put = Callable[[torch.Tensor], torch.Tensor]
"""To where a module runs, in the dtype that is computed in there."""
Region = Callable[[], AbstractContextManager[Any]]


class OtherPathError(Exception):
    """The module called others than in the reference, or with other shapes."""


@dataclass
class Answer:
    """What a module inside answers: the reference's output, and the gradients of its inputs."""

    name: str
    output: Any
    shapes: list[torch.Size]
    """Of the tensors that it is given."""
    gradients: list[torch.Tensor | None]


@dataclass
class Ran:
    """What one replay computed: float64 on the CPU, by what it is."""

    found: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: list[torch.Tensor | None] = field(default_factory=list)
    """The gradient of each float tensor that it was given."""
    given: float = 0.0
    """The largest L2 norm of these tensors; of the reference alone."""


def run(
    module: torch.nn.Module,
    call: Call,
    answers: list[Answer],
    gradients: list[torch.Tensor],
    put: Put,
    region: Region,
    *,
    around: Region = contextlib.nullcontext,
    recorder: Recorder | None = None,
) -> Ran:
    """Forward in the region, and backward with these gradients; buffers are left as they were.

    With a recorder it notes the calls of the forward pass, and nothing is answered.
    """
    ran = Ran()
    inner = named_calls(module, call.name)
    given = mapped(lambda one: _leaf(put(one)), (call.args, call.kwargs))
    leaves = floats(given)
    script = _Script(answers, put, ran)
    asked = inner if recorder else {n: m for n, m in inner.items() if n in script.names}
    with restored(module), around():
        module.zero_grad()
        args, kwargs = mapped(torch.Tensor.clone, given)  # it may write into them
        with region(), answered(asked, recorder or script):
            output = module(*args, **kwargs)
        script.finish()
        outputs = floats(output)
        for at, one in enumerate(tensors_in(output)):
            ran.found[_numbered("output", at, output)] = _plain(one)
        both = zip(outputs, gradients)  # noqa: B905
        pairs = [(one, _like(back, one).clone()) for one, back in both if one.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        for what, one in script.incoming.items():
            ran.found[what] = _plain(one)
        ran.inputs = [one.grad for one in leaves]
        for at, gradient in enumerate(ran.inputs):
            if gradient is not None:
                ran.found[f"gradient of input {at}"] = _plain(gradient)
        for name, one in module.named_parameters():
            if one.grad is not None:
                ran.found[f"gradient of {name}"] = _plain(one.grad)
        for name, one in module.named_buffers():
            ran.found[f"buffer {name}"] = _plain(one)
        module.zero_grad()  # on the device they would take the memory of all weights
    return ran


@dataclass
class Place:
    """Where the model is tried."""

    device: torch.device
    region: Region
    """What the forward pass runs in."""
    dtype: torch.dtype
    """What that computes in."""
    layout: torch.memory_format
    """Of images."""
    repeats: int

    def put(self, one: torch.Tensor) -> torch.Tensor:
        """A tensor as it is, there."""
        one = one.to(self.device)
        return one.contiguous(memory_format=self.layout) if one.dim() == 4 else one


@dataclass
class Task:
    """One call of one module, and all that both replays of it need."""

    module: torch.nn.Module
    call: Call
    answers: list[Answer]
    gradients: list[torch.Tensor]
    random: bool = False

    def on_cpu(
        self,
        around: Region = contextlib.nullcontext,
        seed: int = 0,
        recorder: Recorder | None = None,
    ) -> Ran:
        """The reference."""
        with Wide():
            ran = self._run(
                self.module, widened, contextlib.nullcontext, seed, around=around, recorder=recorder
            )
            given = floats((self.call.args, self.call.kwargs))
            ran.given = max((float(one.norm()) for one in given), default=0.0)
        return ran

    def on(self, place: Place, there: torch.nn.Module) -> Ran:
        """On the device."""
        return self._run(there, place.put, place.region)

    def _run(
        self,
        module: torch.nn.Module,
        put: Put,
        region: Region,
        seed: int = 0,
        **more: Any,
    ) -> Ran:
        torch.default_generator.manual_seed(seed)
        with _evaluating(module) if self.random else contextlib.nullcontext():
            return run(module, self.call, self.answers, self.gradients, put, region, **more)


def widened(one: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, or complex128."""
    return one.to(torch.promote_types(one.dtype, torch.float64)) if is_float(one) else one


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    mode, module.training = module.training, False
    try:
        yield
    finally:
        module.training = mode


def _leaf(one: torch.Tensor) -> torch.Tensor:
    return one.detach().requires_grad_() if is_float(one) else one


def _like(gradient: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """In its dtype first: the device may have no float64."""
    return gradient.to(one.dtype).to(one.device)


def _numbered(what: str, at: int, value: Any) -> str:
    return what if isinstance(value, torch.Tensor) else f"{what} {at}"


def _plain(one: torch.Tensor) -> torch.Tensor:
    one = one.detach().to_dense() if one.layout is not torch.strided else one.detach()
    if one.is_complex():
        one = torch.view_as_real(one.resolve_conj())
    return one.cpu().to(torch.float64, copy=True)


@contextlib.contextmanager
def restored(module: torch.nn.Module) -> Iterator[None]:
    """Its buffers are as they were afterwards."""
    put_back = keep_buffers(module.modules())
    try:
        yield
    finally:
        put_back()


class _Script:
    """Gives the answers in their order."""

    def __init__(self, answers: list[Answer], put: Put, ran: Ran) -> None:
        self.answers, self.put, self.ran = answers, put, ran
        self.names = {answer.name for answer in answers}
        self.incoming: dict[str, torch.Tensor] = {}
        """The gradients that reach the answers."""
        self.at = 0

    def __call__(self, name: str, module: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if self.at == len(self.answers) or self.answers[self.at].name != name:
            raise OtherPathError(f"calls {name} where the reference does not")
        answer = self.answers[self.at]
        number, self.at = self.at, self.at + 1
        given = [*tensors_in((args, kwargs))]
        if [one.shape for one in given] != answer.shapes:
            raise OtherPathError(f"gives {name} other shapes than in the reference")
        for at, one in enumerate(given):
            self.ran.found[f"input {at} of {name}, call {number}"] = _plain(one)
        output = mapped(self.put, answer.output)
        outs = floats(output)
        inputs = floats((args, kwargs))
        gradients = [None if g is None else _like(g, i) for i, g in zip(inputs, answer.gradients)]  # noqa: B905

        def note(incoming: tuple[torch.Tensor, ...]) -> None:
            for at, one in enumerate(incoming):
                what = f"gradient at output {at} of {name}, call {number}"
                self.incoming[what] = one.detach().clone()

        anchor = torch.zeros((), requires_grad=True)  # or it has no backward, where no input has
        made = iter(_Answered.apply(outs, gradients, note, anchor, *inputs))
        return map_tensors(lambda one: next(made) if is_float(one) else one, output)

    def finish(self) -> None:
        """All answers were asked for."""
        if self.at != len(self.answers):
            raise OtherPathError(f"does not call {self.answers[self.at].name}")


class _Answered(torch.autograd.Function):
    """The reference's output; backward, the reference's gradients of the inputs."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Any, gradients: Any, note: Any, anchor: Any, *inputs: Any
    ) -> Any:
        ctx.gradients, ctx.note = gradients, note
        return tuple(one.clone() for one in outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        ctx.note(incoming)
        return None, None, None, None, *ctx.gradients
