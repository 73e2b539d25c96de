"""`qdora merge`: base plus adapter to a plain 16-bit model, tensor by tensor.

The merge is of the function that was trained: onto the dequantized NF4 weights. Merging the adapter onto the original
16-bit weights gives another function (they differ by the NF4 error, 9 % of a weight) and merging into NF4 again would
lose most of a small update, so neither is done by default. If the base given is 16-bit and the adapter says that it was
trained on NF4, each linear is rounded through NF4 first, as training did when it loaded that model; `onto_original`
leaves that out. What was done is recorded in the output, in `qdora_merge.json`.

Peak memory is a few copies of the largest tensor and one output shard, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdora.adapterfile import AdapterFile, LinearAdapter, read_adapter
from qdora.architecture import is_nf4_checkpoint
from qdora.arithmetic import compute_dtype, in_sixteen_bits
from qdora.base import BaseWeight
from qdora.baseweights import StoredBase
from qdora.distributed import bar
from qdora.dora import merge_rows
from qdora.errors import CheckpointError
from qdora.generation import ends_of
from qdora.kinship import MERGE_RECORD, Kinship, ancestry_of
from qdora.output import (
    SETTINGS_FILE,
    TEMPLATE_FILE,
    TEMPLATES,
    TOKENIZER_FILES,
    check_output,
    new_directory,
    read_object,
    write_json,
)
from qdora.shards import ShardWriter, format_bytes, parse_size
from qdora.sources import copy_side_files, local_model
from qdora.tokenizer import (
    kind_of_tokens,
    load_tokenizer,
    template_beside,
    tokenizer_of,
)
from qdora.verify import Comparison, compare, fits_in_memory

__all__ = ["MergeReport", "merge"]


@dataclass
class MergeReport:
    """What `merge` did."""

    out: Path
    base: str
    """`nf4`, `16-bit rounded through nf4` or `16-bit`: what the adapter was merged onto."""
    dtype: str
    merged_linears: int
    bytes_written: int
    comparison: Comparison | None
    """Adapter against merged model; None if they were not compared."""
    not_compared: str = ""
    """Why they were not."""

    def __str__(self) -> str:
        text = (
            f"{self.merged_linears} linears merged onto the {self.base} base, {format_bytes(self.bytes_written)} "
            f"of {self.dtype} in {self.out}"
        )
        return f"{text}\n{self.comparison or f'not verified: {self.not_compared}'}"


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str = "float16",
    max_shard_size: str | int = "5GB",
    verify: bool | None = None,
    onto_original: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> MergeReport:
    """Write `base` with `adapter` merged in to `out`, as a plain transformers model.

    Args:
        base: the NF4 checkpoint that was trained on, or a 16-bit model.
        adapter: an adapter directory, ours or PEFT's.
        dtype: of the output: `float16` or `bfloat16`. The arithmetic is fp32.
        verify: compare the adapter with the result on a few prompts, in fp32 on the CPU; by default if the model fits
            in memory. A result that fails it is not written.
        onto_original: with a 16-bit base, keep its weights as they are even if the adapter was trained on NF4.
        overwrite: replace `out` if it holds something.
        allow_other_base: merge onto other weights than the adapter was trained on, see `kinship`.

    Raises:
        CheckpointError: base or adapter is missing, damaged, or they do not belong together.
        NumericsError: a merged tensor is not finite in `dtype` (it is named), or the merged model answers otherwise
            than the adapter.
    """
    out_dtype, shard_bytes = compute_dtype(dtype, sixteen_bit=True), parse_size(max_shard_size)
    check_output(out, overwrite, [base, adapter])
    source, file = local_model(base), read_adapter(adapter)
    packed = is_nf4_checkpoint(source, trust_remote_code)
    through_nf4 = not packed and not onto_original and file.rounds(base, "pass --onto_original")
    stored = StoredBase(source, through_nf4, trust_remote_code)
    known = stored.kinship(file)
    known.settle(adapter, base, allow_other_base)
    if packed and file.base_kind == "dense" and not allow_other_base:
        raise CheckpointError(
            f"{adapter} was trained on 16-bit weights, and {base} holds NF4 ones, on which it is another function; "
            "name the 16-bit model, or pass --allow_other_base"
        )
    with new_directory(out, overwrite) as directory:
        with ShardWriter(directory, shard_bytes) as writer:
            is_parted = _write_tensors(writer, stored, file, out_dtype)
        report = MergeReport(Path(out), stored.kind, dtype, len(file.linears), writer.total_bytes, comparison=None)
        _write_config(source, directory, dtype, is_parted)
        copy_side_files(source, directory)
        _take_tokenizer_along(adapter, directory, trust_remote_code)
        # The comparison comes before the result gets its name: what fails it is not left behind as a success.
        report.not_compared = _reason_against(
            verify, fits_in_memory(stored.reader, stored.linears), directory, trust_remote_code
        )
        if not report.not_compared:
            report.comparison = compare(
                source, adapter, directory, load_in_4bit=packed or through_nf4, trust_remote_code=trust_remote_code
            )
            report.comparison.check(out)
        merged = (*ancestry_of(source, stored.reader).merged, file.own_hash())
        _write_record(directory, report, base, adapter, merged, known)
    return report


def _write_tensors(writer: ShardWriter, stored: StoredBase, file: AdapterFile, dtype: torch.dtype) -> bool:
    """Every tensor of the merged model; returns whether its head is another matrix than its embedding by now."""
    for key in bar("merge", "tensors")(stored.keys()):
        writer.add(key, stored.linears.in_sixteen_bits(key, _merged(key, stored, file), dtype))
    parted = _parted_ends(stored, file)
    for name, weight in (parted or {}).items():
        writer.add(name, in_sixteen_bits(name, weight, dtype))
    return parted is not None


def _reason_against(verify: bool | None, fits: bool, directory: Path, trust_remote_code: bool) -> str:
    """Why not to compare; empty if nothing speaks against it."""
    if verify is False:
        return "not asked for"
    if verify is None and not fits:
        return "the model does not fit in memory in fp32; --verify insists"
    try:
        load_tokenizer(directory, trust_remote_code)
    except CheckpointError as error:
        if verify:
            raise
        return str(error)
    return ""


def _merged(key: str, stored: StoredBase, file: AdapterFile) -> Tensor:
    """One tensor of the output, in fp32 if arithmetic was needed, else as it was."""
    trained = stored.linears.named(key, file.whole)  # a linear too may have been trained whole
    if trained is not None:
        return file.whole[trained]
    path = stored.linears.find(key)
    if path is None:
        return stored.plain(key)
    merged = merged_weight(stored.weight(key), file.linears.get(path))
    return merged.t() if stored.linears.transposed[path] else merged


def merged_weight(weight: BaseWeight, adapter: LinearAdapter | None) -> Tensor:
    """W', or W where there is no adapter, (out_features, in_features) fp32, computed a tile at a time."""
    whole = torch.empty(weight.out_features, weight.in_features)
    for rows, tile in weight.tiles(torch.float32):
        whole[rows] = tile
        if adapter is not None:
            magnitude = None if adapter.magnitude is None else adapter.magnitude[rows]
            whole[rows] = merge_rows(tile, adapter.A, adapter.B[rows], magnitude, adapter.scaling)
    return whole


def _parted_ends(stored: StoredBase, file: AdapterFile) -> dict[str, Tensor] | None:
    """What to write beside what is stored, if embedding and head are two matrices by now; None if they are one."""
    if stored.linears.ends is None or not file.whole.keys() & set(stored.linears.ends):
        return None
    # A pair that was one lies under one of the names; what a file calls it is not always what the model does.
    keys = {name: stored.key_of(name) for name in stored.linears.ends}
    somewhere = next(key for key in keys.values() if key is not None)  # else `_check_whole` would have spoken
    weights = {
        name: file.whole[name] if name in file.whole else stored.plain(key or somewhere) for name, key in keys.items()
    }
    if torch.equal(*(weight.float() for weight in weights.values())):
        return None
    return {name: weight for name, weight in weights.items() if keys[name] is None}


def _write_config(source: Path, directory: Path, dtype: str, parted: bool) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if parted:
        config["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    write_json(directory / "config.json", {**config, "dtype": dtype})


def _take_tokenizer_along(adapter: str | Path, directory: Path, trust_remote_code: bool) -> None:
    """The chat template that the adapter has learned to answer in, and its tokenizer if it has other tokens.

    Only the template of one with the same tokens: it was written by the library that trained, which may say less of it
    than the files that came with the base (a tokenizer's slow form, for programs that read no other).
    """
    template = template_beside(adapter)
    if template is None:
        return
    if _brings_other_tokens(adapter, directory, trust_remote_code):
        for name in TOKENIZER_FILES:
            (directory / name).unlink(missing_ok=True)  # beside the adapter's it would say something else
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, directory / name)
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)  # as earlier releases of transformers wrote it
    shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
    _forget_template(directory / SETTINGS_FILE)
    with suppress(CheckpointError):  # a template that somebody put beside a base without a tokenizer
        _also_end_at(ends_of(load_tokenizer(directory, trust_remote_code)), directory)


def _also_end_at(tokens: list[int], directory: Path) -> None:
    """Let generation end where an answer does too; a base's config may know the end of a document alone."""
    file = directory / "generation_config.json"
    # Without the file, transformers goes by these in the model's config.
    config = read_object(file) if file.is_file() else _special_ids(read_object(directory / "config.json"))
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    new = [token for token in tokens if token not in ends]
    if new:
        write_json(file, {**config, "eos_token_id": [*new, *ends]})


def _special_ids(config: dict[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = config.get("text_config")
    places = (text, config) if isinstance(text, dict) else (config,)
    return {name: place[name] for place in places for name in names if place.get(name) is not None}


def _forget_template(settings_file: Path) -> None:
    """Take the template out of a tokenizer's settings, where llama.cpp's converter prefers it to the file."""
    settings = read_object(settings_file)
    if settings.pop("chat_template", None) is not None:
        write_json(settings_file, settings)


def _brings_other_tokens(adapter: str | Path, directory: Path, trust_remote_code: bool) -> bool:
    """Whether the adapter's tokenizer, which `chat` uses, cuts text into other tokens than that in the directory."""
    try:
        theirs, _ = tokenizer_of(directory, adapter, trust_remote_code)
    except CheckpointError:
        return False  # a template that somebody put there
    try:
        return kind_of_tokens(theirs) != kind_of_tokens(load_tokenizer(directory, trust_remote_code))
    except CheckpointError:
        return True


def _write_record(
    directory: Path, report: MergeReport, base: str | Path, adapter: str | Path, hashes: Sequence[str], known: Kinship
) -> None:
    record = {
        "base_model": str(base),
        "adapter": str(adapter),
        "merged": list(hashes),
        "merged_onto": report.base,
        "right_base": known.right,
        "base_is": known.text,
        "dtype": report.dtype,
        "verified": None if report.comparison is None else asdict(report.comparison),
    }
    write_json(directory / MERGE_RECORD, record)
