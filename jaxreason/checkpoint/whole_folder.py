"""A folder that appears with all its files, or not at all."""

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def written_whole(directory: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A folder to write, beside `directory`; renamed to it once the block ends well, else removed.

    Args:
      num_bytes: about what will be written.
    An older folder of the name is replaced. Raises ValueError naming the path and the bytes where
    the disk has no room for them, before or while they are written.
    """
    full = f"{directory}: the disk has no room for the {num_bytes:,} bytes of weights"
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if shutil.disk_usage(partial).free < num_bytes:
            raise ValueError(full)
        yield partial
        _rename(partial, directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(full) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: pathlib.Path, directory: pathlib.Path) -> None:
    """A full directory cannot be renamed over, so the older one steps aside for an instant."""
    aside = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    partial.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)
