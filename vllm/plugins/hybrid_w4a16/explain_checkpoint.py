# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A checkpoint's config.json and the headers of its safetensors files.

Weights are not read. For a model on the Hugging Face hub, the headers are fetched with
range requests.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
# Where the quantization is described if config.json does not hold it; the names that
# AutoRound, AutoGPTQ and AutoAWQ write.
_QUANTIZATION_FILES = (
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
)
# Sub-configurations that hold the language model of a multimodal checkpoint.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Larger headers are refused by the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000


class CheckpointError(ValueError):
    """The checkpoint cannot be read, or its layout does not match its config."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor, as a safetensors header describes it."""

    name: str
    dtype: str
    """In the spelling of safetensors: I32, BF16, F16, F32 ..."""
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """Config and tensor list of a checkpoint."""

    name: str
    config: dict[str, Any]
    tensors: list[TensorInfo]
    header_bytes: int
    """Bytes of the safetensors files that are not tensors."""

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        for key in _TEXT_CONFIGS:
            if isinstance(self.config.get(key), dict):
                return self.config[key]
        return self.config

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization config, ``None`` for a 16-bit checkpoint."""
        for config in (self.config, self.text_config):
            for key in ("quantization_config", "compression_config"):
                if config.get(key):
                    return config[key]
        return None

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors files."""
        return self.header_bytes + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shared_expert_size(self) -> int:
        """Intermediate size of a layer's shared expert; 0: the model has none."""
        size = self.value("shared_expert_intermediate_size", default=0)
        if size:
            return size
        count = self.value("n_shared_experts", "num_shared_experts", default=0)
        return count * self.value("moe_intermediate_size", default=0)

    def value(self, *names: str, default: Any = None) -> Any:
        """The language model's config entry under the first of ``names`` that exists.

        Raises ``CheckpointError`` if there is none and no ``default``.
        """
        for name in names:
            if self.text_config.get(name) is not None:
                return self.text_config[name]
        if default is None:
            raise CheckpointError(
                f"{self.name}: config.json has none of {', '.join(names)}"
            )
        return default


def read_checkpoint(name: str) -> Checkpoint:
    """Read a checkpoint folder, or a model of the hub by its name.

    Raises ``CheckpointError`` when there is no such checkpoint or it is broken.
    """
    if not Path(name).exists() and not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name} is neither a folder nor the name of a model on the hub"
        )
    folder = Path(name) if Path(name).exists() else _cached_snapshot(name)
    return _read_hub(name) if folder is None else _read_folder(name, folder)


def _read_folder(name: str, folder: Path) -> Checkpoint:
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {_CONFIG}")
    files = {
        file: (folder / file).read_bytes()
        for file in (_CONFIG, _INDEX, *_QUANTIZATION_FILES)
        if (folder / file).is_file()
    }
    if _INDEX in files:
        shards = sorted(
            set(_parse(files[_INDEX], folder / _INDEX)["weight_map"].values())
        )
    else:
        shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} holds no safetensors files")
    tensors, header_bytes = [], 0
    for shard in shards:
        found, size = read_header(folder / shard)
        tensors += found
        header_bytes += size
    return Checkpoint(name, _merged_config(name, files), tensors, header_bytes)


def read_header(path: Path) -> tuple[list[TensorInfo], int]:
    """The tensors of a safetensors file and the bytes before the first one.

    The format: 8 bytes of little-endian header length, a JSON header with dtype, shape
    and byte range of each tensor, then the bytes. Raises ``CheckpointError`` when the
    file is not that, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file")
            header = _parse(file.read(length), path)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    tensors = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
    ]
    expected = 8 + length + sum(tensor.nbytes for tensor in tensors)
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, its header says {expected}: the download is "
            "incomplete or the file is damaged"
        )
    return tensors, 8 + length


def _parse(data: bytes, origin: object) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{origin}: not valid JSON: {error}") from None


def _merged_config(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """config.json, with the quantization config from its own file if there is one."""
    config = _parse(files[_CONFIG], f"{name}/{_CONFIG}")
    if not config.get("quantization_config"):
        for file in _QUANTIZATION_FILES:
            if file in files:
                config["quantization_config"] = _parse(files[file], f"{name}/{file}")
                break
    return config


def _cached_snapshot(name: str) -> Path | None:
    """The folder of a hub model that has been downloaded completely."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(
            f"{name} is neither a folder nor the name of a model on the hub"
        ) from None
    except LocalEntryNotFoundError:
        return None
    has_weights = (folder / _INDEX).exists() or any(folder.glob("*.safetensors"))
    return folder if has_weights else None


def _read_hub(name: str) -> Checkpoint:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    try:
        files = {
            file: Path(hf_hub_download(name, file)).read_bytes()
            for file in (_CONFIG, *_QUANTIZATION_FILES)
            if api.file_exists(name, file)
        }
        metadata = api.get_safetensors_metadata(name)
    except (
        Exception
    ) as error:  # which HTTP library's depends on the hub client's version
        raise CheckpointError(
            f"there is no folder {name}, and reading it from the hub failed: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    if _CONFIG not in files:
        raise CheckpointError(f"{name} on the hub holds no {_CONFIG}")
    tensors = [
        TensorInfo(tensor, info.dtype, tuple(info.shape), end - begin)
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
        for begin, end in [info.data_offsets]
    ]
    # The length of the headers is not handed on; they are less than 0.1% of the files.
    return Checkpoint(name, _merged_config(name, files), tensors, 0)
