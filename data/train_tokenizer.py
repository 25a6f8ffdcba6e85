"""Train the embedded model's tokenizer on the pre-training corpus.

    python data/train_tokenizer.py --corpus build/corpus --output models/tiny-moe

Byte-level BPE in Hugging Face layout (`tokenizer.json`, `tokenizer_config.json`,
`special_tokens_map.json`), with DeepSeek-V2's special tokens and chat format.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
DOMAIN_BYTES = 3_000_000  # of each domain, so that no domain owns the vocabulary
QUOTING = ("chats", "repetition")
SPECIAL_TOKENS = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Contractions, words with one leading character, single digits, punctuation, line ends, and runs
# of spaces that leave the last one to the next word (as indentation needs).
PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def balanced_texts(corpus: Path) -> Iterator[str]:
    """Yield documents of every training file in turn, DOMAIN_BYTES of each.

    Domains made of the others' text are left out.
    """
    for path in sorted(corpus.glob("*.jsonl")):
        if path.name.endswith(".valid.jsonl") or path.stem in QUOTING:
            continue
        size = 0
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                yield text
                size += len(text.encode())
                if size >= DOMAIN_BYTES:
                    break


def train(texts: Iterator[str]) -> Tokenizer:
    """Train the byte-level BPE; the special tokens take ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model's tokenizer.")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--output", type=Path, default=Path("models/tiny-moe"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train(balanced_texts(arguments.corpus)).save(str(arguments.output / "tokenizer.json"))
    write_json(arguments.output / "special_tokens_map.json", dict(SPECIAL_TOKENS))
    write_json(
        arguments.output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **SPECIAL_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


if __name__ == "__main__":
    main()
