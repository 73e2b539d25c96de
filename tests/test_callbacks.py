"""What happens between the steps: the last one measured, and an end that was asked for."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import TrainerState

import qdora.verbs.train
from qdora.callbacks import EndAtTheFirstAdapter, StopWhenAsked, TellWhereItBegins
from qdora.numerics import FiniteGuard
from qdora.offload import HostInputs
from qdora.signals import Stopped, StopRequest
from tests.test_train import quick
from tests.test_trainer import log_of

ARGS = SimpleNamespace(device="cpu", world_size=1, output_dir="out", resume_from_checkpoint=None)


def test_the_last_step_is_measured_too(tiny_nf4: Path, pairs_file: Path, tmp_path: Path) -> None:
    report = quick(tiny_nf4, pairs_file, tmp_path, max_steps=5, eval_dataset=str(pairs_file), eval_steps=2)
    assert [row["step"] for row in log_of(tmp_path) if row["eval_loss"]] == ["2", "4", "5"]
    assert report.best_step == 5


def control() -> Any:
    return SimpleNamespace(should_save=False, should_training_stop=False)


def state(step: int, epoch: float) -> Any:
    return SimpleNamespace(global_step=step, epoch=epoch, max_steps=9)


def asked_to_stop() -> StopWhenAsked:
    return StopWhenAsked(cast(StopRequest, SimpleNamespace(number=int(signal.SIGTERM))))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_backward_ends_at_the_first_adapter(
    reentrant: bool | None, tiny_nf4: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen layers below it give no gradients, unless reentrant checkpointing needs them to."""
    wanted: list[bool] = []
    load = qdora.verbs.train.load_model

    def watched(*arguments: Any, **settings: Any) -> Any:
        model = load(*arguments, **settings)
        upper = model.get_submodule("model.layers.1")
        upper.register_forward_pre_hook(lambda _, inputs: wanted.append(inputs[0].requires_grad))
        return model

    monkeypatch.setattr(qdora.verbs.train, "load_model", watched)
    how = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    quick(tiny_nf4, pairs_file, tmp_path, max_steps=2, lora_target_modules=r".*layers\.1\..*_proj", **how)
    assert any(wanted) == bool(reentrant)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all(value.count_nonzero() for name, value in adapter.items() if "lora_B" in name)


def test_layers_that_are_recomputed_in_a_way_of_their_own_keep_the_gradient(tiny: Path) -> None:
    """Code of strangers may checkpoint reentrantly, whatever it was asked for; and a model may have no such layers."""
    model = qdora.load_model(tiny)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def asks() -> bool:
        model.disable_input_require_grads()
        model.enable_input_require_grads()
        EndAtTheFirstAdapter().on_train_begin(ARGS, None, None, model=model)
        return bool(model.get_input_embeddings()(torch.tensor([1])).requires_grad)

    layer, plain = model.model.layers[1], model.model.layers[1]._gradient_checkpointing_func
    assert not asks()
    for other in (partial(checkpoint, use_reentrant=True), checkpoint, None):
        layer._gradient_checkpointing_func = other
        assert asks()
    layer._gradient_checkpointing_func = HostInputs(torch.device("cpu"))
    assert not asks()
    layer._gradient_checkpointing_func = plain
    model.model.layers = torch.nn.ModuleList()
    assert asks()


@pytest.mark.parametrize(
    ("resumed", "how"),
    [
        (None, "the same command"),
        ("false", "the same command"),
        ("out/checkpoint-2", "--resume_from_checkpoint last"),
        ("last", "--resume_from_checkpoint last"),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_first_and_says_how_to_go_on(resumed: str | None, how: str) -> None:
    callback, told = asked_to_stop(), control()
    args = SimpleNamespace(**{**vars(ARGS), "resume_from_checkpoint": resumed})
    callback.on_step_end(args, state(4, 0.5), told)
    assert told.should_save
    with pytest.raises(Stopped, match=rf"after step 4 of 9, saved as out/checkpoint-4; {how} goes on from there$"):
        callback.on_save(args, state(4, 0.5), told)


def test_at_the_end_of_an_epoch_the_checkpoint_waits_for_the_evaluation() -> None:
    callback, told = asked_to_stop(), control()
    callback.on_step_end(ARGS, state(4, 1.0), told)
    assert not told.should_save
    callback.on_epoch_end(ARGS, state(4, 1.0), told)
    assert told.should_save


def test_a_run_at_its_end_ends_as_it_would() -> None:
    callback, told = asked_to_stop(), control()
    told.should_training_stop = True
    callback.on_step_end(ARGS, state(9, 2.5), told)
    callback.on_epoch_end(ARGS, state(9, 2.5), told)
    callback.on_save(ARGS, state(9, 2.5), told)
    assert not told.should_save


def test_nobody_asked() -> None:
    callback, told = StopWhenAsked(cast(StopRequest, SimpleNamespace(number=0))), control()
    callback.on_step_end(ARGS, state(4, 0.5), told)
    callback.on_save(ARGS, state(4, 0.5), told)
    assert not told.should_save


def test_one_process_asks_nothing_of_its_device() -> None:
    """A number on the meta device cannot be read back."""
    callback, told = asked_to_stop(), control()
    callback.on_step_end(SimpleNamespace(device="meta", world_size=1, output_dir="out"), state(4, 0.5), told)
    assert told.should_save


def test_of_several_processes_the_one_that_was_asked_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(number: torch.Tensor, _: Any) -> None:
        number.fill_(max(int(number), int(signal.SIGINT)))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    callback, told = StopWhenAsked(cast(StopRequest, SimpleNamespace(number=0))), control()
    callback.on_step_end(SimpleNamespace(device="cpu", world_size=2, output_dir="out"), state(4, 0.5), told)
    assert told.should_save


def test_the_guard_learns_where_a_run_begins() -> None:
    steps: list[int] = []
    guard = cast(FiniteGuard, SimpleNamespace(start=steps.append))
    args, resumed = SimpleNamespace(logging_steps=2, eval_steps=None, save_steps=0.25), TrainerState(logging_steps=10)
    resumed.global_step, resumed.max_steps = 7, 20
    TellWhereItBegins(guard).on_train_begin(args, resumed, control())
    assert steps == [7]
    assert (resumed.logging_steps, resumed.save_steps) == (2, 5)
