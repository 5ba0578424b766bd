"""A model divided over processes: each keeps its rows of every weight, gradient and moment, and has the others' only while a
layer computes with them. This is fully sharded data parallelism (https://arxiv.org/abs/2304.11277), by PyTorch's FSDP2.

It changes where tensors lie, not what is computed: sums over processes are plain sums, as without it.
"""

import torch
from torch import Tensor, nn

from etude.errors import UsageError
from etude.model.transformer import Etude
from etude.parallel import Processes
from etude.training.config import TrainingConfig


def is_sharded(config: TrainingConfig, processes: Processes, precision: str) -> bool:
    """Whether to divide the model. Raises :class:`UsageError` for settings that do not go with it."""
    if config.parallel != "fsdp" or processes.count == 1:
        return False
    if config.batch_size % processes.count:
        raise UsageError(
            f"batch_size ({config.batch_size}) must be a multiple of the number of processes ({processes.count}) with --parallel fsdp: "
            "all of them have to compute equally often"
        )
    if config.auto_micro_batch:
        raise UsageError("--auto_micro_batch goes with --parallel ddp only: under fsdp no process can try again by itself")
    if precision == "fp16":
        raise UsageError("--parallel fsdp goes with bf16 and fp32 only; set --precision fp32, or --parallel ddp")
    return True


def shard(model: Etude, device: torch.device, optimizer: str) -> None:
    """Divide ``model``, which is whole and the same in every process, over all of them; its parameters become DTensors on
    ``device``. Raises :class:`UsageError` for a matrix of fewer rows than processes, under Muon, which cannot take empty parts.
    """
    count = torch.distributed.get_world_size()
    fewest = min(parameter.shape[0] for layer in model.layers for parameter in layer.parameters() if parameter.ndim > 1)
    if optimizer == "muon" and fewest < count:
        raise UsageError(
            f"a matrix of the model has {fewest} rows, fewer than the {count} processes; use --optimizer adamw or ddp"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # The embedding and the head stay gathered from the forward to the backward pass: the loss reads the head in between.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(1.0)  # a sum: the trainer divides by the weight of the whole batch
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def release(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left gathered; without it, later ones would compute with old weights."""
    if hasattr(model, "reshard"):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a divided tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a divided tensor, gathered: every process has to come here. Any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(rows: Tensor, example: Tensor) -> Tensor:
    """This process's ``rows`` as its part of a tensor that is divided as ``example`` is; of one that isn't, all of it."""
    if not hasattr(example, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = example.device_mesh, example.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=example.shape, stride=example.stride())


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
    """``tensor``, which every process has whole, divided as ``example`` is."""
    if not hasattr(example, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
