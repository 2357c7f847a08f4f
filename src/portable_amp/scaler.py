"""ScalerShim: torch's GradScaler that is on only where it is needed, and tells what it did."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import clear_autocast_cache  # by name: it is called in every step
from torch.amp.grad_scaler import OptState

from portable_amp.autocast import NoAutocast, Region, entered
from portable_amp.backends import backend_for, resolve_device
from portable_amp.capabilities import Asleep, Capabilities, Support, look_up, look_up_awake
from portable_amp.errors import (
    GradientWarning,
    PrecisionFallbackWarning,
    ScaleCollapseWarning,
    StateWarning,
)
from portable_amp.nested import map_tensors
from portable_amp.notices import tell, tell_once
from portable_amp.precision import choose

# fp16's smallest normal number. A scale below it protects no gradient any more, and halving on and
# on ends at exactly 0.0, which turns every later gradient into NaN: it is not halved below.
_COLLAPSED = 2.0**-14
# Looking at the scale waits for the device: done only after this many skipped steps on end.
_LOOK_EVERY = 16


class StepResult:
    """What one `step` did; whatever is still on the device is fetched when it is first read."""

    __slots__ = ("_found_inf", "_grad_norm", "_on_known", "_scale", "_stepped", "_unguarded")

    def __init__(
        self,
        stepped: bool | None,
        scale: float | torch.Tensor = 1.0,
        grad_norm: float | torch.Tensor | None = None,
        *,
        found_inf: torch.Tensor | None = None,
        on_known: Callable[[bool], None] | None = None,
    ) -> None:
        self._stepped = stepped
        self._scale = scale
        self._grad_norm = grad_norm
        self._found_inf = found_inf
        self._on_known = on_known
        self._unguarded = False
        """The norm was not looked at before the step."""

    @property
    def stepped(self) -> bool:
        """The optimizer's step was taken; False: skipped, for gradients were infinite or NaN.

        An optimizer that takes `grad_scaler=` decides by itself, and counts as having stepped. Free
        after an ordinary optimizer. A fused optimizer decides inside its kernel, so that the
        first read waits for the device.
        """
        if self._stepped is None:
            assert self._found_inf is not None
            self._stepped = not self._found_inf.item()
            if self._on_known:
                self._on_known(self._stepped)
        return self._stepped

    @property
    def scale(self) -> float:
        """The loss scale this step was taken with; 1.0 where scaling is off."""
        if isinstance(self._scale, torch.Tensor):
            self._scale = float(self._scale.item())
        return self._scale

    @property
    def grad_norm(self) -> float | None:
        """The total norm before clipping, inf or NaN where gradients were; None if not clipped."""
        if isinstance(self._grad_norm, torch.Tensor):
            self._grad_norm = float(self._grad_norm.item())
            if self._unguarded and not math.isfinite(self._grad_norm):
                tell_once(
                    ("scaler", "unguarded"),
                    f"a step was taken with a gradient norm of {self._grad_norm}: the weights are "
                    "lost. backward_step(skip_nonfinite=True) skips such steps, and waits for the "
                    "device to do so.",
                    GradientWarning,
                )
        return self._grad_norm

    def __repr__(self) -> str:
        return (
            f"StepResult(stepped={self.stepped}, scale={self.scale:g}, grad_norm={self.grad_norm})"
        )


class ScalerShim(torch.amp.GradScaler):
    """torch.amp.GradScaler, in its order of arguments, that is safe to keep on every machine.

    Enabled only where fp16 is computed, unless told. Everything torch defines stays as torch
    defines it; added are `last_step`, `backward_step`, state that survives a machine without
    scaling, scaling on devices without float64, and a warning when the scale collapses.

    Args:
        device: device or device type; None: the best device of this machine.
        enabled: None: where `maybe_autocast` of the same device computes in fp16. Without a device
            that is up to the automatic plan, with one to torch's default dtype for it.
        region: what the backward pass of `backward_step` is computed in.

    The other arguments are torch's.

    Raises:
        DeviceError: torch knows no such device.

    >>> scaler = ScalerShim("cpu")
    >>> scaler.is_enabled()
    False
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool | None = None,
        *,
        region: Region | None = None,
    ) -> None:
        self._region = region or NoAutocast()
        self._asked = device, enabled
        decided = False
        try:
            kind, _ = look_up_awake(resolve_device() if device is None else device)
            decided, enabled = True, self._decide()
        except Asleep as asleep:
            kind, enabled = asleep.args[0], enabled is not False
        super().__init__(
            kind, growth_factor=growth_factor, backoff_factor=backoff_factor, enabled=enabled
        )
        self._waits = backend_for(kind).synchronize is not None
        # torch checks the factors. It sets these only when enabled, or its getters would raise.
        self._init_scale = float(init_scale)
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._floor = min(_COLLAPSED, self._init_scale)
        self._carried: dict[str, Any] = {}
        self._skipped_on_end = 0
        self._told_collapse = False
        self._may_fall = False
        """Gradients since the latest update were not finite, as far as is known."""
        self._stepped: bool | None = None
        self._last_step: StepResult | Literal[True] | None = None
        """True for a step without scaling: its result is made for whoever asks."""
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that `backward_step` was given."""
        self._update_is_due = False
        """`backward_step` leaves it to the next iteration: there may be another optimizer."""
        self._scaled_by_hand = False
        """Since the last `backward_step`."""
        if not decided:
            del self._enabled

    def __getattr__(self, name: str) -> Any:
        """Whether it is on, decided when somebody asks: at first that would initialise CUDA."""
        if name not in ("_enabled", "_has_float64"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        self._enabled = self._decide()
        return self.__dict__[name]

    def _decide(self) -> bool:
        device, enabled = self._asked
        kind, capabilities = look_up(resolve_device() if device is None else device)
        self._has_float64 = capabilities is not None and capabilities.float64 is True
        if enabled is None:
            enabled = capabilities is not None and _fp16_is_next(
                capabilities, named=device is not None
            )
        if enabled and (capabilities is None or not capabilities.grad_scaler):
            enabled = False
            what = "has no gradient scaler for it" if capabilities else "finds no such device"
            tell_once(
                ("scaler", kind),
                f"ScalerShim({kind!r}) is disabled: torch {torch.__version__} {what}.",
                PrecisionFallbackWarning,
            )
        return enabled

    @property
    def last_step(self) -> StepResult | None:
        """What the latest `step` did, None before the first."""
        if self._last_step is True:
            self._last_step = StepResult(True)
        return self._last_step

    def scale(self, outputs: Any) -> Any:
        """As in torch, and of losses in a dict or a named tuple; None stays None."""
        self._scaled_by_hand = True
        if not self._enabled or outputs is None:
            return outputs
        if self._update_is_due:
            self.update()
        is_tensor = isinstance(outputs, torch.Tensor)
        if not is_tensor and (isinstance(outputs, Mapping) or hasattr(outputs, "_fields")):
            return map_tensors(super().scale, outputs)
        return super().scale(outputs)

    def backward_step(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool | None = None,
    ) -> StepResult:
        """Backward, unscale, clip, step, and clear the gradients: one optimizer step.

        The gradients of other optimizers that were given to it stay as they are, though the loss
        may depend on their parameters, too. The scale is updated once all have stepped: before the
        first loss of the next iteration, or when somebody looks at it. Gradients that another
        optimizer accumulates by hand meanwhile would have two scales.

        Args:
            loss: scalar, any float dtype, on the model's device.
            optimizer: the one optimizer of this loss.
            max_norm: clip the total gradient norm to this; None: no clipping.
            skip_nonfinite: with scaling off, skip the step where the norm is infinite or NaN. It
                computes the norm if need be, and reading it waits for the device, unless the
                optimizer is a fused one. None: where there is a norm, and that costs no wait.

        Returns:
            Whether it stepped, with which scale, and the norm before clipping.

        Raises:
            TypeError: the optimizer's step needs a closure.
            RuntimeError: the parameters hold gradients that may be of another optimizer's loss, or
                that `unscale_` has unscaled.

        >>> weight = torch.ones(2, requires_grad=True)
        >>> scaler = ScalerShim("cpu")
        >>> scaler.backward_step((3 * weight).sum(), torch.optim.SGD([weight], lr=0.1), max_norm=9)
        StepResult(stepped=True, scale=1, grad_norm=4.242640495300293)
        """
        kind: Any = type(optimizer)
        if _needs_closure(kind):
            raise TypeError(
                f"backward_step has no closure for {kind.__name__}, whose step computes "
                "the loss itself: call optimizer.step(closure), with scaling off"
            )
        if self._enabled:
            self._begin(optimizer)
            # By `get`: the dict of torch makes what it is asked for.
            state = self._per_optimizer_states.get(id(optimizer))
            if state and state["stage"] is OptState.UNSCALED:
                raise RuntimeError(
                    "unscale_() has been called on this optimizer since the last update(), and "
                    "the gradients of this loss would stay scaled: backward_step unscales itself"
                )
        others = self._gradients_of_others(optimizer)
        for parameter, _ in others:
            parameter.grad = None
        try:
            scaled: torch.Tensor = super().scale(loss)
            with self._region:
                scaled.backward()
        finally:
            for parameter, gradient in others:
                parameter.grad = gradient
        norm: torch.Tensor | None = None
        if skip_nonfinite and max_norm is None:
            max_norm = math.inf
        if max_norm is not None:
            self.unscale_(optimizer)
            # The norm of finite gradients may be infinite, and inf / inf would make them NaN.
            most = min(max_norm, torch.finfo(torch.float32).max)
            norm = torch.nn.utils.clip_grad_norm_(_parameters(optimizer), most)
        if self._enabled:
            self.step(optimizer)
            self._update_is_due = True
        elif norm is None or skip_nonfinite is False:
            self.step(optimizer)
        else:
            self._step_if_finite(optimizer, norm, skip_nonfinite)
        optimizer.zero_grad()
        self._scaled_by_hand = False
        result = self.last_step
        assert result is not None
        result._grad_norm = norm
        return result

    def _gradients_of_others(
        self, optimizer: torch.optim.Optimizer
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The parameters and gradients of the other optimizers."""
        known = optimizer in self._optimizers
        self._optimizers.add(optimizer)
        if len(self._optimizers) == 1:
            return []
        mine = _parameters(optimizer)
        if not known and not self._scaled_by_hand and _have_gradients(mine):
            self._optimizers.remove(optimizer)
            raise RuntimeError(
                f"the parameters of this {type(optimizer).__name__} hold gradients already, "
                "perhaps of a loss that was given to backward_step with another optimizer: call "
                "optimizer.zero_grad() before the backward pass. To accumulate, call "
                "scaler.scale(loss).backward()."
            )
        ids = set(map(id, mine))
        return [
            (parameter, parameter.grad)
            for other in self._optimizers
            for parameter in _parameters(other)
            if id(parameter) not in ids
        ]

    def _step_if_finite(
        self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, skip: bool | None
    ) -> None:
        """Without scaling, a step that is skipped where the norm is infinite or NaN."""
        waits = backend_for(norm.device.type).synchronize is not None
        if waits and _skips_by_itself(optimizer):
            found = (~norm.isfinite()).float()
            optimizer.grad_scale, optimizer.found_inf = None, found  # type: ignore[attr-defined]
            try:
                self.step(optimizer)
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            self._last_step = StepResult(None, found_inf=found, on_known=_tell_skipped)
        elif waits and not skip:
            self.step(optimizer)
            self._last_step = StepResult(True)
            self._last_step._unguarded = True
        elif math.isfinite(norm.item()):
            self.step(optimizer)
        else:
            self._last_step = StepResult(False)
            _tell_skipped(False)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As in torch: `optimizer.step(*args, **kwargs)` unless gradients are infinite or NaN.

        Raises:
            RuntimeError: it is given a closure, whose gradients would be scaled; or there are
                gradients, and no loss was scaled.
        """
        if not self._enabled:
            returned = optimizer.step(*args, **kwargs)
            clear_autocast_cache()  # a region around this has the weights as they were
            self._last_step = True
            if entered.fp16:
                _tell_unscaled()
            return returned
        if "closure" in kwargs and kwargs["closure"] is None:
            del kwargs["closure"]
        if "closure" in kwargs or (args and callable(args[0])):
            raise RuntimeError(
                f"{type(optimizer).__name__} is given a closure, and would step with the scaled "
                "gradients that it leaves: compute the loss and its gradients before the step. An "
                "optimizer that needs a closure needs scaling off: precision='bf16' or 'fp32'."
            )
        self._begin(optimizer)
        self._stepped = None
        returned = super().step(optimizer, *args, **kwargs)
        clear_autocast_cache()
        entered.fp16 = False
        found: torch.Tensor | None = None
        if self._stepped is None:
            # A fused optimizer. update() adds the infs of several optimizers into these very
            # tensors, and changes the scale in place, hence the copies; neither waits.
            infs = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            if infs:
                found = torch.stack([inf.to(self._on_device().device) for inf in infs]).sum()
            else:  # it takes `grad_scaler=`, and unscales its gradients itself
                self._stepped = True
        scale = self._on_device()
        self._last_step = StepResult(
            self._stepped,
            scale.clone() if self._waits else scale.item(),
            found_inf=found,
            on_known=self._note,
        )
        return returned

    def _maybe_opt_step(
        self,
        optimizer: torch.optim.Optimizer,
        optimizer_state: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Torch's own decision, kept: the one place that fetches found-inf for ordinary optimizers.

        Private to torch, the same from 2.4 to 2.15. A torch that stops calling it costs one more
        fetch in `StepResult.stepped`, and nothing else.
        """
        infs = optimizer_state["found_inf_per_device"].values()
        self._stepped = not sum(inf.item() for inf in infs)
        returned = optimizer.step(*args, **kwargs) if self._stepped else None
        if self._stepped and len(self._per_optimizer_states) == 1:
            self._may_fall = False
        self._note(self._stepped, optimizer)
        return returned

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As in torch, and on devices without float64 too."""
        if not self._enabled:
            return
        self._begin(optimizer)
        if self._has_float64:
            super().unscale_(optimizer)
            return
        scale, _ = self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        # torch takes the reciprocal in float64 and rounds it; a power of two needs neither.
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        state["found_inf_per_device"] = self._unscale_grads_(
            optimizer, scale.reciprocal(), found_inf, False
        )
        state["stage"] = OptState.UNSCALED

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        """As in torch, and of complex gradients too; without any, none is infinite.

        Private to torch, the same from 2.4 to 2.15.
        """
        self._may_fall = True
        parameters = _parameters(optimizer)
        if any(map(torch.Tensor.is_complex, parameters)):
            optimizer = _Real(parameters)  # type: ignore[assignment]
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return found or {found_inf.device: found_inf}

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """As in torch; a whole number is taken as a scale too, and without a step nothing changes.

        It never halves the scale below 2**-14, or the initial one if that is smaller.
        """
        if not self._enabled:
            return
        self._update_is_due = False
        if isinstance(new_scale, int):
            new_scale = float(new_scale)
        states = self._per_optimizer_states.values()
        if new_scale is None and not any(state["found_inf_per_device"] for state in states):
            self._per_optimizer_states.clear()
            return
        self._make_scale()
        super().update(new_scale)
        if new_scale is None and self._may_fall:
            self._on_device().clamp_(min=self._floor)

    def get_scale(self) -> float:
        """As in torch: it waits for the device."""
        if self._update_is_due:
            self.update()
        return super().get_scale()

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        """See to what torch wants to have been done before this optimizer's step."""
        stage = self._update_is_due and self._per_optimizer_states[id(optimizer)]["stage"]
        if stage is OptState.STEPPED:
            self.update()
        if self._scale is None and not _have_gradients(_parameters(optimizer)):
            self._make_scale()

    def _make_scale(self) -> None:
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(torch.device(self._device))

    def state_dict(self) -> dict[str, Any]:
        """As in torch; while disabled, the state that was loaded, so that it crosses machines."""
        if not self._enabled:
            return dict(self._carried)
        if self._update_is_due:
            self.update()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up saved state; while disabled, keep it for `state_dict`. An empty one starts fresh.

        Raises:
            ValueError: the state is not a gradient scaler's.
        """
        state = dict(state_dict)
        if not state:
            if self._enabled:
                tell(
                    "the checkpoint holds no gradient scaler state (it was saved without loss "
                    f"scaling): the scale starts afresh at {self.get_scale():g}.",
                    StateWarning,
                )
            return
        missing = {
            "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker",
        } - state.keys()  # fmt: skip
        if missing:
            raise ValueError(f"not the state of a gradient scaler: {sorted(missing)} missing")
        if self._enabled:
            if self._update_is_due:
                self.update()
            super().load_state_dict(state)
        else:
            self._carried = state

    def __getstate__(self) -> dict[str, Any]:
        if self._enabled and self._update_is_due:
            self.update()
        state = super().__getstate__()
        state["_last_step"] = None  # it may hold tensors of the device
        del state["_optimizers"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._optimizers = weakref.WeakSet()

    def _on_device(self) -> torch.Tensor:
        return self._check_scale_growth_tracker("step")[0]

    def _note(self, stepped: bool, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count steps skipped on end, as the host learns of them; look at the scale at times."""
        self._skipped_on_end = 0 if stepped else self._skipped_on_end + 1
        if stepped:
            self._told_collapse = False
        if self._told_collapse or not self._skipped_on_end or self._skipped_on_end % _LOOK_EVERY:
            return
        scale = self._on_device().item()
        if scale <= self._floor:
            self._told_collapse = True
            tell(
                f"the loss scale has fallen to {scale:g} after {self._skipped_on_end} skipped "
                f"steps on end: gradients are infinite or NaN{_which(optimizer)}, and no scale "
                "will help. ctx.find_nonfinite(model, batch, loss=...) names the module that makes "
                "the first of them. Look there and at the learning rate, or train with "
                "precision='bf16' or 'fp32'.",
                ScaleCollapseWarning,
            )


def _fp16_is_next(capabilities: Capabilities, *, named: bool) -> bool:
    """Whether `maybe_autocast`, with the device named or not, computes in fp16.

    The two drop-ins must agree: fp16 without scaling loses gradients silently.
    """
    if not named:
        return choose("auto", capabilities).scaler
    return (
        capabilities.autocast
        and torch.get_autocast_dtype(capabilities.device_type) is torch.float16
        and capabilities.float16 is not Support.ABSENT
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _have_gradients(parameters: list[torch.Tensor]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)


def _which(optimizer: torch.optim.Optimizer | None) -> str:
    """The first parameter whose gradient is not finite, and how many there are, in words.

    "" where a step has cleared the gradients since. It waits for the device.
    """
    named = []
    for number, group in enumerate(optimizer.param_groups if optimizer else []):
        names = group.get("param_names")  # since torch 2.6, if it was given them
        for at, one in enumerate(group["params"]):
            named.append((repr(names[at]) if names else f"number {at} of group {number}", one))
    bad = [
        f"{name} of shape {tuple(one.shape)}"
        for name, one in named
        if one.grad is not None and bool((one.grad.detach() * 0).sum() != 0)  # sparse ones, too
    ]
    return f" in {len(bad)} of {len(named)} parameters, first in {bad[0]}" if bad else ""


class _Real:
    """Stands in for an optimizer: the same gradients, complex numbers as pairs of real ones."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.param_groups = [{"params": list(map(self._real, parameters))}]

    @staticmethod
    def _real(parameter: torch.Tensor) -> torch.Tensor:
        gradient = parameter.grad
        if gradient is None or not gradient.is_complex():
            return parameter
        if gradient.is_conj():
            parameter.grad = gradient = gradient.resolve_conj()
        real = torch.view_as_real(gradient._values() if gradient.is_sparse else gradient)
        stand_in = real.detach()
        stand_in.grad = real
        return stand_in


@functools.cache
def _needs_closure(kind: Any) -> bool:
    """As LBFGS does, which computes the loss several times in a step."""
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """It is a fused one, and looks at `found_inf` on the device."""
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and "grad_scaler" not in inspect.signature(optimizer.step).parameters
    )


def _tell_skipped(stepped: bool) -> None:
    if not stepped:
        tell_once(
            ("scaler", "skipped"),
            "a gradient norm is infinite or NaN: that step was skipped, and so will be any other. "
            "StepResult.stepped tells each time.",
            GradientWarning,
        )


def _tell_unscaled() -> None:
    entered.fp16 = False
    tell_once(
        ("scaler", "unscaled"),
        "a step follows an autocast region in fp16, and this scaler is off: gradients below 6e-8 "
        "become zero. Make it of the context that computes, after tuned(): ctx.scaler().",
        GradientWarning,
    )
