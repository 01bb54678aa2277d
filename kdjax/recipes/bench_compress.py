"""``kdjax bench compress``: the steps of a config over several seeds, and what distilling them is worth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table

from kdjax import config as configs
from kdjax import results
from kdjax.compress.report import MEASURES
from kdjax.recipes import compress
from kdjax.statistics import mean_and_sd, mean_interval

SCORES = ("before", "made", "alone", "distilled")


def measure(config: ConfigDict, workdir: Path, seeds: int) -> dict[str, Any]:
    """The steps of ``config.compress`` for seeds 0 to ``seeds`` - 1, each in ``workdir/seed-i``, and their summary."""
    found = []
    for seed in range(seeds):
        changed = ConfigDict(config.to_dict(), type_safe=False)
        changed.seed = seed
        found.append(compress.run(changed, workdir / f"seed-{seed}"))
    return {
        "benchmark": "compress",
        "config_sha256": configs.sha256(configs.resolve(config)),
        **summary(found),
        "environment": results.environment(),
    }


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the ``compress.json`` of several seeds say together.

    For each step, by seed and over all: the scores of the model before it, of the model as it is made, and after
    training alone and distilled; ``difference``, distilled - alone, with Student's t interval over the paired seeds,
    the sign so that more is better; and ``recovered``, the share of what making the model lost that distilling brought
    back, (distilled - made) / (before - made), of the means over seeds, since a seed may lose nothing.
    """
    measured = MEASURES[found[0]["task"]]
    steps: dict[str, Any] = {}
    for number, first in enumerate(found[0]["steps"]):
        rows = [one["steps"][number] for one in found]
        of = lambda key, rows=rows: [row[key] and row[key][measured.key] for row in rows]
        scores = {key: of(key) for key in SCORES if None not in of(key)}
        means = {key: mean_and_sd(values) for key, values in scores.items()}
        entry: dict[str, Any] = {key: {**means[key], "seeds": scores[key]} for key in scores}
        if "alone" in scores:
            pairs = zip(scores["distilled"], scores["alone"], strict=True)
            entry["difference"] = mean_interval([measured.better * (a - b) for a, b in pairs])
        if "distilled" in scores:
            before, made, distilled = (means[key]["mean"] or 0.0 for key in ("before", "made", "distilled"))
            entry["recovered"] = (distilled - made) / (before - made) if before != made else None
        steps[first["name"]] = {"params": first["params"], "weights_bytes": first["weights_bytes"], **entry}
    return {
        "task": found[0]["task"],
        "measure": measured.key,
        "seeds": len(found),
        "teacher": mean_and_sd([one["models"]["teacher"]["score"][measured.key] for one in found]),
        "steps": steps,
    }


def table(values: Mapping[str, Any]) -> Table:
    """A row per step: means over the seeds."""
    measured = MEASURES[values["task"]]

    def text(found: Mapping[str, Any] | None, style: str = measured.text) -> str:
        if found is None:
            return ""
        sd = "" if found["sd"] is None else f" ± {measured.factor * found['sd']:.2g}"
        return format(measured.factor * found["mean"], style) + sd

    caption = (
        f"test {measured.label}, mean ± sd over {values['seeds']} seeds; teacher {text(values['teacher'])}. "
        "distilled - alone: paired, 95 % interval, positive is better. recovered: of what the step lost as made"
    )
    shown = Table(
        "step", "before", "as made", "alone", "distilled", "distilled - alone", "recovered %", caption=caption
    )
    for name, step in values["steps"].items():
        difference = step.get("difference")
        gain = text(difference, measured.change) if difference else ""
        if difference and difference["interval_95"]:
            low, high = (measured.factor * end for end in difference["interval_95"])
            gain = f"{measured.factor * difference['mean']:{measured.change}} [{low:+.2f}, {high:+.2f}]"
        recovered = step.get("recovered")
        share = "" if recovered is None else f"{100 * recovered:.0f}"
        shown.add_row(name, *(text(step.get(key)) for key in SCORES), gain, share)
    return shown
