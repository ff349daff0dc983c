"""Chips whose compilers need no hardware: numbers of their data sheets, and what they could do at best.

Used by benchmarks/aot.py.
"""

import importlib.util
import re
from typing import NamedTuple

from idml_jax.runtime.files import first_line


class Chip(NamedTuple):
    """Numbers of a chip from its data sheet.

    Attributes:
      name: what it is called.
      peak: dense bfloat16 arithmetic in TFLOP/s.
      memory: memory in GiB.
      bandwidth: bandwidth of the memory in GB/s.
      link: GB/s that it receives from other chips over all of its links together, half of what it exchanges.
      source: where the numbers are from.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    source: str


_GOOGLE, _NVIDIA = "Google Cloud, TPU system architecture", "NVIDIA data sheet"
CHIPS = {
    "v4": Chip("TPU v4", 275, 32, 1228, 300, _GOOGLE),
    "v5e": Chip("TPU v5e", 197, 16, 819, 200, _GOOGLE),
    "v5p": Chip("TPU v5p", 459, 95, 2765, 600, _GOOGLE),
    "v6e": Chip("TPU v6e", 918, 32, 1600, 400, _GOOGLE),
    "h100": Chip("H100 SXM", 989, 79.1, 3350, 450, _NVIDIA),
    "a100": Chip("A100 SXM 80 GB", 312, 79.2, 2039, 300, _NVIDIA),
    "l4": Chip("L4", 121, 22.5, 300, 32, _NVIDIA),
}
# What the GPU compiler wants to know of a GPU: properties that the driver reports, from NVIDIA's documentation.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": _GPU.format(
        name="NVIDIA H100 80GB HBM3", cores=132, units=128, clock=1.98, cache=52428800, major=9, minor=0, threads=2048,
        shared=233472, optin=232448, bandwidth=3352320000000, memory=84978434048,
    ),
    "a100": _GPU.format(
        name="NVIDIA A100-SXM4-80GB", cores=108, units=64, clock=1.41, cache=41943040, major=8, minor=0, threads=2048,
        shared=167936, optin=166912, bandwidth=2039000000000, memory=85095874560,
    ),
    "l4": _GPU.format(
        name="NVIDIA L4", cores=58, units=128, clock=2.04, cache=50331648, major=8, minor=9, threads=1536,
        shared=102400, optin=101376, bandwidth=300096000000, memory=24152899584,
    ),
}  # fmt: skip
GPU_SHARE = 0.75  # of a GPU's memory, which jax reserves by default


class Bounds(NamedTuple):
    """The times in seconds that a step takes at least, if arithmetic, memory or links alone mattered.

    Attributes:
      arithmetic: at the chip's peak.
      memory: at the bandwidth of its memory.
      links: at the bandwidth of its links.
    """

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest of them."""
        return max(self)

    @property
    def binds(self) -> str:
        """Which one that is."""
        return self._fields[self.index(self.seconds)]


def bounds(chip: Chip, operations: float, read: float, received: float) -> Bounds:
    """The bounds of a program on a chip.

    Args:
      chip: the chip.
      operations: arithmetic on one chip.
      read: bytes read and written on one chip.
      received: bytes received by one chip.
    """
    return Bounds(operations / chip.peak / 1e12, read / chip.bandwidth / 1e9, received / chip.link / 1e9)


# Numbers in an arrangement of TPUs, and the most along one of them.
ARRANGEMENTS = {"v4": (3, 16), "v5p": (3, 24), "v5e": (2, 16), "v6e": (2, 16)}


def devices_of(target: str):
    """Chip and (described) devices of ``v5e:2x4``, ``h100:8``."""
    from jax.experimental import topologies

    name, _, arrangement = target.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", arrangement):
        raise SystemExit(f"{target!r} is not a chip and its arrangement; chips: {', '.join(CHIPS)}; v5e:2x4, h100:8")
    sides = [int(side) for side in arrangement.split("x")]
    if name in GPUS and len(sides) > 1:
        raise SystemExit(f"{target!r}: for GPUs write their number, as in {name}:8")
    if name in ARRANGEMENTS:
        count, most = ARRANGEMENTS[name]
        if len(sides) != count or max(sides) > most:
            example = "2x2x1" if count == 3 else "2x4"
            raise SystemExit(
                f"{target!r}: {CHIPS[name].name}s are arranged by {count} numbers of at most {most}: {name}:{example}"
            )
    how = {"chip_config_name": "megacore"} if name == "v4" else {}  # its two cores are one device, as jax wants it
    if max(sides) == 1:  # one chip; a host has four otherwise
        how["chips_per_host_bounds"] = (1, 1, 1)
    try:
        if name in GPUS:
            described = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=GPUS[name], topology=f"1x1x{arrangement}"
            )
        else:
            described = topologies.get_topology_desc(platform="tpu", topology_name=target, **how)
    except Exception as error:  # jax raises several kinds
        needed = "jax-cuda13-plugin and jax-cuda13-pjrt" if name in GPUS else "libtpu (pip install -e '.[tpu]')"
        text = first_line(error)
        if name not in GPUS and importlib.util.find_spec("libtpu"):
            raise SystemExit(f"{target} is no arrangement of a {CHIPS[name].name} that libtpu knows: {text}") from None
        raise SystemExit(f"no compiler for {target}: {text}; it needs {needed}") from None
    return CHIPS[name], list(described.devices)
