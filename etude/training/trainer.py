"""The one training loop: model, batches and loss in, a trained model folder out.

Pretraining and SFT differ in those three, not in the loop. Everything a step does is a function of its number and of the
state that checkpoints hold, so a run that was stopped, at any moment and in any way, ends where it would have ended.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from etude import cli, paths
from etude.data.batches import Batches, Samples
from etude.device import pick_compile, pick_device, pick_precision, set_deterministic
from etude.errors import Interrupted, UsageError
from etude.evaluation import LossResult, evaluate_loss
from etude.lock import FolderLock
from etude.losses import Loss, causal_lm_loss, linear_cross_entropy
from etude.memory import keep_freed_memory
from etude.model.transformer import Etude
from etude.parallel import from_environment, local_device
from etude.runlog import RunLog, SilentLog, duration
from etude.tokenizer import Tokenizer
from etude.training import checkpoint, report, resume
from etude.training.config import TrainingConfig
from etude.training.gradients import GradientSum, is_out_of_memory
from etude.training.health import Health
from etude.training.identity import identity
from etude.training.optim import lr_at, make_optimizers, momentum_at, set_for_step
from etude.training.sharding import compile_divided, number_of_parts, release, require_like_machines, shard, whole
from etude.training.signals import StopSignals
from etude.training.spikes import SpikeFound, Spikes
from etude.weights import save_model

AUTO_MICRO_BATCH_TOKENS = 32_768  # enough to keep a large GPU busy; logits of this many tokens still fit a small one


class Trainer:
    """Trains ``model`` on ``batches`` by ``loss``, into the folder ``config.output``.

    ``val`` are the validation samples, or None. ``sample(model)`` returns a text to show now and then. ``fingerprints`` tell
    what must not change on resume beside the config: the data's and the tokenizer's SHA-256, say.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: Etude,
        tokenizer: Tokenizer,
        batches: Batches,
        loss: Callable[[Etude, dict[str, Tensor]], Loss],
        val: Samples | None = None,
        sample: Callable[[Etude], str] | None = None,
        fingerprints: dict[str, Any] | None = None,
    ):
        self.processes = from_environment(config.batch_size, config.collective_timeout)
        batches.processes = self.processes
        if config.threads:
            torch.set_num_threads(config.threads)
        set_deterministic(config.deterministic)
        self.config, self.tokenizer, self.batches = config, tokenizer, batches
        self.val = val if val is not None and len(val) else None
        self.sample = sample
        self.device = pick_device(local_device(config.device))
        self.precision = pick_precision(config.precision, self.device, training=True)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams and events are the current device's
            batches.pinned = True
        elif self.device.type == "cpu":
            keep_freed_memory()
        self.parts = number_of_parts(config, self.processes, self.precision)  # of the model, each in another process
        self.sharded = self.parts > 1
        self.model = model if self.sharded else model.to(self.device)
        model.gradient_checkpointing = config.gradient_checkpointing
        model.fp8 = self.precision == "fp8"
        model.rotary.on(self.device)  # made before compiling, so that compiled code reads it
        self.loss = loss
        self.health = Health(batches, self.device, scaled=self.precision == "fp16")
        self.spikes = Spikes(config)

        self.steps = config.max_steps or math.ceil(config.epochs * batches.steps_per_epoch)
        self.tokens_per_step = config.batch_size * batches.samples.block_size
        flops = model.config.training_flops_per_token(batches.samples.block_size) * self.tokens_per_step * self.steps
        self.compiled = pick_compile(config.compile, self.device, flops)
        if self.compiled:
            with suppress(ImportError, AttributeError):  # a torch that knows no such wishes compiles as it sees fit
                from etude.training.compiler import embed_in_order, hold_long_rows, keep_gradients

                keep_gradients()
                if self.device.type == "cpu":
                    embed_in_order()
                if model.fp8:
                    hold_long_rows()
        self.optimizers = [] if self.sharded else self._make_optimizers()
        wanted = config.micro_batch_size or max(1, AUTO_MICRO_BATCH_TOKENS // batches.samples.block_size)
        rows = self.processes.rows(config.batch_size)
        self.gradients = GradientSum(
            config, self.model, torch.compile(loss, dynamic=False) if self.compiled and not self.sharded else loss,
            self.processes, self.device, self.precision, min(wanted, rows.stop - rows.start), self.parts,
        )  # fmt: skip
        self.eval_batch_size = min(wanted, config.batch_size, max(1, 8_192 // batches.samples.block_size))
        self.step = 0  # optimizer steps done
        self.best_val_loss = math.inf
        self.validation_pending = False  # it was due at this step, but the run was asked to stop
        self.tokens_seen = 0
        self.seconds = 0.0  # spent in steps, over all sessions of the run
        self.identity = identity(config, self.model.config.to_dict(), self.precision, fingerprints or {})
        self.log: RunLog | SilentLog = SilentLog()
        self.saver: checkpoint.Saver

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step and save the model. Raises :class:`Interrupted` after SIGINT or SIGTERM, with all saved."""
        with self.processes.together(self.device):
            if self.processes.is_first:
                with FolderLock(self.config.output):
                    checkpoint.clean(self.config.output)
                    self._run()
            else:
                self._run()

    def _run(self) -> None:
        if self.config.parallel == "hsdp" and self.processes.count > 1:
            require_like_machines(self.processes, self.device)
        if self.sharded:
            self._divide()
        resumed = resume.go_on(self)
        if self.processes.is_first:
            checkpoint.require_room(self.config.output, self.model, self.optimizers, self.config.keep_checkpoints)
            self.log = RunLog(self.config.output, self.config.tracker, cli.as_dict(self.config))
            self.log.resume_from(self.step, revalidate=self.validation_pending)
            cli.save(self.config, f"{self.config.output}/run.yaml")
        print(report.header(self, resumed))
        self.saver = checkpoint.Saver(self.config.output, self.config.keep_checkpoints, self.processes)
        # A lost process is to be noticed before the saver waits for it.
        loading, watching = ThreadPoolExecutor(1, "batches"), self.processes.watching()
        with StopSignals(self.processes) as stop, self.saver, loading as loader, watching:
            if self.validation_pending:
                self._validate(stop)
                self._save()  # it is made up for: neither the next start nor a rewind is to do it again
                self._leave_if_asked(stop)
            if self.step < self.steps:
                if self.config.rewind_on_spike:
                    self._save()  # something of this very run to go back to
                self._loop(loader, stop)
            self.saver.wait()
        self._finish()

    def _divide(self) -> None:
        """Divide model and optimizers over the processes, which have to be connected by now."""
        if self.compiled:
            compile_divided(self.model)
            if self.loss is causal_lm_loss:
                cross_entropy = torch.compile(linear_cross_entropy, dynamic=False)
                self.gradients.loss = partial(causal_lm_loss, cross_entropy=cross_entropy)
        shard(self.model, self.device, self.parts)
        self.optimizers = self._make_optimizers()

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        fused = self.compiled and self.device.type == "cuda"  # on a CPU it would save nothing
        return make_optimizers(self.model, self.config, self.device, self.processes, fused)

    def _loop(self, loader: ThreadPoolExecutor, stop: StopSignals) -> None:
        every = self.intervals()
        self.model.train()
        upcoming = loader.submit(self.batches.at, self.step)
        clock, window = time.perf_counter(), []  # (seconds, tokens) of steps since the last record
        while self.step < self.steps:
            batch = upcoming.result()
            if self.step + 1 < self.steps:
                upcoming = loader.submit(self.batches.at, self.step + 1)
            try:
                with self.processes.overseen(f"in step {self.step + 1}"):
                    metrics = {} if self.spikes.is_quarantined(self.step) else self.optimizer_step(batch)
            except RuntimeError as error:  # beside the gradients, which see to it themselves: the optimizer's first step, say
                if not is_out_of_memory(error):
                    raise
                size = self.gradients.micro_batch_size
                raise UsageError(
                    f"step {self.step + 1}: out of memory in the optimizer; set a lower --micro_batch_size than {size}, "
                    "or a smaller model. Checkpoints are intact"
                ) from error
            except SpikeFound as spike:
                metrics = {}
                if self._went_back(spike):
                    upcoming = loader.submit(self.batches.at, self.step)
                    clock, window = time.perf_counter(), []
                    continue
            self.step += 1
            stop.agree(self.step)
            self.tokens_seen += self.tokens_per_step
            last = self.step == self.steps

            recorded = metrics and (self.step % self.config.log_every == 0 or last)
            if recorded:  # reading the numbers waits for the GPU, so only now and then, and before the clock is read
                metrics = {name: float(value) for name, value in metrics.items()}
            elapsed = time.perf_counter() - clock
            self.seconds += elapsed
            window.append((elapsed, self.tokens_per_step))
            if recorded:
                values, line = report.of_steps(self, metrics, window)
                self.log.metrics(self.step, **values)
                self.log.progress(line, last=last)
                window.clear()
            if _due(self.step, every["eval"], last):
                self._validate(stop)
            if every["sample"] and _due(self.step, every["sample"], last) and self.sample and not stop.asked:
                self.health.check()
                with self.processes.overseen("while sampling"):
                    self.log.line(f"sample    {self.sample(self.model)}")
                release(self.model)
            asked = stop.asked  # once: a signal that comes between saving and leaving is answered after the next step
            if _due(self.step, every["save"], last) or asked:
                self._save()
            if asked:
                self._leave_if_asked(stop)
            clock = time.perf_counter()  # what validating, sampling and saving took is no part of a step

    def _leave_if_asked(self, stop: StopSignals) -> None:
        if stop.asked and (self.step < self.steps or self.validation_pending):
            self.saver.wait()
            self.processes.meet()  # torchrun ends all when the first one ends, and that must not be before the save is done
            self.log.close()
            again = "the same command" if self.config.resume == "auto" else "the same command with --resume auto"
            raise Interrupted(f"stopped after step {self.step} of {self.steps}, and saved; {again} goes on from here")

    def optimizer_step(self, batch: dict[str, Tensor]) -> dict[str, float | Tensor]:
        """One update from a global batch. Its gradient is that of the mean over the batch's supervised tokens, however the
        batch is cut into micro-batches.
        """
        lr = lr_at(self.step, self.steps, self.config)
        set_for_step(self.optimizers, lr, momentum_at(self.step, self.config))
        # Sums over thousands of tokens would overflow fp16 on the way back; a constant keeps them near 1.
        scale = 1.0 / self.tokens_per_step
        loss_sum, weight = self.gradients.compute(self.step, batch, scale, tell=self.log.line)
        if self.gradients.scaler:  # after adding up, so that all processes see an overflow and keep one scale
            for optimizer in self.optimizers:
                self.gradients.scaler.unscale_(optimizer)
        factor = 1 / (scale * weight)  # what the summed gradient still needs to become the mean's
        norm = self.gradients.norm() * factor
        if self.config.max_grad_norm:
            factor = factor * (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.spikes.active and not self._is_taken(loss_sum, norm, weight):
            return {}
        torch._foreach_mul_(self.gradients.tensors(), factor)
        self.health.watch(self.step, loss_sum, norm, weight)
        # The scaler would skip by optimizer; an overflow anywhere spoils the common norm, so all skip together.
        overflow = self.gradients.scaler is not None and not torch.isfinite(norm)
        for optimizer in self.optimizers:
            if self.gradients.scaler and not overflow:
                self.gradients.scaler.step(optimizer)
            elif not self.gradients.scaler:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.gradients.scaler:
            self.gradients.scaler.update()
            self.health.count_overflow(self.step, overflow)
        return {"loss": loss_sum / weight, "grad_norm": norm, "lr": lr, "supervised_tokens": weight}

    def _is_taken(self, loss_sum: Tensor, norm: Tensor, weight: Tensor) -> bool:
        """Whether a step is to update the weights. Raises :class:`SpikeFound`; in either case its gradient is gone.

        Reading the numbers waits for a GPU at every step: the price of knowing before the update.
        """
        if weight == 0 and self.spikes.quarantine:  # all its rows are left out
            self.gradients.forget()
            return False
        overflow = self.gradients.scaler is not None and torch.isfinite(loss_sum) and not torch.isfinite(norm)
        if not overflow:  # one of fp16 is the scaler's affair
            try:
                self.spikes.require_none(float(loss_sum / weight), float(norm))
            except SpikeFound:
                self.gradients.forget()
                raise
        return True

    def _went_back(self, spike: SpikeFound) -> bool:
        """Answer a spike as the config says: skip the step (False), or go back to the last checkpoint (True)."""
        told = f"step {self.step + 1}: {spike}"
        samples = self.batches.describe(self.step)
        if not self.config.rewind_on_spike:
            self.spikes.skip(self.step, told)
            count = f"{len(self.spikes.skipped)} of at most {self.config.skip_spikes}"
            self.log.line(f"spike     {told}; its update is skipped ({count}): {samples}")
            return False
        self.spikes.put_in_quarantine(self.step, self.batches.documents(self.step), told)
        quarantine = self.spikes.quarantine
        self.saver.wait()
        resume.take(self, resume.newest(self))
        self.leave_out(quarantine)
        self.log.resume_from(self.step)
        count = f"{len(quarantine)} of at most {self.config.rewind_on_spike}"
        self.log.line(f"spike     {told}; back to step {self.step} ({count}), without its samples: {samples}")
        return True

    def leave_out(self, quarantine: list[dict[str, Any]]) -> None:
        """Have no step see the samples of these entries any more."""
        self.spikes.quarantine = quarantine
        for entry in quarantine:
            for document in entry["documents"]:
                self.batches.left_out[document] = min(entry["step"], self.batches.left_out.get(document, entry["step"]))

    # -- validating, recording, saving ----------------------------------------------------------------------------------

    def _validate(self, stop: StopSignals) -> None:
        if self.val is None:
            return
        self.validation_pending = True
        if stop.asked:
            return  # there may be only seconds left to save in; it is made up for after resuming
        result = evaluate_loss(
            self.model, self.val, self.device, self.precision, self.loss,
            batch_size=self.eval_batch_size, max_tokens=self.config.max_eval_tokens,
            should_stop=lambda: self.processes.count == 1 and stop.received,
            processes=self.processes, together=self.sharded,
        )  # fmt: skip
        release(self.model)
        if self.processes.count == 1 and stop.received:
            return  # the result is of a part only; it is made again after resuming
        self.validation_pending = False
        values = {"val_loss": result.loss, "val_perplexity": result.perplexity}
        bits = self.bits_per_byte(result)
        if bits is not None:
            values["val_bits_per_byte"] = bits
        self.log.metrics(self.step, **values)
        better = result.loss < self.best_val_loss
        if better:
            self.best_val_loss = result.loss
            self._save_model(f"{self.config.output}/best")
        described = f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}"
        described += f"  bits/byte {bits:.4f}" if bits is not None else ""
        self.log.line(f"validate  step {self.step}: {described}{'  (best so far)' if better else ''}")

    def bits_per_byte(self, result: LossResult) -> float | None:
        """The loss in bits, at the validation data's learnt tokens per byte; None for samples without a token store."""
        store = getattr(self.val, "store", None)
        if store is None or not store.text_bytes:
            return None
        return result.loss / math.log(2) * store.supervised / store.text_bytes

    def _save(self) -> None:
        self.health.check()
        if not (self.processes.is_first or self.sharded):
            return
        self.saver.wait()  # before copying: one copy at a time
        self.saver.save(checkpoint.snapshot(resume.state_of(self), self.model, self.optimizers, self.parts))

    def _save_model(self, folder: str) -> None:
        weights = {}
        if self.processes.is_first or self.sharded:  # of a divided model all have a part
            with self.processes.overseen("while gathering the model"):
                for name, tensor in self.model.state_dict().items():
                    gathered = whole(tensor)
                    if self.processes.is_first:
                        weights[name] = gathered.cpu()
        if self.processes.is_first:
            save_model(self.model, folder, weights)
            self.tokenizer.save(folder, max_length=self.model.config.max_position_embeddings)

    def _finish(self) -> None:
        self.health.check()
        self._save_model(self.config.output)
        if not self.processes.is_first:
            return
        self.log.draw(f"{os.path.basename(self.config.output)}: {self.steps} steps")
        self.log.close()
        best = f"; best validation loss {self.best_val_loss:.4f} in best/" if math.isfinite(self.best_val_loss) else ""
        self.log.line(
            f"complete  {self.steps} steps in {duration(self.seconds)}{best}\nmodel     {paths.typed(self.config.output)}"
        )

    # -- small things -------------------------------------------------------------------------------------------------------

    def intervals(self) -> dict[str, int]:
        def every(value: int | None, share: int) -> int:
            return max(1, self.steps // share) if value is None else value

        config = self.config
        return {
            "eval": every(config.eval_every, 10),
            "save": every(config.save_every, 10),
            "sample": every(config.sample_every, 5),
        }


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
