"""ScalerShim: torch's GradScaler that is on only where it is needed, and tells what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch.amp.grad_scaler import OptState

from portable_amp.backends import resolve_device
from portable_amp.capabilities import Capabilities, Support, look_up
from portable_amp.errors import PrecisionFallbackWarning, ScaleCollapseWarning, StateWarning
from portable_amp.notices import tell, tell_once
from portable_amp.precision import choose

# fp16's smallest normal number. A scale below it protects no gradient any more, and halving on and
# on ends at exactly 0.0, which turns every later gradient into NaN.
_COLLAPSED = 2.0**-14
# Looking at the scale waits for the device: done only after this many skipped steps on end.
_LOOK_EVERY = 16


class StepResult:
    """What one `step` did; whatever is still on the device is fetched when it is first read."""

    __slots__ = ("_found_inf", "_grad_norm", "_on_known", "_scale", "_stepped")

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
    ) -> None:
        kind, capabilities = look_up(resolve_device() if device is None else device)
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
        super().__init__(
            kind,
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            enabled=enabled,
        )
        # torch sets these only when enabled, and its getters then raise on a disabled scaler.
        self._init_scale = float(init_scale)
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._has_float64 = capabilities is not None and capabilities.float64 is True
        self._carried: dict[str, Any] = {}
        self._skipped_on_end = 0
        self._told_collapse = False
        self._stepped: bool | None = None
        self._last_step: StepResult | Literal[True] | None = None
        """True for a step without scaling: its result is made for whoever asks."""

    @property
    def last_step(self) -> StepResult | None:
        """What the latest `step` did, None before the first."""
        if self._last_step is True:
            self._last_step = StepResult(True)
        return self._last_step

    def backward_step(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
    ) -> StepResult:
        """Backward, unscale, clip, step, update, and clear the gradients: one optimizer step.

        Args:
            loss: scalar, any float dtype, on the model's device.
            optimizer: the one optimizer of this loss.
            max_norm: clip the total gradient norm to this; None: no clipping.

        Returns:
            Whether it stepped, with which scale, and the norm before clipping.

        >>> weight = torch.ones(2, requires_grad=True)
        >>> scaler = ScalerShim("cpu")
        >>> scaler.backward_step((3 * weight).sum(), torch.optim.SGD([weight], lr=0.1), max_norm=9)
        StepResult(stepped=True, scale=1, grad_norm=4.242640495300293)
        """
        scaled: torch.Tensor = self.scale(loss)
        scaled.backward()
        norm: torch.Tensor | None = None
        if max_norm is not None:
            self.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)
        self.step(optimizer)
        self.update()
        optimizer.zero_grad(set_to_none=True)
        result = self.last_step
        assert result is not None
        result._grad_norm = norm
        return result

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As in torch: `optimizer.step(*args, **kwargs)` unless gradients are infinite or NaN."""
        if not self._enabled:
            returned = optimizer.step(*args, **kwargs)
            self._last_step = True
            return returned
        self._stepped = None
        returned = super().step(optimizer, *args, **kwargs)
        found: torch.Tensor | None = None
        if self._stepped is None:
            # A fused optimizer. update() adds the infs of several optimizers into these very
            # tensors, and changes the scale in place, hence the copies; neither waits.
            infs = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            if infs:
                found = torch.stack([inf.to(self._on_device().device) for inf in infs]).sum()
            else:  # it had no gradients, or takes `grad_scaler=` and unscales them itself
                self._stepped = True
        self._last_step = StepResult(
            self._stepped, self._on_device().clone(), found_inf=found, on_known=self._note
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
        self._note(self._stepped)
        return returned

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As in torch, and on devices without float64 too."""
        if not self._enabled or self._has_float64:
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

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """As in torch; a whole number is taken as a scale too."""
        if not self._enabled:
            return
        if isinstance(new_scale, int):
            new_scale = float(new_scale)
        super().update(new_scale)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; while disabled, the state that was loaded, so that it crosses machines."""
        return super().state_dict() if self._enabled else dict(self._carried)

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
            super().load_state_dict(state)
        else:
            self._carried = state

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_last_step"] = None  # it may hold tensors of the device
        return state

    def _on_device(self) -> torch.Tensor:
        return self._check_scale_growth_tracker("step")[0]

    def _note(self, stepped: bool) -> None:
        """Count steps skipped on end, as the host learns of them; look at the scale at times."""
        self._skipped_on_end = 0 if stepped else self._skipped_on_end + 1
        if stepped:
            self._told_collapse = False
        if self._told_collapse or not self._skipped_on_end or self._skipped_on_end % _LOOK_EVERY:
            return
        scale = self.get_scale()
        if scale < _COLLAPSED:
            self._told_collapse = True
            tell(
                f"the loss scale has fallen to {scale:g} after {self._skipped_on_end} skipped "
                "steps on end: every gradient is infinite or NaN, and no scale will help. Look at "
                "the loss and the learning rate, or train with precision='bf16' or 'fp32'.",
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


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
