"""Was the machine quiet? What the kernel's counters say of everybody else while the models were timed."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# A core that others hold for 5 % of the time delays one call in twenty: p90 and the throughput show it.
OTHERS_MOST = 0.05
# Cores that are not ours share its memory, its clock and its last cache; half of them busy is felt there.
ELSEWHERE_MOST = 0.5
STEAL_MOST = 0.02  # of all cores: time that a hypervisor gave to other machines comes in long pauses
# p50 shall hold within 5 %: where the medians of the rounds (their 10th to 90th percentile) lie further apart than
# twice that, the machine was not the same all the time.
SPREAD_MOST = 0.10
_TICK = 1.0 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01  # seconds of a tick


class Snapshot(NamedTuple):
    """Seconds since the machine started, by core."""

    busy: dict[int, float]  # whoever ran there, and what the hypervisor took
    steal: dict[int, float]
    total: dict[int, float]


def snapshot(path: Path = Path("/proc/stat")) -> Snapshot | None:
    """The kernel's counters now; ``None`` where there are none."""
    try:
        return parse(path.read_text())
    except OSError:
        return None


def parse(text: str) -> Snapshot:
    """The counters of each core from the text of ``/proc/stat`` (proc(5)).

    The columns are user, nice, system, idle, iowait, irq, softirq, steal, guest and guest_nice; the last two are in the
    first two already.
    """
    busy, steal, total = {}, {}, {}
    for line in text.splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(value) * _TICK for value in values[:8]] + [0.0] * (8 - len(values))
            core = int(name[3:])
            total[core], steal[core] = sum(ticks), ticks[7]
            busy[core] = total[core] - ticks[3] - ticks[4]
    return Snapshot(busy, steal, total)


def load_average() -> float | None:
    """Processes that wanted to run over the last minute; ``None`` where the platform does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_now(cores: Sequence[int] | None, seconds: float = 0.5) -> float | None:
    """The share of those cores (``None``: of all) that is in use while this thread sleeps."""
    before = snapshot()
    time.sleep(seconds)
    after = snapshot()
    return shares(before, after, cores, 0.0)["others"] if before and after else None


def shares(before: Snapshot, after: Snapshot, cores: Sequence[int] | None, ours_s: float) -> dict[str, float]:
    """What was used between two snapshots, as shares in [0, 1].

    Args:
      before: at the begin.
      after: at the end.
      cores: on which our processes ran and nowhere else; ``None``: on any.
      ours_s: the CPU seconds that they took.

    Returns:
      ``others``: of our cores, without ``ours_s`` and with what the hypervisor took; ``elsewhere``: of the cores that
      are not ours, whoever used them; ``steal``: what the hypervisor took of all.
    """
    own = [core for core in after.total if cores is None or core in cores]
    rest = [core for core in after.total if core not in own]
    grown = lambda part, which: sum(getattr(after, part)[c] - getattr(before, part).get(c, 0.0) for c in which)
    share = lambda used, which: float(np.clip(used / max(grown("total", which), _TICK), 0.0, 1.0))
    return {
        "others": share(grown("busy", own) - ours_s, own),
        "elsewhere": share(grown("busy", rest), rest) if rest else 0.0,
        "steal": share(grown("steal", after.total), list(after.total)),
    }


def spread(medians: Sequence[float]) -> float:
    """How far the medians of the rounds lie apart: their 10th to their 90th percentile over their median."""
    low, middle, high = np.percentile(medians, [10, 50, 90])
    return float((high - low) / middle) if middle else 0.0


def judge(seen: Mapping[str, float] | None, before: float | None, spreads: Mapping[str, float]) -> dict[str, Any]:
    """``{"quiet", "causes", ...}``: whether the figures can be trusted, why not, and the numbers that say so.

    Args:
      seen: what ``shares`` returned; ``None`` where the kernel does not say.
      before: what ``busy_now`` returned before anything of ours ran.
      spreads: the ``spread`` of each model.
    """
    seen = dict(seen or {})
    limits = (
        ("others", OTHERS_MOST, "other processes took {} of the cores on which the models ran"),
        ("elsewhere", ELSEWHERE_MOST, "the machine's other cores were {} busy"),
        ("steal", STEAL_MOST, "the hypervisor gave {} of the time to other machines"),
    )
    causes = [text.format(_percent(seen[key])) for key, most, text in limits if seen.get(key, 0.0) > most]
    if before is not None and before > OTHERS_MOST:
        causes.append(f"those cores were {_percent(before)} busy already before the measurement")
    worst = max(spreads, key=lambda name: spreads[name])
    if spreads[worst] > SPREAD_MOST:
        causes.append(f"the median latencies of the rounds lie {_percent(spreads[worst])} apart ({worst})")
    return {
        "quiet": not causes,
        "causes": causes,
        "others": seen.get("others"),
        "elsewhere": seen.get("elsewhere"),
        "steal": seen.get("steal"),
        "busy_before": before,
        "spread": dict(spreads),
    }


def sentence(found: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    if not found["quiet"]:
        return f"The machine was not quiet: {'; '.join(found['causes'])}. Measure again when nothing else runs."
    if found["others"] is None:
        return "The medians of the rounds agree; this platform does not say what else ran."
    return f"The machine was quiet: other processes took {_percent(found['others'])} of the cores that were used."


# ----------------------------------------------------------------------------------------------------------- energy


class Counter(NamedTuple):
    """A RAPL counter of one processor package: microjoules that wrap around."""

    path: Path
    wraps_at: int


def energy_counters(root: Path = Path("/sys/class/powercap")) -> list[Counter]:
    """The counters of whole packages that this process may read; most machines give them to root alone, or not at
    all."""
    found = []
    for place in sorted(root.glob("*")):
        try:
            if (place / "name").read_text().startswith("package"):
                int((place / "energy_uj").read_text())
                found.append(Counter(place / "energy_uj", int((place / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return found


def read_energy(counters: Sequence[Counter]) -> list[int]:
    """Their values now."""
    return [int(counter.path.read_text()) for counter in counters]


def joules(counters: Sequence[Counter], before: Sequence[int], after: Sequence[int]) -> float:
    """What the machine took between two readings, all of it; a counter has wrapped around at most once."""
    grown = ((now - then) % (counter.wraps_at + 1) for counter, then, now in zip(counters, before, after, strict=True))
    return 1e-6 * sum(grown)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
