"""Checkpoints that are never half-written, and exact resume.

A checkpoint is a folder `step-00001000`. It is staged under a temporary name, every file is flushed to disk, a manifest
with sizes and hashes is written last, the folder is renamed into place, and only then are old ones pruned. Losing power
or being killed at any moment leaves the previous checkpoint intact.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import SCALER_NAME

MANIFEST = "manifest.json"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)


def _commit(staging: Path, folder: Path, step: int) -> None:
    """Make a staged folder durable and give it its name."""
    files = {str(f.relative_to(staging)): {"size": f.stat().st_size, "sha256": _sha256(f)} for f in _files(staging)}
    (staging / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    for file in [*_files(staging), staging / MANIFEST, staging]:
        _flush(file)
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    _flush(folder.parent)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Save all processes' state as `folder/step-...` and keep the newest `keep` of them. Every process calls this."""
    staging = folder / f".tmp-{step:08}"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _commit(staging, folder / f"step-{step:08}", step)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).exists())


def verify(checkpoint: Path) -> int:
    """The checkpoint's step. Raises ValueError that names the first file that is not as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step = int(manifest["step"])
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(checkpoint, MANIFEST) from None
    if checkpoint.name != f"step-{step:08}":
        raise _damaged(checkpoint, MANIFEST)
    for name, (size, sha256) in files.items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != size or _sha256(file) != sha256:
            raise _damaged(checkpoint, name)
    return step


def _damaged(checkpoint: Path, name: str) -> ValueError:
    file = checkpoint / name
    return ValueError(f"checkpoint file {file} is damaged: delete {checkpoint} to resume from an older checkpoint")


def load_newest(accelerator: Accelerator, folder: Path) -> int:
    """Restore the newest checkpoint into the prepared objects and return its step; 0 if there is none.

    Raises ValueError if it is damaged, for going on from an older one is the user's decision, or of other networks or
    optimizers.
    """
    if accelerator.is_main_process:
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover)
    found = checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    step = verify(newest)
    scaler = accelerator.scaler
    if not (newest / SCALER_NAME).exists():
        accelerator.scaler = None  # the run was of another precision, which needs none
    try:
        accelerator.load_state(str(newest))
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        fault = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"checkpoint {newest} is of another network or optimizer ({fault}): give another loop.out, or the settings "
            "that it was made with"
        ) from None
    finally:
        accelerator.scaler = scaler
    return step
