"""The boundary of the command line: whatever was raised becomes one paragraph and a status.

Status 2 is something the user can mend; 1 a fault of DiRotQ or of a library under it. The traceback
is shown on demand only, with ``--debug`` or DIROTQ_DEBUG=1.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import DirotqError
from dirotq.pipeline.disk import is_disk_full, user_name, whose
from dirotq.pipeline.wording import reworded

SHARED = Path("/dev/shm")
ELSEWHERE = "Choose a writable store with store=FOLDER or DIROTQ_STORE"
RESUME = "finished work is kept; the same command resumes"
OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|can't allocate memory|not enough memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"
)
BROKEN_GPU = re.compile(r"CUDA error|CUDA driver|cudaError|NVML|no NVIDIA driver")

REASONS = {
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, where a file is wanted",
    errno.EEXIST: "something of that name is there already",
    errno.ENOENT: "there is no such file or folder",
    errno.EIO: "the disk failed to read or write it",
    errno.ELOOP: "its links lead in a circle",
    errno.ESTALE: "the network file system lost it",
}


def explained(error: BaseException) -> tuple[str, int]:
    """Return the paragraph to print for ``error``, and the exit status."""
    if isinstance(error, DirotqError):
        return str(error), 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        if found := next((e for e in _chain(error) if isinstance(e, DirotqError)), None):
            return str(found), 2
        return reworded(error), 2
    if isinstance(error, KeyboardInterrupt):
        where = f" in {error.args[0]}" if error.args else _where(error)
        return f"interrupted{where}; finished work is kept; run the same command to resume", 2
    for explain in (_memory, _system, _home):
        if said := explain(error):
            return said, 2
    return (
        f"this is a fault of DiRotQ or of a library that it uses: {_type(error)}: "
        f"{_line(error)}{_where(error)}. Finished work is kept. Please report it in DiRotQ's "
        "issues, with the command, what it prints with --debug (or DIROTQ_DEBUG=1), and what "
        "`dirotq doctor` says"
    ), 1


def _memory(error: BaseException) -> str | None:
    """Explain memory that ran out. torch is known by its words alone: it may not be there."""
    names = {cls.__name__ for cls in type(error).__mro__}
    ran_out = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    if not ({"MemoryError", "OutOfMemoryError"} & names or ran_out):
        return None
    if "CUDA" in str(error) or "GPU" in str(error):
        return (
            f"the GPU's memory is full{_where(error)}: {_line(error)}. Close what else runs on it, "
            "give capture.vram=SIZE or a smaller capture.batch, reference.batch, validate.batch or "
            f"image, or use a larger GPU; {RESUME}"
        )
    return (
        f"the memory (RAM) of this machine is full{_where(error)}: {_line(error)}. Close other "
        f"programs, use a smaller capture.batch or a machine with more; {RESUME}"
    )


def _system(error: BaseException) -> str | None:
    """Explain what the operating system refused."""
    found = next((e for e in _chain(error) if isinstance(e, OSError)), None)
    text = " ".join(str(e) for e in _chain(error))
    where = _where(error)
    if isinstance(error, BrokenPipeError):
        return f"the program that was reading the output has ended; {RESUME}"
    if "/dev/shm" in text or "shared memory" in text:
        free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
        if is_disk_full(error) or "unable to" in text:
            return (
                f"the shared memory {SHARED} is full ({free:,} bytes free){where}: {_line(error)}. "
                f"Remove what is left there, or give it more (docker run --shm-size=8g); {RESUME}"
            )
    if is_disk_full(error):
        return (
            f"the disk is full{where}: {_line(error)}. Make room (`dirotq gc` lists what may go); "
            f"{RESUME}"
        )
    if _has(error, errno.EFBIG):
        return (
            f"a file became larger than the file size limit of this shell allows (`ulimit -f`)"
            f"{where}: {_line(error)}. Raise it with `ulimit -f unlimited`; {RESUME}"
        )
    if _has(error, errno.EMFILE):
        return (
            f"too many files are open for the limit of this shell (`ulimit -n`){where}. Raise it "
            f"with `ulimit -n 4096`; {RESUME}"
        )
    if _has(error, errno.EROFS):
        return f"{_line(error)}{where}: that place can only be read. {ELSEWHERE}"
    if found is None:
        if isinstance(error, RuntimeError) and BROKEN_GPU.search(str(error)):
            return (
                f"the GPU or its driver failed{where}: {_line(error)}. `dirotq doctor` and "
                f"nvidia-smi say what is there; device=cpu goes without; {RESUME}"
            )
        return None
    if isinstance(found, PermissionError):
        return _denied(found, where)
    if isinstance(found, FileNotFoundError) and found.filename is None and not _cwd():
        return (
            "the folder that this was started in does not exist any more: change to one that does "
            "(`cd`) and run the command again"
        )
    if error is not found:
        return None
    what = REASONS.get(found.errno or 0, found.strerror or _line(found))
    name = os.fsdecode(found.filename) if isinstance(found.filename, str | bytes) else "the system"
    return (
        f"{name}: {what}{where}. Check the path, or give another place (store=FOLDER, "
        f"DIROTQ_STORE, DIROTQ_CACHE, HF_HOME, --out); {RESUME}"
    )


def _home(error: BaseException) -> str | None:
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return (
            "the home folder of this user can't be told: HOME is not set and there is no entry in "
            "the password file. Set HOME to a folder, or give full paths and set DIROTQ_CACHE and "
            "HF_HOME"
        )
    return None


def _denied(error: PermissionError, where: str) -> str:
    """Name the path, whose it is, who may what, and what to do."""
    if error.filename is None:
        return f"permission denied{where}: {_line(error)}. {ELSEWHERE}"
    path = Path(os.fsdecode(error.filename))
    about = ""
    for place in (path, *path.absolute().parents):
        with suppress(OSError, ValueError):
            owned, mode = whose(place, path)
            about = f" ({owned}, mode {stat.filemode(mode)})"
            break
    return (
        f"permission denied for {path}{about}{where}: this process runs as "
        f"{user_name(os.geteuid())}. Let that user read and write there (chmod, chown), or choose "
        "a writable store with store=FOLDER or DIROTQ_STORE"
    )


def _cwd() -> bool:
    with suppress(OSError):
        Path.cwd()
        return True
    return False


def _has(error: BaseException, code: int) -> bool:
    """Tell whether the system's error ``code`` is the cause, as a number or text (safetensors)."""
    return any(
        (isinstance(e, OSError) and e.errno == code) or f"os error {code})" in str(e)
        for e in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _where(error: BaseException) -> str:
    """Name the stage, which pipeline/dag.py notes."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in stage ")]
    return f" ({notes[0]})" if notes else ""


def _type(error: BaseException) -> str:
    cls = type(error)
    plain = cls.__module__ in ("builtins", "__main__")
    return cls.__name__ if plain else f"{cls.__module__}.{cls.__qualname__}"


def _line(error: BaseException) -> str:
    """Return the first line of what it says, without torch's page on its allocator."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no word of explanation"
    return text.rstrip(".") if len(text) <= 300 else f"{text[:300]} ..."
