"""Flags and config files: typed by one parser, and every mistake answered in one line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from qdora import ConfigError
from qdora.arguments import adapter_config, flags_of, parse_estimate, parse_train

NEEDED = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o"]


def test_defaults() -> None:
    run, training = parse_train(NEEDED)
    assert (training.learning_rate, training.bf16, training.gradient_checkpointing) == (2e-4, False, True)
    adapter = adapter_config(run)
    assert (adapter.rank, adapter.alpha, adapter.use_dora, adapter.target_modules) == (16, 32.0, True, "all-linear")


def test_names_types_and_spellings() -> None:
    flags = ["--lora_target_modules", "q_proj", "v_proj", "--use-dora=false", "--lora_r=8", "--learning_rate", "1e-3"]
    run, training = parse_train([*NEEDED, *flags])
    assert adapter_config(run).target_modules == ("q_proj", "v_proj")
    assert (run.use_dora, run.lora_r, training.learning_rate) == (False, 8, 1e-3)
    run, _ = parse_train([*NEEDED, "--lora_target_modules", r".*attn.*"])
    assert adapter_config(run).target_modules == ".*attn.*"


def test_a_config_file_is_overridden(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model_name_or_path: m\ndataset: d\noutput_dir: o\nlearning_rate: 1e-5\nlora_target_modules: [q_proj, k_proj]\n"
        "use_dora: false\neval_dataset: null\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    run, training = parse_train([str(config), "--lora_r", "4"])
    assert (run.lora_r, run.use_dora, training.learning_rate) == (4, False, 1e-5)
    assert run.lora_target_modules == ["q_proj", "k_proj"]
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_fsdp_of_a_file_can_be_taken_back(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\nfsdp: true\n")
    assert parse_train([str(config)])[1].fsdp
    assert not parse_train([str(config), "--fsdp", "false"])[1].fsdp


def test_flags_of() -> None:
    assert flags_of({"a": True, "b": None, "c": [1, "x"], "d": {"e": 1}}) == [
        *["--a", "true"],
        *["--c", "1", "x"],
        *["--d", '{"e": 1}'],
    ]
    with pytest.raises(ConfigError, match="must be text, found 3"):
        flags_of({3: "x"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*NEEDED, "--learing_rate", "1"], "unknown flag --learing_rate; did you mean --learning_rate?"),
        ([*NEEDED, "--lora-rank", "1"], "unknown flag --lora_rank; did you mean --lora_r"),
        ([*NEEDED, "--zzzzzz", "1"], "unknown flag --zzzzzz; `qdora train --help_all`"),
        (NEEDED[:4], "missing: --output_dir"),
        ([*NEEDED, "--accelerator_config", "absent.json"], "absent.json"),
        ([*NEEDED, "--lora_r", "many"], "invalid int value: 'many'"),
        ([*NEEDED, "--lora_r"], "expected one argument"),
        ([*NEEDED, "stray"], "one word too many: 'stray' after --output_dir; give one value"),
        ([*NEEDED, "--dataset", "a.jsonl", "b.jsonl"], "one word too many: 'b.jsonl' after --dataset; give one value"),
        ([*NEEDED, "-x"], "unknown flag -x; `qdora train --help_all`"),
        (["--max_steps", "3", "q.yaml"], "the config file comes first, before all flags; move q.yaml there"),
        (["--dry-run", "q.yml"], "the config file comes first, before all flags; move q.yml there"),
        (["a.yaml", "b.yaml"], "two config files, a.yaml and b.yaml; put the settings of a run into one"),
        ([*NEEDED, "--eval_strategy", "often"], "often"),
        ([*NEEDED, "--hold_outputs", "true", "--gradient_checkpointing", "false"], "--hold_outputs spares a part of"),
        (["absent.yaml"], "no config file at absent.yaml"),
        ([*NEEDED, "--eval_dataset", "e", "--eval_steps", "abc"], "--eval_steps must be a number, found 'abc'"),
        ([*NEEDED, "--max_length", "null"], "max_length"),
    ],
)
def test_mistakes(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_train(flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n", "must hold settings"),
        ("modle: x", "did you mean --model_name_or_path?"),
        ("", "must hold"),
        ("max_length: null", "max_length must be a number of tokens"),
        ("lora_r: 8\nseed: 1\nlora-r: 4\n", "'lora_r' is set in line 1 and in line 3; keep one"),
    ],
)
def test_bad_config_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_train([str(tmp_path / "c.yaml")])
    assert message in str(caught.value)


def test_settings_of_a_setting_and_merged_ones_are_yaml_s_own(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "<<: &a {model_name_or_path: m, dataset: d}\n<<: {output_dir: ~/o}\nresume_from_checkpoint: ~/c\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {a-b: 1, a_b: 2}\n"
    )
    run, training = parse_train([str(config)])
    assert (run.model_name_or_path, training.lr_scheduler_kwargs) == ("m", {"a-b": 1, "a_b": 2})
    assert training.resume_from_checkpoint == str(Path("~/c").expanduser())


def test_what_yaml_reads_as_false(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\nsave_strategy: no\neval_strategy: no\n")
    _, training = parse_train([str(config)])
    assert (training.save_strategy, training.eval_strategy) == ("no", "no")


def test_a_dotted_name_is_a_name() -> None:
    run, _ = parse_train([*NEEDED, "--lora_target_modules", "self_attn.q_proj"])
    assert adapter_config(run).target_modules == ("self_attn.q_proj",)


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "[" * 5000,
        "max_steps: " + "9" * 5000,
        "lora_r: !!int ''",
        "a: &a {b: *a}",
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{f'*{chr(ord(c) - 1)},' * 9}x]\n" for c in "bcdefghi"),
        "x: !!python/object/apply:os.system ['true']",
        "? [a]\n: 1",
    ],
)
def test_hostile_config_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(content + "\n")
    with pytest.raises(ConfigError):
        parse_train([str(path), *NEEDED])


def test_what_a_file_leaves_empty_is_the_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\nmodules_to_save: []\nlora_r: null\n")
    run, _ = parse_train([str(config)])
    assert run.modules_to_save == []
    assert run.lora_r == 16


def test_a_split_of_zero_is_none() -> None:
    _, training = parse_train([*NEEDED, "--validation_split_percentage", "0"])
    assert training.eval_strategy.value == "no"


def test_an_evaluation_takes_no_more_rows_at_once_than_a_step() -> None:
    def rows(*flags: str) -> int:
        size: int = parse_train([*NEEDED, *flags])[1].per_device_eval_batch_size
        return size

    assert rows("--per_device_train_batch_size", "2") == 2
    assert rows("--per_device_train_batch_size", "32") == 8
    assert rows("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "16") == 16


def test_what_is_measured_with_the_log_is_saved_with_it() -> None:
    flags = ["--eval_dataset", "e", "--eval_strategy", "steps", "--logging_steps", "3"]
    _, training = parse_train([*NEEDED, *flags])
    assert (training.eval_steps, training.save_steps, training.load_best_model_at_end) == (3, 3, True)
    _, training = parse_train([*NEEDED, *flags[:4]])
    assert training.eval_steps == training.save_steps == training.logging_steps


def test_merged_keys_are_not_twice_there(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("<<: {model_name_or_path: m, dataset: d, output_dir: o, lora_r: 8}\nlora_r: 4\n")
    assert parse_train([str(config)])[0].lora_r == 4


def test_a_config_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "c.yaml").touch()
    monkeypatch.setattr(Path, "read_text", denied)  # root may read whatever a mode says
    with pytest.raises(ConfigError, match=r"^cannot read .*c.yaml: Permission denied; "):
        parse_train([str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("flags", "dtype", "autocast"),
    [
        (["--bf16", "true"], "bfloat16", False),
        (["--bf16"], "bfloat16", False),
        (["--bf16", "--seed", "1", "--fp16", "false"], "bfloat16", False),
        (["--bf16", "no"], None, False),
        (["--bf16=True", "--dtype", "bfloat16"], "bfloat16", False),
        (["--bf16", "false"], None, False),
        (["--bf16", "true", "--bf16", "false"], None, False),
        (["--bf16", "true", "--dtype", "float32", "--use_cpu", "true"], "float32", True),
    ],
)
def test_bf16_is_a_dtype(flags: list[str], dtype: str | None, autocast: bool) -> None:
    run, training = parse_train([*NEEDED, *flags])
    assert (run.dtype, training.bf16) == (dtype, autocast)


def test_fp16_is_not_for_cpus() -> None:
    for flags in (["--fp16", "true", "--use_cpu", "true"], ["--fp16", "--use_cpu"]):
        with pytest.raises(
            ConfigError, match=r"^--fp16 needs an accelerator, and this run is on the CPU; leave it out"
        ):
            parse_train([*NEEDED, *flags])
    with pytest.raises(ConfigError, match="At most one of fp16 and bf16"):
        parse_train([*NEEDED, "--fp16", "true", "--bf16", "true", "--use_cpu", "true"])
    assert parse_estimate(["--model_name_or_path", "m", "--fp16", "true"])[1].fp16  # for another machine


def test_what_trains_is_in_float32_where_the_loss_is_scaled(tmp_path: Path) -> None:
    def dtype_of(*flags: str) -> str:
        return parse_estimate(["--model_name_or_path", "m", *flags])[0].adapter_dtype

    assert [dtype_of(), dtype_of("--fp16", "false"), dtype_of("--fp16=true", "--fp16=false")] == ["bfloat16"] * 3
    assert [dtype_of("--fp16"), dtype_of("--fp16", "true", "--dtype", "float16")] == ["float32"] * 2
    assert dtype_of("--fp16", "true", "--adapter_dtype", "float32") == "float32"
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\nfp16: true\n")
    assert parse_estimate([str(config)])[0].adapter_dtype == "float32"
    config.write_text("model_name_or_path: m\nfp16: true\nadapter_dtype: bfloat16\n")
    for flags in ([str(config)], ["--model_name_or_path", "m", "--fp16", "--adapter-dtype=bfloat16"]):
        with pytest.raises(
            ConfigError, match=r"^--fp16 scales .* found --adapter_dtype bfloat16, leave it out or pass float32$"
        ):
            parse_estimate(flags)


def test_float16_is_for_training_with_a_scaled_loss() -> None:
    for flags in (["--dtype", "float16"], ["--dtype=float16", "--bf16", "true", "--use_cpu", "true"]):
        with pytest.raises(
            ConfigError,
            match=r"^--dtype float16 loses small gradients .* pass --fp16 true too \(on a GPU\), or --dtype",
        ):
            parse_train([*NEEDED, *flags])
    run, training = parse_estimate(["--model_name_or_path", "m", "--dtype", "float16", "--fp16", "true"])
    assert (run.dtype, training.fp16) == ("float16", True)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("model_name_or_path: ~/m\ndataset: ~/d.jsonl\noutput_dir: ~/o\n")
    run, training = parse_train(["~/c.yaml", "--eval_dataset=~/e.jsonl", "--chat_template_path", "~/t.jinja"])
    found = [run.model_name_or_path, run.dataset, run.eval_dataset, training.output_dir, training.chat_template_path]
    assert found == [str(tmp_path / name) for name in ("m", "d.jsonl", "e.jsonl", "o", "t.jinja")]
