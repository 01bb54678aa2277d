"""Qwen3, 32 billion parameters to 8 billion.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "top_k")
# Both are Qwen3ForCausalLM; each size as in the config.json of Qwen/Qwen3-32B and Qwen/Qwen3-8B-Base.
COMMON = {
    "vocabulary": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "qk_norm": True,
    "tied": False,
    "norm_eps": 1e-6,
}
TEACHER = {"layers": 64, "width": 5120, "heads": 64, "mlp_width": 25600, **COMMON}
STUDENT = {"layers": 36, "width": 4096, "heads": 32, "mlp_width": 12288, **COMMON}
# Kernels are [layers, inputs, outputs]: the products of a pair are split over outputs, then over inputs, so that only
# the second is summed up over devices. Tables are [vocabulary, width].
RULES = (
    ("norm|bias", "replicate"),
    (r"/(q|k|v|gate|up)/kernel", "tensor:-1+fsdp"),
    (r"/(o|down)/kernel", "tensor:-2+fsdp"),
    (r"/(embedding|head/kernel)", "tensor:-2+fsdp"),
    (".*", "replicate"),
)


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_qwen3_32b_8b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:DATA/*.jsonl", tokeniser="Qwen3-8B-Base", context=4096, packing="whole")
    config.data.update(batch_size=64, eval_batch_size=64)
    config.teacher.update(name="decoder", init="Qwen3-32B")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Qwen3-8B-Base")
    config.student.options = {**STUDENT, "remat": "full"}
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = {"schedule": "cosine", "init": 5e-5, "end": 5e-6, "warmup_percent": 3.0}
    config.optimizer.update(learning_rate=rate, clip_norm=1.0, b2=0.95, weight_decay=0.0)
    config.train.update(epochs=2, dtype="bfloat16", accumulate=4)
    config.mesh = {"data": -1, "fsdp": 4, "tensor": 2}
    config.sharding = {"student": RULES, "teacher": RULES}
    return config
