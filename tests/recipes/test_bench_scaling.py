"""What devices say to each other is read right, and is what the sharding rules ask for."""

import pytest

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.recipes import bench, bench_hlo, bench_scaling
from kdjax.recipes.bench_hlo import Collective
from tests.helpers import tiny_config

PROGRAM = """HloModule jit_packed, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner.2 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gathered = bf16[32,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}

%outer.1_spmd (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %again = (s32[], bf16[4,8]{1,0}) while(%p), condition=%less, body=%inner.2, backend_config={"known_trip_count":{"n":"5"}}
  %both = (f32[16]{0}, /*index=1*/pred[]) all-reduce(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main.7_spmd (param: f32[4,8]) -> f32[8] {
  %twice = (s32[], bf16[4,8]{1,0}) while(%p), condition=%less, body=%outer.1_spmd, backend_config={"known_trip_count":{"n":"3"}}
  %begun = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%begun)
  %moved = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  ROOT %out = f32[8]{0} reduce-scatter(%z), dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_read_with_their_sizes_and_how_often_they_run():
    found = bench_hlo.collectives(PROGRAM)
    assert found == [
        Collective("all-gather", "bf16", (32, 8), 15),
        Collective("all-reduce", "f32", (16,), 3),
        Collective("all-reduce", "pred", (), 3),
        Collective("all-gather", "f32", (16, 8), 1),
        Collective("collective-permute", "f32", (2,), 1),
        Collective("reduce-scatter", "f32", (8,), 1),
    ]
    assert [one.bytes for one in found] == [512, 64, 1, 512, 8, 32]
    assert bench_hlo.by_kind(found)["all-gather"] == {"count": 16, "bytes": 15 * 512 + 512}


def test_a_gather_of_a_parameter_that_should_be_whole_is_named():
    found = bench_hlo.collectives(PROGRAM)
    whole = {"teacher/kernel": (8, 1, 16), "student/blocks/kernel": (3, 8, 32), "student/bias": (16,)}
    said = bench_hlo.unasked(found, whole, [])
    assert said == [
        "bf16[32, 8] is of the sizes of student/blocks/kernel",
        "f32[16, 8] is of the sizes of teacher/kernel",
    ]
    assert bench_hlo.unasked(found, whole, ["student/blocks/kernel"]) == said[1:]  # the rules split it


def _meshed(**axes):
    config = tiny_config()
    config.teacher.options, config.student.options = {"hidden": (256, 256)}, {"hidden": (256,)}
    config.mesh = axes
    return configs.resolve(config)


def test_a_batch_that_is_split_moves_gradients_and_no_parameter():
    one, eight = (bench_scaling.on_mesh(_meshed(data=count, fsdp=1)) for count in (1, 8))
    assert one["collectives"] == {} and one["devices"] == 1
    assert set(eight["collectives"]) == {"all-reduce"} and eight["unasked_gathers"] == []
    params = 64 * 256 + 256 + 2560 + 10
    assert 4 * params <= eight["collectives"]["all-reduce"]["bytes"] < 4 * params + 200  # and the metrics
    assert eight["weights_bytes"] == one["weights_bytes"] and eight["weights_bytes"]["student"] == 4 * params
    assert 1.0 <= 8 * eight["flops_per_device"] / one["flops_per_device"] < 1.3  # each does the optimiser's work


def test_parameters_that_are_split_are_gathered_as_asked():
    found = bench_scaling.on_mesh(_meshed(data=1, fsdp=8))
    assert found["collectives"]["all-gather"]["count"] > 0
    # The large kernels are split and may be gathered; the compiler splits the update of a small one besides.
    assert all(one.endswith("head/kernel") for one in found["unasked_gathers"])
    assert found["weights_bytes"]["student"] == 4 * (64 * 256 // 8 + 256 + 2560 + 10)


def test_the_table_has_a_row_for_each_mesh():
    row = bench_scaling.on_mesh(_meshed(data=2, fsdp=1)) | {"flops_over_share": 1.0}
    values = {"meshes": [row], "real_devices": False, **row["environment"]}
    header, (cells,) = bench_scaling.cells(values)
    assert len(header) == len(cells) and cells[0] == "data 2" and "all-reduce" in cells[-2]
    assert "not run" in bench_scaling.caption(values)


def test_a_batch_that_two_devices_cannot_share_is_refused(tmp_path):
    config = tiny_config()
    config.data.batch_size = 33
    with pytest.raises(UserError, match=r"share data\.batch_size=33"):
        bench.run("scaling", configs.resolve(config), workdir=tmp_path)
    with pytest.raises(UserError, match="bench step takes no --devices"):
        bench.run("step", config, workdir=tmp_path, devices=4)
