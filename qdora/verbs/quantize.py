"""`qdora quantize`: a 16-bit model to an NF4 checkpoint, tensor by tensor.

Peak memory is the largest tensor, its quantized form and one output shard, whatever the model's size. The format is
transformers' for bitsandbytes, so plain `AutoModelForCausalLM.from_pretrained` reads the result.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from qdora.architecture import Linears, is_nf4_checkpoint, model_linears
from qdora.arithmetic import compute_dtype, in_sixteen_bits, pick_device
from qdora.errors import CheckpointError, NumericsError
from qdora.experts import STACKS
from qdora.kinship import QUANTIZE_RECORD, ancestry_of
from qdora.loader import nf4_config
from qdora.nf4 import NF4Weight
from qdora.nf4format import LARGEST_SCALE, quantize_nf4
from qdora.output import check_output, new_directory, scratch_beside, write_json
from qdora.shards import ShardReader, ShardWriter, fingerprint, format_bytes, parse_size
from qdora.sources import copy_side_files, find_gguf, gguf_to_directory, local_model

__all__ = ["QuantizeReport", "quantize"]


@dataclass
class QuantizeReport:
    """What `quantize` did."""

    out: Path
    bytes_before: int = 0
    bytes_after: int = 0
    quantized_values: int = 0
    quantized_bytes: int = 0
    kept_values: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    """Path of each quantized linear → ‖W − Ŵ‖/‖W‖."""
    kept_linears: list[str] = field(default_factory=list)
    kept_experts: tuple[str, ...] = ()
    """Paths of experts whose stacks cannot be taken apart."""

    @property
    def share_in_nf4(self) -> float:
        """Of the model's values."""
        return self.quantized_values / max(1, self.quantized_values + self.kept_values)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, absmax included."""
        return 8 * self.quantized_bytes / max(1, self.quantized_values)

    def __str__(self) -> str:
        values = self.quantized_values + self.kept_values
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"{format_bytes(self.bytes_before)} → {format_bytes(self.bytes_after)}, "
            f"{8 * self.bytes_after / max(1, values):.2f} bits per weight: {len(self.errors)} linears, "
            f"{100 * self.share_in_nf4:.0f} % of the weights, in NF4 at "
            f"{self.bits_per_weight:.2f} bits per weight; the rest in 16 bits",
            "relative error of the worst layers: " + ", ".join(f"{path} {error:.4f}" for path, error in worst),
        ]
        if self.kept_linears:
            lines.append(f"kept in 16 bits as asked: {', '.join(_without_numbers(self.kept_linears))}")
        if self.kept_experts:
            lines.append(
                f"kept in 16 bits, for their layout is not one that qdora takes apart: {', '.join(self.kept_experts)}"
            )
        return "\n".join(lines)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    skip_modules: Sequence[str] = (),
    double_quant: bool = True,
    dtype: str = "bfloat16",
    max_shard_size: str | int = "5GB",
    device: str | torch.device | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> QuantizeReport:
    """Write `model` to `out` with the linears of its decoder in NF4.

    Args:
        model: a directory with safetensors, a Hub id, a GGUF file or a directory with one.
        out: the directory to write; it appears whole or not at all.
        skip_modules: linears to leave in 16 bits, by name or path. The head always stays.
        double_quant: store the absmax in 8 bits too (4.13 instead of 4.5 bits per weight).
        dtype: of what is not quantized: `bfloat16` or `float16`.
        max_shard_size: of the output, as `5GB` or in bytes.
        device: where to quantize; the accelerator, if there is one.
        overwrite: replace `out` if it holds something.

    Raises:
        CheckpointError: the model is missing, damaged, quantized already or has no linears.
        ConfigError: an argument is wrong, or `out` is in use.
        NumericsError: a tensor (it is named) is not finite, or not in float16.
    """
    shard_bytes, kept_dtype = parse_size(max_shard_size), compute_dtype(dtype, sixteen_bit=True)
    target = pick_device(device)
    check_output(out, overwrite, [model])
    with ExitStack() as stack:
        directory = stack.enter_context(new_directory(out, overwrite))
        gguf = find_gguf(model)
        if gguf is not None:
            source = scratch_beside(Path(out).resolve())
            stack.callback(shutil.rmtree, source, ignore_errors=True)
            gguf_to_directory(gguf, source, kept_dtype, shard_bytes)
        else:
            source = local_model(model)
        if is_nf4_checkpoint(source, trust_remote_code):
            raise CheckpointError(f"{model} is in NF4 already; train on it as it is")
        reader = ShardReader(source)
        linears = model_linears(source, tuple(skip_modules), trust_remote_code)
        report = QuantizeReport(Path(out), bytes_before=reader.total_bytes, kept_experts=linears.stacks)
        with ShardWriter(directory, shard_bytes) as writer:
            for key, tensor in _matrices(reader, linears):
                for name, part in _convert(key, tensor, linears, kept_dtype, double_quant, target, report):
                    writer.add(name, part)
        _check_complete(linears, report, model)
        report.bytes_after = writer.total_bytes
        _write_config(source, directory, linears, kept_dtype, double_quant)
        copy_side_files(source, directory)
        _write_record(directory, model, reader)
    return report


def _matrices(reader: ShardReader, linears: Linears) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors, stacks of experts taken apart, one in memory at a time."""
    size = reader.total_bytes
    with tqdm(total=size, unit="B", unit_scale=True, desc="quantize", leave=False, disable=None) as bar:  # on terminals
        for key in reader:
            yield from _apart(key, reader.get(key), linears)
            bar.update(reader.nbytes(key))


def _apart(key: str, tensor: Tensor, linears: Linears) -> Iterator[tuple[str, Tensor]]:
    """A stack of experts as a matrix each, under the keys that they have on the Hub; any other tensor as it is."""
    where, _, stack = key.rpartition(".")
    names: list[str] = []
    if stack in STACKS and tensor.dim() == 3:
        first = tuple(f"{path}.0." for path in linears.names.candidates(where))
        names = [path.rpartition(".")[2] for path in linears.shapes if path.startswith(first)]
    if not names:
        yield key, tensor
        return
    gate, up, down = names
    for number, matrix in enumerate(tensor):
        parts = {down: matrix} if stack == "down_proj" else dict(zip((gate, up), matrix.chunk(2), strict=True))
        for name, part in parts.items():
            yield f"{where}.{number}.{name}.weight", part


def _convert(
    key: str,
    tensor: Tensor,
    linears: Linears,
    dtype: torch.dtype,
    double_quant: bool,
    device: torch.device,
    report: QuantizeReport,
) -> list[tuple[str, Tensor]]:
    """The tensors that stand for one tensor of the source."""
    path = linears.find(key)
    if path is None or not linears.quantizes(path):
        report.kept_values += tensor.numel()
        if path is not None:
            report.kept_linears.append(path)
        return [(key, linears.in_sixteen_bits(key, tensor, dtype))]
    plain = in_sixteen_bits(key, tensor, dtype)
    weight = plain.t().contiguous() if linears.transposed[path] else plain
    _check_matrix(path, weight, linears)
    parts = quantize_nf4(weight, double_quant, device)
    report.quantized_values += weight.numel()
    report.quantized_bytes += sum(part.nbytes for part in parts.values())
    report.errors[path] = _relative_error(weight, NF4Weight.from_tensors(parts))
    return [(f"{key}.{name}" if name else key, part) for name, part in parts.items()]


def _check_complete(linears: Linears, report: QuantizeReport, model: str | Path) -> None:
    missing = sorted(linears.transposed.keys() - report.errors.keys() - set(report.kept_linears))
    if missing or not report.errors:
        what = f"{len(missing)} weights are missing, first that of {missing[0]}" if missing else "it has no linears"
        raise CheckpointError(f"{model} does not hold the model of its config.json: {what}; download it again")


def _check_matrix(path: str, weight: Tensor, linears: Linears) -> None:
    if not weight.is_floating_point():
        raise CheckpointError(f"the weight of {path} holds whole numbers ({weight.dtype}); download it again")
    if tuple(weight.shape) != linears.shapes[path]:
        expected = "×".join(map(str, linears.shapes[path]))
        found = "×".join(map(str, weight.shape))
        raise CheckpointError(f"the weight of {path} is {found}, and {expected} by config.json; download it again")
    largest = float(weight.abs().max())
    if largest > LARGEST_SCALE:
        raise NumericsError(
            f"the weight of {path} holds {largest:.4g}, beyond NF4's {LARGEST_SCALE:g}; leave it in 16 bits by "
            f"--skip_modules {path}"
        )


def _relative_error(weight: Tensor, quantized: NF4Weight) -> float:
    error = norm = 0.0
    for rows, tile in quantized.tiles(torch.float32):
        original = weight[rows].float()
        error += float((tile - original).square().sum())
        norm += float(original.square().sum())
    return (error / norm) ** 0.5 if norm else 0.0


def _write_config(source: Path, directory: Path, linears: Linears, dtype: torch.dtype, double_quant: bool) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    config.pop("torch_dtype", None)
    config["quantization_config"] = nf4_config(dtype, double_quant, linears.skipped).to_dict()
    write_json(directory / "config.json", config)


def _without_numbers(paths: Sequence[str]) -> list[str]:
    """Each path once, whatever the number of the expert."""
    return list(dict.fromkeys(re.sub(r"\.experts\.\d+\.", ".experts.*.", path) for path in paths))


def _write_record(directory: Path, model: str | Path, reader: ShardReader) -> None:
    """What it was made from, for adapters of the one to be known by the other."""
    record = {
        "model": str(model),
        "source_hash": fingerprint(reader),
        "hash": fingerprint(ShardReader(directory)),
        "merged": list(ancestry_of(reader.directory, reader).merged),
    }
    write_json(directory / QUANTIZE_RECORD, record)
