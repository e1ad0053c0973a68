"""What a run was made with, and whether this machine can make one: versions, devices, and the checks of `doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from bayesnet import storage
from bayesnet.engine import available_devices
from bayesnet.errors import BayesnetError, ConfigError, DeviceError, StorageError
from bayesnet.rundir import RUNS
from bayesnet.settings import recipe_names
from bayesnet.types import JsonObject

PACKAGES = ("bayesnet", "torch", "torchvision", "pyro-ppl", "arviz", "pytorch-ignite", "safetensors", "Pillow", "numpy")
MIN_FREE_BYTES = 1_000_000_000


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results; "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment() -> JsonObject:
    """Return what a run or a benchmark was made with: versions, system, devices, threads. No environment variables."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "devices": {name: _device_description(name) for name in available_devices()},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def doctor() -> JsonObject:
    """Check this machine and return the environment with a list of checks, each with what to do where it fails."""
    free = shutil.disk_usage(Path.cwd()).free
    found = versions()
    missing = [name for name, version in found.items() if version == "not installed"]
    checks = [
        _check(
            ConfigError, "packages", not missing, ", ".join(missing) or "all installed", "install bayesnet with pip"
        ),
        _check(ConfigError, "python", sys.version_info >= (3, 11), found["python"], "use Python 3.11 or newer"),
        _check(ConfigError, "recipes", bool(recipe_names()), f"{len(recipe_names())} found", "reinstall bayesnet"),
        _check(DeviceError, "arithmetic", *_arithmetic_works()),
        _check(StorageError, "disk", free >= MIN_FREE_BYTES, f"{free / 1e9:.1f} GB free here", "free some space"),
        _check(StorageError, "runs", *_runs_are_writable()),
    ]
    return {**environment(), "checks": checks, "ok": all(check["ok"] for check in checks)}


def _check(error: type[BayesnetError], name: str, ok: bool, found: str, advice: str) -> JsonObject:
    """Return a check's row; ``exit_code`` is that of the error which training here would end in."""
    return {"name": name, "ok": ok, "found": found, "advice": "" if ok else advice, "exit_code": error.exit_code}


def _device_description(name: str) -> str:
    if name.startswith("cuda"):
        return str(torch.cuda.get_device_name(name))
    return platform.processor() or platform.machine() if name == "cpu" else name


def _arithmetic_works() -> tuple[bool, str, str]:
    """Run a matrix product on each device."""
    for name in available_devices():
        try:
            ones = torch.ones(8, 8, device=name)
            if float((ones @ ones).sum()) != 512.0:
                return False, f"wrong product on {name}", "reinstall torch for this machine"
        except RuntimeError as error:
            return False, f"{name}: {str(error).splitlines()[0]}", "reinstall torch for this machine"
    return True, f"right on {', '.join(available_devices())}", ""


def _runs_are_writable() -> tuple[bool, str, str]:
    """Write and remove a file where runs go."""
    folder = next(path for path in (RUNS, Path()) if path.is_dir())
    probe = folder / f".doctor-{os.getpid()}"
    try:
        storage.write_bytes(probe, b"")
        probe.unlink()
    except (BayesnetError, OSError) as error:
        return False, str(error), "change to a directory that you may write to"
    return True, f"can write to {folder.resolve()}", ""
