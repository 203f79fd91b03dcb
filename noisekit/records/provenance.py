"""What a run was made with: software and machine."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("noisekit", "torch", "numpy", "scipy", "pyarrow", "pandas", "pyhessian")


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of what decides numbers, without imports."""
    result = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result


def host_facts() -> dict[str, str]:
    """Return what of this machine decides bits and speed."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": str(os.cpu_count()),
    }


def now() -> str:
    """Return the time in UTC, as ISO 8601 text to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"
