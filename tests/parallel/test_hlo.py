"""Collectives read from optimized programs: kinds, bytes, groups, and how often each runs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason.parallel import hlo
from jaxreason.parallel.hlo import Collective
from jaxreason.parallel.mesh import make_mesh

LAYERS, WIDTH = 5, 64


def test_a_gather_in_a_loop_counts_once_a_trip():
    """Weights split eight ways are gathered in each of five layers; gradients summed likewise."""
    mesh = make_mesh({"fsdp": 8})
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

    def loss(w_LDD, x_BD):
        def layer(x_BD, w_DD):
            w_DD = jax.lax.with_sharding_constraint(w_DD, place())
            return jnp.tanh(x_BD @ w_DD), None

        return (jax.lax.scan(layer, x_BD, w_LDD)[0] ** 2).sum()

    split = place(None, "fsdp")
    w_LDD = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=split)
    x_BD = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32, sharding=place("fsdp"))
    text = jax.jit(jax.grad(loss), out_shardings=split).lower(w_LDD, x_BD).compile().as_text()
    matrix = 4 * WIDTH * WIDTH
    found = hlo.collectives(text)
    assert Collective("all-gather", matrix, 8, LAYERS) in found
    assert hlo.total_bytes(found)["all-gather"] == LAYERS * matrix
    sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.bytes * one.times for one in sums) == LAYERS * matrix
    gathered = dict(kind="all-gather", group=8, times=LAYERS, instructions=1, bytes=matrix)
    assert gathered in hlo.summary(found)


# As XLA writes them for GPUs: asynchronous, several operands combined, groups in three notations.
LINES = {
    "%a = ((bf16[256,8]{1,0}, bf16[256,4]{1,0}), (bf16[2048,8]{1,0}, bf16[2048,4]{1,0})) "
    "all-gather-start(%x, %y), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}":
        Collective("all-gather", 2 * 2048 * 12, 8, 1),
    "%r = ((f32[2048,6]{1,0}), (f32[512,6]{1,0})) reduce-scatter-start(%x), "
    "replica_groups=[2,4]<=[8], dimensions={0}": Collective("reduce-scatter", 4 * 2048 * 6, 4, 1),
    "%s = f32[512,6]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add":
        Collective("reduce-scatter", 4 * 2048 * 6, 4, 1),
    "%p = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) collective-permute-start(%x), "
    "source_target_pairs={{0,1},{1,0}}": Collective("collective-permute", 2 * 8 * 128, 2, 1),
    "%t = ((bf16[512,256]{1,0}), bf16[512,256]{1,0}) all-to-all-start(%x), "
    "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}":
        Collective("all-to-all", 2 * 512 * 256, 8, 1),
    "%c = f32[4352]{0} all-reduce-start(%w), replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}":
        Collective("all-reduce", 4 * 4352, 8, 1),
    "%d = f32[64]{0} all-reduce(%w), replica_groups=mesh['a'=1,'b'=4,'c'=8], "
    "device_ids=([4,8]T(1,0)) {'c'}, to_apply=%add": Collective("all-reduce", 4 * 64, 8, 1),
    "%e = f32[64]{0} all-reduce(%w), replica_groups={}, to_apply=%add":
        Collective("all-reduce", 4 * 64, 32, 1),
    "%f = f32[64]{0} all-reduce(%w), replica_groups={{0},{1}}, to_apply=%add": None,
}  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("= ")[1][:24])
def test_a_line(line):
    head = "HloModule step, num_partitions=32\n"
    text = f"{head}ENTRY %main (x: f32[2]) -> f32[2] {{\n  {line}\n}}\n"
    want = LINES[line]  # None: of one device, which exchanges nothing
    assert hlo.collectives(text) == ([] if want is None else [want])


def test_a_loop_and_a_split_sum_as_tpus_have_them():
    """The trips are in the loop's condition; a split sum is a sum inside a fusion of that name."""
    text = """
%all-reduce-scatter.1 (input.2: f32[512,512]) -> f32[128,512] {
  %r = f32[512,512]{1,0:T(8,128)} all-reduce(%input.2), replica_groups={{0,1,2,3}}, to_apply=%add
}
%body (x: f32[512,512]) -> f32[128,512] {
  %f = f32[128,512]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (x: s32[]) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%x, %constant.5), direction=LT
}
ENTRY %main (x: f32[512,512]) -> f32[128,512] {
  %w = f32[512,512]{1,0} while(%x), condition=%condition, body=%body
}
"""
    assert hlo.collectives(text) == [Collective("reduce-scatter", 4 * 512 * 512, 4, 5)]


def test_what_is_not_called_does_not_count():
    text = """
%unused (x: f32[2]) -> f32[2] {
  %r = f32[2]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
%body (x: f32[2]) -> f32[2] {
  %g = f32[2]{0} all-gather(%x), replica_groups={{0,1}}
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %w = f32[2]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = f32[2]{0} while(%w), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""
    assert hlo.collectives(text) == [Collective("all-gather", 8, 2, 7)]
