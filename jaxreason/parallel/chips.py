"""The chips: peaks for MFU, and how to compile for one that is not here.

Figures: NVIDIA and Google data sheets; GPU device fields from OpenXLA's published target specs
(xla/backends/gpu/target_config/specs).
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. FLOP/s are dense bf16; memory in bytes; bandwidth in bytes a second."""

    name: str
    flops: float
    memory: int
    bandwidth: float
    kinds: tuple[str, ...]  # substrings of jax's device_kind
    cores: int = 0  # the last four fields: NVIDIA compile target only
    l2_bytes: int = 0
    clock_ghz: float = 0.0
    capability: int = 0  # compute capability, major


CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("b200", 2250e12, 191_514_411_008, 7.67e12, ("B200",), 148, 132_644_864, 1.965, 10),
        # The NVL form of the H200 peaks at 836 TFLOP/s; matched before the SXM one by its own name.
        Chip("h200-nvl", 836e12, 151_397_597_184, 4.8e12, ("H200 NVL",)),
        Chip("h200", 989.5e12, 151_397_597_184, 4.8e12, ("H200",), 132, 52_428_800, 1.98, 9),
        Chip("h100", 989.5e12, 84_942_979_072, 3.35e12, ("H100",), 132, 52_428_800, 1.98, 9),
        Chip("v5e", 197e12, 16 * 2**30, 0.81e12, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 96 * 2**30, 2.8e12, ("TPU v5p", "TPU v5")),
        Chip("v6e", 920e12, 32 * 2**30, 1.6e12, ("TPU v6 lite", "TPU v6e")),
    )
}


def detect(device: jax.Device) -> Chip | None:
    """The chip of a live device; None where no peak is known (a CPU), so no MFU is claimed."""
    for chip in CHIPS.values():
        if any(kind in device.device_kind for kind in chip.kinds):
            return chip
    return None


def gpu_target(name: str) -> str:
    """The text-format `GpuTargetConfigProto` that lets XLA compile for this GPU without one."""
    chip = CHIPS[name]
    if not chip.capability:
        raise ValueError(f"chip {name!r} is no GPU that can be compiled for without hardware")
    label = f"NVIDIA {name.upper()}"
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128
  core_count: {chip.cores}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {chip.l2_bytes}
  clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {chip.memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {chip.capability} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 68719476736
  ecc_enabled: true name: "{label}" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{label}"
"""


def absent_gpus(name: str, hosts: int = 1, gpus_per_host: int = 8) -> list:
    """Devices of an absent GPU machine, to lower and compile for (needs the cuda extra)."""
    from jax.experimental import topologies  # imports the CUDA plugin: only when asked for

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        target_config=gpu_target(name),
        topology=f"1x{hosts}x{gpus_per_host}",
    )
    return list(topology.devices)
