"""Which weight files a checkpoint has, and whether they are whole; reads headers only."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

from hfaccel.errors import SourceError
from hfaccel.source.model import read_object

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_HEADER_BYTES_MAX = 100_000_000


def find_weight_files(folder: Path, *, allow_pickle: bool) -> tuple[str, ...]:
    """Weight file names in the order of preference of transformers; empty when there are none.

    Shards that an index names are listed whether or not they exist.

    Raises:
        SourceError: an index cannot be read.
    """
    if (folder / SAFETENSORS_FILE).is_file():
        return (SAFETENSORS_FILE,)
    if (folder / SAFETENSORS_INDEX).is_file():
        return tuple(sorted(set(_weight_map(folder / SAFETENSORS_INDEX).values())))
    if not allow_pickle:
        return ()
    if (folder / PICKLE_FILE).is_file():
        return (PICKLE_FILE,)
    if (folder / PICKLE_INDEX).is_file():
        return tuple(sorted(set(_weight_map(folder / PICKLE_INDEX).values())))
    return ()


def find_weight_problems(folder: Path, *, allow_pickle: bool) -> list[str]:
    """What is wrong with the weights of a checkpoint, one sentence each."""
    try:
        names = find_weight_files(folder, allow_pickle=allow_pickle)
    except SourceError as error:
        return [str(error)]
    if not names:
        return [_no_weights(folder)]
    missing = [name for name in names if not (folder / name).is_file()]
    problems = [f"weight file '{name}' is named by the index but missing: download it again" for name in missing]
    present = [name for name in names if name not in missing]
    if not names[0].endswith(".safetensors"):
        return problems + [problem for name in present if (problem := _pickle_problem(folder / name))]
    tensors: set[str] = set()
    for name in present:
        try:
            tensors |= read_tensor_names(folder / name)
        except SourceError as error:
            problems.append(f"{name} {error.what}: download it again")
    if not problems and names != (SAFETENSORS_FILE,):
        absent = sorted(set(_weight_map(folder / SAFETENSORS_INDEX)) - tensors)
        if absent:
            problems.append(f"{SAFETENSORS_INDEX} names tensors that no shard holds: {', '.join(absent[:3])}")
    return problems


def read_tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, after checking that the file is as long as its header says.

    Raises:
        SourceError: the file is truncated or not a safetensors file.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise SourceError(f"is truncated: {size_bytes} bytes", where=str(path))
        if start == b"version ":
            raise SourceError("is a git-lfs pointer, not the weights", where=str(path), hint="run: git lfs pull")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > _HEADER_BYTES_MAX:
            raise SourceError("is corrupt: its header is not a safetensors header", where=str(path))
        if 8 + header_bytes > size_bytes:
            raise SourceError(f"is truncated: {size_bytes} bytes, header alone {8 + header_bytes}", where=str(path))
        raw_header = stream.read(header_bytes)
    try:
        header = json.loads(raw_header)
        ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SourceError("is corrupt: its header is not a safetensors header", where=str(path)) from error
    expected_bytes = 8 + header_bytes + max(ends.values(), default=0)
    if size_bytes < expected_bytes:
        raise SourceError(f"is truncated: {size_bytes} bytes of {expected_bytes}", where=str(path))
    if size_bytes > expected_bytes:
        raise SourceError(f"is corrupt: {size_bytes} bytes where its header says {expected_bytes}", where=str(path))
    return set(ends)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name, as an index file has it."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("has no weight_map", where=str(index), hint="download the file again")
    names = {str(tensor): str(name) for tensor, name in weight_map.items()}
    outside = sorted({name for name in names.values() if Path(name).is_absolute() or ".." in Path(name).parts})
    if outside:
        raise SourceError(f"names a shard outside the folder: {outside[0]}", where=str(index))
    return names


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE_FILE).is_file() or (folder / PICKLE_INDEX).is_file():
        return (
            f"weights are pickled only ({PICKLE_FILE}), and a pickle can run code: convert them to {SAFETENSORS_FILE} with "
            "save_pretrained of transformers, or pass --allow-pickle if you trust where they come from"
        )
    if (folder / "adapter_config.json").is_file():
        return "holds an adapter without its base model: merge it first (merge_and_unload of peft, then save_pretrained)"
    return f"no weights: neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX}"


def _pickle_problem(path: Path) -> str | None:
    with path.open("rb") as stream:
        legacy_format = stream.read(1) == b"\x80"
    if legacy_format or zipfile.is_zipfile(path):
        return None
    return f"{path.name} is truncated or not a torch checkpoint: download it again"
