"""SimPO in a training loop of your own: Megatron-Core's schedule, DDP and optimizer, and our step.

    torchrun --nproc-per-node 2 examples/plain_loop.py HF_CHECKPOINT pairs.jsonl [STEPS]

Runs on two CPU cores over gloo, or on two GPUs over NCCL. With the quick start's model it takes about 10 seconds on two
cores. It prints the loss and the accuracy of each of STEPS steps (default 5).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from simpo_megatron import LogProbHead, PreferenceStep, RowPacker, SimPO, reduce_metrics
from simpo_megatron.config.data import DataConfig
from simpo_megatron.models.build import build_model, transformer_config
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.models.load import load_hf_weights
from simpo_megatron.program import exit_code
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down

SEQ_LENGTH, GLOBAL_BATCH_SIZE, LAYOUT = 512, 8, {"tensor_model_parallel_size": 2}


def main(checkpoint: Path, preferences: str, steps: int) -> None:
    """Trains for some steps and prints the loss of each.

    Args:
        checkpoint: folder of a Hugging Face checkpoint.
        preferences: file of preference pairs.
        steps: optimizer steps.

    Raises:
        UserError: checkpoint or preferences cannot be read.
    """
    device = resolve_device("auto")
    hf = read_hf_checkpoint(checkpoint)
    config = transformer_config(hf, bf16=False, **LAYOUT)
    initialize(config, timeout_minutes=10, device=device, seed=1)

    # Your model. The output layer of the last stage becomes the head before DDP wraps the model.
    (model,) = build_model(hf, config)
    load_hf_weights([model], hf)
    LogProbHead.install(model, slab_bytes=256 * 2**20)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-4, use_distributed_optimizer=True), [wrapped])
    config.grad_scale_func = optimizer.scale_loss

    # Your loop. One global batch of pairs, this rank's packed rows of it, one call of the schedule, one optimizer step.
    pairs, _, _ = load_data(DataConfig(train_data=(preferences,), seq_length=SEQ_LENGTH), hf)
    objective = SimPO(simpo_beta=2.5, simpo_gamma_beta_ratio=0.55)
    packer = RowPacker(SEQ_LENGTH, objective.responses, config.hidden_size)
    for step in range(steps):
        batch = packer.pack(pairs, pairs.order(step * GLOBAL_BATCH_SIZE, GLOBAL_BATCH_SIZE, seed=1))
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        sums = get_forward_backward_func()(
            forward_step_func=PreferenceStep(objective, hf.architecture.vocab_size, len(batch.microbatches)),
            data_iterator=packer.microbatches(batch),
            model=wrapped,
            num_microbatches=len(batch.microbatches),
            seq_length=batch.row_length or SEQ_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        metrics = reduce_metrics(sums, objective.metrics)
        if torch.distributed.get_rank() == 0:
            accuracy = metrics["rewards/accuracies"]
            print(f"step {step + 1}: loss {metrics['loss']:.4f}, accuracy {accuracy:.3f}", flush=True)
    shut_down()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: torchrun --nproc-per-node 2 examples/plain_loop.py HF_CHECKPOINT pairs.jsonl [STEPS]")
    arguments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 5
    sys.exit(exit_code("plain_loop.py", lambda: main(*arguments)))
