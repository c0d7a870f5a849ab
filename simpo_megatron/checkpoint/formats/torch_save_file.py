"""torch.save files: zip archives of one pickle and the uncompressed storages of its tensors.

`read_torch_file` finds the tensors without loading them. `skeleton_of` is the way back: the bytes of a file around its
tensors, made by torch.save itself on tensors without data, so that their bytes can be written in place later.

From torch 2.7 on, torch.load on fake tensors also finds the offsets. It is not used, because torch 2.6 is supported,
and because a `.distcp` file holds many torch.save files one after the other.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, PickledTensor, read_pickle
from simpo_megatron.errors import UserError


class _FilePart(io.RawIOBase):
    """`length` bytes of a file from byte `start`, read as a file of its own."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self.stream, self.start, self.length, self.position = path.open("rb"), start, length, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be searched."""
        return True

    def tell(self) -> int:
        """The position in the part."""
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves the position."""
        position = offset + (0, self.position, self.length)[whence]
        if position < 0:
            raise OSError("negative seek")
        self.position = position
        return position

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all that are left."""
        left = max(0, self.length - self.position)
        self.stream.seek(self.start + self.position)
        data = self.stream.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data

    def close(self) -> None:
        """Closes the file."""
        self.stream.close()
        super().close()


@dataclass(frozen=True)
class TorchFile:
    """A torch.save file, or one that is part of a larger file.

    Attributes:
        path: the file, or the larger one.
        content: what was saved, with `Record`s and `PickledTensor`s.
        storages: by name, the first byte of a storage in `path`, and its bytes.
    """

    path: Path
    content: Any
    storages: dict[str, tuple[int, int]]

    def place(self, tensor: PickledTensor) -> int:
        """The first byte of a tensor in the file.

        Raises:
            UserError: the tensor is not contiguous, or does not fit its storage.
        """
        start, size = self.storages.get(tensor.storage, (0, -1))
        item, count = ITEM_SIZE[tensor.dtype], math.prod(tensor.shape)
        if not tensor.is_contiguous:
            raise UserError(
                f"{self.path} holds a tensor of shape {list(tensor.shape)} that is not contiguous; save a copy"
            )
        if tensor.offset < 0 or min(tensor.shape, default=0) < 0 or (tensor.offset + count) * item > size:
            raise UserError(f"{self.path} holds a tensor that is larger than its data; copy the file again")
        return start + tensor.offset * item


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> TorchFile:
    """Reads the pickle and the places of the storages, but no tensor.

    Args:
        path: the file.
        start: where it begins in `path`.
        length: of it; None for all from `start`.

    Raises:
        UserError: it is not a torch.save file, it is compressed or truncated, or its pickle is refused.
    """
    try:
        part = _FilePart(path, start, path.stat().st_size - start if length is None else length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; copy it again") from error
    with part:
        try:
            with zipfile.ZipFile(part) as archive:
                return _read(path, archive, part)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
            raise UserError(f"{path} is not a torch.save file of torch 1.6 or later ({error}); copy it again") from None


def _read(path: Path, archive: zipfile.ZipFile, part: _FilePart) -> TorchFile:
    pickled, storages = None, {}
    for entry in archive.infolist():
        _, _, name = entry.filename.partition("/")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{entry.filename} is compressed")
        if name == "data.pkl":
            part.seek(_data_offset(part, entry))
            pickled = part.read(entry.file_size)
        elif name.startswith("data/"):
            offset = _data_offset(part, entry)
            if offset + entry.file_size > part.length:
                raise zipfile.BadZipFile(f"{entry.filename} ends outside the file")
            storages[name.removeprefix("data/")] = (part.start + offset, entry.file_size)
        elif name == "byteorder":
            part.seek(_data_offset(part, entry))
            if part.read(entry.file_size) != b"little":
                raise zipfile.BadZipFile("it was saved on a big-endian machine")
    if pickled is None:
        raise zipfile.BadZipFile("no data.pkl")
    return TorchFile(path, read_pickle(pickled, path), storages)


def _data_offset(part: _FilePart, entry: zipfile.ZipInfo) -> int:
    part.seek(entry.header_offset)
    header = part.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{entry.filename} has no header")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


@dataclass(frozen=True)
class Skeleton:
    """A torch.save file before the bytes of its tensors are there.

    Attributes:
        size: bytes of the whole file.
        fixed: (first byte, bytes) of what belongs to no tensor.
        starts: the first byte of each tensor, in the order in which they are pickled.
    """

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    starts: tuple[int, ...]


class _Recorder:
    """A stream that keeps what is written, and where. torch.save seeks over tensors without data."""

    def __init__(self) -> None:
        self.position, self.fixed, self.starts = 0, [], []

    def write(self, data: Any) -> int:
        if self.fixed and self.fixed[-1][0] + len(self.fixed[-1][1]) == self.position:
            self.fixed[-1][1].extend(data)
        else:
            self.fixed.append((self.position, bytearray(data)))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 1:
            raise ValueError("torch.save was expected to seek forwards only")
        if offset:
            self.starts.append(self.position)
        self.position += offset
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass


def skeleton_of(make: Callable[[], Any]) -> Skeleton:
    """The file that torch.save would write, without the bytes of its tensors.

    Args:
        make: returns what to save; it is called where `torch.empty` makes tensors without data.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    stream = _Recorder()
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(make(), stream)  # type: ignore[arg-type]
    return Skeleton(stream.position, tuple((at, bytes(data)) for at, data in stream.fixed), tuple(stream.starts))
