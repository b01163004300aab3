"""Train under torchrun and write what came out: the script of a test.

Usage: torchrun --nproc-per-node 2 _two_process_training.py OUT_DIRECTORY
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import nn

from ftlib.training import (
    LossFunction,
    TrainingSettings,
    default_accelerator,
    train,
)

BATCH_SIZE = 8
STEPS = 6
CLIPPED = {"max_grad_norm": 0.1}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 1)
    return nn.Sequential(*layers).double()


def make_dataset() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    return list(zip(inputs, inputs.sum(1, keepdim=True).sin(), strict=True))


def mean_squared_error(model, batch):
    inputs, targets = batch
    errors = model(inputs) - targets
    return errors.square().mean(), {"absolute": errors.abs().mean()}


def settings(**changes) -> TrainingSettings:
    usual = {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": 0.01}
    return TrainingSettings(**(usual | changes))


def weights(loss_fn: LossFunction = mean_squared_error, directory=None, **changes):
    """Train from the fixed start; return the weights and the history."""
    model = make_model()
    history = train(
        model, make_dataset(), loss_fn, settings(**changes), directory=directory
    )
    return {n: p.detach() for n, p in model.named_parameters()}, history


class NoisyLoss:
    """A loss of random draws, which notes them and can fail in the middle."""

    def __init__(self, fail_at: int = 0):
        self.fail_at = fail_at
        self.draws: list[float] = []

    def __call__(self, model, batch):
        inputs, _ = batch
        noise = torch.randn(len(inputs), 1, dtype=torch.float64)
        self.draws.append(noise[0].item())
        if len(self.draws) == self.fail_at:
            raise InterruptedError
        return (model(inputs) - noise).square().mean()


def noisy_weights(directory, fail_at=0, checkpoint_every=2):
    loss = NoisyLoss(fail_at)
    trained = weights(loss, directory, checkpoint_every=checkpoint_every)
    return trained, loss.draws


def sharding_accelerator() -> Accelerator:
    """Return an accelerator that spreads the weights, on CPUs too.

    Accelerate asks for a GPU before it takes the plugin, and without one it goes on
    with DDP and says nothing.
    """
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
    )
    PartialState().distributed_type = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = plugin
    return accelerator


def sharded(out: Path) -> None:
    """Train with FSDP; write the weights, the norms and the sizes of the shards."""
    accelerator = sharding_accelerator()
    assert accelerator.is_fsdp2
    model = make_model()
    history = train(
        model,
        make_dataset(),
        mean_squared_error,
        settings(accumulate=2, **CLIPPED),
        accelerator=accelerator,
    )
    whole = accelerator.get_state_dict(model)
    local = sum(p.to_local().numel() for p in model.parameters())
    if accelerator.is_main_process:
        columns = {
            name: torch.tensor(history.column(name), dtype=torch.float64)
            for name in ("loss", "grad_norm")
        }
        counts = {"local": torch.tensor(local)}
        save_file(whole | columns | counts, out / "sharded.safetensors")


def main(out: Path) -> None:
    accelerator = default_accelerator()
    assert accelerator.num_processes == 2
    plain, history = weights()
    accumulated, _ = weights(accumulate=2)
    straight, draws = noisy_weights(out / "straight")
    with suppress(InterruptedError):
        noisy_weights(out / "resumed", fail_at=4)
    resumed, later_draws = noisy_weights(out / "resumed")

    for name, weight in straight[0].items():
        assert torch.equal(weight, resumed[0][name]), name
    assert straight[1] == resumed[1]
    assert later_draws == draws[2:]
    both = accelerator.gather(torch.tensor(draws[:1]))
    assert both[0] != both[1], "both processes drew the same samples"
    if accelerator.is_main_process:
        losses = {"losses": torch.tensor(history.column("loss"))}
        save_file(plain | losses, out / "plain.safetensors")
        save_file(accumulated, out / "accumulated.safetensors")
    sharded(out)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
