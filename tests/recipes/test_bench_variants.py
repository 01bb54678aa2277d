"""One key changed at a time: what the figures must be whatever the machine's speed."""

import pytest

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.recipes import bench, bench_host, bench_limits, bench_variants

SMALL = ["student.name=mlp", "student.options={'hidden':(16,)}", "train.steps=6", "teacher.steps=6", "mesh.data=1"]

CHANGES = ("train.dtype=float32", *bench_variants.CHANGES[2:4], *bench_variants.CHANGES[5:])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench_variants, "CHANGES", CHANGES)
    monkeypatch.setattr(bench_host, "ROUND", 0.0)
    monkeypatch.setattr(bench_variants, "ROUNDS", 2)
    monkeypatch.setattr(bench_limits, "SIZES", (64,))


def config(*words):
    return configs.override(configs.default(), [f"--config.{word}" for word in (*SMALL, *words)])


def test_every_change_is_beside_the_step_as_configured(tmp_path):
    values = bench.run("variants", config("teacher.name=mlp"), workdir=tmp_path, seconds=0.0)
    rows = {row["change"]: row for row in values["rows"]}
    assert list(rows) == ["", *CHANGES[1:]]  # the first is as configured, without a row of its own
    plain = rows.pop("")
    assert plain["step_ms"] > 0.0 and "over_plain" not in plain
    for change, row in rows.items():
        low, high = row["over_plain_range"]
        assert 0.0 < low <= row["over_plain"] <= high
        # In float8 the gradient of the images is written down, too, which nobody asks for.
        assert row["products"] == pytest.approx(plain["products"], rel=0.02) and row["peak_fraction"] > 0.0
        assert row["loss_over_plain"] == pytest.approx(1.0, abs=0.05)
        assert (row["loss"] == plain["loss"]) == (change == "train.overlap=True")
    arguments = lambda change: plain["bytes"]["arguments"] - rows[change]["bytes"]["arguments"]
    weights = 64 * 256 + 256 * 256 + 256 * 10  # of the teacher's layers: one scale a channel in place of three bytes
    assert arguments("teacher.weights=bfloat16") == 2 * weights
    assert arguments("teacher.weights=int8") == 3 * weights - 4 * (256 + 256 + 10)
    header, cells = bench_variants.cells(values)
    assert len(cells) == len(values["rows"]) and {len(row) for row in cells} == {len(header)}


def test_a_change_that_is_refused_says_why(monkeypatch):
    monkeypatch.setattr(bench_variants, "CHANGES", ("train.products=float8",))
    values = bench_variants.measure(config("student.name=cnn", "student.options={'widths':(4,4),'strides':(2,2)}"), 0.0)
    refused = {row["change"]: row["refused"] for row in values["rows"] if "refused" in row}
    assert list(refused) == ["train.products=float8"] and "dense layers" in refused["train.products=float8"]
    header, cells = bench_variants.cells(values)
    assert {len(row) for row in cells} == {len(header)}


def test_a_cache_in_the_teachers_place_is_refused(monkeypatch):
    experiment = bench_variants.build.prepare(config())
    monkeypatch.setattr(bench_variants.build, "prepare", lambda config: experiment._replace(signals=object()))
    with pytest.raises(UserError, match="teacher in the step"):
        bench_variants.measure(config(), 0.0)
