"""Qwen2.5, 7 billion parameters to 1.5 billion.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "top_k")
# Both are Qwen2ForCausalLM; each size as in the config.json of Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen2.5-1.5B.
COMMON = {"layers": 28, "head_dim": 128, "rope_theta": 1e6, "qkv_bias": True, "norm_eps": 1e-6}
TEACHER = {"vocabulary": 152064, "width": 3584, "heads": 28, "kv_heads": 4, "mlp_width": 18944, "tied": False, **COMMON}
STUDENT = {"vocabulary": 151936, "width": 1536, "heads": 12, "kv_heads": 2, "mlp_width": 8960, "tied": True, **COMMON}
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
        raise unknown("variant of lm_qwen25_7b_1_5b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:DATA/*.jsonl", tokeniser="Qwen2.5-1.5B", context=4096, packing="whole")
    config.data.update(batch_size=64, eval_batch_size=64)
    config.teacher.update(name="decoder", init="Qwen2.5-7B-Instruct")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Qwen2.5-1.5B")
    config.student.options = {**STUDENT, "remat": "full"}
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = {"schedule": "cosine", "init": 1e-4, "end": 1e-5, "warmup_percent": 3.0}
    config.optimizer.update(learning_rate=rate, clip_norm=1.0, b2=0.95, weight_decay=0.0)
    config.train.update(epochs=2, dtype="bfloat16", accumulate=4)
    config.mesh = {"data": -1, "fsdp": 8}
    config.sharding = {"student": RULES, "teacher": RULES}
    return config
