"""What the tuner is asked: a model and a batch on a machine. What cannot be is refused here."""

import dataclasses
import functools
import math
import pathlib

from jaxreason.checkpoint.hf_config import config_from_hf
from jaxreason.checkpoint.safetensors_files import read_json
from jaxreason.model.attention import Use, choose
from jaxreason.model.config import PRESETS, DecoderConfig
from jaxreason.parallel import chips
from jaxreason.parallel.mesh import AXES, resolve_shape
from jaxreason.parallel.workload import Rollout
from jaxreason.recipes import checkpoints
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.tune_step import execution

RECIPES = ("pretrain", "sft", "rl")
# The chips that can be compiled for.
CHIPS = tuple(c.name for c in chips.CHIPS.values() if c.platform != "cuda" or c.gpu)
# Of a chip's memory; the rest is the runtime's, NCCL's and fragmentation.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked. Raises ValueError naming the flag, the value and what would work."""

    chip: str
    hosts: int
    model: str  # a preset or a Hugging Face directory
    sequence: int
    tokens_per_step: int
    tokens: float | None = None  # of the whole run
    recipe: str = "pretrain"
    devices_per_host: int | None = None  # None: as the chip is sold
    fixed: tuple[tuple[str, int], ...] = ()  # mesh axes that are given
    attention: str = "auto"  # or a name of model/attention.py

    def __post_init__(self):
        if self.chip not in CHIPS:
            raise ValueError(f"--chip is {self.chip!r}; known chips: {', '.join(CHIPS)}")
        for name in ("hosts", "sequence", "tokens_per_step", "tokens", "devices_per_host"):
            value, flag = getattr(self, name), name.replace("_", "-")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--{flag} is {value}; it must be a finite number")
            if value is not None and value < 1:
                raise ValueError(f"--{flag} is {value:g}; it must be at least 1")
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe is {self.recipe!r}; it must be {', '.join(RECIPES)}")
        self._check_batch()
        if self.device.platform == "tpu":
            chips.slice_topology(self.chip, self.hosts)
            own = self.device.links.per_host
            if self.devices_per_host not in (None, own):
                raise ValueError(
                    f"--devices-per-host is {self.devices_per_host}; hosts of {self.chip} have "
                    f"{own} chips"
                )
        given = dict(self.fixed)
        rest = [axis for axis in AXES if axis not in given][:1]  # any: it is to be enumerated
        resolve_shape({**given, **dict.fromkeys(rest, -1)}, self.num_devices)

    def _check_batch(self) -> None:
        if self.tokens_per_step % self.sequence:
            below = self.tokens_per_step // self.sequence * self.sequence
            near = " or ".join(str(n) for n in (below, below + self.sequence) if n)
            raise ValueError(
                f"--tokens-per-step is {self.tokens_per_step}, not a multiple of --sequence = "
                f"{self.sequence}; {near} would be"
            )
        if self.recipe == "rl" and self.rows < 2:
            raise ValueError(
                f"--tokens-per-step is {self.tokens_per_step}, one completion; --recipe=rl "
                f"compares them: {2 * self.sequence} or more would do"
            )

    @functools.cached_property
    def device(self) -> chips.Chip:
        """The chip in this machine: fast links between GPUs end with their host."""
        known = chips.chip(self.chip)
        if known.platform == "tpu":
            return known
        per_host = self.devices_per_host or known.links.per_host
        island = min(known.links.island, per_host)
        links = dataclasses.replace(known.links, per_host=per_host, island=island)
        return dataclasses.replace(known, links=links)

    @property
    def num_devices(self) -> int:
        return self.hosts * self.device.links.per_host

    @property
    def rows(self) -> int:
        return self.tokens_per_step // self.sequence

    @property
    def rollout(self) -> Rollout | None:
        """All rows are sampled at once, in one update; a quarter of a row is its prompt."""
        if self.recipe != "rl":
            return None
        quarter = self.sequence // 4
        return Rollout(self.rows, quarter, self.sequence - quarter)

    @functools.cached_property
    def architecture(self) -> DecoderConfig:
        if self.model in PRESETS:
            return PRESETS[self.model]
        if not pathlib.Path(self.model).is_dir():
            raise ValueError(
                f"--model is {self.model!r}, neither a preset nor a folder; presets: "
                f"{', '.join(PRESETS)}"
            )
        return shape_of(checkpoints.parse(self.model))

    def attention_use(self, parts: bool = False) -> Use:
        """What the model asks of its attention there; `parts`: on a mesh that splits rows."""
        c, dtype = self.architecture, execution(self.chip, "none").dtype
        window = any(c.sliding)
        gpu = self.device.gpu
        capability = gpu and f"{gpu.capability}.0"
        return Use(self.device.platform, dtype, c.head_dim, capability, window=window, parts=parts)

    @functools.cached_property
    def chosen_attention(self) -> str:
        """What runs on meshes that do not split rows. Raises ValueError with every reason."""
        try:
            return choose(self.attention, self.attention_use())
        except ValueError as error:
            raise ValueError(f"--attention on {self.chip}: {error}") from error

    @property
    def by_name(self) -> str:
        """What a title says of the attention, where it was asked for by name."""
        return "" if self.attention == "auto" else f", attention={self.attention}"

    @property
    def usable(self) -> float:
        """Bytes of a device."""
        return USABLE * self.device.memory


def shape_of(start: Checkpoint) -> DecoderConfig:
    """Of a Hugging Face directory by its config.json alone: its weights need not be there."""
    if start.base is not None:
        return shape_of(start.base)
    if start.kind == "hf":
        return config_from_hf(read_json(start.directory / "config.json"))
    return start.architecture()
