"""The part of ``results.json`` that is of language runs: an arm's scores and sample, and how they are told."""

import math
from collections.abc import Mapping
from typing import Any

from kdjax import memory
from kdjax import results as contract

TASK = "language"
SIGNAL_WIDTHS = {"top_k": "k", "sample": "samples"}  # the form of a cached signal -> how wide it is
_MEANS = {"nll": math.inf, "bits_per_byte": math.inf, "perplexity": math.inf, "accuracy": 1.0}  # -> the highest value
_SIZES = ("tokens", "bytes")
_ARM = {
    "test": _MEANS | dict.fromkeys(_SIZES, math.inf),
    "fidelity": contract.FIDELITY,
    "latency_ms": contract.LATENCY,
}


def arm_result(
    *,
    variables: Mapping[str, Any],
    steps: int,
    examples_per_s: float | None,
    tokens_per_example: int,
    scores: Mapping[str, float],
    latency_ms: Mapping[str, float],
    params_sha256: str,
    sample: str,
) -> dict[str, Any]:
    """One arm's entry of the ``results.json`` of a language run.

    Args:
        variables: ``{"params": ..., "state": ...}``; parameters are counted, the bytes of both are weighed.
        steps: updates made.
        examples_per_s: windows trained on per second; None for an arm that was loaded, not trained.
        tokens_per_example: tokens of a window that are given to the model.
        scores: of the test split, as ``tasks.language.make_evaluate`` gives them with teachers; for the teacher itself
            ``kl`` is 0 and ``agreement`` 1.
        latency_ms: what ``results.latency`` returned for one window.
        params_sha256: hex digest of the parameters.
        sample: what the arm wrote after the prompt.
    """
    speed = None if examples_per_s is None else float(examples_per_s)
    return {
        "params": contract.count(variables),
        "weights_bytes": contract.weigh(variables),
        "steps": int(steps),
        "examples_per_s": speed,
        "tokens_per_s": None if speed is None else speed * tokens_per_example,
        "test": {key: float(scores[key]) for key in _MEANS} | {key: round(scores[key]) for key in _SIZES},
        # In float32 the sum of a KL that is nearly 0 may end just below it.
        "fidelity": {"agreement": float(scores["agreement"]), "kl": max(float(scores["kl"]), 0.0)},
        "latency_ms": {key: float(value) for key, value in latency_ms.items()},
        "params_sha256": params_sha256,
        "sample": sample,
    }


# ---------------------------------------------------------------------------------------------- shown to a person


def _closed_share(arms: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The share of the way, in bits per byte, from the student alone to the teacher that the distilled student went.

    Below 0 it went the other way, above 1 it is better than its teacher. None where the teacher is not better than the
    student alone by at least 0.001 bits per byte, or one of the three is missing.
    """
    if not set(contract.ARMS) <= set(arms):
        return None
    teacher, alone, distilled = (arms[name]["test"]["bits_per_byte"] for name in contract.ARMS)
    return (alone - distilled) / (alone - teacher) if round(alone - teacher, 3) > 0 else None


def _headline(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    bits = {name: arm["test"]["bits_per_byte"] for name, arm in arms.items()}
    if "student_distilled" not in arms:
        return " ".join(
            f"The {contract.ARMS[name]} needs {value:.3f} bits per byte of text." for name, value in bits.items()
        )
    sentence = f"The distilled student needs {_against(bits)}"
    if "teacher" not in arms:
        return f"{sentence}."
    size = contract.share_text(arms["student_distilled"]["params"], arms["teacher"]["params"])
    share = _closed_share(arms)
    if share is None:
        last = "; the teacher is no better than the student alone" if "student_alone" in arms else ""
        return f"{sentence}, with {size} the teacher's parameters{last}."
    percent = round(100 * share)
    if percent > 100:
        went = "is better than the teacher"
    elif percent >= 0:
        went = f"closes {percent} % of the gap to the teacher"
    else:
        went = f"widens the gap to the teacher by {-percent} %"
    return f"{sentence} and {went}, with {size} the teacher's parameters."


def _against(bits: Mapping[str, float]) -> str:
    """What the distilled student needs beside the student alone, or else beside the teacher, or by itself."""
    distilled = bits["student_distilled"]
    name = next((name for name in ("student_alone", "teacher") if name in bits), None)
    if name is None:
        return f"{distilled:.3f} bits per byte of text"
    other = {"student_alone": "the same student alone", "teacher": "the teacher"}[name]
    apart = round(distilled - bits[name], 3)
    if not apart:
        return f"as many bits per byte as {other}"
    return f"{abs(apart):.3f} {'fewer' if apart < 0 else 'more'} bits per byte than {other}"


def _caveat(results: Mapping[str, Any], test_examples: int | None) -> str:
    """No interval: tokens of a text depend on each other, and how much cannot be told from the sums at hand."""
    arms = results["arms"]
    if not {"student_alone", "student_distilled"} <= set(arms):
        return ""
    tokens = arms["student_distilled"]["test"]["tokens"]
    return (
        f"One seed, {tokens:,} test tokens that are not independent of each other: repeat with other seeds before "
        "believing a small difference."
    )


# --------------------------------------------------------------------------------------------------- the contract


def _arm(path: str, arm: Any) -> None:
    counts, speeds = ("params", "weights_bytes", "steps"), ("examples_per_s", "tokens_per_s")
    contract.check_keys(path, arm, {*counts, *speeds, "params_sha256", "sample", *_ARM})
    contract.check_measured(path, arm, counts, _ARM)
    for key in _SIZES:
        contract.check_number(f"{path}.test.{key}", arm["test"][key], whole=True)
    for key in speeds:
        if arm[key] is not None:
            contract.check_number(f"{path}.{key}", arm[key])
    contract.check_sha256(f"{path}.params_sha256", arm["params_sha256"])
    if not isinstance(arm["sample"], str):
        raise contract.wrong(f"{path}.sample", "a string", arm["sample"])


def _rest(results: Mapping[str, Any]) -> None:
    if not isinstance(results["prompt"], str):
        raise contract.wrong("results.prompt", "a string", results["prompt"])
    if "signals" in results:
        _signals("results.signals", results["signals"])


def _signals(path: str, signals: Any) -> None:
    form = signals.get("form") if isinstance(signals, dict) else None
    width = SIGNAL_WIDTHS.get(form) if isinstance(form, str) else None
    if width is None:
        raise contract.wrong(f"{path}.form", f"one of {', '.join(SIGNAL_WIDTHS)}", form)
    contract.check_keys(path, signals, {"form", width, "bytes_per_token"})
    contract.check_number(f"{path}.{width}", signals[width], whole=True)
    contract.check_number(f"{path}.bytes_per_token", signals["bytes_per_token"])


KIND = contract.Kind(
    required=frozenset({"task", "prompt"}),
    optional=frozenset({"signals"}),
    check_arm=_arm,
    check_rest=_rest,
    headline=_headline,
    caveat=_caveat,
    columns={
        "parameters": lambda arm: f"{arm['params']:,}",
        "weights": lambda arm: memory.bytes_text(arm["weights_bytes"]),
        "bits per byte": lambda arm: f"{arm['test']['bits_per_byte']:.4f}",
        "perplexity": lambda arm: f"{arm['test']['perplexity']:.4g}",
        "NLL (nats/token)": lambda arm: f"{arm['test']['nll']:.4f}",
        "top-1 accuracy %": lambda arm: f"{100 * arm['test']['accuracy']:.2f}",
        "agrees with teacher %": lambda arm: f"{100 * arm['fidelity']['agreement']:.2f}",
        "KL(teacher ‖ arm) (nats)": lambda arm: f"{arm['fidelity']['kl']:.4f}",
        "window latency p50 (ms)": lambda arm: f"{arm['latency_ms']['p50']:.3g}",
        "window latency p99 (ms)": lambda arm: f"{arm['latency_ms']['p99']:.3g}",
        "updates": lambda arm: f"{arm['steps']:,}",
        "training tokens/s": lambda arm: contract.speed_text(arm["tokens_per_s"]),
    },
)
