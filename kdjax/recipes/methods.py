"""The methods that ``kdjax compare`` knows: for each the terms that it adds, as its paper uses them.

Response methods replace plain KD's soft term; all others are added to the plain task, without soft labels, as in the
published comparisons (Tian et al. 2020). The weights are starting points: ``kdjax compare --tune`` multiplies them, by
the same factors for every method. ``a+b`` is both methods at once.
"""

from collections.abc import Mapping
from typing import Any

from kdjax.errors import UserError, unknown
from kdjax.objective import default_losses

CONTROL, BASELINE = "control", "kl"
Losses = dict[str, dict[str, Any]]

_SOFT = {"weight": 0.9, "temperature": 4.0}


def _soft(term: str, **options: Any) -> Losses:
    """A soft term in the place of plain KD's: weight 0.9 beside 0.1 of the labels."""
    return {term: {**_SOFT, **options}, "ce": {"weight": 0.1}}


def _added(weight: float, term: str, **options: Any) -> Losses:
    """A term beside the plain task."""
    return {"ce": {"weight": 1.0}, term: {"weight": weight, **options}}


# The last term that is not "ce" is the one whose weight the report shows as tuned; all of a method are tuned together.
METHODS: dict[str, Losses] = {
    CONTROL: {"ce": {"weight": 1.0}},
    BASELINE: _soft("kl"),
    "reverse_kl": _soft("reverse_kl"),
    "js": _soft("js"),
    "logits_mse": _added(0.1, "logits_mse"),
    "standardised_kl": _soft("standardised_kl", temperature=2.0),
    "total_variation": _soft("total_variation"),
    "dist": _added(2.0, "dist", temperature=1.0),
    "dkd": _added(1.0, "dkd", temperature=4.0, target_weight=1.0, other_weight=8.0),
    "nkd": _added(1.0, "nkd"),
    "wsld": _added(1.0, "wsld", temperature=2.0),
    "teacher_free": _soft("teacher_free", temperature=20.0),
    "curriculum_kl": {"curriculum_kl": {"weight": 0.9, "reversal": 1.0}, "ce": {"weight": 0.1}},
    "fitnets": _added(10.0, "fitnets", variant="repdistiller"),
    "attention_transfer": _added(30.0, "attention_transfer", variant="repdistiller"),
    "nst": _added(3.0, "nst"),
    "factor_transfer": _added(1.0, "factor_transfer", variant="repdistiller"),
    "vid": _added(1.0, "vid", variant="repdistiller"),
    "review": _added(1.0, "review"),
    "mgd": _added(1e-3, "mgd"),
    "cka": _added(1.0, "cka"),
    "pkt": _added(30.0, "pkt"),
    "rkd": {"ce": {"weight": 1.0}, "rkd_distance": {"weight": 25.0}, "rkd_angle": {"weight": 50.0}},
    "similarity": _added(1000.0, "similarity"),
    "correlation": _added(0.02, "correlation"),
    "fsp": _added(1.0, "fsp", variant="repdistiller"),
    "ickd": _added(2.5, "ickd", variant="torchdistill"),
    "crd": _added(0.8, "crd", variant="repdistiller"),
    "infonce": _added(0.8, "infonce"),
    "exits": _added(1.0, "exits"),
    "past_predictions": {"past_predictions": {"weight": 1.0, "share": {"schedule": "linear", "init": 0.0, "end": 0.8}}},
    "tinybert": {"ce": {"weight": 1.0}, "tinybert_attention": {"weight": 1.0}, "tinybert_hidden": {"weight": 1.0}},
    "distilbert": {**_soft("kl"), "distilbert_cosine": {"weight": 0.2, "projector": "linear"}},
    "minilm": _added(1.0, "minilm"),
    "minilmv2": _added(1.0, "minilmv2"),
}


def losses_of(method: str) -> Losses:
    """The terms of a method, or of several joined by "+" (a term that two have is the later one's).

    Raises:
      UserError: an unknown method.
    """
    found: Losses = {}
    for name in method.split("+"):
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        found |= {term: dict(options) for term, options in METHODS[name].items()}
    return found


def tuned_term(method: str) -> str | None:
    """The term whose weight is tuned; ``None`` for the control, which has none."""
    return next((term for term in reversed(losses_of(method)) if term != "ce"), None)


def with_method(losses: Mapping[str, Mapping[str, Any]], method: str, factor: float = 1.0) -> Losses:
    """A config's whole ``losses`` section for a method; options that the method does not set are the config's own.

    Args:
      losses: of the config.
      method: by name.
      factor: multiplies the weights of all terms but the labels' own.
    """
    chosen = losses_of(method)
    section: Losses = {}
    for term, options in default_losses().items():
        section[term] = {**options, **losses.get(term, {}), "weight": 0.0}
        if term in chosen:
            section[term] |= chosen[term]
            if term != "ce":
                section[term]["weight"] *= factor
    return section


def check(methods: list[str]) -> list[str]:
    """The methods to run: the control first, each once.

    Raises:
      UserError: an unknown method, or one named twice.
    """
    for method in methods:
        losses_of(method)
        if methods.count(method) > 1:
            raise UserError(f"--methods names {method} twice: name each method once.")
    return [CONTROL, *(method for method in methods if method != CONTROL)]
