"""Qwen3: 32 billion parameters teach 8 billion, on 8 devices: the weights are split over all, the batch over 4 pairs.

    kdjax distill --config configs/lm_qwen3_32b_8b.py --config.data.data_dir=DATA --workdir runs/qwen3 \\
        --config.teacher.init=MODELS/Qwen3-32B --config.student.init=MODELS/Qwen3-8B-Base \\
        --config.data.tokenizer=MODELS/Qwen3-8B-Base

MODELS holds the two models as Hugging Face has them (``config.json``, ``*.safetensors``, the tokenizer's files), DATA
files ``*.jsonl`` with a conversation, a text, or a prompt and a completion on each line (``kdjax.data.text.load``). A
document of more than 4097 tokens is refused: make ``data.context`` larger, or cut it with
``--config.data.options.longer=cut``. The two devices of a pair see the same sequences and share each product
(``mesh.tensor``): half the heads, half the neurons and half the vocabulary each. ``kdjax train --arm
student_distilled`` with the same options leaves out the control, the same student without a teacher.

Recipe: the pair is that of Qwen3's strong-to-weak distillation (Yang et al. 2025); the rest is that of DeepSeek-R1's
distilled Llama-8B (DeepSeek-AI 2025, appendix B.4.3): 2 to 3 epochs, 64 sequences a step, rate 5e-5 with cosine to a
tenth. Not from there: context (theirs 32,768), weights of the losses, AdamW's betas, no decay, clipping, warm-up.

Measured: not measured, no such device was at hand. The step compiles for 8 devices. Each holds 20.5 GB: teacher 8.2
(bfloat16), student 4.1 and AdamW's moments 8.2 (float32). Compiled for CPUs the step needs 46.8 GB besides, with copies
of attention's scores, 4.3 GB each, and of the teacher in float32, which a GPU's own attention and bfloat16 do without.

Variants:
  top_k      what the student learns is the teacher's 32 likeliest tokens and the mass of the rest. The teacher can say
             that once, beforehand, and be gone from the step: ``kdjax cache`` with the same options, then distil in
             another workdir with --config.teacher.cache=runs/qwen3/cache
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax import sharding
from kdjax.errors import unknown

VARIANTS = ("", "top_k")
# As in the config.json of Qwen/Qwen3-32B and of Qwen/Qwen3-8B-Base, both Qwen3ForCausalLM.
COMMON = {"vocabulary": 151936, "kv_heads": 8, "head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6}
CHOICES = {"qk_norm": True, "tied": False}
TEACHER = {"layers": 64, "width": 5120, "heads": 64, "mlp_width": 25600, **COMMON, **CHOICES}
STUDENT = {"layers": 36, "width": 4096, "heads": 32, "mlp_width": 12288, **COMMON, **CHOICES}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_qwen3_32b_8b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:*.jsonl", tokenizer="Qwen3-8B-Base", context=4096, packing="whole")
    config.data.update(batch_size=64, eval_batch_size=16)
    config.teacher.update(name="decoder", init="Qwen3-32B")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Qwen3-8B-Base")
    config.student.options = {**STUDENT, "remat": "full"}
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = {"schedule": "cosine", "init": 5e-5, "end": 5e-6, "warmup_percent": 3.0}
    config.optimizer.update(learning_rate=rate, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.train.update(epochs=2, dtype="bfloat16", accumulate=8)  # 2 sequences on a pair of devices at a time
    config.mesh = {"data": -1, "fsdp": 4, "tensor": 2}
    config.sharding = {"student": sharding.DECODER, "teacher": sharding.DECODER}
    config.checkpoint.every = 500
    config.log.update(every=10, eval_every=500)
    if arg == "top_k":
        config.losses.kl.weight = 0.0
        config.losses.top_k.update(weight=0.9, k=32)
    return config
