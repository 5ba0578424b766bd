"""The gradient of a step's global batch: added up over micro-batches, then over processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from etude.data.batches import micro_batches, to_device
from etude.device import autocast
from etude.errors import UsageError
from etude.losses import Loss
from etude.model.transformer import Etude
from etude.parallel import Processes
from etude.training.config import TrainingConfig
from etude.training.sharding import local


class GradientSum:
    """Fills ``.grad`` of the model's parameters. The sum is the same however a batch is cut into micro-batches.

    ``loss`` is what every micro-batch is put to, compiled or not; ``micro_batch_size`` is the rows of one.
    ``parts`` are those that the model is divided into.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: Etude,
        loss: Callable[[Etude, dict[str, Tensor]], Loss],
        processes: Processes,
        device: torch.device,
        precision: str,
        micro_batch_size: int,
        parts: int,
    ):
        self.config, self.model, self.loss, self.processes = config, model, loss, processes
        self.device, self.precision, self.micro_batch_size, self.parts = device, precision, micro_batch_size, parts
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None

    def compute(self, step: int, batch: dict[str, Tensor], scale: float, tell: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the loss of ``batch``, this process's rows of it, times ``scale``, over all processes.
        Returns the loss and its weight, summed likewise. ``tell`` is given what a person should know.

        Out of memory raises :class:`UsageError`; with ``auto_micro_batch``, half the micro-batch is tried instead.
        """
        loss_sum, weight = self._here(step, batch, scale, tell)
        if self.parts == 1:  # else FSDP has added them up on the way
            self.processes.sum_gradients(self.tensors())
        return tuple(self.processes.sum(torch.stack((loss_sum, weight.to(loss_sum.dtype)))))

    @torch.no_grad()  # to_local would record itself
    def tensors(self) -> list[Tensor]:
        """The gradients, of a divided model this process's rows of them. To change them in place changes the gradients."""
        return [local(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]

    def norm(self) -> Tensor:
        """The norm of all gradients together."""
        norm = torch.nn.utils.get_total_norm(self.tensors())
        if self.parts == 1:
            return norm
        copies = self.processes.count // self.parts
        return (self.processes.sum(norm.square()) / copies).sqrt()

    def forget(self) -> None:
        """Drop the gradients without an update."""
        self.model.zero_grad(set_to_none=True)
        if self.scaler:  # it would take the next step's unscaling for a second one of this step's
            scale = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.device.type)
            self.scaler.load_state_dict(scale)

    def _here(self, step: int, batch: dict[str, Tensor], scale: float, tell: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        while True:
            try:
                return self._over_micro_batches(step, batch, scale)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                size = self.micro_batch_size
                told = f"step {step + 1}: out of memory with --micro_batch_size {size} of block_size {self.config.block_size}"
                if not self.config.auto_micro_batch or size == 1:
                    smaller = f"--micro_batch_size {size // 2} (the gradient stays the same) or " if size > 1 else ""
                    raise UsageError(
                        f"{told}; set {smaller}a shorter --block_size, or free the device's memory. Checkpoints are intact"
                    ) from error
            # Out here the error, and with it the activations that its traceback holds, is gone.
            self.micro_batch_size = size // 2
            self.forget()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            tell(f"memory    {told}; going on with {self.micro_batch_size}, the same batch and gradient")

    def _over_micro_batches(self, step: int, batch: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        weight = torch.zeros((), device=self.device)
        row = self.processes.rows(self.config.batch_size).start  # of the global batch
        for micro_batch in micro_batches(batch, self.micro_batch_size):
            self._seed_dropout(step, row)
            row += len(micro_batch["ids"])
            with autocast(self.device, self.precision):
                result = self.loss(self.model, to_device(micro_batch, self.device))
            scaled = result.sum * scale
            (self.scaler.scale(scaled) if self.scaler else scaled).backward()
            loss_sum += result.sum.detach()
            weight += result.weight
        # The generator's state in a checkpoint is not to tell who computed what.
        self._seed_dropout(step, self.config.batch_size)
        return loss_sum, weight

    def _seed_dropout(self, step: int, row: int) -> None:
        """Dropout is a function of (seed, step, row), so that a resumed step drops the same channels."""
        torch.manual_seed(((self.config.seed * 1_000_003 + step) * 1_000_003 + row) % 2**63)


def is_out_of_memory(error: Exception) -> bool:
    # A CPU's and Metal's allocators raise no error class of their own, nor does cuBLAS.
    signs = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
