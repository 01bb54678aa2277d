"""Qwen2.5: 7 billion parameters teach 1.5 billion, on 8 devices, each of which holds an eighth of both models.

    kdjax distill --config configs/lm_qwen25_7b_1_5b.py --config.data.data_dir=DATA --workdir runs/qwen25 \\
        --config.teacher.init=MODELS/Qwen2.5-7B-Instruct --config.student.init=MODELS/Qwen2.5-1.5B \\
        --config.data.tokenizer=MODELS/Qwen2.5-1.5B

MODELS holds the two models as Hugging Face has them (``config.json``, ``*.safetensors``, the tokenizer's files), DATA
files ``*.jsonl`` with a conversation, a text, or a prompt and a completion on each line (``kdjax.data.text.load``). A
document of more than 4097 tokens is refused: make ``data.context`` larger, or cut it with
``--config.data.options.longer=cut``. The two tables of embeddings have 152,064 and 151,936 rows for the same 151,665
tokens; both are cut to those. ``kdjax train --arm student_distilled`` with the same options leaves out the control, the
same student without a teacher.

Recipe: that of DeepSeek-R1's distilled Qwen-1.5B (DeepSeek-AI 2025, appendix B.4.3): 2 to 3 epochs, 64 sequences a
step, rate 1e-4 with cosine to a tenth. There the teacher only wrote the text; here it also says how likely each token
is. Not from there: context (theirs 32,768), weights of the losses, AdamW's betas, no decay, clipping, warm-up.

Measured: not measured, no such device was at hand. The step compiles for 8 devices. Each holds 4.2 GB: teacher 1.9
(bfloat16), student 0.8 and AdamW's moments 1.5 (float32). Compiled for CPUs the step needs 23.3 GB besides, with copies
of attention's scores, 3.8 GB each, and of the teacher in float32, which a GPU's own attention and bfloat16 do without.

Variants:
  top_k      what the student learns is the teacher's 32 likeliest tokens and the mass of the rest. The teacher can say
             that once, beforehand, and be gone from the step: ``kdjax cache`` with the same options, then distil in
             another workdir with --config.teacher.cache=runs/qwen25/cache
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax import sharding
from kdjax.errors import unknown

VARIANTS = ("", "top_k")
# As in the config.json of Qwen/Qwen2.5-7B-Instruct and of Qwen/Qwen2.5-1.5B, both Qwen2ForCausalLM.
COMMON = {"layers": 28, "head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
TEACHER = {"vocabulary": 152064, "width": 3584, "heads": 28, "kv_heads": 4, "mlp_width": 18944, "tied": False, **COMMON}
STUDENT = {"vocabulary": 151936, "width": 1536, "heads": 12, "kv_heads": 2, "mlp_width": 8960, "tied": True, **COMMON}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_qwen25_7b_1_5b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:*.jsonl", tokenizer="Qwen2.5-1.5B", context=4096, packing="whole")
    config.data.update(batch_size=64, eval_batch_size=16)
    config.teacher.update(name="decoder", init="Qwen2.5-7B-Instruct")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Qwen2.5-1.5B")
    config.student.options = {**STUDENT, "remat": "full"}
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = {"schedule": "cosine", "init": 1e-4, "end": 1e-5, "warmup_percent": 3.0}
    config.optimizer.update(learning_rate=rate, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.train.update(epochs=2, dtype="bfloat16", accumulate=4)  # 2 sequences on a device at a time
    config.mesh = {"data": -1, "fsdp": 8}
    config.sharding = {"student": sharding.DECODER, "teacher": sharding.DECODER}
    config.checkpoint.every = 500
    config.log.update(every=10, eval_every=500)
    if arg == "top_k":
        config.losses.kl.weight = 0.0
        config.losses.top_k.update(weight=0.9, k=32)
    return config
