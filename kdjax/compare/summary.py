"""What a comparison of methods came to: as figures, in sentences, and as a table for a terminal or a document.

Every difference is paired over the seeds. A difference is called real where Holm's correction over its family of
comparisons says so: all methods against the control are one family, all other methods against the baseline another.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from kdjax import report_html as ui
from kdjax import statistics
from kdjax.compare import results as contract
from kdjax.results import noise_points
from kdjax.untrusted import markdown as plain
from kdjax.untrusted import terminal

BETTER, WORSE, TIED = "better", "worse", "not told apart"
MARKS = {BETTER: " ▲", WORSE: " ▼", TIED: ""}
STYLES = {BETTER: "green", WORSE: "red", TIED: "dim"}
TERMINAL = ("accuracy", "to_control", "to_baseline", "agreement", "ms_ratio")
Row = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------ the figures


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method, the highest mean accuracy first.

    Returns:
        Rows of ``method``; ``accuracy`` (``statistics.mean_interval``); ``to_control`` and ``to_baseline``
        (``statistics.paired`` of the accuracies, with ``holm_p`` and a ``verdict`` of "better", "worse" or "not told
        apart"; None for the control and the baseline themselves, and for the control against the baseline, which is the
        baseline's own row); the means of ``agreement``, ``kl``, ``nll`` and ``ece``; ``flops_ratio`` and ``ms_ratio``,
        the cost of a step relative to the baseline's (to the control's without a baseline), None if that is 0.
    """
    methods, control, baseline = results["methods"], results["control"], results["baseline"]
    against_control = _family(results, control, [name for name in methods if name != control])
    others = [name for name in methods if name not in (control, baseline)]
    against_baseline = _family(results, baseline, others) if baseline is not None else {}
    cost = methods[baseline if baseline is not None else control]
    rows = []
    for name, method in methods.items():
        means = {key: float(np.mean([cell[key] for cell in method["cells"]])) for key in contract.CELL}
        ratio = lambda key, method=method: method[key] / cost[key] if cost[key] else None
        rows.append(
            {
                "method": name,
                **means,
                "accuracy": statistics.mean_interval(_accuracies(method), least_sd(results)),
                "to_control": against_control.get(name),
                "to_baseline": against_baseline.get(name),
                "flops_ratio": ratio("flops_per_step"),
                "ms_ratio": ratio("ms_per_step"),
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"]["mean"])


def _family(results: Mapping[str, Any], reference: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The comparisons of ``names`` with one method, corrected for their number."""
    methods = results["methods"]
    spread = math.sqrt(2) * least_sd(results)  # of a difference of two
    against = _accuracies(methods[reference])
    found = [statistics.paired(_accuracies(methods[name]), against, spread) for name in names]
    corrected = statistics.holm([one["p"] for one in found])
    return {
        name: {**one, "holm_p": p, "verdict": _verdict(one["mean"], p)}
        for name, one, p in zip(names, found, corrected, strict=True)
    }


def _verdict(mean: float, p: float | None) -> str:
    if p is None or p > statistics.LEVEL:
        return TIED
    return BETTER if mean > 0 else WORSE


def _accuracies(method: Mapping[str, Any]) -> list[float]:
    return [cell["accuracy"] for cell in method["cells"]]


def least_sd(results: Mapping[str, Any]) -> float:
    """Of an accuracy: the deviation of rounding to whole test examples, for seeds that agree to the last one."""
    return 1 / (math.sqrt(12) * results["test_examples"])


# ---------------------------------------------------------------------------------------------------- in sentences


def sentence(results: Mapping[str, Any]) -> str:
    """What the comparison came to, in plain sentences: which differences are real, which are not, and what hides."""
    return " ".join(sentences(results))


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The parts of :func:`sentence`, the most important first."""
    rows, seeds, baseline = summarise(results), len(results["seeds"]), results["baseline"]
    compared = [row for row in rows if row["to_control"]]
    if not compared:
        return [f"Only the control ran: it is right on {_percent(rows[0])} % of the test set."]
    if seeds == 1:
        return _one_seed(results, rows)
    found = [_counts(compared, "to_control", "the same student alone")]
    found += [
        f"{title}: {_names(compared, 'to_control', verdict)}."
        for title, verdict in (("Better", BETTER), ("Worse", WORSE), ("No real difference seen", TIED))
        if any(row["to_control"]["verdict"] == verdict for row in compared)
    ]
    beside = [row for row in rows if row["to_baseline"]]
    if beside:
        real = [
            f"{verdict}: {_names(beside, 'to_baseline', verdict)}"
            for verdict in (BETTER, WORSE)
            if any(row["to_baseline"]["verdict"] == verdict for row in beside)
        ]
        counted = _counts(beside, "to_baseline", f"plain KD ({baseline})")
        found.append(f"{counted[:-1]} ({'; '.join(real)})." if real else counted)
    if len(compared) > 1:
        found.append(_leader(results, rows))
    return [*found, _visible(compared, seeds), *_idle(results)]


def _counts(rows: Sequence[Row], key: str, reference: str) -> str:
    counts = {v: sum(row[key]["verdict"] == v for row in rows) for v in (BETTER, WORSE, TIED)}
    if len(rows) == 1:
        how = rows[0][key]["verdict"]
        return f"{rows[0]['method']} is {how} {'from' if how == TIED else 'than'} {reference}."
    verb = lambda verdict: f"{counts[verdict] or 'none'} {'is' if counts[verdict] <= 1 else 'are'} {verdict}"
    return f"Of {len(rows)} methods, {verb(BETTER)} than {reference}, {verb(WORSE)}, and {verb(TIED)} from it."


def _names(rows: Sequence[Row], key: str, verdict: str) -> str:
    """The methods with that verdict, with their differences in points."""
    return ", ".join(
        f"{row['method']} {ui.signed(100 * row[key]['mean'], 2)}" for row in rows if row[key]["verdict"] == verdict
    )


def _leader(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The highest mean, and what shares the first place with it (a family of its own)."""
    first = rows[0]["method"]
    against = _family(results, first, [row["method"] for row in rows[1:]])
    tied = [name for name, one in against.items() if one["verdict"] == TIED]
    best = f"The highest mean is that of {first}, {_percent(rows[0])} %"
    if not tied:
        return f"{best}, told apart from all others."
    if len(tied) == len(against):
        return f"{best}, not told apart from any other."
    return f"{best}, not told apart from {len(tied)} of the {len(against)} others: {', '.join(tied)}."


def _visible(compared: Sequence[Row], seeds: int) -> str:
    """How large a difference must be for so few seeds; the median deviation stands for all methods."""
    sd = float(np.median([row["to_control"]["sd"] for row in compared]))
    least = 100 * statistics.visible_difference(sd, seeds, len(compared))
    among = f" and {len(compared)} comparisons" if len(compared) > 1 else ""
    return (
        f"With {seeds} seeds{among}, a difference must typically be {least:.2g} points to be seen: smaller ones may be "
        "there, and “not told apart” does not mean equal."
    )


def _one_seed(results: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    control = next(row for row in rows if row["method"] == results["control"])
    examples = results["test_examples"]
    noise = noise_points([rows[0]["accuracy"]["mean"], control["accuracy"]["mean"]], examples)
    return [
        "One seed: no difference between methods can be told from chance.",
        f"The highest accuracy is that of {rows[0]['method']}, {_percent(rows[0])} %; the same student alone has "
        f"{_percent(control)} %.",
        f"With {examples:,} test examples, differences below about {noise:.1f} points (two binomial standard errors) "
        "are noise of the test set alone; for that of training, run at least 5 seeds.",
        *_idle(results),
    ]


def _idle(results: Mapping[str, Any]) -> list[str]:
    """Names the methods whose every run ended at the control's very parameters: their terms did nothing."""
    digests = {name: [cell["params_sha256"] for cell in m["cells"]] for name, m in results["methods"].items()}
    control = digests.pop(results["control"])
    idle = [name for name, found in digests.items() if found == control]
    return [f"No effect at all: {', '.join(idle)} gave exactly the parameters of {results['control']}."] if idle else []


# ---------------------------------------------------------------------------------------------------------- tables


def table(results: Mapping[str, Any]) -> Table:
    """The leaderboard for a terminal of 80 columns, with the sentences below it; ``markdown`` has more figures."""
    shown = {label: key for label, key in columns(results).items() if key in TERMINAL}
    caption = terminal(sentence(results))
    found = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("method", overflow="fold")
    for label, key in shown.items():
        found.add_column(terminal(label), justify="right", overflow="fold", style="bold" if key == "accuracy" else "")
    for row in summarise(results):
        cells = [terminal(cell(row, key), _style(row, key)) for key in shown.values()]
        found.add_row(terminal(row["method"]), *cells)
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The leaderboard as a Markdown table, real differences bold, with a line that explains it."""
    shown = columns(results)
    lines = [f"| {' | '.join(['method', *map(plain, shown)])} |", f"|---|{'---:|' * len(shown)}"]
    for row in summarise(results):
        cells = [plain(row["method"])]
        for key in shown.values():
            real = isinstance(row[key], dict) and row[key].get("verdict", TIED) != TIED
            cells.append(f"**{cell(row, key)}**" if real else cell(row, key))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{legend(results)}\n"


def columns(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables' columns after the method: label -> key of a row."""
    baseline = results["baseline"]
    cost = baseline if baseline is not None else results["control"]
    return {
        "accuracy %": "accuracy",
        f"− {results['control']}": "to_control",
        **({f"− {baseline}": "to_baseline"} if baseline is not None else {}),
        "agrees %": "agreement",
        "KL": "kl",
        "NLL": "nll",
        "ECE": "ece",
        f"FLOPs / {cost}": "flops_ratio",
        f"ms / {cost}": "ms_ratio",
    }


def cell(row: Row, key: str) -> str:
    """The text of one figure of a row, as every table shows it."""
    value = row[key]
    if value is None:
        return "–"
    if key == "accuracy":
        return f"{_percent(row)}{half_width(value)}"
    if key in ("to_control", "to_baseline"):
        return f"{ui.signed(100 * value['mean'], 2)}{half_width(value)}{MARKS[value['verdict']]}"
    if key == "agreement":
        return f"{100 * value:.2f}"
    return f"{value:.2f}" if key.endswith("ratio") else f"{value:.3f}"


def _style(row: Row, key: str) -> str:
    compared = key in ("to_control", "to_baseline") and row[key]
    return STYLES[row[key]["verdict"]] if compared else ""


def _percent(row: Row) -> str:
    return f"{100 * row['accuracy']['mean']:.2f}"


def half_width(found: Mapping[str, Any]) -> str:
    """Half the width of an interval, in points."""
    ends = found["interval_95"]
    return f" ± {50 * (ends[1] - ends[0]):.2f}" if ends else ""


def legend(results: Mapping[str, Any]) -> str:
    """What the figures of the tables are, and what they do not say."""
    seeds, tuning = len(results["seeds"]), results["tuning"]
    trained = f"{seeds} seed{'s' if seeds > 1 else ''}, {results['updates']:,} updates each"
    budget = (
        f"every tuned method had {tuning['trials']} trials, judged on {tuning['holdout_examples']:,} held-out training "
        "examples"
        if tuning
        else "no method was tuned"
    )
    return (
        f"{trained}; {budget}. Means ± half the 95 % interval of Student's t; differences in points, paired over the "
        "seeds, ▲ better and ▼ worse by the paired t-test at 5 % after Holm's correction for the number of methods (an "
        "interval beside 0 is not enough). KL(teacher ‖ student) and NLL in nats. The intervals say what other seeds "
        f"would give on the same {results['test_examples']:,} test examples, not what other examples would."
    )
