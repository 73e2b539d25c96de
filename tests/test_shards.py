"""Reading and writing shards, and every way in which a model directory can be wrong."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qdora import shards
from qdora.errors import CheckpointError, ConfigError
from qdora.shards import INDEX_FILE, SINGLE_FILE, ShardReader, ShardWriter, fingerprint, format_bytes, parse_size
from tests.conftest import make_model


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"t{i}": torch.randn(10, 10).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(7)}


def write(directory: Path, size: int) -> dict[str, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    with ShardWriter(directory, size) as writer:
        for key, tensor in tensors().items():
            writer.add(key, tensor)
    return tensors()


@pytest.mark.parametrize("size", [1, 500, 10**9])
def test_round_trip(tmp_path: Path, size: int) -> None:
    written = write(tmp_path, size)
    reader = ShardReader(tmp_path)
    assert set(reader.keys()) == written.keys()
    assert reader.total_bytes == sum(t.nbytes for t in written.values())
    for key, tensor in written.items():
        assert torch.equal(reader.get(key), tensor)
        assert reader.nbytes(key) == tensor.nbytes
    files = sorted(tmp_path.glob("*.safetensors"))
    if size == 10**9:
        assert [f.name for f in files] == [SINGLE_FILE]
    else:
        assert all(f.name.endswith(f"-of-{len(files):05d}.safetensors") for f in files)
        for file in files:
            parts = load_file(file)
            assert sum(t.nbytes for t in parts.values()) <= size or len(parts) == 1


def test_a_truncated_shard(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    file = tmp_path / SINGLE_FILE
    for keep in (0, 4, 20, file.stat().st_size - 1):
        content = file.read_bytes()
        file.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            ShardReader(tmp_path)
        file.write_bytes(content)


def test_no_weights_and_pickled_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        ShardReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled weights"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": {"t0": "../other.safetensors"}}', "outside its directory"),
        ('{"weight_map": {"t0": "/etc/passwd"}}', "outside its directory"),
        ('{"weight_map": {"t0": "absent.safetensors"}}', "is not there"),
        ('{"weight_map": {"t9": "shard.safetensors"}}', "first 't9'"),
    ],
)
def test_a_bad_index(tmp_path: Path, index: str, message: str) -> None:
    write(tmp_path, 10**9)
    (tmp_path / SINGLE_FILE).rename(tmp_path / "shard.safetensors")
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        ShardReader(tmp_path)


@pytest.mark.parametrize("index", ["not json", '{"weight_map": {"t0": "absent.safetensors"}}', "of others"])
def test_beside_a_single_file_an_index_is_passed_over_as_transformers_does(index: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    if index == "of others":
        others = {key: 2 * tensor for key, tensor in load_file(model / SINGLE_FILE).items()}
        save_file(others, model / "model-00001-of-00001.safetensors", {"format": "pt"})
        index = json.dumps({"weight_map": dict.fromkeys(others, "model-00001-of-00001.safetensors")})
    (model / INDEX_FILE).write_text(index)
    reader = ShardReader(model)
    plain = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(plain[key], reader.get(key).to(plain[key].dtype)) for key in reader)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match="'a' stands in both"):
        ShardReader(tmp_path)


def stored(directory: Path, content: dict[str, torch.Tensor], size: int = 10**9) -> str:
    directory.mkdir()
    with ShardWriter(directory, size) as writer:
        for key, tensor in content.items():
            writer.add(key, tensor)
    return fingerprint(ShardReader(directory))


def test_a_fingerprint_names_the_weights_and_not_their_files(tmp_path: Path) -> None:
    content = {**tensors(), "large": torch.randn(300, 200), "none": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}
    original = stored(tmp_path / "one", content)
    assert len(original) == 64
    assert original == stored(tmp_path / "sharded", content, 500)
    assert original == stored(tmp_path / "backwards", dict(reversed(content.items())), 2000)
    save_file(content, tmp_path / "one" / SINGLE_FILE, metadata={"format": "pt", "other": "header"})
    assert original == fingerprint(ShardReader(tmp_path / "one"))


def test_a_fingerprint_by_its_definition(tmp_path: Path) -> None:
    small, large = torch.arange(6, dtype=torch.int16).view(2, 3), torch.arange(20_000, dtype=torch.int32)
    raw = large.numpy().tobytes()
    starts = [round_down * (len(raw) - 4096) // 15 for round_down in range(16)]
    expected = b'["a", "I16", [2, 3]]\n' + small.numpy().tobytes() + b'["b", "I32", [20000]]\n'
    expected += b"".join(raw[start : start + 4096] for start in starts)
    assert (starts[0], starts[-1]) == (0, len(raw) - 4096)
    assert stored(tmp_path / "m", {"b": large, "a": small}) == hashlib.sha256(expected).hexdigest()


def test_what_a_fingerprint_can_tell(tmp_path: Path) -> None:
    large = torch.randn(300, 200)
    content = {**tensors(), "large": large}
    one_value, first, last, between = (tensor.clone() for tensor in (content["t3"], large, large, large))
    one_value[9, 9] += 1
    first[0, 0] += 1
    last[-1, -1] += 1
    between.view(-1)[1024 + 50] += 1  # after the first window of 4 KiB, before the second
    changed = {
        "a value of a small tensor": {**content, "t3": one_value},
        "the first value of a large one": {**content, "large": first},
        "the last": {**content, "large": last},
        "a large one, a little everywhere": {**content, "large": large * (1 + 1e-6)},
        "a shape": {**content, "large": large.view(200, 300)},
        "a dtype": {**content, "t0": content["t0"].view(torch.int32)},
        "a name": {("large2" if key == "large" else key): value for key, value in content.items()},
        "one more": {**content, "more": torch.zeros(0)},
        "two exchanged": {**content, "t0": content["t2"], "t2": content["t0"]},
    }
    original = stored(tmp_path / "original", content)
    hashes = {what: stored(tmp_path / what.replace(" ", "-"), other) for what, other in changed.items()}
    assert len({original, *hashes.values()}) == len(changed) + 1
    # What it cannot tell, as its description says.
    assert original == stored(tmp_path / "between", {**content, "large": between})


def test_sizes() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    assert parse_size(100) == 100
    for bad in ("", "5 TB", "-1GB", "0", "GB", "five"):
        with pytest.raises(ConfigError, match="not a size"):
            parse_size(bad)
    assert [format_bytes(n) for n in (5, 1500, 2.5e6, 1.234e9)] == ["5 B", "1.5 kB", "2.5 MB", "1.23 GB"]


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="stands in its header twice"):
        ShardReader(tmp_path)


def test_codes_without_their_scales_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' in F8_E4M3, whose scales nothing tells"):
        ShardReader(tmp_path)


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10**9)

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("No such file or directory: model.safetensors")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shards, "safe_open", absent)  # as the library says it
    monkeypatch.setattr(Path, "open", denied)  # root may open whatever a mode says
    with pytest.raises(CheckpointError, match=r"^cannot read .*model.safetensors: Permission denied; let it be read"):
        ShardReader(tmp_path)
