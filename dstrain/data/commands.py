"""`dstrain shards build | index | check | cat`."""

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dstrain.data.check import check_corpus
from dstrain.data.counts import TokenCounter
from dstrain.data.index import CorpusIndex, ShardTable, read_corpus_index, write_corpus_index, write_shard_index
from dstrain.data.locate import FolderListing, locate
from dstrain.data.scan import scan_shard
from dstrain.data.shards import BadSample, Corpus
from dstrain.data.sources import read_texts, source_files
from dstrain.data.terminal import with_progress
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.data.writer import write_text_shards, write_token_shards
from dstrain.errors import EXIT_DONE, CorpusError

PROBLEMS_SHOWN = 20  # a wrong --field would fill the screen thousands of times over


def build_command(args: Namespace) -> int:
    """`dstrain shards build`: texts → text shards, or with `--tokenizer` token shards; `--valid-fraction`: two sets."""
    if args.shard_mb <= 0 or args.docs_per_block <= 0:
        raise CorpusError(f"--shard-mb {args.shard_mb} --docs-per-block {args.docs_per_block}: give sizes above 0")
    if not 0 <= args.valid_fraction < 1:
        raise CorpusError(f"--valid-fraction {args.valid_fraction} is not a share; give a number from 0 up to 1")
    files = source_files(args.sources)
    tokenizer = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    out = Path(args.out)
    if args.valid_fraction == 0:
        _build(args, files, tokenizer, out, "train", None)
    else:
        _build(args, files, tokenizer, out / "train", "train", False)
        _build(args, files, tokenizer, out / "valid", "valid", True)
    return EXIT_DONE


def _build(
    args: Namespace,
    files: list[Path],
    tokenizer: DocumentTokenizer | None,
    folder: Path,
    prefix: str,
    held_out: bool | None,
) -> None:
    """Write one set of shards: all texts, or those that the split puts on the `held_out` side."""
    texts: Iterable[str] = (
        text
        for text in read_texts(files, args.field)
        if held_out is None or is_held_out(text, args.valid_fraction, args.seed) == held_out
    )
    texts = with_progress(texts, f"{prefix} documents")
    shard_bytes = int(args.shard_mb * 2**20)
    if tokenizer is None:
        index = write_text_shards(folder, texts, prefix=prefix, shard_bytes=shard_bytes)
    else:
        index = write_token_shards(
            folder,
            tokenizer.encode_many(texts),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.digest,
            prefix=prefix,
            shard_bytes=shard_bytes,
            block_documents=args.docs_per_block,
        )
    print(f"{_sizes(index, None if tokenizer is None else int(index.shards.tokens.sum()))} → {folder}")


def is_held_out(text: str, valid_fraction: float, seed: int) -> bool:
    """Decide by the text itself, so that copies of a text are never on both sides, and adding sources moves none."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < valid_fraction * 2**64


def index_command(args: Namespace) -> int:
    """`dstrain shards index`: scan every shard of a folder anew and write all its indexes."""
    folder = Path(args.path)
    if not folder.is_dir():
        raise CorpusError(f"{args.path}: not a folder; give the folder of the shards")
    tokenizer = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    index = index_folder(folder, tokenizer)
    tokens = int(index.shards.tokens.sum()) or None
    if tokenizer is not None and not index.shards.types.any():
        TokenCounter(tokenizer, args.field).count_all(locate(str(folder)), anew=True)
        corpus = Corpus.open(str(folder), text_field=args.field, tokenizer=tokenizer, on_bad_sample="skip")
        tokens = corpus.total_tokens
        _warn_of_bad_samples(corpus)
    print(f"{_sizes(index, tokens)} indexed in {folder}")
    return EXIT_DONE


def _warn_of_bad_samples(corpus: Corpus) -> None:
    if corpus.bad_sample_count:
        print(f"{corpus.bad_sample_count:,} samples cannot be read and have no tokens, among them:", file=sys.stderr)
        print("\n".join(corpus.bad_samples), file=sys.stderr)


def index_folder(folder: Path, tokenizer: DocumentTokenizer | None) -> CorpusIndex:
    """Index every shard of a folder and the folder itself.

    Token shards are noted as made by `tokenizer`; without one, as made by what was known of the same shards. Raises
    CorpusError when there are no shards, when they are not this tokenizer's, or when the folder cannot be written.
    """
    # A damaged index.json is what this is to repair, so it is not relied on.
    names = FolderListing(folder, read_index=False).matching("*.tar")
    summaries = []
    try:
        for name in with_progress(names, "shards"):
            index = scan_shard(folder / name)
            write_shard_index(folder / name, index)
            summaries.append(index.summary)
        table = ShardTable.of(summaries)
        largest_id = int(table.max_ids.max())
        if tokenizer is not None and largest_id >= tokenizer.vocab_size:
            raise CorpusError(
                f"{folder}: holds token id {largest_id}, but {tokenizer.folder} has {tokenizer.vocab_size} tokens; "
                "give the tokenizer that made the shards"
            )
        made_by = tokenizer.digest if tokenizer is not None else _known_tokenizer(folder, table)
        corpus_index = CorpusIndex(table, made_by if table.types.any() else None)
        write_corpus_index(folder, corpus_index)
    except OSError as error:
        raise CorpusError(
            f"{folder}: the indexes cannot be written ({error}); make the folder writable, or index a copy"
        ) from error
    return corpus_index


def _known_tokenizer(folder: Path, table: ShardTable) -> str | None:
    """What an earlier index of the same shards says that their ids were made by."""
    try:
        known = read_corpus_index(folder)
    except CorpusError:
        return None
    return known.tokenizer if known is not None and known.shards.digest == table.digest else None


def check_command(args: Namespace) -> int:
    """`dstrain shards check`: verify every digest and read every sample. Raises CorpusError listing the problems."""
    report = check_corpus(args.path, args.field)
    if args.json:
        print(json.dumps(asdict(report)))
    if report.problems:
        shown, more = report.problems[:PROBLEMS_SHOWN], len(report.problems) - PROBLEMS_SHOWN
        rest = [f"and {more:,} more; --json prints all of them"] if more > 0 else []
        raise CorpusError("\n".join([f"{args.path}: {len(report.problems):,} problems", *shown, *rest]))
    if not args.json:
        tokens = "" if report.tokens is None else f", {report.tokens:,} tokens"
        print(f"{args.path}: {report.shards:,} shards, {report.documents:,} documents{tokens}: all good")
    return EXIT_DONE


def cat_command(args: Namespace) -> int:
    """`dstrain shards cat`: print the first documents, as text or as token ids."""
    corpus = Corpus.open(args.path, text_field=args.field)
    tokenizer = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    mapped_shard = lru_cache(maxsize=1)(corpus.mapped_shard)
    for shard, document in islice(_places(corpus), args.n):
        place: dict[str, object] = {"shard": corpus.shard_path(shard).name, "document": document}
        if corpus.kind == "text":
            mapped = mapped_shard(shard)
            place["key"] = mapped.keys[document]
            try:
                content: object = mapped.text(document, args.field)
            except BadSample as bad:
                raise CorpusError(f"{bad}; repair or remove the sample") from bad
        else:
            ids = corpus.shard(shard).read_document(document)
            place["tokens"] = len(ids)
            content = tokenizer.decode(ids) if tokenizer is not None else ids.tolist()
        if args.json:
            print(json.dumps({**place, "content": content}, ensure_ascii=False))
        else:
            print("── " + ", ".join(f"{name} {value}" for name, value in place.items()))
            print(content)
    return EXIT_DONE


def _places(corpus: Corpus) -> Iterator[tuple[int, int]]:
    for shard, documents in enumerate(corpus.document_counts.tolist()):
        yield from ((shard, document) for document in range(documents))


def _sizes(index: CorpusIndex, tokens: int | None) -> str:
    counted = "" if tokens is None else f", {tokens:,} tokens"
    return f"{int(index.shards.documents.sum()):,} documents{counted} in {len(index.shards):,} shards"
