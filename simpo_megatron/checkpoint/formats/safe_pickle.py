"""Reads what Megatron and torch pickle, without importing, calling or loading anything that a file names.

`torch.load(weights_only=True)` would load whole tensors, and needs Megatron for the enums in its arguments. Here every
global becomes a `Record`, which only remembers what it was given. Tensors become `PickledTensor`s, which say where
their bytes are. A global that belongs in no checkpoint is an error, so a file that wants to run code is refused and
runs none.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from simpo_megatron.errors import UserError

# Names of dtypes and storages in a pickle, as safetensors' names.
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.bool": "BOOL",
}
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.BoolStorage": "BOOL",
}
# Bytes of a number.
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}

# How the names of harmless things begin. As records they can do nothing, so whole modules may pass.
_HARMLESS = (
    "torch.distributed.checkpoint.",
    "megatron.",
    "transformer_engine",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.",
    "signal.Signals",
    "numpy.",
    "_codecs.encode",
    "torch.serialization._get_layout",
    "torch.device",
    "torch.optim.",
    "torch.strided",
    "torch.contiguous_format",
    "torch.float8_",
    "torch.int",
    "torch.uint",
    "torch.bool",
    "torch.Generator",
    "torch.storage.",
    "torch.Float8",
    "_io.BytesIO",
    "io.BytesIO",
    "collections.defaultdict",
)
# Types without side effects, which are made as they are.
_REAL: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
}


class Record:
    """An object of a class that is not loaded: its name, the arguments it was made from, and its state."""

    global_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Keeps the arguments; the class that is named does not exist here."""
        record = super().__new__(cls)
        record.__dict__["args"] = args
        return record

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and all(isinstance(key, str) for key in state):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores the value: a pickled subclass of dict fills itself like this."""

    def append(self, value: Any) -> None:
        """Ignores the value: a pickled subclass of list fills itself like this."""


class PickledTensor(NamedTuple):
    """A tensor in a torch.save file, by the place of its bytes.

    Attributes:
        dtype: by the name of safetensors.
        storage: the name of the storage with its bytes.
        offset: its first number in the storage, in numbers.
        shape: of the tensor.
        stride: from index to index of every dimension, in numbers.
    """

    dtype: str
    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its numbers are one after the other."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


class _Storage(NamedTuple):
    dtype: str
    key: str


def _rebuild_tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    return PickledTensor(storage.dtype, storage.key, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    """Gives records and places where pickle would import and call."""

    def find_class(self, module: str, name: str) -> Any:
        """What a global stands for. Raises UnpicklingError where it belongs in no checkpoint."""
        full = f"{module}.{name}"
        if full == "torch._utils._rebuild_tensor_v2":
            return _rebuild_tensor
        if full in ("torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"):
            return _rebuild_parameter
        for table in (_DTYPES, _STORAGES, _REAL):
            if full in table:
                return table[full]
        if full.startswith(_HARMLESS):
            return type(name, (Record,), {"global_name": full})
        raise pickle.UnpicklingError(f"it names {full}, which belongs in no checkpoint")

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a tensor refers to."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return _Storage(dtype if isinstance(dtype, str) else "U8", key)


def read_pickle(data: bytes, source: Path | str) -> Any:
    """Unpickles with `Record`s and `PickledTensor`s in place of objects and tensors.

    Args:
        data: the pickle.
        source: names it in errors.

    Raises:
        UserError: it is not a pickle, or names something that belongs in no checkpoint. None of its code has run.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle can raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} is not a pickle that a checkpoint holds: {reason}; copy it again") from None
