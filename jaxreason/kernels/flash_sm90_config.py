"""Tiles of the Hopper kernels in `flash_sm90.py` and `flash_sm90_backward.py`."""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.mosaic_gpu import for_head_dim

COMPUTE_CAPABILITY = "9.0"  # the only one whose instructions these are
ROWS = 64  # that a warpgroup's matrix instruction has
COMPUTE = 2  # warpgroups that compute; the one after them copies
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet at once in a program, and buffers of what it reads in turn."""

    queries: int
    keys: int
    stages: int  # of keys; of queries, where keys stay
    value_stages: int  # of values; of gradients of the output, where keys stay

    def __post_init__(self):
        for name in ("queries", "keys"):
            if getattr(self, name) not in (64, 128):
                raise ValueError(f"Tiles.{name} is {getattr(self, name)}; it must be 64 or 128")
        for name in ("stages", "value_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tiles.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, and how many programs share the forward pass: one for each core."""

    forward: Tiles
    of_keys: Tiles  # the gradients of keys and values, and of queries unless `ordered`
    of_queries: Tiles  # the gradient of the queries, if `ordered`
    ordered: bool = False  # the same bits in every run
    programs: int = 132  # H100 SXM, H200

    def __post_init__(self):
        for name in ("forward", "of_queries"):
            queries = getattr(self, name).queries
            if queries != COMPUTE * ROWS:
                raise ValueError(
                    f"Config.{name}.queries is {queries}; it must be {COMPUTE * ROWS}, {ROWS} for "
                    f"each of {COMPUTE} warpgroups"
                )
        if self.programs < 1:
            raise ValueError(f"Config.programs is {self.programs}; it must be at least 1")

    @property
    def adds(self) -> bool:
        """Whether the pass over the keys adds up the gradient of the queries by the way."""
        return not self.ordered


# By the head dim in shared memory. What fits in registers and shared memory; not tuned on a chip.
CONFIGS = {
    64: Config(Tiles(128, 128, 4, 4), Tiles(128, 128, 2, 2), Tiles(128, 128, 2, 2)),
    128: Config(Tiles(128, 128, 2, 2), Tiles(64, 128, 2, 2), Tiles(128, 64, 3, 3)),
    256: Config(Tiles(128, 64, 2, 2), Tiles(64, 64, 2, 1), Tiles(128, 64, 2, 1)),
}


def config_for(head_dim: int) -> Config:
    """Raises NotImplementedError for a head dim that none is for."""
    return for_head_dim("flash_sm90", CONFIGS, head_dim)
