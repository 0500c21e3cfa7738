"""Tiles of the Blackwell kernels in `flash_sm100.py` and `flash_sm100_backward.py`."""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.mosaic_gpu import for_head_dim

COMPUTE_CAPABILITY = "10.0"  # the only one whose instructions these are
ROWS = 128  # that a matrix instruction has, and lanes of the tensor memory
COLUMNS = 512  # of the tensor memory, 32 bits each
NATIVE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread has a row: of what is reduced along rows
TCGEN05 = plgpu.Layout.TCGEN05  # four threads share a row: of what goes to shared memory


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet at once in a program, and buffers of what it reads in turn."""

    queries: int
    keys: int
    stages: int  # of keys; of queries, where keys stay
    value_stages: int  # of values; of gradients of the output, where keys stay

    def __post_init__(self):
        if self.queries not in (64, 128, 256):
            raise ValueError(f"Tiles.queries is {self.queries}; it must be 64, 128 or 256")
        if self.keys not in (64, 128):
            raise ValueError(f"Tiles.keys is {self.keys}; it must be 64 or 128")
        for name in ("stages", "value_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tiles.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, and how many programs share the forward pass: one for each core."""

    forward: Tiles
    of_keys: Tiles  # the gradients of keys and values, and of queries unless `ordered`
    of_queries: Tiles  # the gradient of the queries, if `ordered` or `of_keys.queries` is 64
    ordered: bool = False  # the same bits in every run
    programs: int = 148  # B200

    def __post_init__(self):
        for name in ("forward", "of_queries"):
            queries = getattr(self, name).queries
            if queries not in (ROWS, 2 * ROWS):
                raise ValueError(
                    f"Config.{name}.queries is {queries}; it must be {ROWS} or {2 * ROWS}, {ROWS} "
                    f"for each warpgroup that computes"
                )
        if self.of_keys.keys != ROWS or self.of_keys.queries > ROWS:
            raise ValueError(
                f"Config.of_keys has {self.of_keys.queries} queries and {self.of_keys.keys} keys; "
                f"it must have 64 or {ROWS}, and {ROWS}"
            )
        for name in ("of_keys", "of_queries"):
            if getattr(self, name).stages < 2:
                raise ValueError(
                    f"Config.{name}.stages is 1; it must be at least 2, one read ahead"
                )
        if self.programs < 1:
            raise ValueError(f"Config.programs is {self.programs}; it must be at least 1")

    @property
    def adds(self) -> bool:
        """Whether the pass over the keys adds up the gradient of the queries by the way. With 64
        queries it cannot: the product whose rows they are has 128."""
        return not self.ordered and self.of_keys.queries == ROWS


# By the head dim in shared memory. What fits in it and in the tensor memory; not tuned on a chip.
CONFIGS = {
    64: Config(Tiles(256, 128, 3, 3), Tiles(128, 128, 2, 2), Tiles(256, 64, 3, 3)),
    128: Config(Tiles(256, 128, 2, 2), Tiles(128, 128, 2, 1), Tiles(256, 64, 2, 2)),
    256: Config(Tiles(128, 64, 2, 2), Tiles(64, 128, 2, 1), Tiles(128, 64, 2, 1)),
}


def config_for(head_dim: int) -> Config:
    """Raises NotImplementedError for a head dim that none is for."""
    return for_head_dim("flash_sm100", CONFIGS, head_dim)


def check_columns(name: str, tiles: Tiles, needed: int, head_dim: int):
    """Raises ValueError where what a kernel holds in the tensor memory does not fit."""
    if needed > COLUMNS:
        raise ValueError(
            f"Config.{name} is {tiles}, which takes {needed} columns of tensor memory at head_dim "
            f"{head_dim}; there are {COLUMNS}"
        )
