"""Every attention implementation that can be simulated on CPU, under its own name, in a model."""

import dataclasses
import functools

import pytest

from jaxreason.kernels import decode_pallas, flash, splash
from jaxreason.kernels.ring import Kernel
from jaxreason.model import attention, decode_choice

_TILES = flash.Tiles(16, 32, 4, 2)
_FLASH = dict(config=flash.Config(_TILES, _TILES, flash.Tiles(32, 16, 4, 2), interpret=True))
_KERNELS = {
    "flash": Kernel(
        functools.partial(flash.attention, **_FLASH), functools.partial(flash.gradients, **_FLASH)
    ),
    "splash": Kernel(functools.partial(splash.attention, interpret=True), None),
}
_DECODE = functools.partial(
    decode_pallas.decode_attention, tiles=decode_pallas.Tiles(keys=16), interpret=True
)
RUN_HERE = ("blockwise", "reference", *_KERNELS)


@pytest.fixture
def simulated_kernels(monkeypatch):
    """`mesh.attention = flash`, `mesh.decode_attention = pallas` and the like run here, in Pallas'
    simulation.
    """
    for name, kernel in _KERNELS.items():
        there = attention.IMPLEMENTATIONS[name]
        here = dataclasses.replace(there, kernel=kernel, platforms=None)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, here)
    there = decode_choice.IMPLEMENTATIONS["pallas"]
    here = dataclasses.replace(there, kernel=_DECODE, platforms=None)
    monkeypatch.setitem(decode_choice.IMPLEMENTATIONS, "pallas", here)
