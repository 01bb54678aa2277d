"""TRL's GKDTrainer (PyPI ``trl``) on given sequences: lmbda = 0; and beta = 0, which is forward KL at temperature 1."""

import itertools
import os
import tempfile

from alternate import Side
from language_pair import ADAMW, RATE, folders, windows


def trl_side(pair, weights):
    """GKDTrainer.training_step, and what transformers' Trainer does after it: the optimiser's step, gradients cleared.

    Trainer's loader, clipping, schedule, callbacks and log are left out.
    """
    import torch

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with folders(pair, weights) as names:
        teacher, student = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in names)
    teacher.config.use_cache = student.config.use_cache = False
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))  # asked for, and never used
    with tempfile.TemporaryDirectory() as scratch:
        config = GKDConfig(
            scratch, lmbda=0.0, beta=0.0, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none"
        )
        optimizer = torch.optim.AdamW(student.parameters(), RATE, fused=True, **ADAMW)
        trainer = GKDTrainer(
            student,
            teacher,
            config,
            data_collator=list,
            train_dataset=Dataset.from_dict({"messages": [[]]}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
            optimizers=(optimizer, None),
        )
    batches = itertools.cycle([torch.from_numpy(tokens).long() for tokens in windows(pair)])
    targets = torch.tensor(pair.batch * pair.tokens)

    def step():
        tokens = next(batches)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        loss = trainer.training_step(student, batch, targets)
        optimizer.step()
        student.zero_grad()
        return loss.item()

    return Side(step)
