"""The kernels of a plugin device: each of its storages has a CPU storage that holds the numbers.

What is private to torch here ran on each minor version from 2.10 to 2.15.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from portable_amp.nested import map_tensors, tensors_in
from portable_amp.testing.ledger import Ledger

# What autocast does is the plugin's own affair: torch brings rules for its own devices only. These
# are CUDA's, less what nobody trains with, and the CPU's for cross_entropy_loss.
_LOWER_PRECISION = (
    "_convolution", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "einsum",
    "gru_cell", "linear", "lstm_cell", "matmul", "mm", "mv", "prelu",
    "scaled_dot_product_attention",
)  # fmt: skip
_FLOAT32 = (
    "binary_cross_entropy_with_logits", "cdist", "cosine_embedding_loss", "cosine_similarity",
    "cross_entropy_loss", "cumprod", "cumsum", "exp", "expm1", "group_norm", "huber_loss", "kl_div",
    "l1_loss", "layer_norm", "linalg_vector_norm", "log", "log10", "log1p", "log2",
    "log_softmax.int", "logsumexp", "mse_loss", "nll_loss", "nll_loss2d", "norm.Scalar",
    "norm.ScalarOpt_dim", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "prod",
    "prod.dim_int", "reciprocal", "rms_norm", "rsqrt", "smooth_l1_loss", "softmax.int", "softplus",
    "sum", "sum.dim_IntList", "triplet_margin_loss",
)  # fmt: skip
_WIDEST = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put",
    "scatter_add", "tensordot", "vdot",
)  # fmt: skip

# Their second argument may stay on the CPU: indices, lengths.
_TAKE_CPU_TENSORS = (
    "aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_pack_padded_sequence",
)  # fmt: skip


class Plugin:
    """The device's kernels, which torch finds from here on.

    Args:
        name: the device type, new to torch.
        module: becomes `torch.<name>`.
        ledger: the device's memory.
        generator: the device's random numbers; a generator of the CPU.
    """

    def __init__(
        self, name: str, module: ModuleType, ledger: Ledger, generator: torch.Generator
    ) -> None:
        self.name, self.ledger, self.generator = name, ledger, generator
        _register_device(name, module)
        # torch.load's own way for plugins needs an allocator; Python cannot give it one.
        torch.serialization.register_package(0, lambda storage: None, self.load_storage)
        # torch keeps kernels for as long as their library lives.
        self.everything = torch.library.Library("_", "IMPL")
        self.everything.fallback(self.compute, "PrivateUse1")
        self.everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        self.aten = torch.library.Library("aten", "IMPL")
        for operation, kernel in (
            ("_copy_from", self.copy_from),
            ("set_.source_Storage", self.set_storage),
            ("set_.source_Storage_storage_offset", _set_geometry),
            ("_efficientzerotensor", self.whole("zeros")),  # has no memory to point to
            # Taken apart, these two would warn of an output that the CPU's resizes.
            ("mse_loss", self.whole("mse_loss")),
            ("smooth_l1_loss", self.whole("smooth_l1_loss")),
            ("convolution_overrideable", self.whole("convolution")),
            ("convolution_backward_overrideable", self.convolve_backward),
        ):
            self.aten.impl(operation, kernel, "PrivateUse1")
        # Else torch would copy a conjugate in order to copy it, and so on without end.
        for key in ("Conjugate", "Negative"):
            self.aten.impl("_copy_from", torch.library.fallthrough_kernel, key)
        # The CPU has no such kernels; as a formula, autograd finds their gradients by itself.
        for operation, formula in (
            ("_thnn_fused_lstm_cell", _lstm_cell),
            ("_thnn_fused_gru_cell", _gru_cell),
        ):
            self.aten.impl(operation, formula, "PrivateUse1")
            self.aten.impl(operation, formula, "AutogradPrivateUse1")
        for operation in _LOWER_PRECISION:
            self.autocast(operation, lambda dtypes: torch.get_autocast_dtype(name))
        for operation in _FLOAT32:
            self.autocast(operation, lambda dtypes: torch.float32)
        for operation in _WIDEST:
            self.autocast(operation, lambda dtypes: functools.reduce(torch.promote_types, dtypes))

    def compute(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Any operation: the CPU's, on the numbers; what it gives comes back to the device."""
        may_stay = args[1] if op.name().startswith(_TAKE_CPU_TENSORS) else ()
        if kwargs.get("generator") is not None:  # it can only be the CPU's
            raise RuntimeError(f"Expected a '{self.name}' device type for generator")
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def down(tensor: torch.Tensor) -> torch.Tensor:
            if not self.owns(tensor):
                if tensor.dim() and not any(tensor is one for one in tensors_in(may_stay)):
                    raise self.stranger(tensor)
                return tensor  # a CPU scalar may mix
            pairs.append((tensor, _numbers(tensor)))
            return pairs[-1][1]

        def up(cpu: torch.Tensor) -> torch.Tensor:
            return self.on_device(cpu, owners.get(cpu.untyped_storage()._cdata))

        args, kwargs = map_tensors(down, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        owners = {cpu.untyped_storage()._cdata: mine for mine, cpu in pairs}
        # A number comes as such where the operation wants a tensor; the right overload takes it.
        plain = any(not isinstance(args[at], torch.Tensor) for at in _tensor_places(op, len(args)))
        with _below_autocast("CPU"), self.drawing(op):
            result = (op.overloadpacket if plain else op)(*args, **kwargs)
        if op._schema.is_mutable:
            for mine, cpu in pairs:
                self.follow(mine, cpu, owners)
        return map_tensors(up, result)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on this device."""
        return tensor.device.type == self.name

    def stranger(self, tensor: torch.Tensor) -> Exception:
        """Torch's own error for a tensor of another device."""
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{self.name}:0 and {tensor.device}!"
        )

    def on_device(self, cpu: torch.Tensor, view_of: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor of the device with these numbers, in new memory or as a view."""
        if view_of is None:
            tensor = torch._C._acc.create_empty_tensor((0,), cpu.dtype)
            _set_like(cpu, tensor, self.new_storage(cpu.untyped_storage()))
            self.ledger.take(tensor)
            return _marked(tensor, cpu)
        # To torch a view is an inference tensor if its base is, whatever the mode it is made in.
        with torch.inference_mode(view_of.is_inference()):
            tensor = torch._C._acc.create_empty_tensor((0,), cpu.dtype)
        return _marked(_set_like(cpu, tensor, view_of.untyped_storage()), cpu)

    def new_storage(self, numbers: torch.UntypedStorage) -> Any:
        """A storage of the device in the same memory; torch keeps what hangs on its object."""
        storage: Any = torch._C._construct_storage_from_data_pointer(
            numbers.data_ptr(), torch.device(self.name, 0), numbers.nbytes()
        )
        storage.numbers = numbers
        # copy.deepcopy calls it; torch's own ends the process where a device has no allocator.
        storage.clone = functools.partial(self.copy_of, numbers)
        return storage

    def copy_of(self, numbers: torch.UntypedStorage) -> torch.UntypedStorage:
        """A new storage of the device with these numbers."""
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(numbers.clone())
        return self.on_device(whole).untyped_storage()

    def follow(
        self, mine: torch.Tensor, cpu: torch.Tensor, owners: dict[int, torch.Tensor]
    ) -> None:
        """Give `mine` the shape and memory that an operation in place has given to `cpu`."""
        owner = owners.get(cpu.untyped_storage()._cdata)
        if owner is None or owner.untyped_storage().nbytes() < cpu.untyped_storage().nbytes():
            owner = self.on_device(cpu)
        _set_like(cpu, mine, owner.untyped_storage())

    @contextlib.contextmanager
    def drawing(self, op: Any) -> Iterator[None]:
        """Random operations draw from the device's generator, and leave the CPU's alone."""
        if torch.Tag.nondeterministic_seeded not in op.tags:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def copy_from(
        self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        """Copies to the device, from it, and on it."""
        there = _numbers(target) if self.owns(target) else target
        there.copy_(_numbers(source) if self.owns(source) else source)
        return target

    def set_storage(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
        """All of a storage as one row: how torch copies storages."""
        return _set_geometry(tensor, storage, 0, (storage.nbytes() // tensor.itemsize,))

    def whole(self, operation: str) -> Callable[..., Any]:
        """That operation of the CPU as a kernel, where torch would do something else."""
        return functools.partial(self.compute, getattr(torch.ops.aten, operation).default)

    def convolve_backward(self, grad: Any, image: Any, weight: Any, *args: Any) -> Any:
        """The gradients of a convolution."""
        channels = [grad.shape[1]]
        return self.whole("convolution_backward")(grad, image, weight, channels, *args)

    def load_storage(self, storage: Any, location: str) -> torch.UntypedStorage | None:
        """For torch.load: what was saved there, on the device again; None for other devices."""
        if location.split(":")[0] != self.name:
            return None
        return self.copy_of(storage)

    def autocast(self, operation: str, choose: Callable[[list[torch.dtype]], torch.dtype]) -> None:
        """Let autocast bring this operation's floating arguments, float64 apart, to one dtype."""
        name, _, overload = operation.partition(".")
        op = getattr(getattr(torch.ops.aten, name), overload or "default")

        def eligible(tensor: torch.Tensor) -> bool:
            floating = tensor.is_floating_point() and tensor.dtype is not torch.float64
            return floating and self.owns(tensor)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtypes = [tensor.dtype for tensor in tensors_in((args, kwargs)) if eligible(tensor)]
            with _below_autocast("PrivateUse1"):
                if dtypes:
                    dtype = choose(dtypes)
                    args, kwargs = map_tensors(
                        lambda tensor: tensor.to(dtype) if eligible(tensor) else tensor,
                        (args, kwargs),
                    )
                return op(*args, **kwargs)

        self.aten.impl(op, kernel, "AutocastPrivateUse1")


@functools.cache
def _tensor_places(op: Any, given: int) -> list[int]:
    """Which of the first arguments of an operation must be tensors."""
    return [
        at for at, wanted in enumerate(op._schema.arguments[:given]) if str(wanted.type) == "Tensor"
    ]


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor that a tensor of the device stands for."""
    storage = tensor.untyped_storage()
    numbers = getattr(storage, "numbers", None)
    if numbers is None:
        raise NotImplementedError(
            f"this memory on {tensor.device} was not made by the plugin: torch.save works here, "
            "pickle and torch's old file format do not"
        )
    cpu = torch.empty(0, dtype=tensor.dtype, device="cpu")
    cpu.set_(numbers, tensor.storage_offset(), tensor.shape, tensor.stride())
    return _marked(cpu, tensor)


def _marked(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, conjugate and negative if `like` is: to torch these are marks, not numbers."""
    tensor = tensor.conj() if like.is_conj() else tensor
    return torch._neg_view(tensor) if like.is_neg() else tensor


def _lstm_cell(
    gates: torch.Tensor,
    more_gates: torch.Tensor,
    cell: torch.Tensor,
    *biases: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for bias in biases:
        gates = gates if bias is None else gates + bias
    enter, forget, new, leave = (gates + more_gates).chunk(4, 1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell, cell.new_empty(0)


def _gru_cell(
    gates: torch.Tensor,
    more_gates: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor | None = None,
    more_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    reset, update, new = (gates if bias is None else gates + bias).chunk(3, 1)
    others = (more_gates if more_bias is None else more_gates + more_bias).chunk(3, 1)
    reset, update = (reset + others[0]).sigmoid(), (update + others[1]).sigmoid()
    new = (new + reset * others[2]).tanh()
    return new + update * (hidden - new), hidden.new_empty(0)


def _register_device(name: str, module: ModuleType) -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(name, backend_module=module)


def _set_geometry(
    tensor: torch.Tensor,
    storage: torch.UntypedStorage,
    offset: int | torch.SymInt,
    shape: Sequence[int],
    stride: Sequence[int] = (),
) -> torch.Tensor:
    """Make `tensor` a view into `storage`; the CPU's own kernel does it for any device."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    op = torch.ops.aten.set_.source_Storage_storage_offset
    op.redispatch(cpu, tensor, storage, offset, shape, stride)
    return tensor


def _set_like(
    cpu: torch.Tensor, tensor: torch.Tensor, storage: torch.UntypedStorage
) -> torch.Tensor:
    """Make `tensor` the view into `storage` that `cpu` is into its own."""
    return _set_geometry(tensor, storage, cpu.storage_offset(), cpu.shape, cpu.stride())


def _below_autocast(backend: str) -> Any:
    """A region in which autocast for this backend does nothing."""
    key = getattr(torch._C.DispatchKey, f"Autocast{backend}")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))
