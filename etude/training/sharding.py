"""A model divided over processes: each keeps its rows of every weight, gradient and moment, and has the others' only while a
layer computes with them. This is fully sharded data parallelism (https://arxiv.org/abs/2304.11277), by PyTorch's FSDP2.

It changes where tensors lie, not what is computed: sums over processes are plain sums, as without it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from etude.errors import UsageError
from etude.model.transformer import Block, Etude
from etude.parallel import Processes, all_gather
from etude.training.config import TrainingConfig

GATHERED = 2**27  # weights that are gathered together: half a GiB of fp32, and one more group is on its way meanwhile


def number_of_parts(config: TrainingConfig, processes: Processes, precision: str) -> int:
    """Into how many parts the model is divided: 1 where every process has all of it. Raises :class:`UsageError` for settings that
    do not go with a divided one.
    """
    if config.parallel == "ddp" or processes.count == 1:
        return 1
    option, count = f"--parallel {config.parallel}", processes.count
    if config.parallel == "hsdp":
        if processes.on_machine is None:
            raise UsageError(
                "--parallel hsdp has to know how many processes a machine has, from LOCAL_WORLD_SIZE; torchrun sets it"
            )
        count = processes.on_machine
        if count == 1:
            return 1
    if config.batch_size % processes.count:
        raise UsageError(
            f"batch_size ({config.batch_size}) must be a multiple of the number of processes ({processes.count}) with {option}: "
            "all of them have to compute equally often"
        )
    if config.auto_micro_batch:
        raise UsageError(
            f"--auto_micro_batch goes with --parallel ddp only: under {config.parallel} no process can try again by itself"
        )
    if precision == "fp16":
        raise UsageError(f"{option} goes with bf16 and fp32 only; set --precision fp32, or --parallel ddp")
    return count


def require_like_machines(processes: Processes, device: torch.device) -> None:
    """Raise :class:`UsageError`, in every process, if machines have unlike numbers of them."""
    counts = set(processes.gather(torch.tensor([processes.on_machine], device=device)).tolist())
    if len(counts) > 1:
        raise UsageError(
            f"--parallel hsdp wants as many processes on each machine, and there are {' and '.join(map(str, sorted(counts)))}; "
            "start torchrun with the same --nproc_per_node everywhere, or set --parallel fsdp"
        )


def shard(model: Etude, device: torch.device, parts: int) -> None:
    """Divide ``model``, which is whole and the same in every process, into ``parts``; its parameters become DTensors on ``device``.

    Where there are more processes than parts, each stretch of ``parts`` ranks has a model of its own, and gradients are added up over
    them as well (hybrid sharding: what is gathered often need not leave a machine).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    count = torch.distributed.get_world_size()
    shape, names = ((parts,), ("parts",)) if parts == count else ((count // parts, parts), ("copies", "parts"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    groups = _groups(model.layers)
    for group in groups:
        # The last one's weights are the first that the way back wants.
        fully_shard(group, mesh=mesh, reshard_after_forward=group is not groups[-1])
    # The embedding and the head stay gathered from the forward to the backward pass: the loss reads the head in between.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in (model, *(group[0] for group in groups)):
        module.set_gradient_divide_factor(1.0)  # a sum: the trainer divides by the weight of the whole batch
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def compile_divided(model: Etude) -> None:
    """Have training compute with compiled code, which :func:`shard` leaves in one piece where all weights are gathered at once, and
    which has no gathering within a piece: that cannot be compiled. Validating and sampling, whose shapes vary, compute as before.
    """
    pieces = [(layer, "forward") for layer in (*model.layers, model.norm)] + [(model, "embedded")]
    for module, method in pieces if _groups(model.layers) else [(model, "hidden")]:
        plain = getattr(module, method)
        setattr(module, method, _in_training(module, torch.compile(plain, dynamic=False), plain))


def _in_training(module: nn.Module, fast: Callable, plain: Callable) -> Callable:
    return lambda *arguments, **named: (fast if module.training else plain)(*arguments, **named)


def _groups(layers: nn.ModuleList) -> list[list[Block]]:
    """Consecutive layers whose weights are gathered together: a layer alone, of a large model; of a smaller one many, since each
    gathering costs the CPU about a millisecond, in which a large GPU computes a small layer. None of a small one: its layers are
    gathered with all the rest.
    """
    size = sum(parameter.numel() for parameter in layers[0].parameters())
    each = max(1, GATHERED // size)
    return [list(layers[start : start + each]) for start in range(0, len(layers), each)] if each < len(layers) else []


def release(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left gathered; without it, later ones would compute with old weights."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a divided tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a divided tensor, gathered: every process has to come here. Any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(rows: list[Tensor], examples: list[Tensor]) -> list[Tensor]:
    """Whole tensors, of which each process has some ``rows``, divided as ``examples`` are: all in one gathering, to which every
    process has to come. Of tensors that aren't divided, themselves.
    """
    if not hasattr(examples[0], "to_local"):
        return rows
    mesh = examples[0].device_mesh
    parts = mesh.size(-1)
    shapes = [(_rows_each(example, parts), *example.shape[1:]) for example in examples]
    flat = torch.cat(
        [
            nn.functional.pad(part.flatten(), (0, math.prod(shape) - part.numel()))
            for part, shape in zip(rows, shapes, strict=True)
        ]
    )
    everything = flat.new_empty(parts * flat.numel())
    all_gather(everything, flat, mesh.get_group("parts"))
    pieces = everything.view(parts, -1).split([math.prod(shape) for shape in shapes], dim=1)
    return [piece.reshape(-1, *example.shape[1:])[: len(example)] for piece, example in zip(pieces, examples, strict=True)]


def own_rows(tensor: Tensor, example: Tensor) -> Tensor:
    """This process's rows of ``tensor``, which is whole, if ``example`` is divided; otherwise all of it."""
    if not hasattr(example, "to_local"):
        return tensor
    mesh = example.device_mesh
    each = _rows_each(example, mesh.size(-1))
    return tensor[each * mesh.get_local_rank("parts") :][:each]


def _rows_each(example: Tensor, parts: int) -> int:
    """How many rows the first part of a divided tensor has; later ones have as many, as long as there are any."""
    return -(-len(example) // parts)


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
    """``tensor``, which every process has whole, divided as ``example`` is."""
    if not hasattr(example, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
