"""Calls of the CUDA driver that torch does not make.

**Not yet run on a GPU**: written from the driver's documentation, tested on a fake of its library.
"""

from __future__ import annotations

import ctypes
from typing import Any

from lamina_kv.data.movers.batched_copy import BatchedCopy, find

LIBRARY = "libcuda.so.1"

_RELAXED_CAPTURE = 2
_HOST_POINTER_FOR_REGISTERED_MEMORY = 91
_PCI_ADDRESS_BYTES = 16


class Driver:
    """The driver, asked about one device.

    Args:
        ordinal: number of the device, as torch has it.

    Raises:
        OSError: if there is no driver.
    """

    def __init__(self, ordinal: int) -> None:
        self._library: Any = ctypes.CDLL(LIBRARY)
        self._ordinal = ordinal

    def relax_capture(self) -> None:
        """Say that what the calling thread does has nothing to do with graphs that another one
        captures: a capture forbids some calls to every thread, or is spoilt by them, otherwise."""
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    @property
    def shares_addresses(self) -> bool:
        """Whether kernels reach pinned memory at its address on the host. Not so under WSL.

        Raises:
            RuntimeError: if the driver does not say.
        """
        value = ctypes.c_int()
        which = ctypes.c_int(_HOST_POINTER_FOR_REGISTERED_MEMORY)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device())
        return bool(value.value)

    @property
    def pci_address(self) -> str:
        """The device's address on the bus, as ``0000:3b:00.0``.

        Raises:
            RuntimeError: if the driver does not say.
        """
        text = ctypes.create_string_buffer(_PCI_ADDRESS_BYTES)
        length = ctypes.c_int(_PCI_ADDRESS_BYTES)
        self._call("cuDeviceGetPCIBusId", text, length, self._device())
        return text.value.decode().lower()

    def batched_copy(self) -> BatchedCopy | None:
        """The function for copy engines; None in a driver that has none."""
        return find(self._library)

    def _device(self) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self._ordinal))
        return device

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"the CUDA driver answers {name} with error {code}")
