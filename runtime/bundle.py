"""The bundle on the device: loaded once, every byte checked, nothing executed (DESIGN.md 3).

A bundle is a directory or a .tar of one. `manifest.json` says what the method is; `manifest.sha256` beside it holds the
manifest's hash and the manifest holds the hash of every other file. ``python -m andon.runtime.bundle`` prints the
published JSON Schema of the manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ..calib.atomic import write_atomic
from .bundlefiles import COPY_AGAIN, MAX_FILE_BYTES, MAX_FILES, MAX_TOTAL_BYTES, inside
from .errors import BundleError, ConfigError, ProductError, quoted
from .manifest import Manifest, State, Table, Threshold, Variant
from .modelid import former_ids, model_id
from .tempfolder import TemporaryFolder
from .unpack import unpack
from .wiring import check

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
#: What a folder of `andon train` has, and a bundle has not
CHECKPOINT = "provenance.json"
MAX_MANIFEST_BYTES = 16 << 20
_CHUNK = 1 << 20


class Bundle:
    """A loaded, checked bundle. A context manager: a bundle that came from a .tar is unpacked until it closes.

    Attributes:
        path: what was loaded (directory or .tar).
        root: directory the files are in.
        manifest: the validated manifest.
        id: first 12 hex digits of the manifest's SHA-256; what verdicts carry.
        model_id: what the manifest says but thresholds; equal before and after `andon calibrate`, and for every Andon.
        former_ids: what earlier versions of Andon took for it: state that they wrote is this bundle's.
    """

    def __init__(self, path: Path, root: Path, manifest: Manifest, digest: str, unpacked: Any = None):
        self.path = path
        self.root = root
        self.manifest = manifest
        self.id = digest[:12]
        self.model_id = model_id(manifest)
        self.former_ids = former_ids(manifest)
        self._unpacked = unpacked

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Load a bundle and check every file's SHA-256 and the program's wiring.

        Raises:
            BundleError: it is missing, tampered with, incomplete, of another schema, or leaves its directory.
        """
        path = Path(path)
        if path.is_file():
            unpacked = TemporaryFolder("bundle")
            try:
                return cls._load(path, unpack(path, Path(unpacked.name)), unpacked)
            except BaseException:
                unpacked.cleanup()
                raise
        if not path.is_dir():
            raise BundleError(
                f"there is no bundle at {path}",
                found="nothing",
                expected="a bundle directory or .tar",
                next_step="andon export --method METHOD",
            )
        return cls._load(path, path, None)

    @classmethod
    def _load(cls, path: Path, root: Path, unpacked: TemporaryFolder | None) -> Bundle:
        with _locked(root, fcntl.LOCK_SH):
            manifest, digest = _signed_manifest(root)
        _check_files(root, manifest)
        check(manifest)
        return cls(path, root, manifest, digest, unpacked)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the unpacked copy of a .tar; nothing to do for a directory."""
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    def stage_path(self, stage: str, variant: Variant) -> Path:
        """Path of a stage's ONNX file.

        Raises:
            ConfigError: the bundle does not have this precision variant.
        """
        if variant not in self.manifest.variants:
            raise ConfigError(
                f"the bundle has no {variant} variant",
                found=variant,
                expected=", ".join(self.manifest.variants),
                next_step=f"andon export --method {self.manifest.method} --{variant}",
            )
        return inside(self.root, self.manifest.stages[stage].files[variant])

    def array(self, entry: State | Table) -> NDArray[Any]:
        """Read one state tensor or table; its shape and dtype are as the manifest says.

        Raises:
            BundleError: the npz lacks it, or it has another shape or type.
        """
        arrays = read_npz(inside(self.root, entry.file), (entry.key,), limit=entry.size * 8 + 4096)
        array = arrays[entry.key]
        if array.shape != entry.shape or array.dtype.name != entry.dtype:
            raise BundleError(
                f"{entry.file}: array {entry.key} is not what the manifest says",
                found=f"{array.dtype.name}{list(array.shape)}",
                expected=f"{entry.dtype}{list(entry.shape)}",
                next_step=COPY_AGAIN,
            )
        return array

    def class_index(self, product: str) -> int:
        """Index of a product on every class-bound axis.

        Raises:
            ProductError: the bundle does not know the product.
        """
        try:
            return self.manifest.classes.index(product)
        except ValueError:
            raise ProductError(
                f"unknown product {product!r}",
                found=product,
                expected=", ".join(self.manifest.classes),
                next_step="give one of these products, or train on images of the new one",
            ) from None

    def threshold(self, product: str, program: str = "default", camera: str | None = None) -> Threshold | None:
        """The calibrated threshold of a product under a program, or None before `andon calibrate`: the camera's own
        before that of all cameras."""
        own = self.own_threshold(product, program, camera)
        return self.manifest.thresholds.get(product, {}).get(program) if own is None else own

    def own_threshold(self, product: str, program: str, camera: str | None) -> Threshold | None:
        """The threshold that was calibrated for one camera alone."""
        own = self.manifest.camera_thresholds.get(camera) if camera is not None else None
        return None if own is None else own.get(product, {}).get(program)

    def require_folder(self, command: str) -> None:
        """Refuse a bundle that cannot be changed, before any work is done for the change.

        Args:
            command: what wants to change it; the message says how to run it on the folder.

        Raises:
            BundleError: the bundle is a .tar.
        """
        if self._unpacked is None:
            return
        # The tar holds the bundle in one folder of that name, or bare: then it needs a folder first.
        bare = self.root == Path(self._unpacked.name)
        folder = self.path.parent / (self.path.name.removesuffix(".tar") + "-unpacked" if bare else self.root.name)
        tar, target, beside = (quoted(path) for path in (self.path, folder, folder.parent))
        unpack = f"mkdir {target} && tar -xf {tar} -C {target}" if bare else f"tar -xf {tar} -C {beside}"
        raise BundleError(
            f"{self.path} is packed and cannot be changed",
            found="a .tar",
            expected="a bundle directory",
            next_step=f"{command} --bundle {target}" if folder.is_dir() else f"{unpack} && {command} --bundle {target}",
        )

    def save_thresholds(self, thresholds: Mapping[str, Mapping[str, Threshold]], camera: str | None = None) -> Bundle:
        """Write thresholds (product -> program -> threshold) into the bundle, merged with those it has now: of all
        cameras, or of one.

        Atomic: after a crash the bundle holds either the old or the new thresholds. Several processes may do it at
        once: they wait for each other, and each merges into what the one before has written.

        Raises:
            BundleError: the bundle is a .tar, a product or program is unknown, or the folder has come to hold another
                model since this bundle was loaded; nothing is written.
        """
        self.require_folder("andon calibrate")

        def change(present: Manifest) -> Manifest:
            merged = {product: dict(entries) for product, entries in present.thresholds.items()}
            own = {name: {p: dict(e) for p, e in each.items()} for name, each in present.camera_thresholds.items()}
            into = merged if camera is None else own.setdefault(camera, {})
            for product, entries in thresholds.items():
                into.setdefault(product, {}).update(entries)
            return present.model_copy(update={"thresholds": merged, "camera_thresholds": own})

        return self._save(change)

    def forget_camera(self, camera: str) -> Bundle:
        """Take the thresholds of one camera out of the bundle: those of all cameras hold there again.

        Raises:
            BundleError: as :meth:`save_thresholds`.
            ConfigError: the camera has none.
        """
        self.require_folder(f"andon calibrate --forget-camera {quoted(camera)}")

        def change(present: Manifest) -> Manifest:
            require_own_thresholds(present, camera)
            kept = {name: each for name, each in present.camera_thresholds.items() if name != camera}
            return present.model_copy(update={"camera_thresholds": kept})

        return self._save(change)

    def _save(self, change: Callable[[Manifest], Manifest]) -> Bundle:
        """Change the manifest's thresholds as they are now."""
        with _locked(self.root, fcntl.LOCK_EX):
            present = _signed_manifest(self.root)[0]
            if (model := model_id(present)) != self.model_id:
                raise BundleError(
                    f"{self.path} was replaced by another model in the meantime",
                    found=f"model {model}",
                    expected=f"model {self.model_id}, which the thresholds are for",
                    next_step=f"andon calibrate --bundle {quoted(self.path)} again, with the data set of the new model",
                )
            manifest = change(present)
            check(manifest)
            return Bundle(self.path, self.root, manifest, write_manifest(self.root, manifest))


def require_own_thresholds(manifest: Manifest, camera: str) -> None:
    """Refuse a camera for which nothing was calibrated, as one of another name.

    Raises:
        ConfigError: the bundle has no thresholds of that camera.
    """
    if camera not in manifest.camera_thresholds:
        raise ConfigError(
            f"the bundle has no thresholds of camera {camera}",
            found=camera,
            expected=", ".join(manifest.camera_thresholds) or "none has any: those of the product hold at all cameras",
            next_step=f"name one of these, or calibrate it: andon calibrate --camera {quoted(camera)}",
        )


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Validate manifest bytes.

    Raises:
        BundleError: listing the fields that are wrong.
    """
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()[:5]]
        raise BundleError(
            f"{where} is not a valid manifest",
            found="; ".join(problems),
            expected="schema andon.bundle/1 (configs/schema/bundle.json)",
            next_step="export the bundle again with this version of Andon",
        ) from error


def write_manifest(root: Path, manifest: Manifest) -> str:
    """Write manifest.json and manifest.sha256 and return the SHA-256.

    The digest file lists old and new hash while the manifest is being replaced, so a crash at any point leaves a
    bundle that loads.
    """
    raw = (manifest.model_dump_json(by_alias=True, indent=1) + "\n").encode()
    digest = hashlib.sha256(raw).hexdigest()
    previous = (root / DIGEST).read_bytes() if (root / DIGEST).is_file() else b""
    write_atomic(root / DIGEST, previous + f"{digest}  {MANIFEST}\n".encode())
    write_atomic(root / MANIFEST, raw)
    write_atomic(root / DIGEST, f"{digest}  {MANIFEST}\n".encode())
    return digest


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes of a file, read once."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def read_npz(path: Path, keys: tuple[str, ...] | None = None, limit: int = MAX_FILE_BYTES) -> dict[str, NDArray[Any]]:
    """Read arrays of an npz without pickle; `limit` bounds each array's unpacked size in bytes.

    Raises:
        BundleError: a key is missing, an array is larger than the limit, or the file is not an npz of plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {i.filename.removesuffix(".npy"): i.file_size for i in archive.infolist()}
        wanted = tuple(sizes) if keys is None else keys
        for key in wanted:
            if key not in sizes or sizes[key] > limit:
                raise BundleError(
                    f"{path.name} has no usable array {key!r}",
                    found=f"{sizes[key]} bytes" if key in sizes else ", ".join(sizes),
                    expected=f"at most {limit} bytes" if key in sizes else key,
                    next_step=COPY_AGAIN,
                )
        with np.load(path, allow_pickle=False) as data:
            return {key: np.ascontiguousarray(data[key]).reshape(data[key].shape) for key in wanted}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path.name} cannot be read", found=error, expected="an npz of plain arrays") from error


def schema() -> dict[str, Any]:
    """The published JSON Schema of manifest.json (configs/schema/bundle.json)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema(by_alias=True)}


@contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    """Hold the folder's lock: shared to read manifest and digest as a pair, exclusive to replace them.

    The lock is on the folder itself, so there is no lock file that a copy or a read-only bundle would have to have.
    Where it cannot be had (some network shares, a folder that may be entered but not listed) there is none.
    """
    folder: int | None = None
    try:
        with suppress(OSError):
            folder = os.open(root, os.O_RDONLY)
            fcntl.flock(folder, how)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _signed_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest, and its SHA-256, which the digest file must list; the caller holds the lock."""
    raw = _read_manifest(root)
    digest = hashlib.sha256(raw).hexdigest()
    listed = _listed_digests(root)
    if digest not in listed:
        raise BundleError(
            f"{root / MANIFEST} was changed after it was written",
            found=f"sha256 {digest}",
            expected=f"sha256 {' or '.join(listed)} ({DIGEST})",
            next_step=COPY_AGAIN,
        )
    return parse_manifest(raw, str(root / MANIFEST)), digest


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    for name in (MANIFEST, DIGEST):
        if not (root / name).is_file() or (root / name).is_symlink():
            checkpoint = (root / CHECKPOINT).is_file()
            raise BundleError(
                f"{root} is not a bundle",
                found=f"a checkpoint: {CHECKPOINT}, but no {name}" if checkpoint else f"no {name}",
                expected=f"{MANIFEST} and {DIGEST}",
                next_step="andon export --method METHOD" + (f" --checkpoint {quoted(root)}" if checkpoint else ""),
            )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is too large", found=path.stat().st_size, expected=f"<= {MAX_MANIFEST_BYTES} bytes")
    return path.read_bytes()


def _listed_digests(root: Path) -> list[str]:
    with (root / DIGEST).open(encoding="ascii", errors="replace") as stream:
        text = stream.read(4096)
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def _check_files(root: Path, manifest: Manifest) -> None:
    """Every file the manifest uses is listed; every listed file is there, whole and unchanged."""
    used = {file for stage in manifest.stages.values() for file in stage.files.values()}
    used |= {e.file for e in manifest.state.values()} | {e.file for e in manifest.tables.values()}
    for name in sorted(used | set(manifest.files)):
        inside(root, name)
    unlisted = sorted(used - set(manifest.files))
    if unlisted:
        raise BundleError("the manifest uses a file it does not list", found=unlisted[0], expected="an entry in files")
    total = sum(entry.bytes for entry in manifest.files.values())
    if total > MAX_TOTAL_BYTES or len(manifest.files) > MAX_FILES:
        raise BundleError(
            "the bundle is too large",
            found=f"{total} bytes in {len(manifest.files)} files",
            expected=f"<= {MAX_TOTAL_BYTES} bytes in <= {MAX_FILES} files",
        )
    for name, entry in manifest.files.items():
        path = inside(root, name)
        if not path.is_file():
            raise BundleError(
                f"the bundle lacks {name}", found="no such file", expected=f"{entry.bytes} bytes", next_step=COPY_AGAIN
            )
        size = path.stat().st_size
        digest = hash_file(path)[0] if size == entry.bytes else f"(of {size} bytes)"
        if digest != entry.sha256:
            raise BundleError(
                f"{name} was changed after the bundle was written",
                found=f"sha256 {digest}",
                expected=f"sha256 {entry.sha256} (of {entry.bytes} bytes)",
                next_step=COPY_AGAIN,
            )


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
