"""Downloads from a server on this machine: whole, resumed, broken off, wrong; and where files are looked for."""
import dataclasses
import errno
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import huggingface_hub
from huggingface_hub import errors
import numpy as np
import pytest

from mmaudio_jax.weights import download
from mmaudio_jax.weights import files

CONTENT = np.random.RandomState(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HUB_HEADERS = (('ETag', f'"{SHA256}"'), ('X-Repo-Commit', 40 * 'a'))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as the server's `behaviour` says."""

    def do_HEAD(self):
        """The hub's client asks this first."""
        self.send_response(200)
        for name, value in (*HUB_HEADERS, ('Content-Length', str(len(CONTENT)))):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        server = self.server
        start = 0
        if server.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        server.starts.append(start)
        if server.status != 200:
            self.send_error(server.status)
            return
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(CONTENT)}')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}')
        for name, value in (*HUB_HEADERS, ('Content-Length', str(len(CONTENT) - start))):
            self.send_header(name, value)
        self.end_headers()
        end = start + server.bytes_a_connection if server.drops else len(CONTENT)
        server.drops -= 1 if server.drops else 0
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def fixture_no_hub_cache(monkeypatch):
    """What this machine downloaded before plays no role."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', '/dev/null/cache')


@pytest.fixture(name='server')
def fixture_server():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.ranges, server.drops, server.bytes_a_connection, server.status, server.starts = True, 0, 1_000_000, 200, []
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(name='entry')
def fixture_entry(server, monkeypatch):
    """The 16k VAE's file, on `server`."""
    monkeypatch.setattr(files, '_RELEASE', f'http://127.0.0.1:{server.server_address[1]}/')
    monkeypatch.setattr(download, '_PAUSE_S', 0.0)
    return dataclasses.replace(files.get('vae_16k'), md5=MD5)


def test_a_download(entry, tmp_path):
    path = download.fetch(entry, tmp_path, offline=False)
    assert path == tmp_path / 'files' / 'v1-16.pth' and path.read_bytes() == CONTENT
    assert download.find(entry, tmp_path, None) == path
    assert not list(path.parent.glob('*.part'))


@pytest.mark.parametrize('ranges, expected', [(True, [0, 1_000_000, 2_000_000]), (False, [0, 0, 0])])
def test_a_connection_that_drops_is_continued(server, entry, tmp_path, ranges, expected):
    server.ranges, server.drops = ranges, 2
    assert download.fetch(entry, tmp_path, offline=False).read_bytes() == CONTENT
    assert server.starts == expected


def test_the_next_run_continues(server, entry, tmp_path):
    partial = tmp_path / 'files' / 'v1-16.pth.part'
    partial.parent.mkdir()
    partial.write_bytes(CONTENT[:2_500_000])
    assert download.fetch(entry, tmp_path, offline=False).read_bytes() == CONTENT
    assert server.starts == [2_500_000]


@pytest.mark.parametrize('there, starts', [(CONTENT, [len(CONTENT)]), (CONTENT + b'more', [len(CONTENT) + 4, 0])])
def test_a_part_that_is_whole_or_too_long(server, entry, tmp_path, there, starts):
    partial = tmp_path / 'files' / 'v1-16.pth.part'
    partial.parent.mkdir()
    partial.write_bytes(there)
    assert download.fetch(entry, tmp_path, offline=False).read_bytes() == CONTENT
    assert server.starts == starts


def test_a_connection_that_always_drops_is_one_line_and_keeps_what_came(server, entry, tmp_path):
    server.drops, server.bytes_a_connection = 1000, 0
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'v1-16.pth.part').write_bytes(CONTENT[:700])
    with pytest.raises(ConnectionError, match='v1-16.pth: .*after 700 of 3000000 bytes, 700 bytes are there') as error:
        download.fetch(entry, tmp_path, offline=False)
    assert '\n' not in str(error.value) and f"put {entry.url} into {tmp_path / 'files'}" in str(error.value)
    assert (tmp_path / 'files' / 'v1-16.pth.part').read_bytes() == CONTENT[:700]
    assert len(server.starts) == download._ATTEMPTS


def test_wrong_content_is_removed(entry, tmp_path):
    wrong = dataclasses.replace(entry, md5='0' * 32)
    with pytest.raises(ValueError, match=f'has MD5 {MD5}, not 000.* and was removed'):
        download.fetch(wrong, tmp_path, offline=False)
    assert not list((tmp_path / 'files').glob('v1*'))


@pytest.mark.parametrize('status', [404, 403, 500])
def test_the_server_refuses(server, entry, tmp_path, status):
    server.status = status
    with pytest.raises(ConnectionError, match='v1-16.pth: the download failed'):
        download.fetch(entry, tmp_path, offline=False)
    assert len(server.starts) == (1 if status < 500 else download._ATTEMPTS)


def test_no_network(server, entry, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match='refused.*to do it by hand, put http.*v1-16.pth into'):
        download.fetch(entry, tmp_path, offline=False)


def test_offline(server, entry, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"v1-16.pth: not on this machine.*into {tmp_path / 'files'}"):
        download.fetch(entry, tmp_path, offline=True)
    assert not server.starts and not list(tmp_path.iterdir())


def test_a_full_disk(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda _: type('', (), {'free': 1_000_000}))
    with pytest.raises(OSError, match='v1-16.pth.part: no space left on the disk'):
        download.fetch(entry, tmp_path, offline=False)


@pytest.fixture(name='unprivileged')
def fixture_unprivileged(tmp_path):
    """tmp_path may not be written, and we are not root, whom no permission stops."""
    user = os.geteuid()
    tmp_path.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    tmp_path.chmod(0o755)


def test_no_permission(entry, tmp_path, unprivileged):
    with pytest.raises(PermissionError, match=f'{tmp_path}/cache: the cache folder is not writable; choose another'):
        download.fetch(entry, tmp_path / 'cache', offline=False)


def _hub_cache(root: pathlib.Path, entry: files.OfficialFile, content: bytes, name: str) -> pathlib.Path:
    """A file in the layout of the hub's cache; `name` is that of its content."""
    repo = root / f'models--{entry.repo.replace("/", "--")}'
    for folder in ('blobs', 'refs', 'snapshots/123'):
        (repo / folder).mkdir(parents=True)
    (repo / 'refs' / 'main').write_text('123')
    (repo / 'blobs' / name).write_bytes(content)
    path = repo / 'snapshots' / '123' / entry.folder / entry.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(repo / 'blobs' / name)
    return path


def test_files_are_found_where_people_keep_them(tmp_path):
    entry, vocoder, clip = (files.get(name) for name in ('vae_16k', 'bigvgan_v2_44k', 'clip_vit_h_14_378'))
    root, folder = tmp_path / 'cache', tmp_path / 'official'
    for place in ('ext_weights/v1-16.pth', 'weights/x', 'DFN5B-CLIP-ViT-H-14-384/open_clip_model.safetensors'):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_bytes(b'x')
    assert download.find(entry, root, folder) == folder / 'ext_weights' / 'v1-16.pth'
    assert download.find(clip, root, folder) == folder / 'DFN5B-CLIP-ViT-H-14-384' / 'open_clip_model.safetensors'
    assert download.find(vocoder, root, folder) is None
    path = _hub_cache(root / 'hub', vocoder, b'x', 'abc')
    assert download.find(vocoder, root, folder) == path and download.is_from_hub(path)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / 'v1-16.pth').mkdir()
    with pytest.raises(IsADirectoryError, match='v1-16.pth: is a folder'):
        download.find(files.get('vae_16k'), tmp_path, tmp_path)
    with pytest.raises(NotADirectoryError, match='nowhere: is no folder of official files; correct config.weights.folder'):
        download.find(files.get('vae_16k'), tmp_path, tmp_path / 'nowhere')


HUB = """
import pathlib, sys
from mmaudio_jax.weights import download, files
print(download.fetch(files.get(sys.argv[1]), pathlib.Path(sys.argv[2]), offline=False))
"""


@pytest.mark.parametrize('name, drops, expected', [
    ('bigvgan_v2_44k', 1, ''),
    pytest.param('bigvgan_v2_44k', 1000, 'ConnectionError: bigvgan_generator.pt: the download from the hub failed .*by hand',
                 marks=pytest.mark.slow),
    ('mmaudio_small_16k', 0, f'ValueError: mmaudio_small_16k.pth: .*has MD5 {MD5}, not'),
])
def test_the_hubs_own_client(server, tmp_path, name, drops, expected):
    """It goes on after a dropped connection; a file whose MD5 is wrong is removed from its cache."""
    server.drops, server.bytes_a_connection = drops, 0
    endpoint = {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_address[1]}'}
    result = subprocess.run([sys.executable, '-c', HUB, name, str(tmp_path)], env={**os.environ, **endpoint}, check=False,
                            capture_output=True, text=True)
    blobs = [path for path in (tmp_path / 'hub').rglob('blobs/*') if path.is_file()]
    entry = files.get(name)
    if expected:
        assert re.search(expected, result.stderr) and not blobs and download.find(entry, tmp_path, None) is None
    else:
        path = download.find(entry, tmp_path, None)
        assert result.stdout.strip() == str(path) and [blob.name for blob in blobs] == [SHA256]
        assert download.checked_md5(entry, path, tmp_path, verify=True) == MD5


@pytest.mark.parametrize('error, message', [
    (errors.LocalEntryNotFoundError('no connection\nand no cache'), 'hub failed .no connection and no cache'),
    (OSError(errno.ENOSPC, 'No space left'), 'hub: no space left on the disk'), (ConnectionError('reset'), 'reset')])
def test_the_hub_fails(tmp_path, monkeypatch, error, message):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
    with pytest.raises(OSError, match=message) as caught:
        download.fetch(files.get('bigvgan_v2_44k'), tmp_path, offline=False)
    assert '\n' not in str(caught.value)


def test_a_damaged_file_of_the_hub(tmp_path):
    entry = files.get('bigvgan_v2_44k')
    path = _hub_cache(tmp_path / 'hub', entry, b'damaged', SHA256)
    with pytest.raises(ValueError, match='bigvgan_generator.pt: has SHA-256 .* it is damaged'):
        download.checked_md5(entry, path, tmp_path, verify=True)


def test_a_wrong_md5_and_weights_of_ones_own(entry, tmp_path):
    path = tmp_path / 'v1-16.pth'
    path.write_bytes(b'mine')
    with pytest.raises(ValueError, match=f'{path}: has MD5 .*config.weights.verify'):
        download.checked_md5(entry, path, tmp_path, verify=True)
    assert download.checked_md5(entry, path, tmp_path, verify=False) == hashlib.md5(b'mine').hexdigest()


def test_an_md5_is_computed_again_only_when_the_file_changed(entry, tmp_path, monkeypatch):
    path = tmp_path / 'v1-16.pth'
    path.write_bytes(CONTENT)
    counted = []
    digest = download._digest
    monkeypatch.setattr(download, '_digest', lambda path, *rest: counted.append(path) or digest(path, *rest))
    assert [download.checked_md5(entry, path, tmp_path, True) for _ in range(3)] == [MD5] * 3 and len(counted) == 1
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match='has MD5'):
        download.checked_md5(entry, path, tmp_path, True)
    assert list(json.loads((tmp_path / 'md5.json').read_text())) == [str(path)]


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(download.fcntl, 'flock', no_lock)
    entered = False
    with download.lock(tmp_path / 'v1-16.pth'):
        entered = True
    assert entered


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv(download.VARIABLE, '/somewhere')
    assert str(download.cache_folder(None)) == '/somewhere' and str(download.cache_folder('/else')) == '/else'
    monkeypatch.delenv(download.VARIABLE)
    assert str(download.cache_folder('')) == os.path.expanduser('~/.cache/mmaudio_jax')
