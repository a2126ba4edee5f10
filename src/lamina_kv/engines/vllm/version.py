"""Which versions of vLLM are served. vLLM is not imported here."""

from __future__ import annotations

SUPPORTED = ("0.32", "0.33")
"""Versions of vLLM, by their first two numbers."""

REQUIREMENT = ">=0.32,<0.34"
"""The same for pip."""


class UnsupportedVersion(RuntimeError):
    """This version of vLLM is not one that Lamina knows.

    Args:
        version: of vLLM.
    """

    def __init__(self, version: str) -> None:
        super().__init__(
            f"LaminaConnector serves vLLM {served()}, and this is vLLM {version}: its connector "
            f"interface changes with every version. pip install 'vllm{REQUIREMENT}', or a version "
            "of lamina-kv that is made for this one, or serve without --kv-transfer-config"
        )


def served() -> str:
    """The supported versions, for a sentence."""
    return " or ".join(f"{version}.x" for version in SUPPORTED)


def is_supported(version: str) -> bool:
    """Whether Lamina serves that version of vLLM.

    Args:
        version: as ``vllm.__version__`` has it, such as ``0.33.0+cpu``.
    """
    return ".".join(version.split(".")[:2]) in SUPPORTED


def check_version(version: str) -> None:
    """Refuse a version of vLLM that is not served.

    Args:
        version: as :func:`is_supported` says.

    Raises:
        UnsupportedVersion: says which are, and what to install.
    """
    if not is_supported(version):
        raise UnsupportedVersion(version)
