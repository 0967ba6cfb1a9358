"""Files that are whole or absent, and archives of arrays whose bytes depend on the arrays alone."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCRATCH = ".part-"
"""How the name of a file begins while it is written; one that is left behind can be deleted."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date that an archive can hold


def write_whole(path: Path, content: str | bytes, mark: str = "") -> None:
    """Write ``path`` so that it holds its old or its new content, never a part of one.

    The content is written to a scratch file beside it, flushed to disk and renamed; text is encoded
    as UTF-8. The next write replaces a scratch file that a killed process left.

    Args:
        path: the file.
        content: all of it.
        mark: part of the scratch file's name; processes that may write at once have different ones.

    Raises:
        OSError: the content cannot be written; ``path`` is unchanged.
    """
    scratch = path.with_name(f"{SCRATCH}{mark}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(scratch, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def npz_bytes(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """The bytes of a .npz archive that ``numpy.load`` reads; equal arrays give equal bytes."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)
            out.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), entry.getvalue())
    return archive.getvalue()
