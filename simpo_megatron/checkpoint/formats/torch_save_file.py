"""torch.save files, which are zip archives of one pickle and uncompressed storages.

Reading says where the tensors lie, without loading them. `lay_out` is the way back: the bytes of a file around its tensors,
made by torch.save itself on tensors without data, so that their bytes can be written in place later.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.safe_pickle import ITEM_SIZE, StoredTensor, read_pickle
from simpo_megatron.errors import UserError


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self.stream, self.start, self.length, self.position = path.open("rb"), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self.position, self.length)[whence]
        if position < 0:
            raise OSError("negative seek")
        self.position = position
        return position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.stream.seek(self.start + self.position)
        data = self.stream.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data

    def close(self) -> None:
        self.stream.close()
        super().close()


@dataclass(frozen=True)
class TorchFile:
    """A torch.save file, or one that is part of a larger file.

    Attributes:
        content: what was saved, with `Record`s and `StoredTensor`s.
        storages: first byte, in the file, and bytes of every storage.
    """

    path: Path
    content: Any
    storages: dict[str, tuple[int, int]]

    def place(self, tensor: StoredTensor) -> int:
        """The first byte of a tensor in the file.

        Raises:
            UserError: the tensor is not contiguous, or does not fit its storage.
        """
        start, size = self.storages.get(tensor.storage, (0, -1))
        item = ITEM_SIZE[tensor.dtype]
        count = 1
        for dim in tensor.shape:
            count *= dim
        if not tensor.is_contiguous:
            raise UserError(
                f"{self.path} holds a tensor of shape {list(tensor.shape)} that is not contiguous; save a copy"
            )
        if tensor.offset < 0 or min(tensor.shape, default=0) < 0 or (tensor.offset + count) * item > size:
            raise UserError(f"{self.path} holds a tensor that is larger than its data; copy the file again")
        return start + tensor.offset * item


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> TorchFile:
    """Reads the pickle and the places of the storages, no tensor.

    Raises:
        UserError: it is not a torch.save file, it is compressed or truncated, or its pickle is refused.
    """
    try:
        window = _Window(path, start, path.stat().st_size - start if length is None else length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; copy it again") from error
    with window:
        try:
            with zipfile.ZipFile(window) as archive:
                return _read(path, archive, window)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
            raise UserError(f"{path} is not a torch.save file of torch 1.6 or later ({error}); copy it again") from None


def _read(path: Path, archive: zipfile.ZipFile, window: _Window) -> TorchFile:
    pickled, storages = None, {}
    for entry in archive.infolist():
        _, _, name = entry.filename.partition("/")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{entry.filename} is compressed")
        if name == "data.pkl":
            window.seek(_data_offset(window, entry))
            pickled = window.read(entry.file_size)
        elif name.startswith("data/"):
            offset = _data_offset(window, entry)
            if offset + entry.file_size > window.length:
                raise zipfile.BadZipFile(f"{entry.filename} ends outside the file")
            storages[name.removeprefix("data/")] = (window.start + offset, entry.file_size)
        elif name == "byteorder":
            window.seek(_data_offset(window, entry))
            if window.read(entry.file_size) != b"little":
                raise zipfile.BadZipFile("it was saved on a big-endian machine")
    if pickled is None:
        raise zipfile.BadZipFile("no data.pkl")
    return TorchFile(path, read_pickle(pickled, path), storages)


def _data_offset(window: _Window, entry: zipfile.ZipInfo) -> int:
    window.seek(entry.header_offset)
    header = window.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{entry.filename} has no header")
    return entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


@dataclass(frozen=True)
class Layout:
    """A file before its tensors: its size, the bytes around them, and the first byte of each, in the order pickled."""

    size: int
    fixed: tuple[tuple[int, bytes], ...]
    holes: tuple[int, ...]


class _Sparse:
    """A stream that keeps what is written and where; torch seeks over tensors without data."""

    def __init__(self) -> None:
        self.position, self.fixed, self.holes = 0, [], []

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
            self.holes.append(self.position)
        self.position += offset
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass


def lay_out(make: Any) -> Layout:
    """Lays out the file torch.save would write.

    Args:
        make: returns what to save; called where `torch.empty` makes tensors without data.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    stream = _Sparse()
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(make(), stream)  # type: ignore[arg-type]
    return Layout(stream.position, tuple((at, bytes(data)) for at, data in stream.fixed), tuple(stream.holes))
