"""TRL's trainer, told what is different about our models: how they are entered, saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from qdora.answers import Question, answer, count_matches
from qdora.callbacks import EndAtTheFirstAdapter, LogTheEnd, TellWhereItBegins
from qdora.checkpoint import load_adapter, save_adapter
from qdora.distributed import whole
from qdora.errors import ConfigError, reason
from qdora.flags import MEASURED_PLAINLY, PLAIN_LOSSES
from qdora.groups import Rates, parameter_groups, rates_by_part
from qdora.kept import STATE_FILE, checkpoint_of, clear_scratch, keep_newest, name_checkpoint, scratch_of, state_of
from qdora.loss import IGNORED
from qdora.measure import score
from qdora.numerics import FiniteGuard, check_weights, refuse_evaluation
from qdora.output import whole_files, writing
from qdora.packing import check_rows_apart
from qdora.progress import Progress, Speedometer
from qdora.sampling import EpochSeeded
from qdora.scoring import ScoredModel
from qdora.sharding import Sharding, shard_root
from qdora.states import load_states, save_states

__all__ = ["AdapterTrainer"]

_MAKE_ROOM = "make room, and the same command goes on from the newest checkpoint that is there"


class AdapterTrainer(SFTTrainer):
    """`SFTTrainer` that trains one adapter, in one process or several.

    What DDP wraps, and the root of FSDP2, is a `ScoredModel`; what checkpoints hold is the adapter (in PEFT's format,
    offsets exact) instead of the model.

    Args:
        chunk_bytes: of the logits that exist at once, in the head's dtype; None for what suits the device.
        sharding: of the model, if its layers are sharded (`model.load_model`).
        rates: of magnitude and direction; by default both have the trainer's.
        asked: questions to answer at each evaluation.
        skips_nonfinite: leave out a step whose loss or gradient is not finite, instead of stopping.
        keep: how many checkpoints, or all. The trainer's own `save_total_limit` must be off, for it removes them in
            place: a kill would leave half of one under its name.
        settings: of `SFTTrainer`, the model among them.
    """

    control: Any  # the trainer's own, which it leaves without types
    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *,
        chunk_bytes: int | None = None,
        sharding: Sharding | None = None,
        rates: Rates | None = None,
        asked: Sequence[Question] = (),
        skips_nonfinite: bool = False,
        keep: int | None = None,
        **settings: Any,
    ) -> None:
        self._sharding, self._rates, self._asked, self._keep = sharding, rates, list(asked), keep
        self._saving_to: Path | None = None
        self.measures_anew = False
        """Whether the best evaluation of the checkpoint to go on from is of other data or by another metric."""
        super().__init__(**settings)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(bar=not self.args.disable_tqdm))
        self._speed = Speedometer(self.args.device, self.args.world_size)
        self.add_callback(self._speed)
        self._scored = ScoredModel(self.model, chunk_bytes)
        self._entry: Any = None
        self._rates_used: dict[str, float] = {}
        self.guard = FiniteGuard(self.model, self._replay, skips_nonfinite, self.accelerator.scaler)
        self.add_callback(TellWhereItBegins(self.guard))
        self.add_callback(EndAtTheFirstAdapter())
        self.add_callback(LogTheEnd())
        if sharding is not None:
            shard_root(self._scored, sharding)
            register_fsdp_forward_method(self._scored, "head_is_plain")
        if self.padding_free:
            check_rows_apart(self._scored, self.data_collator)

    def _send_telemetry(self) -> None:
        """Nothing. TRL's tells the Hub of each trainer, from a thread of its own; data workers that are forked while it
        holds the connection's lock wait for that lock forever (huggingface_hub closes connections after a fork)."""

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if self._sharding is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """The model's entry: in training what DDP made of it. Gradients are of no use in evaluation, nor is DDP."""
        if not training:
            return self._scored
        if self._entry is None:
            # What is sharded is neither moved nor wrapped; only autocast and compilation are prepared.
            placed, is_sharded = None if self._sharding is None else False, self._sharding is not None
            self._entry = self.accelerator.prepare_model(
                self._scored, device_placement=placed, evaluation_mode=is_sharded
            )
        return self._entry

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's, over magnitude and direction as groups of their own."""
        if self.optimizer is None:
            found = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            kind, settings = found
            # Some (GaLore, LOMO, Muon) take the model apart by themselves.
            if not {"params", "model", "optimizer_dict"} & settings.keys() and _is_plain(kind):
                rates = self._rates or Rates(self.args.learning_rate, self.args.weight_decay)
                groups = parameter_groups(self.model, rates)
                self.optimizer_cls_and_kwargs = kind, {**settings, "params": groups}
            elif self._rates is not None and self._rates.differ:
                raise ConfigError(
                    f"--optim {self.args.optim} knows no rates of magnitude and direction; use adamw_torch"
                )
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the answers' tokens; over all micro-batches of a step, if the trainer counted them.

        Other losses than the plain one are TRL's: slower. A head that does more than multiply is left to the model's
        own loss, with all its logits.
        """
        if return_outputs or self._other_loss():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._head_is_plain:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        entry = self._scored if model is self.model else model
        total = entry(lean=True, **inputs)
        if num_items_in_batch is None:
            return total / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        # If the tokens were counted in all processes, so must the loss be: their gradients are averaged.
        summands = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * summands / torch.as_tensor(num_items_in_batch).clamp(min=1)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The trainer's, under the guard's eyes."""
        self._speed.count(inputs)
        self.guard.begin(self._tr_loss)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.add(inputs, loss, num_items_in_batch)
        return loss

    def _replay(self, inputs: Any, num_items_in_batch: Any) -> Any:
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """The trainer's, with speed, memory and the rate of each part."""
        logs = self.guard.corrected(logs, self.state.global_step)
        super().log({**logs, **self._rates_used, **self._speed.read()} if "loss" in logs else logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Loss a token over all rows, whatever batches they came in; perplexity; exact matches, if asked for."""
        if self._measures_otherwise():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._asked:
                output.metrics[f"{metric_key_prefix}_exact_match"] = self._exact_match()
            return output
        self.callback_handler.eval_dataloader = dataloader
        self._average()
        entry = self._wrap_model(self.model, training=False)
        entry.eval()
        # Rows laid end to end come as one: none can be told from those that fill up the last batch.
        gather = self.accelerator.gather if self.padding_free else self.accelerator.gather_for_metrics
        with self.compute_loss_context_manager():
            tally = score(entry, self._prepared(dataloader), self._head_is_plain, gather)
        if not math.isfinite(tally.loss):
            with self.compute_loss_context_manager():
                again = partial(score, self._scored, map(self._prepare_inputs, dataloader), self._head_is_plain)
                refuse_evaluation(self.model, self.state.global_step, again)
        metrics = {"loss": tally.loss, "perplexity": tally.perplexity}
        if self._asked:
            metrics["exact_match"] = self._exact_match()
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=tally.rows)

    def _prepared(self, dataloader: Any) -> Iterator[dict[str, Any]]:
        for batch in dataloader:
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _exact_match(self) -> float:
        """The share of questions answered word for word; each process answers some."""
        mine = self._asked[self.args.process_index :: self.args.world_size]
        with self.compute_loss_context_manager():
            answers = answer(self.model, self.processing_class, mine, self.args.per_device_eval_batch_size)
        right = torch.tensor(count_matches(answers), device=self.args.device)
        return float(self.accelerator.reduce(right, "sum")) / len(self._asked)

    @cached_property
    def _head_is_plain(self) -> bool:
        return self._scored.head_is_plain()

    def _other_loss(self) -> bool:
        return self._measures_otherwise() or self.args.loss_type not in PLAIN_LOSSES

    def _measures_otherwise(self) -> bool:
        """Whether evaluation takes the loss that trains, rather than the likelihood."""
        # `aux_loss_enabled` is newer than the oldest TRL that fits: the load balancing of mixtures of experts.
        balances = getattr(self, "aux_loss_enabled", False)
        return self.label_smoother is not None or self.args.loss_type not in MEASURED_PLAINLY or balances

    def _average(self) -> None:
        """Some optimizers (schedule-free ones) train at one point, and the model that they find is another."""
        if self.optimizer is not None and hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return None if norm is None else whole(norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        self._rates_used = rates_by_part(self.optimizer.param_groups)
        # The last moment before the optimizer's step.
        return norm if self.guard.passes(norm, self.state.global_step + 1) else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process joins in, for a sharded one must be gathered."""
        self._save(output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None before the run's end, when there is something to say: `card` writes it."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        is_checkpoint = directory != Path(self.args.output_dir)
        self._average()
        check_weights(self.model)
        save_adapter(self.model, directory, exact_offsets=is_checkpoint, write=self.args.should_save)
        if self.args.should_save:
            with whole_files(directory) as scratch:
                self.processing_class.save_pretrained(scratch)

    def _get_output_dir(self, trial: Any) -> Any:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The trainer's, in a scratch directory: it gets its name when it is complete and on the disk."""
        out, step = Path(self.args.output_dir), self.state.global_step
        checkpoint, self._saving_to = checkpoint_of(out, step), scratch_of(out)
        unfinished = checkpoint_of(self._saving_to, step)
        try:
            with writing(checkpoint, _MAKE_ROOM):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(unfinished):
                    self.state.best_model_checkpoint = str(checkpoint)
                else:
                    self.state.best_model_checkpoint = self._best_checkpoint()
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / STATE_FILE))
                    name_checkpoint(unfinished, checkpoint)
                    keep_newest(out, self._keep, checkpoint, self.state.best_model_checkpoint)
        finally:
            self._saving_to = None
            if self.args.should_save:
                clear_scratch(out)  # after a failure it would fill a disk that is full
        self.accelerator.wait_for_everyone()  # or one might leave, and end all, while the main one is writing

    def save_all(self) -> None:
        """The adapter and the trainer's state, at the end of a run."""
        out = Path(self.args.output_dir)
        with writing(out, _MAKE_ROOM):
            self.save_model()
            if self.args.should_save:
                with whole_files(out) as scratch:
                    self.state.save_to_json(str(scratch / STATE_FILE))

    def stand_at(self, checkpoint: str) -> None:
        """As after a training whose last checkpoint this is: what was to be kept is loaded, nothing is trained."""
        self.state = state_of(checkpoint)
        self.state.best_model_checkpoint = self._best_checkpoint()
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_adapter(self.model, best or checkpoint)
        self.create_optimizer()

    def _best_checkpoint(self) -> str | None:
        """That of the best evaluation, by its step: the directory may be called otherwise than when that was noted."""
        step = self.state.best_global_step
        here = None if step is None else checkpoint_of(self.args.output_dir, step)
        return str(here) if here is not None and here.is_dir() else self.state.best_model_checkpoint

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.optimizer.whole_state_dict()  # out of accelerate's wrapper
        if self.args.should_save:
            save_states(Path(output_dir), state, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.measures_anew:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self.state.best_model_checkpoint = self._best_checkpoint()  # the trainer forgets one that moved
        try:
            load_states(Path(checkpoint), self.state.global_step, self.optimizer, self.lr_scheduler)
        except ValueError as error:
            raise ConfigError(
                f"{checkpoint} is of a run that trained otherwise, or of another release: {reason(error)}; keep its "
                "--optim, --freeze and adapter's flags, or remove its optimizer.pt and pass --resume_from_checkpoint"
            ) from None

    def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
        sampler = super()._get_train_sampler(*given, **named)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return EpochSeeded(sampler, self.args.seed, lambda: int(self.state.epoch or 0))

    def get_eval_dataloader(self, *given: Any, **named: Any) -> Any:
        """Over all rows: `--dataloader_drop_last` is about steps."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*given, **named)
        finally:
            self.args.dataloader_drop_last = drops

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state comes next and says that the checkpoint is complete: for every process.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.accelerator.wait_for_everyone()
        load_adapter(self.model, self.state.best_model_checkpoint)


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
