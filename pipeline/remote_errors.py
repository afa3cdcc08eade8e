"""What a remote place answers, in words: what passes by itself, and what a person has to mend.

Libraries of storage services have error types of their own; their names and words are all that is
known of them here, as none of them has to be installed.
"""

import errno
import re
from collections.abc import Iterator

from fsspec.registry import known_implementations

from dirotq.errors import ArtifactError
from dirotq.pipeline.disk import is_disk_full

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Protocols, and the extras of this package that install what they need."""
LASTING = (
    AttributeError, FileExistsError, ImportError, IsADirectoryError, NotADirectoryError,
    NotImplementedError, PermissionError, TypeError, ValueError,
)  # fmt: skip
LASTING_CODES = (errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EROFS)
_NO_CREDENTIALS = re.compile(r"Credentials|ProfileNotFound|TokenRetrieval|SSOToken|RefreshError")
_NO_BUCKET = re.compile(r"NoSuchBucket|(?:bucket|container)\W.*not (?:exist|found)", re.IGNORECASE)


def lasting(error: Exception) -> bool:
    """Tell whether the same request would fail again; all else is tried again a few times."""
    if isinstance(error, LASTING) or is_disk_full(error) or _unknown(error) or no_bucket(error):
        return True
    return isinstance(error, OSError) and error.errno in LASTING_CODES


def no_bucket(error: BaseException) -> bool:
    """Tell whether the bucket itself is missing, and not an object in it."""
    return any(_NO_BUCKET.search(f"{type(e).__name__} {e}") for e in _chain(error))


def explained(error: Exception, does: str, where: str, tries: int) -> ArtifactError:
    """Return what tells a user why the URL ``where`` could not be read or written.

    does   read, written, removed
    tries  how often it was tried
    """
    host = "/".join(where.split("/")[:3])
    if _unknown(error):
        what = (
            f"{where}: no credentials for {host}. S3's are the environment variables "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of ~/.aws (AWS_PROFILE); a "
            "server of your own is AWS_ENDPOINT_URL. Other protocols' go into environment "
            "variables FSSPEC_<PROTOCOL>_<OPTION>"
        )
    elif no_bucket(error):
        what = f"{where}: there is no bucket {host}. Create it, or correct the URL"
    elif isinstance(error, PermissionError):
        what = (
            f"{where} may not be {does}: {_line(error)}. The credentials in use (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID, ...) do not allow it, or are wrong; for an object that is not "
            "there, a bucket that may not be listed answers the same"
        )
    elif is_disk_full(error):
        what = f"{where} could not be {does}: the disk there is full. Make room there"
    elif isinstance(error, NotImplementedError):
        what = f"{where} can't be {does}: fsspec has no way to do that with this protocol"
    else:
        often = f" after {tries} attempts" if tries > 1 else ""
        what = (
            f"{where} could not be {does}{often}: {_line(error)}. Check the network and the server "
            "(its address, AWS_ENDPOINT_URL for S3); the same command goes on where this one ended"
        )
    return ArtifactError(what)


def unopened(error: Exception, url: str) -> ArtifactError:
    """Return what to raise for a URL that fsspec can't open at all."""
    protocol = url.partition("://")[0].rpartition("::")[2]
    if isinstance(error, ImportError):
        package = known_implementations.get(protocol, {}).get("err", _line(error))
        extra = EXTRAS.get(protocol)
        how = f"pip install 'dirotq[{extra}]'" if extra else str(package)
        return ArtifactError(f"{url}: {protocol}:// needs a package that is not here: {how}")
    if protocol not in known_implementations:
        return ArtifactError(
            f"{url}: fsspec knows no protocol {protocol}://. Known are file:///FOLDER, "
            "s3://BUCKET/PREFIX (pip install 'dirotq[s3]'), gs://BUCKET/PREFIX (gcsfs), "
            "abfs://CONTAINER/PREFIX (adlfs) and others"
        )
    return ArtifactError(f"{url} can't be opened: {_line(error)}")


def _unknown(error: BaseException) -> bool:
    """Tell whether nobody knows who asks."""
    return any(_NO_CREDENTIALS.search(type(e).__name__) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    """Return the first line of what it says, without passwords in URLs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"://[^/\s@]*@", "://", lines[0] if lines else "")
    return f"{type(error).__name__}: {text.rstrip('.'):.300}" if text else type(error).__name__
