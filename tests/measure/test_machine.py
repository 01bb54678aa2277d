import numpy as np
import pytest

from kdjax.measure import machine

# Two readings of /proc/stat of a machine with two cores, in ticks: user nice system idle iowait irq softirq steal ...
BEFORE = """cpu  300 0 30 5000 10 0 0 0 0 0
cpu0 100 0 10 2500 5 0 0 0 50 0
cpu1 200 0 20 2500 5 0 0 0 0 0
intr 123 0 0
"""
QUIET = """cpu  1280 0 40 6010 10 0 0 0 0 0
cpu0 100 0 10 3500 5 0 0 0 50 0
cpu1 1180 0 30 2510 5 0 0 0 0 0
intr 200 0 0
"""
BUSY = """cpu  1680 100 40 5150 10 30 20 50 0 0
cpu0 700 100 20 2620 5 30 20 5 50 0
cpu1 980 0 20 2675 5 0 0 45 0 0
"""
TICK = machine._TICK


def shares(after, cores, ours):
    return machine.shares(machine.parse(BEFORE), machine.parse(after), cores, ours * TICK)


def test_of_a_core_that_only_we_used_nothing_is_others():
    seen = shares(QUIET, [1], 980)  # busy: 980 user and 10 system of 1,000 ticks
    np.testing.assert_allclose(list(seen.values()), [0.01, 0.0, 0.0], atol=1e-12)
    found = machine.judge(seen, 0.0, {"a": 0.02})
    assert found["quiet"] and not found["causes"]
    assert "quiet: other processes took 1.0 %" in machine.sentence(found)


def test_others_elsewhere_and_the_hypervisor_are_told_apart():
    # core 0: 600 + 100 + 10 + 30 + 20 + 5 busy of 885; core 1: 780 + 45 busy of 1,000, of which 700 are ours
    seen = shares(BUSY, [1], 700)
    np.testing.assert_allclose(seen["others"], 125 / 1000)
    np.testing.assert_allclose(seen["elsewhere"], 765 / 885)
    np.testing.assert_allclose(seen["steal"], 50 / 1885)
    found = machine.judge(seen, 0.0, {"a": 0.02})
    assert not found["quiet"]
    assert [cause.split(" %")[0].split()[-1] for cause in found["causes"]] == ["12.5", "86.4", "2.7"]
    assert machine.sentence(found).startswith("The machine was not quiet: other processes took 12.5 % of the cores")


def test_unpinned_all_cores_are_ours():
    seen = shares(BUSY, None, 1500)
    np.testing.assert_allclose(seen["others"], (765 + 825 - 1500) / 1885)
    assert seen["elsewhere"] == 0.0


def test_counters_that_lag_behind_are_no_negative_share():
    assert shares(QUIET, [1], 2000)["others"] == 0.0


@pytest.mark.parametrize(("before", "spread", "named"), [(0.3, 0.0, "already before"), (None, 0.2, "20.0 % apart (a)")])
def test_a_busy_begin_and_drifting_rounds_are_causes(before, spread, named):
    (cause,) = machine.judge(None, before, {"a": spread, "b": 0.0})["causes"]
    assert named in cause


def test_without_counters_the_sentence_says_so():
    assert "does not say what else ran" in machine.sentence(machine.judge(None, None, {"a": 0.0}))


def test_spread_is_that_of_numpy():
    medians = np.random.default_rng(0).normal(10, 1, 40)
    expected = (np.quantile(medians, 0.9) - np.quantile(medians, 0.1)) / np.median(medians)
    np.testing.assert_allclose(machine.spread(medians.tolist()), expected)


def test_energy_of_two_packages_over_a_wrap(tmp_path):
    for name, label, value in (("p0", "package-0", 900), ("p1", "package-1", 5), ("core", "core", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(label + "\n")
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")
    counters = machine.energy_counters(tmp_path)
    before = machine.read_energy(counters)
    (tmp_path / "p0" / "energy_uj").write_text("100\n")  # 900 -> 999, 0 -> 100
    (tmp_path / "p1" / "energy_uj").write_text("55\n")
    np.testing.assert_allclose(machine.joules(counters, before, machine.read_energy(counters)), 250e-6)
    assert machine.energy_counters(tmp_path / "none") == []
