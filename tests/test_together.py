"""Flags that contradict each other, or have nothing to act on, end before anything is loaded."""

from __future__ import annotations

import pytest

from qdora.arguments import parse_train
from qdora.errors import ConfigError
from tests.test_arguments import NEEDED


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_text_field words", "--dataset_text_field has no effect here: name the column `text`"),
        ("--eos_token <|end|>", "--eos_token has no effect here: answers end with the tokenizer's own"),
        ('--model_init_kwargs {"a":1}', "--model_init_kwargs has no effect here"),
        ("--freeze magnitude --magnitude_learning_rate 1e-3", "--freeze magnitude leaves nothing"),
        ("--freeze magnitude --magnitude_weight_decay 0.1", "--freeze magnitude leaves nothing"),
        ("--freeze direction --loraplus_lr_ratio 16", "--freeze direction leaves no B"),
        ("--early_stopping_threshold 0.1", "--early_stopping_threshold is for --early_stopping_patience"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1, found 0"),
        ("--seed -1", "--seed must be at least 0, found -1"),
        ("--max_length 0", "--max_length must be at least 1, found 0"),
        ("--num_train_epochs 0", "--num_train_epochs must be above 0, found 0"),
        ("--use_dora false --freeze magnitude", "--use_dora false leaves the magnitude out"),
        ("--eval_strategy steps", "--eval_strategy steps needs an --eval_dataset"),
        ("--eval_exact_match 3", "--eval_exact_match answers rows at each evaluation; it needs data"),
    ],
)
def test_what_does_not_fit(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train([*NEEDED, *flags.split()])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset_text_field text",
        "--freeze direction --magnitude_learning_rate 1e-3",
        "--freeze magnitude --loraplus_lr_ratio 16",
        "--num_train_epochs 0 --max_steps 3",
        "--eval_dataset e --eval_exact_match 3 --metric_for_best_model exact_match",
    ],
)
def test_what_fits(flags: str) -> None:
    parse_train([*NEEDED, *flags.split()])
