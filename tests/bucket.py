"""A file system like a bucket: objects are read, written, listed and deleted, and nothing else.

Its addresses are `bucket:///folder`, whose objects are the files of a folder of this machine, so
that processes share them. Unlike in a bucket, an object that is being written appears before it is
complete.
"""

import errno
import os
import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class BucketFileSystem(LocalFileSystem):
    """The files of this machine, without renames, locks and appends."""

    protocol = ("bucket",)
    cachable = False
    failures: list = []  # errors that the next writes and reads raise
    pause = 0.0  # seconds between two blocks that are written
    log: list = []  # what was done

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("bucket://").rstrip("/")

    def _do(self, action, path):
        self.log.append((action, Path(path).name))
        if self.failures:
            raise self.failures.pop(0)

    def _write(self, path, content):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for start in range(0, len(content), 200):
                file.write(content[start : start + 200])
                file.flush()
                time.sleep(self.pause)

    def put_file(self, lpath, rpath, callback=None, **options):
        self._do("write", rpath)
        self._write(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._do("write", path)
        self._write(self._strip_protocol(path), value)

    def get_file(self, rpath, lpath, callback=None, **options):
        self._do("read", rpath)
        Path(lpath).write_bytes(Path(self._strip_protocol(rpath)).read_bytes())

    def rm_file(self, path):
        self._do("delete", path)
        os.remove(self._strip_protocol(path))

    def _refuse(self, *arguments, **options):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    mv = mv_file = cp_file = link = symlink = touch = makedirs = mkdir = makedir = _refuse

    def open(self, path, mode="rb", **options):
        return super().open(path, mode, **options) if mode == "rb" else self._refuse()


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
