"""A tokenizer and a chat template for the tiny models, so that they can be asked as users do."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from engine.models import VOCABULARY

_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|im_start|>", "<|im_end|>")


def make_spoken(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint that has a tokenizer: a token for each byte of a text, and others that
    no text is made of, so that each token of the model is one of the tokenizer.

    Args:
        model: the checkpoint.
        folder: is made.

    Returns:
        the folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(model, folder)
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIAL]
    pairs = ("".join(pair) for pair in product(ascii_lowercase, repeat=2))
    names += [next(pairs) for _ in range(VOCABULARY - len(names))]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_SPECIAL[1],
        additional_special_tokens=[_SPECIAL[0]],
        chat_template=_TEMPLATE,
    )
    whole.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = whole.eos_token_id
    (folder / "config.json").write_text(json.dumps(config))
    return folder
