"""Which results fp16 autocast computes in fp16 on a GPU, told from a pass in fp32 elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from portable_amp.numerics import watch
from portable_amp.numerics.watch import numbers

# Source: torch's autocast op reference for CUDA, as the operations are named below autograd
# (torch 2.4 to 2.15). The tests compare them with autocast's own kernels.
TO_FP16 = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "convolution",
    "_convolution", "mkldnn_rnn_layer", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell",
    "_prelu_kernel", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_cudnn_attention",
}  # fmt: skip
"""What is cast to fp16, whatever it is given."""
TO_FP32 = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "pow",
    "reciprocal", "rsqrt", "sinh", "tan", "softplus", "native_layer_norm", "native_group_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax", "logsumexp", "sum", "prod", "cumsum", "cumprod",
    "norm", "linalg_vector_norm", "renorm", "dist", "_cdist_forward", "_pdist_forward",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "smooth_l1_loss", "huber_loss",
    "soft_margin_loss", "multi_margin_loss", "multilabel_margin_loss_forward",
    "binary_cross_entropy_with_logits", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d",
}  # fmt: skip
"""What is cast to fp32."""
AS_FIRST = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm",
}  # fmt: skip
"""What computes in the dtype of its first argument, with weights in fp32."""


class Half:
    """Follows, operation by operation, what would be fp16. In doubt, it would.

    Casts that the model asks for itself, such as `x.float()`, cannot be seen: in fp32 they do
    nothing.
    """

    def __init__(self) -> None:
        self.memory: set[int] = set()
        """Where there is what would be fp16."""
        self.nodes: dict[int, bool] = {}
        """Whether a node of the graph has gradients in fp16, by its number."""

    def forward(self, function: Any, given: list[torch.Tensor], output: Any, number: int) -> bool:
        """Whether the results of an operation would be fp16; `number`: of the next node."""
        name = function.overloadpacket.__name__
        were = [watch.memory_of(one) in self.memory for one in given]
        result = any(were)
        if name in TO_FP16:
            result = True
        elif name in TO_FP32 or not given:
            result = False
        elif name in AS_FIRST or function._schema.is_mutable:
            result = were[0]
        else:
            wide = [one.dim() > 0 for one in given]  # numbers do not widen tensors
            result = all(was for was, dims in zip(were, wide, strict=True) if dims or not any(wide))
        self.nodes.setdefault(number - 1, result or any(were))
        before = {watch.memory_of(one) for one in given}
        for one in numbers(output):
            memory = watch.memory_of(one)
            if memory in before:  # a view, or written into: its dtype stays
                continue
            (self.memory.add if result else self.memory.discard)(memory)
        return result
