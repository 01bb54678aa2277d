"""Llama 3: 8 billion parameters (3.1) teach 1 billion (3.2), on 8 devices, each with an eighth of both models.

    kdjax distill --config configs/lm_llama31_8b_1b.py --config.data.data_dir=DATA --workdir runs/llama \\
        --config.teacher.init=MODELS/Llama-3.1-8B-Instruct --config.student.init=MODELS/Llama-3.2-1B-Instruct \\
        --config.data.tokenizer=MODELS/Llama-3.2-1B-Instruct

MODELS holds the two models as Hugging Face has them (``config.json``, ``*.safetensors``, the tokenizer's files), DATA
files ``*.jsonl`` with a conversation, a text, or a prompt and a completion on each line (``kdjax.data.text.load``). A
document of more than 4097 tokens is refused: make ``data.context`` larger, or cut it with
``--config.data.options.longer=cut``. ``kdjax train --arm student_distilled`` with the same options leaves out the
control, the same student without a teacher.

Recipe: the pair is that of torchtune's 8B to 1B; the rest is that of DeepSeek-R1's distilled Qwen-1.5B, nearest to it
in size (DeepSeek-AI 2025, appendix B.4.3): 2 to 3 epochs, 64 sequences a step, rate 1e-4 with cosine to a tenth. Not
from there: context, weights of the losses, AdamW's betas, no decay, clipping, warm-up.

Measured: not measured, no such device was at hand. The step compiles for 8 devices. Each holds 3.9 GB: teacher 2.0
(bfloat16), student 0.6 and AdamW's moments 1.2 (float32). Compiled for CPUs the step needs 31.0 GB besides, with copies
of attention's scores, 4.3 GB each, and of the teacher in float32, which a GPU's own attention and bfloat16 do without.

Variants:
  pruned     the student is the teacher itself, cut to 3072 channels and 9216 neurons in each feedforward: the 4.5
             billion parameters of Llama-3.1-Minitron-4B-Width (Sreenivas et al. 2024, arXiv 2408.11796), and learns
             from ``kl`` alone, as there. It needs no student.init, and its tokenizer is the teacher's. A device holds
             8.8 GB (teacher 2.0, student 2.3, moments 4.5), and a CPU needs 36.1 GB besides.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax import sharding
from kdjax.errors import unknown

VARIANTS = ("", "pruned")
# As in the config.json of meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-1B-Instruct, both LlamaForCausalLM.
COMMON = {"vocabulary": 128256, "heads": 32, "kv_heads": 8, "rope_theta": 5e5, "norm_eps": 1e-5}
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
TEACHER = {
    **COMMON,
    **{"layers": 32, "width": 4096, "head_dim": 128, "mlp_width": 14336, "tied": False},
    "rope_scaling": {"factor": 8.0, **SCALING},
}
STUDENT = {
    **COMMON,
    **{"layers": 16, "width": 2048, "head_dim": 64, "mlp_width": 8192, "tied": True},
    "rope_scaling": {"factor": 32.0, **SCALING},
}
PRUNED = {"width": 3072, "mlp_width": 9216}  # of the teacher; the rest is as in the teacher


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_llama31_8b_1b.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="jsonl:*.jsonl", tokenizer="Llama-3.2-1B-Instruct", context=4096, packing="whole")
    config.data.update(batch_size=64, eval_batch_size=16)
    config.teacher.update(name="decoder", init="Llama-3.1-8B-Instruct")
    config.teacher.options = TEACHER
    config.student.update(name="decoder", init="Llama-3.2-1B-Instruct")
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
    if arg == "pruned":
        config.data.tokenizer = config.teacher.init
        config.student.init = "teacher"
        config.student.options = {**PRUNED, "remat": "full"}
        config.losses.kl.weight = 1.0
        config.losses.ce.weight = 0.0
    return config
