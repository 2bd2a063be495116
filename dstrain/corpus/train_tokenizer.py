"""Train a WordPiece tokenizer and write it as a folder that Transformers loads as a fast BERT tokenizer.

The same texts give the same bytes. The trainer of the `tokenizers` library numbers the characters inside words in the
order of a hash map with a random seed, and breaks ties between equally frequent pairs by those numbers; so all
characters are numbered here, before it sees them.
"""

import json
import unicodedata
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing

from dstrain.data.sources import read_texts, source_files
from dstrain.errors import EXIT_DONE, CorpusError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 … 4
INSIDE_WORD = "##"
VOCABULARY_MULTIPLE = 64  # matrix multiplications like it
COMMON_ALPHABET = 1000  # characters that are kept whatever their share; rarer ones become [UNK], as in BERT …
COVERAGE = 0.9995  # … but for those that are needed to write this share of the text, as with thousands of Chinese ones
MINIMUM_FREQUENCY = 2
SAMPLE_BYTES = 64_000_000  # text beyond it changes a vocabulary little and costs minutes


def sampled_texts(files: Sequence[Path], field: str, sample_bytes: int = SAMPLE_BYTES) -> list[str]:
    """All texts of the files, or every k-th one where they hold more than `sample_bytes`, so that all parts count.

    `field` is the texts' key in JSON, or several with commas between them: both sides of a translation, say.
    """
    stride = max(1, -(-sum(file.stat().st_size for file in files) // sample_bytes))
    sample: list[str] = []
    position = 0
    for file in files:
        for text in chain.from_iterable(read_texts([file], one) for one in field.split(",")):
            if position % stride == 0 and text.strip():
                sample.append(text)
            position += 1
    return sample


# ---------------------------------------------------------------- training


def train_wordpiece(texts: Sequence[str], vocab_size: int, lowercase: bool = True) -> Tokenizer:
    """A WordPiece tokenizer (Schuster & Nakajima 2012; BERT's normaliser and word splitting) of `vocab_size` tokens.

    The size is rounded up to a multiple of 64 with [unused…] tokens. Raises CorpusError when the texts are empty, or
    when the vocabulary cannot hold their characters, or cannot be filled from them.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(normalizer.normalize_str(text))
    alphabet = choose_alphabet(letters, vocab_size)
    if not alphabet:
        raise CorpusError("there is no text in the sources; a tokenizer is trained on texts")
    first_tokens = [*SPECIAL_TOKENS, *sorted(alphabet)]
    first_tokens += [INSIDE_WORD + c for c in sorted(alphabet) if not _is_word_of_its_own(c)]
    if vocab_size < len(first_tokens):
        raise CorpusError(
            f"--vocab-size {vocab_size} is too small for the special tokens and the {len(alphabet)} characters of "
            f"these texts; give at least {len(first_tokens)}"
        )
    learner = Tokenizer(WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MINIMUM_FREQUENCY,
        special_tokens=first_tokens,  # numbers them in this order
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = learner.get_vocab()
    if len(learned) < vocab_size:
        raise CorpusError(
            f"--vocab-size {vocab_size} is more than these {len(texts):,} texts can fill; give at most {len(learned)}"
        )
    tokens = sorted(learned, key=learned.__getitem__)
    padded_size = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    tokens += [f"[unused{number}]" for number in range(padded_size - vocab_size)]
    return _bert_tokenizer(tokens, lowercase)


def choose_alphabet(letters: Counter[str], vocab_size: int) -> list[str]:
    """The characters that a vocabulary holds, most frequent first.

    The common ones in any case; further ones until COVERAGE is reached, or the vocabulary is full.
    """
    ordered = sorted(sorted(c for c in letters if not c.isspace()), key=lambda c: -letters[c])
    chosen: list[str] = []
    missing, room = sum(letters[c] for c in ordered), vocab_size - len(SPECIAL_TOKENS)
    uncovered = (1 - COVERAGE) * missing
    for character in ordered:
        room -= 1 if _is_word_of_its_own(character) else 2
        if len(chosen) >= COMMON_ALPHABET and (missing <= uncovered or room < 0):
            break
        chosen.append(character)
        missing -= letters[character]
    return chosen


def _is_word_of_its_own(character: str) -> bool:
    """Whether BERT's word splitting isolates the character, so that it never stands inside a word."""
    punctuation = unicodedata.category(character).startswith("P") or character in "$+<=>^`|~"
    return punctuation or "一" <= character <= "鿿" or "㐀" <= character <= "䶿"


def _bert_tokenizer(tokens: Sequence[str], lowercase: bool) -> Tokenizer:
    """The tokenizer that has exactly `tokens`, numbered in their order, and adds [CLS] and [SEP]."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=INSIDE_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizer_decoders.WordPiece(prefix=INSIDE_WORD)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


# ---------------------------------------------------------------- writing


def write_tokenizer(tokenizer: Tokenizer, folder: Path, lowercase: bool) -> None:
    """Write tokenizer.json and the files that Transformers' AutoTokenizer reads beside it."""
    vocabulary = tokenizer.get_vocab()
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": 512,
        **roles,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        lines = "".join(token + "\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
        (folder / "vocab.txt").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"--out {folder}: {error.strerror or error}; choose a folder that can be written") from error


def train_command(args: Namespace) -> int:
    """`dstrain tokenizer train SRC… --out DIR [--vocab-size 8192] [--field KEY[,KEY]] [--lowercase/--no-lowercase]`."""
    if args.kind != "wordpiece":
        raise CorpusError(f"--kind {args.kind}: only wordpiece can be trained")
    texts = sampled_texts(source_files(args.sources), args.field)
    tokenizer = train_wordpiece(texts, args.vocab_size, args.lowercase)
    write_tokenizer(tokenizer, Path(args.out), args.lowercase)
    sample = texts[:1000]
    characters = sum(map(len, sample))
    tokens = sum(len(encoding.ids) - 2 for encoding in tokenizer.encode_batch(sample))
    print(
        f"WordPiece tokenizer of {tokenizer.get_vocab_size():,} tokens from {len(texts):,} texts"
        f" ({sum(map(len, texts)) / 1e6:.1f} M characters), {'lowercase' if args.lowercase else 'cased'}\n"
        f"  {characters / max(1, tokens):.2f} characters per token\n"
        f"  → {args.out}"
    )
    return EXIT_DONE
