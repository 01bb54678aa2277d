"""Tunix' DistillationTrainer (PyPI ``google-tunix``) with its LogitStrategy and its Qwen2."""

import itertools

from alternate import Side
from language_pair import ADAMW, RATE, folders, sizes, windows


def tunix_side(pair, weights):
    """What DistillationTrainer.train does with a batch: the teacher's forward pass, then the update, each jitted.

    Its loader, hooks, checkpoints and log are left out.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput
    from tunix.distillation.strategies.logit import LogitStrategy
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    def model(folder, size):
        ours = sizes(pair, *size)
        config = ModelConfig(
            num_layers=ours.layers,
            vocab_size=ours.vocabulary,
            embed_dim=ours.width,
            hidden_dim=ours.mlp_width,
            num_heads=ours.heads,
            head_dim=ours.head_dim,
            num_kv_heads=ours.kv_heads,
            rope_theta=ours.rope_theta,
            norm_eps=ours.norm_eps,
            use_tied_embedding=ours.tied,
        )
        return create_model_from_safe_tensors(folder, config, dtype=jnp.float32)

    def forward(model, input_tokens, input_mask):
        tokens = input_tokens[:, :-1]
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        return model(tokens, positions, None, causal)[0]

    labels = lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens[:, 1:], pair.vocabulary)
    with folders(pair, weights) as (teacher, student):
        trainer = DistillationTrainer(
            model(student, pair.student),
            model(teacher, pair.teacher),
            LogitStrategy(forward, forward, labels, temperature=pair.temperature, alpha=pair.soft),
            optax.adamw(RATE, **ADAMW),
            TrainingConfig(eval_every_n_steps=10**9),
        )
    update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as train() asks for it
    tokens = [jnp.asarray(tokens) for tokens in windows(pair)]
    batches = itertools.cycle([TrainingInput(input_tokens=x, input_mask=jnp.ones(x.shape, bool)) for x in tokens])

    def step():
        loss, _, _ = update(trainer._prepare_inputs(next(batches)))
        return float(loss)

    return Side(step)
