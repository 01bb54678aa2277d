"""torchdistill's DistillationBox (PyPI ``torchdistill``) with its KDLoss, on the bundled models in PyTorch."""

from alternate import Side
from torch_distill import prepare
from vision_pair import HARD, MOMENTUM, RATE, SOFT, TEMPERATURE


def torchdistill_side(pair, weights, *, channels_last=False):
    """What the training loop of torchdistill's image classification calls for a batch, without its loader and log."""
    import torch
    from torchdistill.core.distillation import get_distillation_box

    teacher, student, _, batches = prepare(pair, weights, channels_last)
    logits = {"module_path": ".", "module_io": "output"}
    kd = {f"{model}_{key}": value for model in ("student", "teacher") for key, value in logits.items()}
    kd |= {"temperature": TEMPERATURE, "alpha": HARD, "beta": SOFT, "reduction": "batchmean"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}
    config = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": MOMENTUM, "fused": True}},
    }
    box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step():
        x, y = next(batches)
        loss = box.forward_process(x, targets=y, supp_dict={})
        box.post_forward_process(loss=loss)
        return loss.item()

    return Side(step)
