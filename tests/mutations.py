"""Proof that the tests of docs/reliability.md test something: each protection is taken away, and a test must fail.

    python tests/mutations.py                     all of them, about ten seconds each
    python tests/mutations.py --only spike lock   those whose name or file has one of these words
    python tests/mutations.py --list

The package and its tests are copied to a temporary folder, and changed there: one place at a time, put back afterwards. Each
time the tests that are named beside it run, in a forked process that imports the copy; at least one has to fail. Exit code 0:
all did. 1: a mutation survived, or is stale: its old text does not stand in the file exactly once, so it needs a new one.

Not collected by pytest. The numbers are those of the lines in docs/reliability.md.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("etude", "inference", "tests", "tool", "train", "docs", "pyproject.toml", "Makefile", "README.md", "README_CN.md")
SECONDS = 150  # for the tests of one mutation; what hangs without its protection is found out, too
MEMORY = 6 * 2**30  # bytes of address space, likewise
STALE, KILLED, SURVIVED, BROKEN = "stale", "killed", "SURVIVED", "broken"


@dataclass(frozen=True)
class Mutation:
    """A protection, and what is left without it."""

    check: str  # its number
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: tuple[str, ...]  # pytest node ids below tests/, of which one has to fail


def m(check: str, name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(check, name, file, old, new, tests)


CHECKPOINT, TRAINER, FILES = "etude/training/checkpoint.py", "etude/training/trainer.py", "etude/files.py"
RESUME = "etude/training/resume.py"
GRADIENTS, SPIKES, HEALTH = "etude/training/gradients.py", "etude/training/spikes.py", "etude/training/health.py"
PARALLEL, SIGNALS, BATCHES = "etude/parallel.py", "etude/training/signals.py", "etude/data/batches.py"
SHARDING, DIVIDED = "etude/training/sharding.py", "test_sharding.py::test_divided_a_model_is_trained_as_it_is_whole"
JSONL, DUMP, BZIP2, OUTPUT = (
    "etude/corpus/jsonl.py",
    "etude/corpus/wiki/dump.py",
    "etude/corpus/wiki/bzip2.py",
    "etude/corpus/output.py",
)
WEIGHTS, LLAMA, EXPORT, TOKENIZER = "etude/weights.py", "etude/llama.py", "etude/export.py", "etude/tokenizer.py"
SFT, PRETRAIN, CONVERSATIONS = "etude/data/sft.py", "etude/data/pretrain.py", "etude/corpus/conversations.py"
NO_CONTEXT = '__import__("contextlib").nullcontext'

STOPPED = "test_trainer.py::test_asked_to_stop_at_every_step_in_turn"
STOPPED_ANYWHERE = "test_trainer.py::test_asked_to_stop_at_any_step_a_run_ends_as_if_it_had_not_been"
ROUND_TRIP = "test_checkpoint.py::test_all_comes_back_exactly_and_training_goes_on_as_if_nothing_had_been"
MISFIT = "test_checkpoint.py::test_state_that_does_not_fit_is_refused"
ORDER = "test_checkpoint.py::test_order_is_by_number_and_other_names_are_left_alone"
DAMAGE = "test_checkpoint.py::test_damage_is_found_named_and_answered_with_the_checkpoint_before"
UNUSABLE = "test_checkpoint.py::test_without_a_usable_checkpoint_every_reason_is_told_and_nothing_starts_over"
CRASH = "test_checkpoint.py::test_a_crash_at_any_call_leaves_the_old_checkpoint_or_the_new_one"
WENT_BACK = "test_faults.py::test_going_back_from_spikes_equals_having_known_them_from_the_start"
BAD_NUMBER = "test_trainer.py::test_a_number_that_is_none_stops_the_run_before_it_reaches_the_weights"
BAD_RECORD = "test_jsonl.py::test_a_bad_record_is_named_with_its_place_and_reason"
TWO_AS_ONE = "test_parallel.py::test_two_processes_reach_the_bits_of_one_with_two_micro_batches"
ONE_TOLD = "test_parallel.py::test_one_process_asked_to_stop_stops_all_after_one_step_with_one_save"
DAMAGED_JSON = "test_model_files.py::test_damaged_json_files_load_or_are_refused_by_name"
DAMAGED_WEIGHTS = "test_model_files.py::test_damaged_safetensors_files_load_whole_or_are_refused_by_name"
OWN_CODE = "test_model_files.py::test_a_folder_that_asks_for_its_own_code_is_refused_and_nothing_of_it_runs"
PICKLES = "test_model_files.py::test_pickles_beside_or_instead_of_safetensors_are_never_opened"

MUTATIONS = (
    # ---- files and checkpoints ----
    m("1", "a checkpoint is written in its place", CHECKPOINT, "with whole_folder(target) as folder, processes",
      f"target.mkdir(parents=True, exist_ok=True)\n        with {NO_CONTEXT}(target) as folder, processes", CRASH),
    m("1", "leftovers of a killed run stay", TRAINER, "checkpoint.clean(self.config.output)", "pass",
      "test_faults.py::test_what_a_killed_run_left_half_written_is_cleaned_and_nothing_else"),
    m("1", "what a library half wrote has a name nobody knows", FILES, "temporary = folder / path.name",
      "temporary = folder.with_suffix('.file.tmp')",
      "test_soak.py::test_what_a_run_killed_while_it_wrote_its_best_model_left_goes_with_the_next"),
    m("1", "leftovers beside the best model stay", CHECKPOINT, ', Path(run) / "best")\n', ")\n",
      "test_soak.py::test_what_a_run_killed_while_it_wrote_its_best_model_left_goes_with_the_next"),
    m("2", "a file's content is not synced", FILES, "_make_readable(temporary)\n        sync(temporary)",
      "_make_readable(temporary)",
      "test_files.py::test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on"),
    m("2", "a file's name is not synced", FILES,
      "        sync(path.parent)\n    finally:\n        shutil.rmtree(folder", "    finally:\n        shutil.rmtree(folder",
      "test_files.py::test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on"),
    m("2", "a folder's files are not synced", FILES, "            sync(file)\n", "",
      "test_files.py::test_all_of_a_folder_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on"),
    m("2", "a folder's name is not synced", FILES,
      "        sync(path.parent)\n    finally:\n        shutil.rmtree(temporary", "    finally:\n        shutil.rmtree(temporary",
      "test_files.py::test_all_of_a_folder_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on"),
    m("3", "hashes are not compared", CHECKPOINT, "if found != digest:", "if False:", DAMAGE),
    m("4", "missing files are not looked for", CHECKPOINT, "if not (path / name).is_file():", "if False:", DAMAGE, UNUSABLE),
    m("3", "no checkpoint before the damaged one is tried", CHECKPOINT, "            reasons.append(str(error))\n",
      "            raise\n", DAMAGE),
    m("5", "a run without usable checkpoint starts over", CHECKPOINT, "    if reasons:\n", "    if False:\n", UNUSABLE),
    m("5", "a named checkpoint falls back to another", RESUME, "else checkpoint.load(wanted)",
      "else newest(trainer)", "test_trainer.py::test_a_named_checkpoint_is_taken_exactly_or_not_at_all"),
    m("6", "the optimizer's state is not restored", CHECKPOINT,
      "    _restore_optimizers(checkpoint, model, optimizers)\n    for", "    for", ROUND_TRIP, STOPPED),
    m("6", "the random state is not restored", CHECKPOINT, "            torch.set_rng_state(tensor)", "            pass",
      ROUND_TRIP),
    m("6", "dropout is not seeded by the step", GRADIENTS, "+ step) * 1_000_003 + row)", ") * 1_000_003 + row)",
      "test_trainer.py::test_dropout_differs_between_steps_and_micro_batches_but_not_between_runs"),
    m("6", "dropout is not seeded at all", GRADIENTS, "            self._seed_dropout(step, row)\n", "",
      "test_parallel.py::test_dropout_drops_the_same_in_two_processes"),
    m("6", "a resumed run begins its data again", TRAINER,
      "upcoming = loader.submit(self.batches.at, self.step)\n        clock",
      "upcoming = loader.submit(self.batches.at, 0)\n        clock", STOPPED),
    m("6", "a resumed run forgets its best loss", RESUME, "math.inf if best is None else best", "math.inf",
      STOPPED_ANYWHERE),
    m("6", "a validation that was due is not made up for", RESUME,
      'trainer.validation_pending = found.state["validation_pending"]', "pass", STOPPED_ANYWHERE),
    m("7", "metrics of steps that are made again stay", "etude/runlog.py", 'if r["step"] < step or', "if True or",
      "test_trainer.py::test_a_resumed_run_has_no_step_twice_in_its_metrics"),
    m("10", "checkpoints are ordered by name", CHECKPOINT, "sorted(numbered, reverse=True)",
      "sorted(numbered, key=lambda pair: pair[1].name, reverse=True)", ORDER),
    m("10", "other names count as checkpoints", CHECKPOINT, "NAME.fullmatch(path.name))]", "NAME.search(path.name))]", ORDER),
    m("10", "old checkpoints go before the new one is there", CHECKPOINT, "    processes = processes if processes and taken",
      "    prune(run, max(keep - 1, 0))\n    processes = processes if processes and taken",
      "test_checkpoint.py::test_the_old_checkpoint_goes_only_after_the_new_one_is_on_the_disk"),
    m("10", "pruning takes the best model along", CHECKPOINT, "    for path in found_in(run)[keep:]:\n",
      '    shutil.rmtree(Path(run) / "best", ignore_errors=True)\n    for path in found_in(run)[keep:]:\n',
      "test_trainer.py::test_best_is_the_model_of_the_least_validation_loss", ORDER),
    m("11", "a checkpoint is not a copy", CHECKPOINT, 'to("cpu", copy=True,', 'to("cpu", copy=False,',
      "test_faults.py::test_training_goes_on_while_a_checkpoint_is_written_and_does_not_reach_it"),
    m("11", "an error of a write is lost", CHECKPOINT, "            writing.result()", "            writing.exception()",
      "test_faults.py::test_an_error_of_the_disk_ends_the_run_at_the_next_save_and_keeps_the_checkpoint_before"),
    m("12", "nobody asks for room first", TRAINER, "checkpoint.require_room(", "(lambda *arguments: None)(",
      "test_faults.py::test_too_small_a_disk_is_told_before_the_first_step"),
    m("12", "a full disk is no error of the disk", WEIGHTS, "except SafetensorError as error:  # the library's own",
      "except ZeroDivisionError as error:  #",
      "test_checkpoint.py::test_a_full_disk_is_told_as_such_and_keeps_the_old_checkpoint"),
    m("13", "a changed run goes on", "etude/training/identity.py", "    if refused:\n", "    if False:\n",
      "test_trainer.py::test_a_changed_run_is_refused_with_old_and_new_unless_allowed"),
    m("13", "only the first difference is told", "etude/training/identity.py", "for name in refused)}. Put",
      "for name in refused[:1])}. Put", "test_parallel_edges.py::test_all_that_differs_is_told_at_once"),
    m("13", "a run that is past its end starts", RESUME, "if trainer.steps < found.step:", "if False:",
      "test_trainer.py::test_a_run_may_be_made_longer_and_says_so"),
    m("14", "missing and foreign weights are ignored", CHECKPOINT, "if parameters.keys() != checkpoint.model.keys():",
      "if False:", MISFIT),
    m("14", "shapes and dtypes of weights are ignored", CHECKPOINT,
      "if saved.shape != parameter.shape or saved.dtype != parameter.dtype:", "if False:", MISFIT),
    m("14", "missing optimizer state is ignored", CHECKPOINT, "if missing and checkpoint.step > 0:", "if False:", MISFIT),
    m("14", "optimizer state of other shapes is ignored", CHECKPOINT, "if key not in state or state[key].shape not in",
      "if () in", MISFIT),
    m("14", "foreign optimizer state is ignored", CHECKPOINT, "    if saved:\n", "    if False:\n", MISFIT,
      "test_checkpoint.py::test_another_optimizer_is_refused"),
    m("14", "checkpoints of other versions are read", CHECKPOINT, 'if state.get("schema_version") != SCHEMA_VERSION:',
      "if False:", "test_checkpoint.py::test_a_checkpoint_of_another_version_is_refused"),
    m("15", "a run takes no lock", TRAINER, "with FolderLock(self.config.output):", f"with {NO_CONTEXT}():",
      "test_faults.py::test_a_second_run_in_a_folder_is_refused_naming_the_first"),
    m("15", "a lock that another holds is taken", "etude/lock.py", "            return False\n        print",
      "            return True\n        print", "test_faults.py::test_a_second_run_in_a_folder_is_refused_naming_the_first"),
    m("15", "a lock is not given back", "etude/lock.py", "        _unlock(self._file)  #", "        #",
      "test_faults.py::test_a_lock_is_free_when_it_is_given_back_though_a_child_holds_its_file"),
    # ---- being stopped, and what goes wrong in a step ----
    m("16", "signals are not handled", SIGNALS, "self._previous[number] = signal.signal(number, self._note)", "pass",
      "test_trainer.py::test_further_signals_do_not_disturb_the_save"),
    m("16", "a second signal has its usual effect", SIGNALS, "        first, self.received = not self.received, True\n",
      "        first, self.received = not self.received, True\n        signal.signal(number, signal.SIG_DFL)\n",
      "test_trainer.py::test_further_signals_do_not_disturb_the_save"),
    m("16", "nothing is saved when a run is stopped", TRAINER, 'if _due(self.step, every["save"], last) or asked:',
      'if _due(self.step, every["save"], last):', STOPPED),
    m("16", "a stopped run leaves before its save is done", TRAINER,
      "            self.saver.wait()\n            self.processes.meet()", "            self.processes.meet()",
      "test_parallel_edges.py::test_a_run_whose_last_save_failed_does_not_say_that_it_is_saved"),
    m("21", "a step's numbers are not looked at", TRAINER, "self.health.watch(self.step, loss_sum, norm, weight)", "pass",
      BAD_NUMBER),
    m("21", "a loss that is no number passes", HEALTH, "if math.isfinite(loss_sum) and weight", "if weight",
      "test_parallel_edges.py::test_under_fp16_a_gradient_may_overflow_but_a_loss_may_not"),
    m("21", "a gradient that is no number passes", HEALTH, "(math.isfinite(norm) and norm > 0)", "not norm == 0", BAD_NUMBER),
    m("21", "a gradient of 0 passes", HEALTH, "(math.isfinite(norm) and norm > 0)", "math.isfinite(norm)",
      "test_parallel_edges.py::test_a_gradient_of_exactly_nothing_stops_the_run"),
    m("22", "a skipped step updates", TRAINER,
      "            except SpikeFound:\n                self.gradients.forget()\n                raise",
      "            except SpikeFound:\n                [optimizer.step() for optimizer in self.optimizers]\n"
      "                self.gradients.forget()\n                raise",
      "test_faults.py::test_a_skipped_step_changes_nothing_at_all"),
    m("22", "a skipped step's gradient stays", TRAINER,
      "            except SpikeFound:\n                self.gradients.forget()\n", "            except SpikeFound:\n",
      "test_faults.py::test_a_skipped_step_changes_nothing_at_all"),
    m("22", "spikes may be skipped without end", SPIKES, "if len(self.skipped) > self.skips_allowed:", "if False:",
      "test_faults.py::test_spikes_are_counted_across_resumes_and_end_the_run_above_the_cap"),
    m("22", "skipped steps are not saved", SPIKES, '"skipped": list(self.skipped)', '"skipped": []',
      "test_faults.py::test_spikes_are_counted_across_resumes_and_end_the_run_above_the_cap"),
    m("22", "what spikes are judged by is not restored", SPIKES,
      'deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)', "deque((), WINDOW), deque((), WINDOW)", WENT_BACK,
      "test_faults.py::test_killed_after_going_back_a_run_ends_the_same"),
    m("22", "a quarantine is lost in going back", TRAINER,
      "        resume.take(self, resume.newest(self))\n        self.leave_out(quarantine)",
      "        resume.take(self, resume.newest(self))",
      WENT_BACK),
    m("22", "a quarantine is not saved", SPIKES, '"quarantine": list(self.quarantine)', '"quarantine": []',
      "test_faults.py::test_killed_after_going_back_a_run_ends_the_same"),
    m("22", "a quarantined step updates", TRAINER,
      "{} if self.spikes.is_quarantined(self.step) else self.optimizer_step(batch)", "self.optimizer_step(batch)",
      WENT_BACK),
    m("22", "documents in quarantine go on teaching", BATCHES, 'arrays["labels"][row] = IGNORED', "pass",
      "test_faults.py::test_documents_in_quarantine_teach_nothing_from_then_on"),
    m("22", "a run goes back without end", SPIKES, "if len(self.quarantine) >= self.rewinds_allowed:", "if False:",
      "test_faults.py::test_a_run_goes_back_at_most_so_often"),
    m("22", "going back does not wait for the save under way", TRAINER,
      "        quarantine = self.spikes.quarantine\n        self.saver.wait()\n",
      "        quarantine = self.spikes.quarantine\n",
      "test_parallel_edges.py::test_going_back_waits_for_the_checkpoint_under_way"),
    m("22", "a step without a token passes for one in quarantine", TRAINER, "if weight == 0 and self.spikes.quarantine:",
      "if weight == 0:", "test_parallel_edges.py::test_a_batch_without_a_supervised_token_is_a_spike_and_no_step_of_zero"),
    m("23", "unreadable samples are not named", BATCHES, "except Exception as error:  # a damaged store",
      "except ZeroDivisionError as error:  # a damaged store",
      "test_faults.py::test_samples_that_cannot_be_read_are_named_and_the_run_goes_on_later"),
    m("24", "out of memory is any other error", GRADIENTS,
      "                if not is_out_of_memory(error):\n                    raise", "                raise",
      "test_faults.py::test_out_of_memory_says_what_was_tried_and_what_to_set"),
    m("24", "half a gradient stays after running out of memory", GRADIENTS,
      "self.micro_batch_size = size // 2\n            self.forget()\n", "self.micro_batch_size = size // 2\n",
      "test_parallel_edges.py::test_half_a_gradient_is_dropped_when_memory_runs_out"),
    m("25", "a batch without a token is learnt from", HEALTH,
      "math.isfinite(loss_sum) and weight > 0 and (self._scaled or (math.isfinite(norm) and norm > 0))", "True",
      "test_trainer.py::test_a_batch_without_a_supervised_token_is_refused_rather_than_learnt_as_zero"),
    m("25", "the gradient is not that of the supervised tokens' mean", TRAINER, "factor = 1 / (scale * weight)",
      "factor = 1 / (scale * self.tokens_per_step) + 0 * weight", "test_trainer.py::test_steps_are_those_of_the_formula"),
    # ---- several processes ----
    m("8", "gradients are not added up", PARALLEL, "dist.all_reduce(flat)", "pass", TWO_AS_ONE),
    m("8", "every process takes the same rows", BATCHES, "self.numbers(step)[self.processes.rows(self.batch_size)]",
      "self.numbers(step)[:len(self.numbers(step)[self.processes.rows(self.batch_size)])]", TWO_AS_ONE),
    m("8", "dropout is seeded by the row of the process", GRADIENTS,
      "row = self.processes.rows(self.config.batch_size).start", "row = 0",
      "test_parallel.py::test_dropout_drops_the_same_in_two_processes"),
    m("9", "the gradients of a divided model are averaged", SHARDING, "module.set_gradient_divide_factor(1.0)", "pass  #", DIVIDED),
    m("9", "the norm is that of one process's part", GRADIENTS, "if self.parts == 1:\n            return norm", "if True:\n            return norm",
      DIVIDED),
    m("9", "the norms of all machines' copies are added up", GRADIENTS, "(self.processes.sum(norm.square()) / copies)",
      "(self.processes.sum(norm.square()) / 1)", "test_sharding.py::test_two_machines_with_a_divided_copy_each_train_as_one_process"),
    m("9", "every machine's process writes a part", CHECKPOINT, "if processes.rank < taken.shards:", "if True:",
      "test_sharding.py::test_two_machines_with_a_divided_copy_each_train_as_one_process"),
    m("9", "a process without rows is given others'", SHARDING, "return tensor[each * mesh.get_local_rank(\"parts\") :][:each]",
      "return tensor[-each:]", "test_sharding.py::test_a_process_may_have_no_row_of_a_matrix"),
    m("9", "weights gathered for a sample are used again", TRAINER, "                release(self.model)\n", "",
      "test_sharding.py::test_samples_are_printed_and_training_goes_on_with_the_weights_it_has"),
    m("9", "moments are not divided again", CHECKPOINT, "divided_like(value, parameters[index]) if value.ndim", "value if value.ndim",
      "test_sharding.py::test_a_divided_state_comes_back_whole_and_is_divided_again"),
    m("9", "the first part is taken for the whole", CHECKPOINT, "torch.cat([part[name] for part in parts]) if tensor.ndim", "tensor if tensor.ndim",
      "test_sharding.py::test_a_divided_state_comes_back_whole_and_is_divided_again"),
    m("9", "parts that are missing are not looked for", CHECKPOINT, "for name in (*parts,",
      "for name in (*[part for part in parts if part in manifest],",
      "test_sharding.py::test_a_missing_swapped_or_foreign_part_is_named"),
    m("11", "an error of one process leaves the others waiting", PARALLEL,
      "if self._store.check([FAILED]):\n                    raise StorageError(self._store.get(FAILED).decode())\n                if self._lost",
      "if self._lost",
      "test_sharding.py::test_an_error_of_one_disk_ends_all_with_the_checkpoint_before"),
    m("16", "an interrupted import is a traceback", "etude/cli.py", "isinstance(error.__cause__, KeyboardInterrupt)", "False",
      "test_cli.py::test_an_interruption_that_python_wrapped_is_one_still"),
    m("8", "threads ask for MKL's kernels together", "etude/model/transformer.py", "\nsettle_kernels()\n", "\n",
      "test_model.py::test_elementary_functions_are_called_by_one_thread_before_many_ask"),
    m("8", "compiled code adds up in any order", TRAINER, "                    embed_in_order()\n", "                    pass\n",
      "test_compiled.py::test_compiled_code_adds_up_the_same_bits_each_time"),
    m("16", "a second Ctrl-C breaks into the end of a pool", "etude/corpus/workers.py",
      "signal.signal(signal.SIGINT, lambda", "(lambda *_: None)(0, lambda",
      "test_data.py::test_ctrl_c_while_a_pool_ends_is_answered_afterwards"),
    m("29", "processes use any tokenizer", "etude/data/encoding.py", "if tokenizer.fingerprint != fingerprint:", "if False:",
      "test_data.py::test_processes_answer_for_the_tokenizer_that_was_asked_for"),
    m("17", "a closed terminal kills the run", SIGNALS, '("SIGINT", "SIGTERM", "SIGHUP")', '("SIGINT", "SIGTERM")',
      "test_signals.py::test_a_run_whose_terminal_is_closed_saves_and_leaves"),
    m("19", "restarted processes take dead ones' addresses", PARALLEL, "return torch.distributed.PrefixStore(start, store)", "return store",
      "test_torchrun.py::test_after_one_process_dies_torchrun_starts_all_again_and_the_run_ends_as_if_none_had"),
    m("20", "a GPU that waits is waited for", PARALLEL, "        timer.start()\n", "",
      "test_parallel.py::test_a_gpu_that_waits_for_a_lost_process_is_left_with_the_same_message"),
    m("18", "a process heeds only its own signal", SIGNALS,
      "return self.received if self._processes.count == 1 else self._agreed", "return self.received", ONE_TOLD,
      "test_parallel_edges.py::test_no_process_leaves_before_the_save_is_on_the_disk"),
    m("18", "every process saves", TRAINER, "if not (self.processes.is_first or self.sharded):", "if False:",
      "test_parallel_edges.py::test_only_the_first_writes"),
    m("18", "a process leaves before the save is done", TRAINER,
      "            self.saver.wait()\n            self.processes.meet()  #", "            self.saver.wait()\n            #",
      "test_parallel_edges.py::test_no_process_leaves_before_the_save_is_on_the_disk"),
    m("20", "nobody gives up waiting", PARALLEL, "            timeout=longer,", "           ",
      "test_parallel.py::test_a_process_that_hangs_is_named_and_the_others_leave"),
    m("20", "a lost process is not named", PARALLEL, "or the connection broke; {self._whereabouts()}.",
      "or the connection broke.", "test_parallel.py::test_a_process_that_hangs_is_named_and_the_others_leave"),
    m("20", "it is not told what a lost process was waited for in", PARALLEL,
      "        except RuntimeError as error:\n            raise self._peer_lost(doing) from error",
      "        finally:\n            pass", "test_parallel.py::test_a_process_that_hangs_is_named_and_the_others_leave"),
    m("18", "a process validates a part when it is told to stop", TRAINER,
      "should_stop=lambda: self.processes.count == 1 and stop.received,", "should_stop=lambda: stop.received,",
      "test_parallel.py::test_told_to_stop_while_validating_two_processes_save_and_make_up_for_it"),
    m("8", "later checkpoints are moved before all have read", RESUME, "    trainer.processes.meet()  # all have read",
      "    # all have read", "test_parallel_edges.py::test_no_checkpoint_is_moved_unless_all_could_read_theirs"),
    m("8", "every process decides for itself which checkpoint is the newest", RESUME,
      "path = trainer.processes.from_first(decide)", "path = decide()",
      "test_parallel_edges.py::test_all_go_on_from_the_checkpoint_that_the_first_finds"),
    m("9", "a part is told written before it is on the disk", CHECKPOINT,
      "        write_safetensors(tensors, path)\n        sync(path)\n", "        write_safetensors(tensors, path)\n",
      "test_parallel_edges.py::test_a_part_is_on_the_disk_when_it_is_told"),
    # ---- text and conversations ----
    m("26", "keys may occur twice", JSONL, "if len(value) != len(pairs):", "if False:", BAD_RECORD),
    m("26", "the fast reader does not count keys", JSONL, "if line.count(b'\":') != keys or", "if",
      "test_jsonl.py::test_the_fast_reader_takes_nothing_that_the_exact_one_reads_otherwise"),
    m("26", "NaN is read as JSON", JSONL, 'raise ValueError(f"{name} is no JSON")', "pass", BAD_RECORD),
    m("26", "any JSON value is a record", JSONL,
      "if not isinstance(value, dict):\n        raise DataError(f\"expected a JSON object",
      "if False:\n        raise DataError(f\"expected a JSON object", BAD_RECORD,
      "test_jsonl.py::test_parsing_takes_objects_only"),
    m("26", "deep nesting is a traceback", JSONL,
      '    except RecursionError:\n        raise DataError("nested too deeply") from None\n', "", BAD_RECORD,
      "test_jsonl.py::test_mutated_lines_are_all_accepted_or_rejected"),
    m("26", "max_bad is no limit", JSONL, "if len(self.reasons) > self.max_bad:", "if False:",
      "test_jsonl.py::test_rejects_end_the_job_one_above_the_limit"),
    m("26", "half characters are text", JSONL, "    return unencodable(text)\n", '    return ""\n', BAD_RECORD,
      "test_jsonl.py::test_mutated_lines_are_all_accepted_or_rejected"),
    m("27", "a BOM is text", JSONL, 'text.removeprefix("\\ufeff") if offset == 0 else text', "text",
      "test_jsonl.py::test_a_bom_and_windows_line_ends_are_no_part_of_the_text"),
    m("27", "bytes that are no UTF-8 are left out", JSONL, 'text = line.decode("utf-8")\n',
      'text = line.decode("utf-8", "ignore")\n', "test_jsonl.py::test_a_byte_that_is_not_utf_8_is_named_by_line_and_offset"),
    m("27", "the offset is counted from the line", JSONL, "{offset + error.start}", "{error.start}",
      "test_jsonl.py::test_a_byte_that_is_not_utf_8_is_named_by_line_and_offset"),
    m("27", "zero bytes are text", JSONL, 'if "\\0" in text:', "if False:", "test_jsonl.py::test_other_encodings_are_refused",
      "test_jsonl.py::test_utf_16_is_told_by_its_zero_bytes_where_every_byte_is_ascii"),
    m("28", "a line may be of any length", JSONL, "if len(line) > MAX_LINE_BYTES:", "if False:",
      "test_jsonl.py::test_an_endless_line_is_refused_in_bounded_memory"),
    m("28", "a line is read to its end", JSONL, "file.readline(MAX_LINE_BYTES + 1)", "file.readline()",
      "test_jsonl.py::test_an_endless_line_is_refused_in_bounded_memory"),
    m("29", "no text is enough", PRETRAIN, 'tokens.require_documents(train, files, "text")', "pass",
      "test_data.py::test_data_without_a_document_is_refused"),
    m("29", "no conversation is enough", SFT, 'tokens.require_documents(train, files, "conversation")', "pass",
      "test_data.py::test_nothing_but_questions_is_no_data"),
    m("30", "turns may come in any order", SFT, "    check_order(messages)\n", "",
      "test_data.py::test_bad_conversations_are_refused_or_counted"),
    m("30", "any role is one", CONVERSATIONS, "if not isinstance(role, str) or role not in ROLE_OF:", "if False:",
      "test_chat.py::test_bad_records_are_refused_with_the_reason"),
    m("30", "contents need not be text", CONVERSATIONS, "if not isinstance(content, str):", "if False:",
      "test_chat.py::test_bad_records_are_refused_with_the_reason"),
    m("30", "empty turns are learnt", CONVERSATIONS, 'if not message["content"].strip():', "if False:",
      "test_data.py::test_bad_conversations_are_refused_or_counted", "test_chat.py::test_the_order_of_turns_is_checked"),
    m("30", "conversations without a reply are kept", SFT, "if not any(chat.mask):", "if False:",
      "test_data.py::test_long_conversations_are_cut_or_left_out_and_counted"),
    m("30", "a conversation is cut anywhere", SFT, 'fitting = [end for end in chat.ends if end <= limit]', "fitting = []",
      "test_data.py::test_a_long_conversation_is_cut_after_its_last_whole_reply"),
    m("31", "special tokens in text are control tokens", TOKENIZER, "self._text.encode_special_tokens = True", "pass",
      "test_tokenizer.py::test_special_tokens_in_text_stay_text", "test_chat.py::test_special_tokens_in_contents_stay_text",
      "test_llama.py::test_what_a_user_types_stays_text_in_the_export"),
    m("31", "contents are encoded with the template", "etude/chat.py", "            ids += content\n",
      "            ids += self.tokenizer.encode_template(message[\"content\"])\n",
      "test_chat.py::test_special_tokens_in_contents_stay_text",
      "test_chat.py::test_special_tokens_split_across_contents_stay_text"),
    # ---- dumps ----
    m("32", "a dump may end anywhere", DUMP, "if not _END.fullmatch(pending):", "if False:",
      "test_wiki.py::test_a_dump_cut_anywhere_names_its_last_whole_page"),
    m("32", "an archive may end anywhere", BZIP2, "        if stream is not None:\n            raise EOFError",
      "        if False:\n            raise EOFError",
      "test_wiki.py::test_an_archive_cut_anywhere_names_its_last_whole_page"),
    m("33", "a DOCTYPE is read over", DUMP, 'if b"<!DOCTYPE" in head or b"<!ENTITY" in head:', "if False:",
      "test_wiki.py::test_no_entity_is_ever_read"),
    m("33", "pages of countless tags are parsed", DUMP, "if len(xml) > BATCH_BYTES and (", "if False and (",
      "test_wiki.py::test_pages_of_countless_tags_are_refused_unparsed"),
    m("34", "a page may be of any length", DUMP, "if len(pending) > BATCH_BYTES + max_page_bytes:",
      "if len(pending) > 2**31:", "test_wiki.py::test_archives_that_never_end_are_stopped_in_little_memory"),
    m("32", "a damaged archive is a shorter text", JSONL, "            except (OSError, EOFError, ValueError) as error:\n",
      "            except EOFError:\n                return\n            except (OSError, ValueError) as error:\n",
      "test_jsonl.py::test_damaged_archives_are_errors_and_never_a_shorter_text"),
    m("35", "an input may be the output", OUTPUT, "if file != PIPE and target.exists() and os.path.samefile(file, target):",
      "if False:", "test_dedup.py::test_an_output_that_is_there_or_read_is_refused_and_nothing_is_left"),
    m("35", "what is there is overwritten", OUTPUT, "if (target.exists() or target.is_symlink()) and not force:", "if False:",
      "test_dedup.py::test_an_output_that_is_there_or_read_is_refused_and_nothing_is_left"),
    m("35", "a folder of other things is replaced", OUTPUT, "if target.is_dir() and (others :=", "if False and (others :=",
      "test_output.py::test_a_folder_of_other_things_is_never_replaced"),
    m("35", "what is no ordinary file is replaced", OUTPUT,
      "if target.exists() and not target.is_file() and not target.is_dir():", "if False:",
      "test_output.py::test_what_is_no_ordinary_file_is_refused"),
    m("36", "a tool writes its output in its place", OUTPUT, "temporary = stack.enter_context(whole_file(target))",
      "temporary = target", "test_wiki.py::test_a_dump_cut_anywhere_names_its_last_whole_page",
      "test_wiki.py::test_killed_at_any_moment_the_output_is_absent_or_whole"),
    m("36", "leftovers of killed tools stay", OUTPUT, "            clear_leftovers(mine)", "            pass",
      "test_parallel_edges.py::test_what_a_killed_tool_left_goes_with_the_next_run"),
    # ---- model files ----
    m("37", "pickles are read where safetensors are expected", WEIGHTS, "        return load_file(path)\n",
      '        return load_file(path) if open(path, "rb").read(2) not in (b"PK", b"\\x80\\x04") else __import__("pickle").load(open(path, "rb"))\n',
      "test_checkpoint.py::test_a_pickle_under_a_safetensors_name_is_refused_and_never_run"),
    m("37", "the package unpickles", WEIGHTS, "import json\n", "import json\nimport pickle\n",
      "test_checkpoint.py::test_the_package_has_no_way_to_run_what_it_reads"),
    m("37", "transformers may read pickles", LLAMA, '"use_safetensors": True, ', "", PICKLES,
      "test_model_files.py::test_transformers_is_asked_to_trust_no_code_and_to_read_no_pickle"),
    m("37", "pickled weights are opened where there are no others", LLAMA,
      "        return read_safetensors(folder / \"model.safetensors\")\n",
      "        if pickled:\n            return torch.load(folder / pickled[0], weights_only=False)\n"
      '        return read_safetensors(folder / "model.safetensors")\n',
      "test_checkpoint.py::test_the_package_has_no_way_to_run_what_it_reads", PICKLES),
    m("38", "transformers asks whether to run a folder's code", LLAMA, '"trust_remote_code": False',
      '"trust_remote_code": None', "test_model_files.py::test_transformers_is_asked_to_trust_no_code_and_to_read_no_pickle",
      "test_model_files.py::test_nothing_in_the_package_runs_commands_or_trusts_code"),
    m("38", "a Llama with code of its own is loaded", LLAMA,
      '        "auto_map (a model with code of its own, which Etude never runs)": values.get("auto_map"),\n', "", OWN_CODE),
    m("38", "an Etude model with code of its own is loaded", WEIGHTS, '    if values.get("auto_map"):\n', "    if False:\n",
      OWN_CODE),
    m("38", "transformers loads a model with code of its own", LLAMA, 'if values.get("auto_map") or kernels:', "if kernels:",
      OWN_CODE),
    m("38", "transformers fetches a kernel that a config names", LLAMA, 'if values.get("auto_map") or kernels:',
      'if values.get("auto_map"):',
      "test_model_files.py::test_a_kernel_from_the_hub_is_not_fetched_because_a_config_names_one"),
    m("38", "a tokenizer with code of its own is loaded", TOKENIZER, 'if settings.get("auto_map"):', "if False:", OWN_CODE),
    m("38", "a chat template's failure is a traceback", TOKENIZER, "except Exception as error:  # a template is",
      "except TemplateError as error:  # a template is",
      "test_model_files.py::test_a_chat_template_can_do_nothing_but_render"),
    m("38", "an index may name files elsewhere", LLAMA, 'not re.fullmatch(r"[\\w+-][\\w.+-]{0,200}", shard, re.ASCII)',
      "False", "test_llama.py::test_an_index_cannot_reach_out_of_its_folder"),
    m("38", "a damaged safetensors file is a traceback", WEIGHTS,
      "except (SafetensorError, ValueError, RuntimeError) as error:", "except (ValueError, RuntimeError) as error:",
      DAMAGED_WEIGHTS, "test_model_files.py::test_no_change_of_a_checkpoint_is_loaded"),
    m("38", "shapes are not compared with the config", WEIGHTS, "if expected != found or len(named) != len(tensors):",
      "if False:", DAMAGED_WEIGHTS),
    m("38", "a weight may be there twice", WEIGHTS, "if expected != found or len(named) != len(tensors):",
      "if expected != found:", "test_model_files.py::test_a_weight_that_is_there_under_two_names_is_refused"),
    m("38", "whole numbers are weights", WEIGHTS, "if odd := sorted(", "if odd := [] and sorted(",
      "test_model_files.py::test_weights_that_are_no_floating_point_numbers_are_refused"),
    m("38", "a config's values may be of any kind", WEIGHTS, "if type(value) not in allowed:", "if False:", DAMAGED_JSON),
    m("38", "NaN is a number for a config", WEIGHTS, "if type(value) is float and not math.isfinite(value):", "if False:",
      "test_model_files.py::test_values_of_the_wrong_kind_are_named_with_the_one_that_belongs_there"),
    m("38", "the rotary table may have any size", WEIGHTS, "MAX_POSITIONS = 2**24", "MAX_POSITIONS = 2**60",
      "test_model_files.py::test_sizes_that_nobody_has_memory_for_are_refused_before_they_are_tried"),
    m("38", "layers are made without end", WEIGHTS, "if config.num_hidden_layers > len(tensors):", "if False:",
      "test_model_files.py::test_sizes_that_nobody_has_memory_for_are_refused_before_they_are_tried"),
    m("38", "rotary settings are not tried", WEIGHTS, "    _check_rotary(config, source)\n", "", DAMAGED_JSON,
      "test_model_files.py::test_values_of_the_wrong_kind_are_named_with_the_one_that_belongs_there"),
    m("38", "JSON files may have any size", WEIGHTS, "if path.stat().st_size > MAX_JSON:", "if False:",
      "test_model_files.py::test_a_file_larger_than_any_of_its_kind_is_refused_without_being_read"),
    m("38", "a pipe is waited for", WEIGHTS, "    if not path.is_file():  # a named pipe", "    if False:  # a named pipe",
      "test_model_files.py::test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_rather_than_waited_for"),
    m("38", "messages hold what a stranger wrote", WEIGHTS, 'character if character.isprintable() else "\\ufffd"',
      "character", DAMAGED_WEIGHTS),
    m("38", "ids may be of any size", TOKENIZER, "if self._size > 2 * len(self.vocabulary) + 1000:", "if False:",
      "test_model_files.py::test_token_ids_far_beyond_the_vocabulary_are_refused_and_a_gap_is_counted"),
    m("38", "a panic of the tokenizers library is a crash", TOKENIZER, 'type(error).__name__ != "PanicException"', "True",
      DAMAGED_JSON),
    m("38", "transformers makes up weights that are missing", LLAMA, 'if missing := sorted(found["missing_keys"]):',
      "if missing := []:", "test_model_files.py::test_transformers_never_makes_up_weights_that_are_missing"),
    m("39", "logits are not compared", LLAMA, "if not difference <= MAX_LOGIT_DIFFERENCE:", "if False:",
      "test_llama.py::test_a_wrong_config_is_refused_and_leaves_nothing"),
    m("39", "NaN passes for equal logits", LLAMA, "if not difference <= MAX_LOGIT_DIFFERENCE:",
      "if difference > MAX_LOGIT_DIFFERENCE:", "test_llama.py::test_weights_that_overflow_are_refused"),
    m("39", "greedy tokens are not compared", EXPORT, "if greedy != [", "if None == [",
      "test_llama.py::test_a_greedy_token_that_differs_is_refused"),
    m("39", "ids are not compared", EXPORT, "    _check_tokenizer(folder, tokenizer, chats)\n", "",
      "test_llama.py::test_another_tokenizer_or_template_is_refused"),
    m("39", "an export is written in its place", EXPORT, "with whole_folder(output_folder) as folder:",
      f"output_folder.mkdir(parents=True, exist_ok=True)\n    with {NO_CONTEXT}(output_folder) as folder:",
      "test_llama.py::test_a_refused_export_leaves_the_older_one_as_it_was"),
    m("39", "an export replaces any folder", EXPORT, "    _refuse_to_replace(output_folder)\n", "",
      "test_llama.py::test_a_folder_of_other_things_is_never_replaced"),
)  # fmt: skip


# ---- running them ---------------------------------------------------------------------------------------------------------


def copy_repository(to: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, to / name)


def failures(copy: Path, tests: Sequence[str], seconds: float = SECONDS) -> tuple[str, list[str]]:
    """Run tests in the copy: ("passed", "failed" or why neither can be told; what failed)."""
    output = copy / "output.txt"
    child = os.fork()
    if child == 0:
        os.setsid()  # with all that a test starts, to be ended together
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        code = 99
        try:
            import etude

            assert Path(etude.__file__).is_relative_to(copy), etude.__file__
            import pytest

            arguments = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={copy}"]
            code = int(pytest.main([*arguments, f"--basetemp={copy / 'scratch'}", *(f"tests/{test}" for test in tests)]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        found, waited = os.waitpid(child, os.WNOHANG)
        status = waited if found else None
        time.sleep(0.02)
    hung = status is None
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever a test has left behind
    if hung:
        os.waitpid(child, 0)
        return "failed", [f"hung for {seconds:g} s"]
    code = os.waitstatus_to_exitcode(status)
    text = output.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^FAILED (?:tests/)?(.+)$", text, re.MULTILINE)
    if code < 0:  # what a signal does that nobody handles
        return "failed", [f"ended by {signal.Signals(-code).name}"]
    if code == 1 and failed:
        return "failed", failed
    return ("passed" if code == 0 else f"pytest ended with {code}: {text[-600:]}"), []


def verdict(copy: Path, mutation: Mutation) -> tuple[str, str]:
    """(one of the four verdicts, what failed or why it cannot be told)"""
    path = copy / mutation.file
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if (count := whole.count(mutation.old)) != 1:
        return STALE, f"its text stands {count} times in {mutation.file}"
    changed = whole.replace(mutation.old, mutation.new)
    try:
        compile(changed, mutation.file, "exec")
    except SyntaxError as error:
        return BROKEN, f"no Python: {error}"
    path.write_text(changed, encoding="utf-8")
    try:
        result, failed = failures(copy, mutation.tests)
    finally:
        path.write_text(whole, encoding="utf-8")
    if result == "passed":
        return SURVIVED, ", ".join(mutation.tests)
    return (KILLED, failed[0]) if result == "failed" else (BROKEN, result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="words of names, files or check numbers")
    parser.add_argument("--list", action="store_true", help="name the mutations and leave")
    parser.add_argument("--no_baseline", action="store_true", help="take it for granted that the tests pass as they are")
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.only or any(word in (mutation.check, mutation.file) or word in mutation.name for word in options.only)
    ]
    if options.list:
        print("\n".join(f"{mutation.check:>3}  {mutation.file:<32}{mutation.name}" for mutation in chosen))
        return 0
    sys.dont_write_bytecode = True  # a changed file may have the size and the second of the old one
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import torch  # noqa: F401  once, for all that are forked

    counts = {STALE: 0, KILLED: 0, SURVIVED: 0, BROKEN: 0}
    with tempfile.TemporaryDirectory(prefix="etude-mutations-") as folder:
        copy = Path(folder).resolve()
        copy_repository(copy)
        if not options.no_baseline:
            tests = sorted({test for mutation in chosen for test in mutation.tests})
            result, failed = failures(copy, tests, seconds=SECONDS + 10 * len(tests))
            if result != "passed":
                print(f"unmutated, the tests do not pass: {'; '.join(failed) or result}", file=sys.stderr)
                return 1
        for mutation in chosen:
            started = time.monotonic()
            found, why = verdict(copy, mutation)
            counts[found] += 1
            print(
                f"{found:<9}{mutation.check:>3}  {mutation.name:<60}{time.monotonic() - started:5.0f} s  {why[:150]}",
                flush=True,
            )
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0 if counts[KILLED] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
