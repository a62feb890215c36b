"""Official files on this machine: found, downloaded (resumed where it broke off), verified, put in place when whole."""
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any
import urllib.error
import urllib.request

from tqdm import tqdm

from mmaudio_jax import media
from mmaudio_jax.media import Path
from mmaudio_jax.weights import files

VARIABLE = 'MMAUDIO_JAX_CACHE'
_DEFAULT = '~/.cache/mmaudio_jax'
_CHUNK = 1 << 20  # bytes
_TIMEOUT_S = 30.0  # without a byte
_ATTEMPTS = 5  # in a row without a new byte
_PAUSE_S = 1.0  # before the second attempt; doubled for each further one


def cache_folder(cache: Path | None) -> pathlib.Path:
    """The cache folder: `cache`, else $MMAUDIO_JAX_CACHE, else ~/.cache/mmaudio_jax. It need not exist."""
    return pathlib.Path(cache or os.environ.get(VARIABLE) or _DEFAULT).expanduser()


def find(entry: files.OfficialFile, root: pathlib.Path, folder: Path | None) -> pathlib.Path | None:
    """The file of `entry` in `folder` (also where the official code puts it), in the cache `root`, or in the hub's own cache.

    Raises:
      OSError: `folder` is no folder, or a folder stands in the file's place.
    """
    places = [root / 'files']
    if folder:
        given = pathlib.Path(folder).expanduser()
        if not given.is_dir():
            raise NotADirectoryError(f'{given}: is no folder of official files; correct config.weights.folder')
        places = [given, given / 'weights', given / 'ext_weights', given / entry.repo.split('/')[-1], *places]
    for path in [place / name for place in places for name in (entry.file, *entry.others)]:
        if path.is_dir():
            raise IsADirectoryError(f'{path}: is a folder; the official file of that name must stand there')
        if path.exists():
            return path
    return _in_hub_cache(entry, root)


def _in_hub_cache(entry: files.OfficialFile, root: pathlib.Path) -> pathlib.Path | None:
    if not entry.repo:
        return None
    import huggingface_hub  # here: loading a cached conversion does not need it
    for folder in (root / 'hub', None):  # ours, then the one that the official code fills
        for name in (entry.file, *entry.others):
            path = huggingface_hub.try_to_load_from_cache(entry.repo, f'{entry.folder}{name}', cache_dir=folder)
            if isinstance(path, str) and pathlib.Path(path).is_file():
                return pathlib.Path(path)
    return None


def is_from_hub(path: pathlib.Path) -> bool:
    """Whether `path` stands in a hub cache."""
    return 'snapshots' in path.parts


def fetch(entry: files.OfficialFile, root: pathlib.Path, offline: bool) -> pathlib.Path:
    """Downloads the file of `entry` into the cache `root`; a download that broke off goes on where it stopped.

    Raises:
      FileNotFoundError: `offline`.
      OSError: no network, the connection broke too often, no space or no permission in `root`.
      ValueError: what came is not the official file.
    """
    place = root / 'files' / entry.file
    by_hand = f'to do it by hand, put {entry.url} into {place.parent}'
    if offline:
        raise FileNotFoundError(f'{entry.file}: not on this machine, and config.weights.offline forbids a download; {by_hand}')
    print(f'{entry.file}: downloading {entry.url} into {root}', file=sys.stderr, flush=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.repo:
            return _from_hub(entry, root, by_hand)
        with lock(place):
            if not place.is_file():  # another process may have brought it
                _from_release(entry, place, by_hand)
    except PermissionError as error:
        raise PermissionError(f'{root}: the cache folder is not writable; choose another with config.weights.cache or '
                              f'${VARIABLE}') from error
    return place


def _from_hub(entry: files.OfficialFile, root: pathlib.Path, by_hand: str) -> pathlib.Path:
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # its retries are not the user's
    try:
        found = huggingface_hub.hf_hub_download(entry.repo, f'{entry.folder}{entry.file}', cache_dir=root / 'hub')
    except PermissionError:
        raise
    except Exception as error:  # pylint: disable=broad-except; the client lets through those of whatever it is built on
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _disk_full(root / 'hub') from error
        raise ConnectionError(f'{entry.file}: the download from the hub failed ({_line(error.__cause__ or error)}); try again, '
                              f'it goes on where it stopped; {by_hand}') from error
    path = pathlib.Path(found)
    if entry.md5 and (md5 := _remembered(path, root)) != entry.md5:
        path.resolve().unlink()  # the hub's cache: the name is a link to the content
        path.unlink(missing_ok=True)
        raise _wrong(entry, md5, by_hand)
    return path


def _from_release(entry: files.OfficialFile, place: pathlib.Path, by_hand: str) -> None:
    partial = place.with_name(f'{place.name}.part')
    try:
        _download(entry.url, partial)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        size = f', {partial.stat().st_size} bytes are there' if partial.exists() else ''
        raise ConnectionError(f'{entry.file}: the download failed ({_line(error)}{size}); try again, it goes on where it '
                              f'stopped; {by_hand}') from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(partial) from error
        raise
    md5 = _digest(partial)
    if md5 != entry.md5:
        partial.unlink()
        raise _wrong(entry, md5, by_hand)
    partial.rename(place)


def _wrong(entry: files.OfficialFile, md5: str, by_hand: str) -> ValueError:
    return ValueError(f'{entry.file}: what came from {entry.url} has MD5 {md5}, not {entry.md5}, and was removed; try again; '
                      f'{by_hand}')


def _download(url: str, partial: pathlib.Path) -> None:
    """Appends what is missing of `url` to `partial`, over as many connections as that takes."""
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _connect(url, partial)
            return
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise  # the server knows what it says
            came = partial.exists() and partial.stat().st_size > before
            failures = 0 if came else failures + 1
            if failures >= _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S * 2**max(failures - 1, 0))


def _connect(url: str, partial: pathlib.Path) -> None:
    """One connection: continues `partial`, or begins anew when the server cannot continue.

    Raises:
      ConnectionError: it ended before the file did.
    """
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing follows what is there: whole, or of another file
            if error.headers.get('Content-Range') == f'bytes */{have}':
                return
            partial.unlink()
            return _connect(url, partial)
        raise
    with response:
        continued = response.status == 206 and f"{response.headers.get('Content-Range')}".startswith(f'bytes {have}-')
        have = have if continued else 0
        total = have + int(response.headers.get('Content-Length') or 0)
        bar = tqdm(total=total or None, initial=have, unit='B', unit_scale=True, desc=partial.stem, mininterval=1)
        with open(partial, 'ab' if continued else 'wb') as file, bar:
            if shutil.disk_usage(partial.parent).free < total - have:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    if have < total:
        raise ConnectionError(f'the connection ended after {have} of {total} bytes')


def checked_md5(entry: files.OfficialFile, path: pathlib.Path, root: pathlib.Path, verify: bool) -> str:
    """The MD5 of `path`, remembered in the cache `root` for as long as the file does not change.

    Raises:
      ValueError: `verify`, and it is not the published one, or a file of the hub is not the one that its name promises.
    """
    md5 = _remembered(path, root)
    if verify and entry.md5 and md5 != entry.md5:
        raise ValueError(f'{path}: has MD5 {md5}, the official file {entry.md5}: it is damaged or another one; replace it by '
                         f'{entry.url}, or set config.weights.verify to False for weights of your own')
    return md5


def _remembered(path: pathlib.Path, root: pathlib.Path) -> str:
    memory = root / 'md5.json'
    status = path.stat()
    identity = [status.st_size, status.st_mtime_ns, status.st_ino]
    try:
        known: dict[str, Any] = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    key = str(path.resolve())
    if known.get(key, {}).get('identity') == identity:
        return known[key]['md5']
    md5 = _digest(path)
    blob = path.resolve().name  # the hub's cache names large files by their SHA-256
    if re.fullmatch('[0-9a-f]{64}', blob) and (found := _digest(path, 'sha256')) != blob:
        raise ValueError(f'{path}: has SHA-256 {found}, the hub says {blob}: it is damaged; delete it and try again')
    with contextlib.suppress(OSError, media.MediaError):  # a cache that cannot be written only costs time
        root.mkdir(parents=True, exist_ok=True)
        with media.atomic_file(memory) as beside:
            beside.write_text(json.dumps({**known, key: {'identity': identity, 'md5': md5}}))
    return md5


def _digest(path: pathlib.Path, algorithm: str = 'md5') -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
    """Makes processes that want to write `path` wait for each other; without a lock where none can be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f'.{path.name}.lock'), 'w')  # pylint: disable=consider-using-with
    except OSError:  # the writer, if there is anything to write, says it better
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _disk_full(path: pathlib.Path) -> OSError:
    return OSError(f'{path}: no space left on the disk; what came is kept and the download goes on there; free some, or choose '
                   f'another folder with config.weights.cache or ${VARIABLE}')


def _line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:200]
