"""What the fuzzer damages, and which of our functions then reads it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

import qdora
from qdora.adapterfile import read_adapter
from qdora.architecture import is_nf4_checkpoint, model_linears
from qdora.arguments import adapter_config, parse_train
from qdora.baseweights import StoredBase
from qdora.data import encode
from qdora.resume import start
from qdora.rows import read_rows
from qdora.shards import ShardReader, fingerprint
from tests.conftest import disturb, make_model
from tests.mutate import CANARY_CODE, Mutant, mutate_bytes, mutate_json, mutate_safetensors, mutate_text, pickled

__all__ = ["KINDS", "Case", "Kind", "make_seeds", "schedule"]


@dataclass(frozen=True)
class Case:
    """A mutant that lies ready to be read."""

    how: str
    fatal: bool
    read: Callable[[], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of mutant."""

    share: int
    """How many of a hundred."""
    prepare: Callable[[Path, Path, Random, Path], Case]
    """(sound inputs, an empty directory, rng, the canary's file) → the case."""


def make_seeds(place: Path) -> None:
    """The sound inputs, tiny."""
    place.mkdir(parents=True, exist_ok=True)
    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
    }
    make_model(place / "one", **small)
    make_model(place / "shards", shard="60KB", **small)
    qdora.quantize(place / "one", place / "nf4")
    qdora.quantize(place / "one", place / "plain-nf4", double_quant=False)
    for name, use_dora in (("dora", True), ("lora", False)):
        config = qdora.AdapterConfig(rank=2, alpha=4, use_dora=use_dora)
        model = qdora.load_model(place / "nf4", adapter=config)
        disturb(model)
        qdora.save_adapter(model, place / name, exact_offsets=True)
    _make_rows(place / "rows")
    _make_gguf(place / "tiny.gguf", place / "one")
    _make_checkpoint(place)
    (place / "made").touch()


def schedule() -> list[str]:
    """A hundred names of kinds, well mixed."""
    names = [name for name, kind in KINDS.items() for _ in range(kind.share)]
    assert len(names) == 100, len(names)
    Random(0).shuffle(names)
    return names


# --- tensors ---


def _weights(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory = _copied(seeds / "one", scratch)
    mutant = _replaced(directory / "model.safetensors", lambda content: mutate_safetensors(content, rng, canary))

    def read() -> None:
        reader = ShardReader(directory)
        fingerprint(reader)
        for key in reader:
            reader.get(key)

    return Case(mutant.how, mutant.fatal, read)


def _index(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory = _copied(seeds / "shards", scratch)
    path = directory / "model.safetensors.index.json"
    if rng.random() < 0.5:
        mutant = _replaced(path, lambda content: mutate_json(content, rng))
    else:
        mutant = _foreign_shard(path, rng)

    def read() -> None:
        reader = ShardReader(directory)
        for key in reader:
            reader.get(key)

    return Case(mutant.how, mutant.fatal, read)


def _foreign_shard(path: Path, rng: Random) -> Mutant:
    """The index names what it must not, or a shard is another's."""
    index = json.loads(path.read_text())
    key = rng.choice(list(index["weight_map"]))
    kind = rng.choice(["climbs", "absolute", "absent", "pickled", "key", "swapped", "device"])
    if kind in ("key", "swapped"):
        shards = sorted(path.parent.glob("*.safetensors"))
        if kind == "swapped":
            shutil.copyfile(shards[0], shards[1])
        else:
            index["weight_map"]["model.absent.weight"] = shards[0].name
    else:
        index["weight_map"][key] = {
            "climbs": f"../{path.parent.name}/../../one/model.safetensors",
            "absolute": "/tmp/model.safetensors",
            "absent": "model-00099-of-00099.safetensors",
            "pickled": "pytorch_model.bin",
            "device": "/dev/zero",
        }[kind]
    path.write_text(json.dumps(index))
    return Mutant(b"", f"a shard: {kind}", fatal=True)


_QUANT_STATE = "quant_state.bitsandbytes__nf4"


def _nf4_tensors(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory, mutant = _damaged_nf4(seeds, scratch, rng, canary)

    def read() -> None:
        stored = StoredBase(directory)
        for key in stored.keys():  # noqa: SIM118 (not a mapping)
            if stored.linears.find(key) is None:
                stored.plain(key)
            else:
                weight = stored.weight(key)
                for _ in weight.tiles(torch.float32):
                    pass

    return Case(mutant.how, mutant.fatal, read)


def _damaged_nf4(seeds: Path, scratch: Path, rng: Random, canary: Path) -> tuple[Path, Mutant]:
    nested = rng.random() < 0.7
    directory = _copied(seeds / ("nf4" if nested else "plain-nf4"), scratch)
    path = directory / "model.safetensors"
    if rng.random() < 0.2:
        return directory, _replaced(path, lambda content: mutate_safetensors(content, rng, canary))
    tensors = load_file(path)
    key = rng.choice([key for key in tensors if key.endswith(".weight.absmax")]).removesuffix(".absmax")
    mutant = _damage_state(tensors, key, rng) if rng.random() < 0.5 else _damage_part(tensors, key, nested, rng)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory, mutant


def _damage_state(tensors: dict[str, torch.Tensor], key: str, rng: Random) -> Mutant:
    """The JSON that lies in a tensor."""
    name = f"{key}.{_QUANT_STATE}"
    content = bytes(tensors[name].tolist())
    if rng.random() < 0.4:
        mutant = mutate_json(content, rng)
        changed = mutant.content
    else:
        state, fatal = json.loads(content), True
        fields: list[tuple[str, list[Any]]] = [
            ("blocksize", [0, -64, 32, 63, 128, 2**40, 2**70, "64", None, 64.5, [64], True]),
            ("shape", [[64, 63], [1, 2**40], [-64, -64], [0, 0], [64], [], None, "64", [64, 64, 1], [2**70, 1]]),
            ("quant_type", ["fp4", "int8", "", None, 4]),
            ("nested_blocksize", [0, -1, 64, 2**40, None] if "nested_blocksize" in state else [7]),
            ("nested_offset", [float("nan"), float("inf"), 1e30, -5.0, "x", None]),
            ("dtype", ["load", "nn", "", None, "int64", 3]),
        ]
        field, values = rng.choice(fields)
        if field.startswith("nested") and "nested_blocksize" not in state:
            field, values = "blocksize", [32]
        state[field] = rng.choice(values)
        mutant, changed = Mutant(b"", f"{key}: {field} is {state[field]!r}", fatal), json.dumps(state).encode()
    tensors[name] = torch.frombuffer(bytearray(changed or b" "), dtype=torch.uint8)
    return Mutant(b"", f"the quant state of {key}: {mutant.how}", mutant.fatal)


def _damage_part(tensors: dict[str, torch.Tensor], key: str, nested: bool, rng: Random) -> Mutant:
    """A tensor of a packed weight has another size or dtype, or holds what no scale is."""
    scales = f"{key}.nested_absmax" if nested else f"{key}.absmax"
    part = rng.choice([key, f"{key}.absmax", f"{key}.quant_map", scales, scales])
    tensor = tensors[part]
    kind = rng.choice(["shorter", "longer", "empty", "gone", "dtype", "nan", "inf", "absurd", "negative"])
    # NF4's values, and an absmax that is not quantized, are right in any floating dtype.
    fatal = kind != "dtype" or (nested and not part.endswith(".quant_map"))
    if kind in ("nan", "inf", "absurd", "negative") and tensor.is_floating_point():
        filled = {"nan": float("nan"), "inf": float("inf"), "absurd": 1e30, "negative": -1.0}[kind]
        place = tensor.view(-1)[rng.randrange(tensor.numel())]
        fatal = place.item() != filled  # NF4's first value is -1
        place.fill_(filled)
    elif kind == "gone":
        del tensors[part]
    elif kind in ("shorter", "empty"):
        tensors[part] = tensor.view(-1)[: 0 if kind == "empty" else tensor.numel() - 1].clone()
    elif kind == "dtype":
        tensors[part] = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int32)
    else:
        kind, tensors[part] = "longer", torch.cat([tensor.view(-1), tensor.view(-1)[:1]])
    return Mutant(b"", f"{part}: {kind}", fatal)


# --- adapters ---


def _adapter(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory, mutant = _damaged_adapter(seeds, scratch, rng, canary)

    def read() -> None:
        file = read_adapter(directory)
        for path in file.linears:
            file.config.targets(path)
            file.config.scaling_of(path)

    return Case(mutant.how, mutant.fatal, read)


def _damaged_adapter(seeds: Path, scratch: Path, rng: Random, canary: Path) -> tuple[Path, Mutant]:
    directory = _copied(seeds / rng.choice(["dora", "lora"]), scratch)
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    kind = rng.choice(["bytes", "tensors", "tensors", "config", "config", "pattern", "pickle"])
    if kind == "bytes":
        return directory, _replaced(weights, lambda content: mutate_safetensors(content, rng, canary))
    if kind == "config":
        return directory, _replaced(config, lambda content: mutate_json(content, rng))
    if kind == "pickle":
        weights.unlink()
        (directory / "adapter_model.bin").write_bytes(pickled(canary))
        return directory, Mutant(b"", "a pickled adapter", fatal=True)
    if kind == "pattern":
        return directory, _hostile_pattern(config, rng)
    tensors = load_file(weights)
    key = rng.choice(list(tensors))
    kind = rng.choice(["nan", "inf", "gone", "shape", "transposed", "scalar", "named", "dtype"])
    if kind in ("nan", "inf"):
        tensors[key].view(-1)[0] = float(kind)
    elif kind == "gone":
        del tensors[key]
    elif kind == "named":
        tensors[f"{key}.x"] = tensors.pop(key)
    else:
        tensors[key] = {
            "shape": lambda t: torch.cat([t, t]),
            "transposed": lambda t: t.t().contiguous() if t.dim() == 2 else t[None],
            "scalar": lambda t: t.view(-1)[0].clone(),
            "dtype": lambda t: t.to(torch.int64),
        }[kind](tensors[key])
    # Rows of B too many, and a magnitude to match, would be an adapter for another model.
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory, Mutant(b"", f"{key}: {kind}", fatal=kind != "shape")


def _hostile_pattern(path: Path, rng: Random) -> Mutant:
    config = json.loads(path.read_text())
    pattern = rng.choice(
        ["(.+)+$x", r"(\w+\.?)*!", "(.*)*.*.*.*.*.*.*.*y", "(a|a|.)*!", r"(.*?)(.*?)(.*?)(.*?)\4\3\2\1!"]
    )
    field = rng.choice(["target_modules", "rank_pattern", "alpha_pattern"])
    config[field] = pattern if field == "target_modules" else {pattern: 3}
    path.write_text(json.dumps(config))
    return Mutant(b"", f"{field}: {pattern}")


# --- configs, tokenizers ---


def _model_config(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory = _copied(seeds / rng.choice(["one", "nf4"]), scratch, weights=False)
    mutant = _damaged_config(directory / "config.json", rng, canary)

    def read() -> None:
        is_nf4_checkpoint(directory)
        linears = model_linears(directory)
        for path in linears.shapes:
            linears.quantizes(path)

    return Case(mutant.how, mutant.fatal, read)


def _damaged_config(path: Path, rng: Random, canary: Path) -> Mutant:
    if rng.random() < 0.75:
        return _replaced(path, lambda content: mutate_json(content, rng))
    config = json.loads(path.read_text())
    kind = rng.choice(["code", "code", "hub code", "sizes", "skip", "type"])
    if kind in ("code", "hub code"):
        (path.parent / "evil.py").write_text(CANARY_CODE.format(path=str(canary)) + "class Evil: pass\n")
        where = "evil.Evil" if kind == "code" else "owner/name--evil.Evil"
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": where, "AutoModelForCausalLM": where}}
    elif kind == "sizes":
        field = rng.choice(["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim"])
        config[field] = rng.choice([2**31, 10**7, 2**62, -1, 0, 10**30])
    elif kind == "skip":
        config.setdefault("quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
        config["quantization_config"]["llm_int8_skip_modules"] = rng.choice([["(.+)+$x"], [7], "lm_head", ["["], [""]])
    else:
        config["model_type"] = rng.choice(["gpt2", "llama4", "whisper", "../../evil", "", None])
    path.write_text(json.dumps(config))
    return Mutant(b"", f"config: {kind}", fatal=kind in ("code", "hub code"))


_HOSTILE_TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 'x' * 10**11 }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ 'x' | center(10**11) }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(messages) }}",
    "{% if %}",
    "{{ 1 // 0 }}",
    "",
)


def _tokenizer(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory = _copied(seeds / "one", scratch, weights=False)
    kind = rng.choice(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json", "code", "template"])
    fatal = False
    if kind == "template":
        template = rng.choice(_HOSTILE_TEMPLATES).replace("CANARY", str(canary))
        (directory / "chat_template.jinja").write_text(template)
        how = f"template: {template[:80]}"
    elif kind == "code":
        (directory / "evil.py").write_text(CANARY_CODE.format(path=str(canary)) + "class Evil: pass\n")
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        path.write_text(json.dumps(config))
        how = "a tokenizer's code"
    else:
        how = f"{kind}: {_replaced(directory / kind, lambda content: mutate_json(content, rng)).how}"
    chat = [{"messages": [{"role": "user", "content": "12 + 30"}, {"role": "assistant", "content": "42"}]}]

    def read() -> None:
        encode(chat, qdora.load_tokenizer(directory), 64)

    return Case(how, fatal, read)


# --- data, flags ---

_ROW_FILES = ("chat.jsonl", "pairs.jsonl", "alpaca.json", "pairs.csv", "text.parquet", "share.jsonl")


def _rows(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    name = rng.choice(_ROW_FILES)
    path = Path(shutil.copy(seeds / "rows" / name, scratch / name))
    if path.suffix == ".parquet":
        mutant = _replaced(path, lambda content: mutate_bytes(content, rng))
    elif path.suffix == ".json":
        mutant = _replaced(path, lambda content: mutate_json(content, rng))
    else:
        mutant = _replaced(path, lambda content: mutate_text(content, rng))

    def read() -> None:
        encode(read_rows(path), _shared_tokenizer(seeds), 64, path)

    return Case(f"{name}: {mutant.how}", mutant.fatal, read)


_YAML = b"""model_name_or_path: base-nf4
dataset: notes.jsonl
output_dir: adapter
max_steps: 80
per_device_train_batch_size: 8
max_length: 512
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 2e-4
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 1}
save_steps: 40
report_to: none
"""
_HOSTILE_YAML = (
    b"!!python/object/apply:builtins.open ['CANARY', w]\n",
    b"model_name_or_path: !!python/object/apply:os.system ['touch CANARY']\n",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("k")))
    + b"lora_target_modules: *j\n",
    b"dataset: &d {a: *d}\n",
    b"dataset: " + b"[" * 5000 + b"\n",
    b"max_steps: " + b"9" * 5000 + b"\n",
    b"? [a, b]\n: 1\n",
    b'output_dir: "\\x00"\n',
    b"learning_rate: .nan\n",
    b"lora_r: 99999999999999999999\n",
    b"lora_target_modules: ['(.+)+$x']\n",
)


def _train_config(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    path = scratch / "train.yaml"
    if rng.random() < 0.3:
        hostile = rng.choice(_HOSTILE_YAML).replace(b"CANARY", str(canary).encode())
        mutant = Mutant(_YAML + hostile if rng.random() < 0.7 else hostile, f"yaml: {hostile[:60]!r}")
    elif rng.random() < 0.5:
        lines = dict(line.split(b": ", 1) for line in _YAML.splitlines())
        mutant = mutate_json(json.dumps({k.decode(): v.decode() for k, v in lines.items()}).encode(), rng)
    else:
        mutant = mutate_text(_YAML, rng)
    path.write_bytes(mutant.content)

    def read() -> None:
        run, _ = parse_train([str(path)])
        adapter_config(run).targets("model.layers.0.self_attn.q_proj")

    return Case(mutant.how, mutant.fatal, read)


# --- whole verbs ---


def _load(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    model, adapter, mutant = _damaged_pair(seeds, scratch, rng, canary)
    return Case(mutant.how, mutant.fatal, lambda: qdora.load_model(model, adapter, device="cpu"))


def _merge(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    model, adapter, mutant = _damaged_pair(seeds, scratch, rng, canary)
    out = scratch / "merged"
    # It reads the model's own files, so that an adapter beside them does no harm.
    fatal = mutant.fatal and not mutant.how.startswith("embedded")
    return Case(mutant.how, fatal, lambda: qdora.merge(model, adapter, out, verify=False))


def _damaged_pair(seeds: Path, scratch: Path, rng: Random, canary: Path) -> tuple[Path, Path, Mutant]:
    """A model and its adapter, one of the two damaged somewhere."""
    target = rng.choice(["nf4", "nf4", "weights", "adapter", "config.json", "generation_config.json", "embedded"])
    model, adapter = seeds / "nf4", seeds / "dora"
    if target == "nf4":
        model, mutant = _damaged_nf4(seeds, scratch, rng, canary)
    elif target == "adapter":
        adapter, mutant = _damaged_adapter(seeds, scratch, rng, canary)
    elif target == "weights":
        model = _copied(seeds / "one", scratch)
        mutant = _replaced(model / "model.safetensors", lambda content: mutate_safetensors(content, rng, canary))
    else:
        model = _copied(seeds / "nf4", scratch)
        if target == "config.json":
            mutant = _damaged_config(model / target, rng, canary)
        elif target == "generation_config.json":
            mutant = _replaced(model / target, lambda content: mutate_json(content, rng))
        else:
            mutant = _with_embedded_adapter(model, seeds, canary)
    return model, adapter, Mutant(b"", f"{target}: {mutant.how}", mutant.fatal)


def _with_embedded_adapter(model: Path, seeds: Path, canary: Path) -> Mutant:
    """transformers loads an adapter that lies beside a model, and what that names as its base."""
    config = json.loads((seeds / "dora" / "adapter_config.json").read_text())
    (model / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/name"}))
    (model / "adapter_model.bin").write_bytes(pickled(canary))
    return Mutant(b"", "an adapter beside the model", fatal=True)


def _quantize(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    directory = _copied(seeds / "one", scratch)
    path = directory / "model.safetensors"
    kind = rng.choice(["file", "config", "nan", "inf", "shape", "integers", "gone"])
    if kind == "file":
        mutant = _replaced(path, lambda content: mutate_safetensors(content, rng, canary))
    elif kind == "config":
        mutant = _damaged_config(directory / "config.json", rng, canary)
    else:
        tensors = load_file(path)
        key = rng.choice([key for key in tensors if "_proj" in key])
        if kind in ("nan", "inf"):
            tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = float(kind)
        elif kind == "gone":
            del tensors[key]
        else:
            tensors[key] = tensors[key][1:].clone() if kind == "shape" else tensors[key].to(torch.int16)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
        mutant = Mutant(b"", f"{key}: {kind}", fatal=True)
    return Case(mutant.how, mutant.fatal, lambda: qdora.quantize(directory, scratch / "out", device="cpu"))


def _gguf(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    path = Path(shutil.copy(seeds / "tiny.gguf", scratch))
    mutant = _replaced(path, lambda content: _damaged_gguf(content, rng))
    return Case(mutant.how, mutant.fatal, lambda: qdora.quantize(path, scratch / "out", device="cpu"))


def _damaged_gguf(content: bytes, rng: Random) -> Mutant:
    """Mostly in what describes the tensors, for the rest is weights."""
    head = content[: len(content) // (1 if rng.random() < 0.2 else 4)]
    if rng.random() < 0.3:
        place = rng.randrange(4, len(head) - 8)
        number = rng.choice([2**64 - 1, 2**63, 2**40, 2**32, 0])
        return Mutant(content[:place] + struct.pack("<Q", number) + content[place + 8 :], f"{number} at {place}")
    mutant = mutate_bytes(head, rng)
    return Mutant(mutant.content if "cut" in mutant.how else mutant.content + content[len(head) :], mutant.how)


def _resume(seeds: Path, scratch: Path, rng: Random, canary: Path) -> Case:
    checkpoint = _copied(seeds / "checkpoint-3", scratch)
    name = rng.choice(["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
    if name.endswith(".json"):
        mutant = _replaced(checkpoint / name, lambda content: mutate_json(content, rng))
    elif rng.random() < 0.3:
        mutant = _replaced(checkpoint / name, lambda _: Mutant(pickled(canary), "a pickle", fatal=True))
    else:
        mutant = _replaced(checkpoint / name, lambda content: mutate_bytes(content, rng))
    flags = ["--model_name_or_path", "base", "--dataset", "rows.jsonl", "--output_dir", str(scratch)]
    run, training = parse_train([*flags, "--resume_from_checkpoint", "last"])
    return Case(f"{name}: {mutant.how}", mutant.fatal, lambda: start(run, training, scratch))


# --- what they share ---

_tokenizers: dict[Path, Any] = {}


def _shared_tokenizer(seeds: Path) -> Any:
    if seeds not in _tokenizers:
        _tokenizers[seeds] = qdora.load_tokenizer(seeds / "one")
    return _tokenizers[seeds]


def _copied(source: Path, scratch: Path, weights: bool = True) -> Path:
    """A directory of its own; files are links until they are replaced."""
    directory = scratch / source.name
    directory.mkdir()
    for file in source.iterdir():
        if weights or file.suffix != ".safetensors":
            os.link(file, directory / file.name) if file.suffix == ".safetensors" else shutil.copy(file, directory)
    return directory


def _replaced(path: Path, mutate: Callable[[bytes], Mutant]) -> Mutant:
    mutant = mutate(path.read_bytes())
    path.unlink()
    path.write_bytes(mutant.content)
    return mutant


# --- sound inputs ---


def _make_rows(place: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    place.mkdir()
    pairs = [{"prompt": f"Question: {i} and {i}? Answer:", "completion": f" {2 * i}"} for i in range(8)]
    alpaca = [{"instruction": row["prompt"], "output": row["completion"]} for row in pairs]
    roles = (("user", "prompt"), ("assistant", "completion"))
    chats = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in pairs]
    share = [{"conversations": [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]}] * 4
    for name, rows in (("chat", chats), ("pairs", pairs), ("share", share)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "alpaca.json").write_text(json.dumps(alpaca))
    (place / "pairs.csv").write_text("prompt,completion\n" + "".join(f'"a, {i}",{i}\n' for i in range(8)))
    parquet.write_table(pyarrow.table({"text": [row["prompt"] for row in pairs]}), place / "text.parquet")


def _make_gguf(path: Path, model: Path) -> None:
    import gguf

    config, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([1] * len(tokenizer["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, tensor in tensors.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _make_checkpoint(place: Path) -> None:
    """What transformers leaves of a run after three steps, as small as it can be."""
    checkpoint = Path(shutil.copytree(place / "dora", place / "checkpoint-3"))
    TrainerState(global_step=3, max_steps=6).save_to_json(str(checkpoint / "trainer_state.json"))
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save({"last_epoch": 3}, checkpoint / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, checkpoint / "rng_state.pth")


KINDS: dict[str, Kind] = {
    "weights": Kind(14, _weights),
    "index": Kind(7, _index),
    "nf4 tensors": Kind(10, _nf4_tensors),
    "adapter": Kind(14, _adapter),
    "model config": Kind(10, _model_config),
    "tokenizer": Kind(9, _tokenizer),
    "rows": Kind(14, _rows),
    "train config": Kind(8, _train_config),
    "checkpoint": Kind(3, _resume),
    "load_model": Kind(6, _load),
    "merge": Kind(2, _merge),
    "quantize": Kind(2, _quantize),
    "gguf": Kind(1, _gguf),
}
