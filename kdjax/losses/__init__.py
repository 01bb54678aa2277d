"""The losses of distillation: pure functions of arrays, one module per kind of knowledge."""

from kdjax.losses.response import (
    combine_logits,
    cross_entropy,
    jensen_shannon,
    kl,
    logits_mse,
    skew_kl,
)

__all__ = ["combine_logits", "cross_entropy", "jensen_shannon", "kl", "logits_mse", "skew_kl"]
