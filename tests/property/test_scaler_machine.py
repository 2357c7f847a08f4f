"""ScalerShim beside torch.amp.GradScaler: whatever is done to both, in whatever order, is the same.

Where scaling is off, the oracle is a loop without any scaler. Where torch's scaler gives up for
want of a gradient or a loss, `Scaler` says what is to come of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from torch.amp.grad_scaler import OptState

from portable_amp import ScalerShim
from portable_amp.scaler import StepResult
from portable_amp.testing.strategies import gradient_streams

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1),
    "fused": lambda weights: torch.optim.Adam(weights, lr=0.1, fused=True),
}
# fp16 weights are an error of unscale_, so that they are not to be met too often.
DTYPES = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = st.fixed_dictionaries(
    {
        "init_scale": st.sampled_from([2.0**16, 1.0, 2.0**24, 3.0]),
        "growth_factor": st.sampled_from([2.0, 3.0]),
        "backoff_factor": st.sampled_from([0.5, 0.3]),
        "growth_interval": st.integers(1, 3),
    }
)
FACTOR = gradient_streams(min_steps=1, max_steps=1).map(lambda stream: stream[0])
WHICH = st.sampled_from([0, 1])
MAX_NORM = st.sampled_from([None, 1.0])
NEW_SCALES = st.one_of(
    st.none(),
    st.none(),
    st.sampled_from([1024, 7.3, 2.0**-13]),
    st.floats(2.0**-14, 2.0**40, width=32),
    st.sampled_from(
        [
            torch.tensor(5.7),
            torch.tensor(0.1, dtype=torch.float64),
            torch.ones(2),  # refused: one scale, not two
            torch.tensor(2.0, requires_grad=True),  # refused
        ]
    ),
)
COPIES = st.sampled_from([copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))])


def bits(tensor: torch.Tensor | None) -> list[int] | None:
    """NaN is the same as itself here, and -0.0 is not 0.0."""
    return None if tensor is None else tensor.detach().reshape(-1).view(torch.uint8).tolist()


@contextlib.contextmanager
def forbidden_float64() -> Iterator[None]:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise TypeError("no float64 on this device")

    with mock.patch.object(torch.Tensor, "double", refuse):
        yield


class Scaler(torch.amp.GradScaler):
    """torch's, but that nothing to do is done, and that the scale stays above a floor."""

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, fp16: Any) -> Any:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, fp16)
        return found or {found_inf.device: found_inf}

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if self._scale is None and all(weight.grad is None for weight in weights):
            self._lazy_init_scale_growth_tracker(torch.device("cpu"))

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.begin(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        self.begin(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        if self._scale is None and new_scale is not None:
            self._lazy_init_scale_growth_tracker(torch.device("cpu"))
        recorded = any(
            state["found_inf_per_device"] for state in self._per_optimizer_states.values()
        )
        if new_scale is None and not recorded:
            self._per_optimizer_states.clear()
            return
        super().update(new_scale)
        if new_scale is None and self._scale is not None:
            self._scale.clamp_(min=2.0**-14)


class NoScaler:
    """What a loop does where there is nothing to scale."""

    def scale(self, losses: Any) -> Any:
        return losses

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None: ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self, new_scale: float | torch.Tensor | None = None) -> None: ...

    def get_scale(self) -> float:
        return 1.0

    def _get_growth_tracker(self) -> int:
        return 0


class Training:
    """Two optimizers and one scaler. The loss is linear: no step spoils the gradients to come."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        self.weights: list[list[torch.Tensor]] = [[], []]
        self.optimizers: list[Any] = [None, None]
        self.retired: list[Any] = []
        self.known: list[Any] = []  # to the scaler: those that `backward_step` was given
        self.by_hand = False

    def begin(self, which: int, kind: str, dtype: torch.dtype) -> None:
        # A scaler knows optimizers by their id: the old one stays alive, lest its id comes again.
        self.retired.append(self.optimizers[which])
        self.weights[which] = [
            torch.tensor([1.0, -2.0, 0.5], requires_grad=True),
            torch.tensor([0.3, 4.0], dtype=dtype, requires_grad=True),
        ]
        self.optimizers[which] = OPTIMIZERS[kind](self.weights[which])

    def loss(self, which: int, factor: float, of_both: bool = False) -> torch.Tensor:
        first, second = self.weights[which]
        loss = (first.sum() + 3 * second.float().sum()) * factor
        return loss + self.loss(1 - which, factor) if of_both else loss

    def backward(self, losses: Any, by_hand: bool = True) -> None:
        self.by_hand |= by_hand
        scaled = self.scaler.scale(losses)
        for loss in [scaled] if isinstance(scaled, torch.Tensor) else scaled:
            loss.backward()

    def clip(self, which: int, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.weights[which], max_norm))

    def stepped(self, which: int) -> bool:
        """Whether torch's scaler took the step just made. To be asked before `update`."""
        if isinstance(self.scaler, NoScaler):
            return True
        return not sum(self.scaler._found_inf_per_device(self.optimizers[which]).values())

    def step_by_hand(
        self, which: int, factor: float, max_norm: float | None, of_both: bool
    ) -> tuple[Any, ...]:
        """What `ScalerShim.backward_step` is short for, but for the update."""
        state = getattr(self.scaler, "_per_optimizer_states", {}).get(id(self.optimizers[which]))
        if state and state["stage"] is OptState.UNSCALED:
            raise RuntimeError("the gradients of this loss would stay scaled")
        scale, norm, optimizer = self.scaler.get_scale(), None, self.optimizers[which]
        if optimizer not in self.known:
            held = any(weight.grad is not None for weight in self.weights[which])
            if self.known and held and not self.by_hand:
                raise RuntimeError("perhaps of another loss")
            self.known.append(optimizer)
        loss = self.loss(which, factor, of_both)
        other = [weight.grad for weight in self.weights[1 - which]]
        other_is_known = self.optimizers[1 - which] in self.known
        for weight in self.weights[1 - which] if other_is_known else ():
            weight.grad = None
        try:
            self.backward(loss, by_hand=False)
        finally:
            for weight, grad in zip(self.weights[1 - which], other, strict=True):
                if other_is_known:
                    weight.grad = grad
        if max_norm is not None:
            self.scaler.unscale_(optimizer)
            norm = self.clip(which, max_norm)
        skips = isinstance(self.scaler, NoScaler) and not math.isfinite(norm or 0.0)
        if not skips:
            self.scaler.step(optimizer)
        stepped = not skips and self.stepped(which)
        optimizer.zero_grad(set_to_none=True)
        self.by_hand = False
        return stepped, scale, norm

    def learned(self, which: int) -> list[Any]:
        """Everything an optimizer's step changes."""
        states = [self.optimizers[which].state.get(weight, {}) for weight in self.weights[which]]
        tensors = [state[name] for state in states for name in sorted(state)]
        return [bits(tensor) for tensor in [*self.weights[which], *tensors]]


def attempt(act: Callable[[Training], Any], training: Training) -> Any:
    """What came of it; the exception's type, where it raised."""
    try:
        return act(training)
    except Exception as error:
        return type(error)


class ScalerMachine(RuleBasedStateMachine):
    states = Bundle("states")

    @initialize(
        on=st.sampled_from([True, True, True, False]),
        float64=st.booleans(),
        options=SETTINGS,
        kinds=st.tuples(*[st.sampled_from(list(OPTIMIZERS))] * 2),
        dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    )
    def start(
        self,
        on: bool,
        float64: bool,
        options: dict[str, Any],
        kinds: tuple[str, str],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.ours, self.theirs = Training(None), Training(None)
        self.kept: dict[str, Any] = {}
        self.unread: list[tuple[StepResult, tuple[Any, ...]]] = []
        self.arrive(on, float64, options)
        for which in (0, 1):
            self.begin(which, kinds[which], dtypes[which])

    def arrive(self, on: bool, float64: bool, options: dict[str, Any]) -> None:
        """Fresh scalers on a machine like that; they have taken up no state yet."""
        self.on, self.float64 = on, float64
        self.ours.scaler = ScalerShim("cpu", **options, enabled=on)
        self.ours.scaler._has_float64 = float64
        self.theirs.scaler = Scaler("cpu", **options) if on else NoScaler()
        self.theirs.known, self.theirs.by_hand = [], False

    def both(self, act: Callable[[Training], Any]) -> Any:
        """Do it on both sides: both give the same, or both raise the same."""
        with contextlib.nullcontext() if self.float64 else forbidden_float64():
            ours = attempt(act, self.ours)
        theirs = attempt(act, self.theirs)
        assert repr(ours) == repr(theirs)
        return theirs

    @rule(which=WHICH, kind=st.sampled_from(list(OPTIMIZERS)), dtype=st.sampled_from(DTYPES))
    def begin(self, which: int, kind: str, dtype: torch.dtype) -> None:
        assert not self.both(lambda training: training.begin(which, kind, dtype))

    @rule(which=WHICH, factor=FACTOR)
    def backward(self, which: int, factor: float) -> None:
        assert not self.both(lambda training: training.backward(training.loss(which, factor)))

    @rule(factors=st.tuples(FACTOR, FACTOR), container=st.sampled_from([list, tuple, iter]))
    def backward_of_both_losses(self, factors: tuple[float, float], container: Any) -> None:
        assert not self.both(
            lambda training: training.backward(
                container([training.loss(which, factors[which]) for which in (0, 1)])
            )
        )

    @rule(which=WHICH)
    def unscale(self, which: int) -> None:
        self.both(lambda training: training.scaler.unscale_(training.optimizers[which]))

    @rule(which=WHICH)
    def clip(self, which: int) -> None:
        self.both(lambda training: training.clip(which, 1.0))

    @rule(which=WHICH, read=st.booleans())
    def step(self, which: int, read: bool) -> None:
        earlier = self.ours.scaler.last_step
        before = [bits(weight) for weight in self.theirs.weights[which]]
        scale = self.theirs.scaler.get_scale()
        raised = self.both(lambda training: training.scaler.step(training.optimizers[which]))
        result = self.ours.scaler.last_step
        if raised:
            assert result is earlier
            return
        stepped = self.theirs.stepped(which)
        assert stepped or [bits(weight) for weight in self.theirs.weights[which]] == before
        self.unread.append((result, (stepped, scale, None)))
        if read:
            self.read_results()

    @rule(
        order=st.lists(WHICH, min_size=1, max_size=5),
        data=st.data(),
        max_norm=MAX_NORM,
        of_both=st.booleans(),
    )
    def backward_steps(
        self, order: list[int], data: st.DataObject, max_norm: float | None, of_both: bool
    ) -> None:
        """The scale is updated before an optimizer comes again, and at the end."""
        truths: list[tuple[Any, ...]] = []
        have_stepped: set[int] = set()

        def step(training: Training, which: int, factor: float) -> None:
            if training is self.theirs:
                truths.append(training.step_by_hand(which, factor, max_norm, of_both))
            else:
                loss, optimizer = training.loss(which, factor, of_both), training.optimizers[which]
                training.scaler.backward_step(loss, optimizer, max_norm=max_norm)

        for which in order:
            known = getattr(self.theirs.scaler, "_per_optimizer_states", {})
            stage = known.get(id(self.theirs.optimizers[which]), {}).get("stage")
            if have_stepped and stage is OptState.STEPPED:
                self.theirs.scaler.update()
                have_stepped.clear()
            factor = data.draw(FACTOR)
            if not self.both(functools.partial(step, which=which, factor=factor)):
                have_stepped.add(which)
                self.unread.append((self.ours.scaler.last_step, truths[-1]))
        if have_stepped:
            self.theirs.scaler.update()

    @rule(factors=st.tuples(FACTOR, FACTOR), clipped=st.sampled_from([(), (0,), (1,), (0, 1)]))
    def iterate(self, factors: tuple[float, float], clipped: tuple[int, ...]) -> None:
        """An ordinary iteration with two optimizers and one scaler."""
        self.backward_of_both_losses(factors, list)
        for which in clipped:
            self.unscale(which)
            self.clip(which)
        for which in (0, 1):
            self.step(which, False)
        self.update(None)
        for which in (0, 1):
            self.zero_grad(which, True)

    @rule()
    def read_results(self) -> None:
        """As late as one likes: what came after must not have changed what they tell."""
        for result, truth in self.unread:
            told = result.stepped, result.scale, result.grad_norm
            assert repr(told) == repr(truth)  # so that NaN is the same as itself
        self.unread.clear()

    @rule(new_scale=NEW_SCALES)
    def update(self, new_scale: Any) -> None:
        def update(training: Training) -> None:
            # torch's refuses whole numbers; ours takes them.
            whole = isinstance(new_scale, int) and training is self.theirs
            training.scaler.update(float(new_scale) if whole else new_scale)

        self.both(update)

    @rule(which=WHICH, set_to_none=st.booleans())
    def zero_grad(self, which: int, set_to_none: bool) -> None:
        assert not self.both(lambda training: training.optimizers[which].zero_grad(set_to_none))

    @rule(on=st.booleans(), float64=st.booleans(), options=SETTINGS)
    def resume_elsewhere(self, on: bool, float64: bool, options: dict[str, Any]) -> None:
        state = self.ours.scaler.state_dict()
        self.arrive(on, float64, options)
        self.take_up(state)

    @rule(target=states)
    def save(self) -> Any:
        state = self.ours.scaler.state_dict()
        return state if state else multiple()

    @rule(state=states)
    def take_up(self, state: dict[str, Any]) -> None:
        """Where scaling is off, ours carries the state on."""
        self.ours.scaler.load_state_dict(state)
        if self.on and state:
            self.theirs.scaler.load_state_dict(state)
        self.kept = state

    @rule(twin=COPIES)
    def go_on_with_a_copy(self, twin: Callable[[Any], Any]) -> None:
        def copy(training: Training) -> None:
            training.scaler = twin(training.scaler)

        if not self.both(copy):
            self.theirs.known.clear()
            assert self.ours.scaler.last_step is None

    @invariant()
    def the_trainings_are_the_same_bit_for_bit(self) -> None:
        for which in (0, 1):
            assert self.ours.learned(which) == self.theirs.learned(which)
            for ours, theirs in zip(
                self.ours.weights[which], self.theirs.weights[which], strict=True
            ):
                assert bits(ours.grad) == bits(theirs.grad)

    @invariant()
    def the_scalers_are_the_same_bit_for_bit(self) -> None:
        ours, theirs = self.ours.scaler, self.theirs.scaler
        assert ours.get_scale() == theirs.get_scale()
        assert ours._get_growth_tracker() == theirs._get_growth_tracker()
        if self.on:
            self.kept = theirs.state_dict()
        assert ours.state_dict() == self.kept

    def teardown(self) -> None:
        self.read_results()


@pytest.mark.filterwarnings("ignore::portable_amp.ScaleCollapseWarning")
@pytest.mark.filterwarnings("ignore::portable_amp.StateWarning")
@pytest.mark.filterwarnings("ignore::portable_amp.GradientWarning")
def test_whatever_is_done_in_whatever_order_it_is_as_with_torchs_scaler() -> None:
    run_state_machine_as_test(
        ScalerMachine,
        settings=settings(
            # Of the 25 that tools/mutation asks for, three times as many.
            max_examples=max(75, settings().max_examples),
            stateful_step_count=20,
            report_multiple_bugs=False,
        ),
    )
