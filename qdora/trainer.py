"""TRL's trainer, told what is different about our models: how they are entered, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from qdora.answers import Question, answer, count_matches
from qdora.checkpoint import load_adapter, save_adapter
from qdora.distributed import whole
from qdora.errors import ConfigError
from qdora.groups import Rates, parameter_groups
from qdora.loss import CHUNK_BYTES, IGNORED
from qdora.measure import score
from qdora.offload import HostInputs
from qdora.packing import check_rows_apart
from qdora.progress import Progress, Speedometer
from qdora.scoring import ScoredModel
from qdora.sharding import Sharding, shard_root

__all__ = ["AdapterTrainer", "KeepInputsOnHost", "MeasureTheEnd"]


class AdapterTrainer(SFTTrainer):
    """`SFTTrainer` that trains one adapter, in one process or several.

    What DDP wraps, and the root of FSDP2, is a `ScoredModel`; what checkpoints hold is the adapter (in PEFT's format,
    offsets exact) instead of the model.

    Args:
        chunk_bytes: of the fp32 logits that exist at once.
        sharding: of the model, if its layers are sharded (`model.load_model`).
        rates: of magnitude and direction; by default both have the trainer's.
        asked: questions to answer at each evaluation.
        settings: of `SFTTrainer`, the model among them.
    """

    control: Any  # the trainer's own, which it leaves without types
    optimizer_cls_and_kwargs: Any

    def __init__(
        self,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        sharding: Sharding | None = None,
        rates: Rates | None = None,
        asked: Sequence[Question] = (),
        **settings: Any,
    ) -> None:
        self._sharding, self._rates, self._asked = sharding, rates, list(asked)
        super().__init__(**settings)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(bar=not self.args.disable_tqdm))
        self._speed = Speedometer(self.args.device, self.args.world_size)
        self._scored = ScoredModel(self.model, chunk_bytes)
        self._entry: Any = None
        if sharding is not None:
            shard_root(self._scored, sharding)
            register_fsdp_forward_method(self._scored, "head_is_plain")
        if self.padding_free:
            check_rows_apart(self._scored, self.data_collator)

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
        self._speed.count(inputs)
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

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """The trainer's, with speed and memory."""
        super().log({**logs, **self._speed.read()} if "loss" in logs else logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Loss a token over all rows, whatever batches they came in; perplexity; exact matches, if asked for."""
        if self._other_loss():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self.callback_handler.eval_dataloader = dataloader
        entry = self._wrap_model(self.model, training=False)
        entry.eval()
        # Rows laid end to end come as one: none can be told from those that fill up the last batch.
        gather = self.accelerator.gather if self.padding_free else self.accelerator.gather_for_metrics
        with self.compute_loss_context_manager():
            tally = score(entry, self._prepared(dataloader), self._head_is_plain, gather)
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
        right = torch.tensor(count_matches(mine, answers), device=self.args.device)
        return float(self.accelerator.reduce(right, "sum")) / len(self._asked)

    @cached_property
    def _head_is_plain(self) -> bool:
        return self._scored.head_is_plain()

    def _other_loss(self) -> bool:
        # `aux_loss_enabled` is newer than the oldest TRL that fits: the load balancing of mixtures of experts.
        balances = getattr(self, "aux_loss_enabled", False)
        # `chunked_nll` is what TRL called its own lean way before that became the plain one.
        plain = self.args.loss_type in ("nll", "chunked_nll")
        return self.label_smoother is not None or not plain or balances

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return None if norm is None else whole(norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return whole(norm) if isinstance(norm, Tensor) else norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process joins in, for a sharded one must be gathered."""
        self._save(output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None before the run's end, when there is something to say: `card` writes it."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        is_checkpoint = directory != Path(self.args.output_dir)
        save_adapter(self.model, directory, exact_offsets=is_checkpoint, write=self.args.should_save)
        if self.args.should_save:
            self.processing_class.save_pretrained(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.optimizer.whole_state_dict()  # out of accelerate's wrapper
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.args.world_size == 1:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # By way of the host: a shard's owner has no room for the whole, and transformers 5.17 asks torch for `cpu:1`.
        files = [Path(checkpoint) / "optimizer.pt", Path(checkpoint) / "scheduler.pt"]
        if all(map(Path.is_file, files)):
            for file, owner in zip(files, (self.optimizer, self.lr_scheduler), strict=True):
                owner.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

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


class MeasureTheEnd(TrainerCallback):
    """Evaluate, and save, after the last step too: otherwise what came after the last evaluation could not be kept."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class KeepInputsOnHost(TrainerCallback):
    """Lets the layers' inputs wait on the host, once the trainer has enabled gradient checkpointing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        HostInputs(self._device).install(model)
