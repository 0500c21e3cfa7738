"""The chips: peaks for MFU, links, how to compile for one that is not here, and with which options.

Figures: NVIDIA and Google data sheets, jax-ml/scaling-book (TPU links); GPU device fields from
OpenXLA's published target specs (xla/backends/gpu/target_config/specs).
"""

import dataclasses
import math
import os

import jax


@dataclasses.dataclass(frozen=True)
class Links:
    """Bandwidth of one device, one way, in bytes a second; and how far the fast links go.

    Of a TPU's torus `inside` counts the two links of one of its dims: a mesh axis lies along one.
    """

    inside: float  # within an island: GPUs of one host, chips of one slice
    between: float  # between islands
    per_host: int  # devices
    island: int  # devices, at most


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What long, large work reaches of each peak: the constants of the time model (cost.py).

    A matmul whose narrower dim is n reaches matmul * n / (n + matmul_half) of the peak FLOP/s, and
    attention over rows of length n accordingly.
    """

    matmul: float
    matmul_half: float
    attention: float
    attention_half: float
    memory: float  # of the bandwidth, in elementwise work
    link: float  # of a link's bandwidth, in collectives of megabytes
    overlap: float  # share of a collective's time that may hide behind the compute of its layer
    latency: float  # seconds of a collective besides its bytes, for each island it passes


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """What XLA wants to know of an NVIDIA GPU that is not here, beside memory and bandwidth."""

    cores: int
    l2_bytes: int
    clock_ghz: float
    capability: int  # compute capability, major


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. FLOP/s are dense bf16; memory in bytes; bandwidth in bytes a second."""

    name: str
    flops: float
    memory: int
    bandwidth: float
    kinds: tuple[str, ...]  # substrings of jax's device_kind
    links: Links
    efficiency: Efficiency
    gpu: GpuTarget | None = None

    @property
    def platform(self) -> str:
        if self.name == "cpu":
            return "cpu"
        return "tpu" if self.name.startswith("v") else "cuda"


# Matmul: 650 and 580 of 989.5 TFLOP/s at widths of 2048 and 1024 (facts/performance.md 1c; 629 by
# quack on an H200, 681 by XLA on an H100). Attention: forward and backward, causal, head dim 128:
# 390, 443, 478 and 493 TFLOP/s at 2k, 4k, 8k and 16k (tokamax's autotuning medians on an H100, same
# page 2). Memory: 4.3 of 4.8 TB/s, a copy measured on an H200. Link: 380 of 450 GB/s, NCCL issue
# 1264. None of them was fitted to the training steps that tests/parallel/test_cost.py holds the
# model against. Overlap and latency are judgements: XLA hides what the layer beside it can.
_HOPPER = Efficiency(
    matmul=0.75, matmul_half=280, attention=0.52, attention_half=640,
    memory=0.90, link=0.80, overlap=0.75, latency=20e-6,
)  # fmt: skip
# Matmul: 1490 to 1740 of 2250 TFLOP/s in TransformerEngine's GEMM table (B300), and the width at
# which half is reached grows as the peak does. Attention: 917 to 977 forward at 4k by cuDNN and FA4
# (flash-attention PR 2605), the backward pass at Hopper's share of that.
_BLACKWELL = Efficiency(
    matmul=0.70, matmul_half=600, attention=0.42, attention_half=1000,
    memory=0.90, link=0.80, overlap=0.75, latency=20e-6,
)  # fmt: skip
# scaling-book: a matmul is bound by FLOPs from widths of about 240 on; splash attention's share is
# MaxText's. Not held against a published step yet.
_TPU = Efficiency(
    matmul=0.80, matmul_half=240, attention=0.45, attention_half=640,
    memory=0.80, link=0.85, overlap=0.80, latency=5e-6,
)  # fmt: skip
# One core of an EPYC 9005: 228 GFLOP/s fp32 and 33 to 40 GB/s (performance.md 10); devices are
# threads of one machine, and its memory is their link.
_CPU = Efficiency(
    matmul=0.60, matmul_half=30, attention=0.20, attention_half=100,
    memory=0.60, link=0.50, overlap=0.0, latency=100e-6,
)  # fmt: skip

_NVLINK4, _NVLINK5 = Links(450e9, 50e9, 8, 8), Links(900e9, 50e9, 8, 8)

CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("b200", 2250e12, 191_514_411_008, 7.67e12, ("B200",), _NVLINK5, _BLACKWELL,
             GpuTarget(148, 132_644_864, 1.965, 10)),
        # The NVL form of the H200 peaks at 836 TFLOP/s; matched before the SXM one by its own name.
        Chip("h200-nvl", 836e12, 151_397_597_184, 4.8e12, ("H200 NVL",), _NVLINK4, _HOPPER),
        Chip("h200", 989.5e12, 151_397_597_184, 4.8e12, ("H200",), _NVLINK4, _HOPPER,
             GpuTarget(132, 52_428_800, 1.98, 9)),
        Chip("h100", 989.5e12, 84_942_979_072, 3.35e12, ("H100",), _NVLINK4, _HOPPER,
             GpuTarget(132, 52_428_800, 1.98, 9)),
        Chip("v5e", 197e12, 16 * 2**30, 0.81e12, ("TPU v5 lite", "TPU v5e"),
             Links(90e9, 6.25e9, 4, 256), _TPU),
        Chip("v5p", 459e12, 96 * 2**30, 2.8e12, ("TPU v5p", "TPU v5"),
             Links(180e9, 6.25e9, 4, 6144), _TPU),
        Chip("v6e", 920e12, 32 * 2**30, 1.6e12, ("TPU v6 lite", "TPU v6e"),
             Links(180e9, 6.25e9, 4, 256), _TPU),
        Chip("cpu", 228e9, 16 * 2**30, 35e9, (), Links(10e9, 1e9, 8, 8), _CPU),
    )
}  # fmt: skip


def chip(name: str) -> Chip:
    """Raises ValueError with the known names."""
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}; known chips: {', '.join(CHIPS)}")
    return CHIPS[name]


def detect(device: jax.Device) -> Chip | None:
    """The chip of a live device; None where no peak is known (a CPU), so no MFU is claimed."""
    for known in CHIPS.values():
        if any(kind in device.device_kind for kind in known.kinds):
            return known
    return None


# --- compiler options -----------------------------------------------------------------------------

_MIB = 2**20


def xla_options(chip: Chip | None, num_devices: int) -> dict[str, object]:
    """What the train step is compiled with unless the config says otherwise.

    Names that jaxlib 0.10.2 and 0.12 both know. One device has no collectives to hide, and gets
    the compiler's defaults; so do chips whose compiler has good ones (TPU) and CPUs.
    """
    if chip is None or chip.platform != "cuda" or num_devices == 1:
        return {}
    options = {
        # Off unless asked for, at optimization level O0: collectives would block their layer.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # 30 MiB by default, less than half a layer of 1.7B: a collective below some tens of
        # megabytes does not fill the links. More would leave nothing to hide it behind.
        "xla_gpu_all_gather_combine_threshold_bytes": 128 * _MIB,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 128 * _MIB,
        "xla_gpu_all_reduce_combine_threshold_bytes": 128 * _MIB,
    }
    if chip.gpu and chip.gpu.capability >= 10:
        # JAX-Toolbox for B200: graphs of library calls delay NCCL's kernels.
        options["xla_gpu_enable_command_buffer"] = "FUSION,CUSTOM_CALL"
    return options


# --- devices that are not here --------------------------------------------------------------------


def gpu_target(name: str) -> str:
    """The text-format `GpuTargetConfigProto` that lets XLA compile for this GPU without one."""
    known = chip(name)
    if known.gpu is None:
        raise ValueError(f"chip {name!r} is no GPU that can be compiled for without hardware")
    label = f"NVIDIA {name.upper()}"
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 fpus_per_core: 128
  core_count: {known.gpu.cores}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(known.bandwidth)} l2_cache_size: {known.gpu.l2_bytes}
  clock_rate_ghz: {known.gpu.clock_ghz}
  device_memory_size: {known.memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{
    major: {known.gpu.capability} feature_extension: ACCELERATED_FEATURES }}
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


def slice_topology(name: str, hosts: int) -> str:
    """The name of a TPU slice of that many hosts: as square as can be, v5p:4x4x4 for 16.

    Raises ValueError where there is no slice of that size.
    """
    known = chip(name)
    dims = [2, 2, 1] if name == "v5p" else [2, 2]
    devices = hosts * known.links.per_host
    while math.prod(dims) < devices:
        dims[dims.index(min(dims))] *= 2
    if math.prod(dims) != devices or devices > known.links.island:
        most = known.links.island // known.links.per_host
        raise ValueError(
            f"hosts is {hosts}; slices of {name} have 1, 2, 4, ... {_power_below(most)} hosts of "
            f"{known.links.per_host} chips"
        )
    dims = sorted(dims, key=lambda dim: (dim == 1, dim))  # 2x2x1 and 2x4x4, as they are called
    return f"{name}:{'x'.join(map(str, dims))}"


def _power_below(most: int) -> int:
    return 2 ** (most.bit_length() - 1)


def absent_tpus(name: str, hosts: int) -> list:
    """Devices of an absent TPU slice, to lower and compile for (needs libtpu, the tpu extra)."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a server of Google's cloud
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=slice_topology(name, hosts)
    )
    return list(topology.devices)
