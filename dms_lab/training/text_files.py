"""Which files a user means by a path, and what is in them; without torch."""

import functools
import hashlib
from collections.abc import Iterable
from glob import glob
from pathlib import Path


def text_files(path: str, extensions: tuple[str, ...]) -> list[Path]:
    """The files that a path, folder (searched with its subfolders) or glob names, in order; `ValueError` if none."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.suffix in extensions and p.is_file()]
        what = f"the folder {path} with extensions {', '.join(extensions)}"
    else:
        found = [Path(p) for p in glob(str(place), recursive=True) if Path(p).is_file()]
        what = f"the glob {path}"
    if not found:
        raise ValueError(f"data.path: no file found by {what}; give a file, a folder or a glob, or set data.extensions")
    return sorted(found)


def content_hash(files: Iterable[Path]) -> str:
    """12 hex digits over what is in the files, in their order, wherever they lie."""
    digest = hashlib.sha256()
    for path in files:
        about = path.stat()
        digest.update(_digest(path, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=65536)
def _digest(path: Path, size: int, changed_ns: int) -> bytes:
    """Of a file's content, read once as long as its size and time of change are the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
