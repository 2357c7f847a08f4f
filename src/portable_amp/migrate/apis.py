"""What there is in torch.cuda and beside it, and the rule that tells of each."""

from __future__ import annotations


def _names(code: str, module: str, names: str) -> dict[str, str]:
    return {f"{module}.{name}": code for name in names.split()}


BY_NAME: dict[str, str] = {
    **_names("PAM104", "torch.cuda.amp", "custom_fwd custom_bwd"),
    **_names("PAM301", "torch.cuda", "empty_cache"),
    **_names("PAM302", "torch.cuda", "synchronize"),
    **_names(
        "PAM303",
        "torch.cuda",
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached "
        "max_memory_cached reset_peak_memory_stats reset_max_memory_allocated "
        "reset_max_memory_cached reset_accumulated_memory_stats memory_stats "
        "memory_stats_as_nested_dict memory_summary memory_snapshot memory_usage mem_get_info "
        "host_memory_stats set_per_process_memory_fraction list_gpu_processes ipc_collect "
        "_record_memory_history _dump_snapshot _snapshot utilization device_memory_used",
    ),
    **_names("PAM304", "torch.cuda", "manual_seed manual_seed_all seed seed_all"),
    **_names(
        "PAM305",
        "torch.cuda",
        "Event Stream ExternalStream CUDAGraph graph stream StreamContext current_stream "
        "default_stream set_stream make_graphed_callables graph_pool_handle "
        "is_current_stream_capturing cudart nvtx.range_push nvtx.range_pop nvtx.range "
        "nvtx.range_start nvtx.range_end nvtx.mark profiler.start profiler.stop profiler.profile",
    ),
    **_names("PAM306", "torch.cuda", "set_device device device_of current_device init"),
    **_names(
        "PAM307",
        "torch.cuda",
        "get_device_name get_device_capability get_device_properties get_rng_state "
        "get_rng_state_all set_rng_state set_rng_state_all initial_seed can_device_access_peer "
        "get_sync_debug_mode set_sync_debug_mode temperature power_draw clock_rate",
    ),
    **_names("PAM402", "torch.nn", "DataParallel"),
    **_names("PAM402", "torch.cuda", "device_count"),
    **_names("PAM602", "torch.cuda", "OutOfMemoryError"),
    **_names("PAM701", "torch", "set_float32_matmul_precision get_float32_matmul_precision"),
    **_names(
        "PAM701",
        "torch.backends",
        "cuda.matmul.allow_tf32 cudnn.allow_tf32 cudnn.flags mkldnn.allow_tf32 mkldnn.flags",
    ),
}
"""A name that torch documents -> the rule that tells of it, whatever its arguments."""
