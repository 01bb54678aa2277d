"""Qwen2.5: 1.5 billion parameters teach 0.5 billion, on one GPU of 80 GB.

    kdjax distill --config configs/lm_qwen25_1_5b_0_5b.py --config.data.data_dir=DATA --workdir runs/qwen25_small \\
        --config.teacher.init=MODELS/Qwen2.5-1.5B-Instruct --config.student.init=MODELS/Qwen2.5-0.5B \\
        --config.data.tokenizer=MODELS/Qwen2.5-0.5B

MODELS and DATA are as in ``lm_qwen25_7b_1_5b.py``, and so are losses and optimiser; both tables of embeddings have
151,936 rows here.

Measured: not measured. Weights and moments take 9.1 GB: teacher 3.1 (bfloat16), student 2.0 and AdamW's moments 4.0
(float32); a step is 1.1e14 FLOPs of matrix products, for 16,384 tokens.

Variants:
  fresh      untrained models on the source text of Python's own standard library, byte by byte beside a vocabulary of
             the models' size, for benchmarks: no weights and no data are needed but a tokenizer, which
             ``python -c "from kdjax.data.tokenizers import write_byte_tokenizer as w; w('tokenizer', 151936)"`` writes.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "fresh")
# As in the config.json of Qwen/Qwen2.5-1.5B-Instruct and of Qwen/Qwen2.5-0.5B, both Qwen2ForCausalLM.
COMMON = {"vocabulary": 151936, "kv_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "tied": True}
TEACHER = {"width": 1536, "layers": 28, "heads": 12, "head_dim": 128, "mlp_width": 8960, **COMMON}
STUDENT = {"width": 896, "layers": 24, "heads": 14, "head_dim": 64, "mlp_width": 4864, **COMMON}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_qwen25_1_5b_0_5b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:*.jsonl", tokenizer="Qwen2.5-0.5B", context=2048, packing="whole")
    config.data.update(batch_size=8, eval_batch_size=8)
    config.teacher.update(name="decoder", init="Qwen2.5-1.5B-Instruct")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Qwen2.5-0.5B")
    config.student.options = STUDENT
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = {"schedule": "cosine", "init": 1e-4, "end": 1e-5, "warmup_percent": 3.0}
    config.optimizer.update(learning_rate=rate, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.train.update(epochs=2, dtype="bfloat16")
    config.checkpoint.every = 500
    config.log.update(every=10, eval_every=500)
    if arg == "fresh":
        config.data.update(name="stdlib", options={"files": 200}, tokenizer="tokenizer", packing="split")
        config.teacher.update(init="", epochs=1, weights="bfloat16")
        config.student.init = ""
    return config
