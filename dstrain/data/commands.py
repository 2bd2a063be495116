"""`dstrain shards build | index | check | cat`."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from dstrain.data.check import check_corpus
from dstrain.data.index import CorpusIndex, ShardIndex, total_tokens, write_corpus_index, write_shard_index
from dstrain.data.locate import FolderListing, LocatedShard
from dstrain.data.scan import scan_shard
from dstrain.data.shards import BadSample, Corpus, OpenShard
from dstrain.data.sources import read_texts, source_files
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.data.writer import write_text_shards, write_token_shards
from dstrain.errors import EXIT_DONE, CorpusError

T = TypeVar("T")
PROBLEMS_SHOWN = 20  # a wrong --field would fill the screen thousands of times over


def build_command(args: Namespace) -> int:
    """`dstrain shards build`: texts → text shards, or with `--tokenizer` token shards; `--valid-fraction`: two sets."""
    if args.shard_mb <= 0 or args.docs_per_block <= 0:
        raise CorpusError(f"--shard-mb {args.shard_mb} --docs-per-block {args.docs_per_block}: give sizes above 0")
    if not 0 <= args.valid_fraction < 1:
        raise CorpusError(f"--valid-fraction {args.valid_fraction} is not a share; give a number from 0 up to 1")
    files = source_files(args.sources)
    encoder = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    out = Path(args.out)
    if args.valid_fraction == 0:
        _build(args, files, encoder, out, "train", None)
    else:
        _build(args, files, encoder, out / "train", "train", False)
        _build(args, files, encoder, out / "valid", "valid", True)
    return EXIT_DONE


def _build(
    args: Namespace,
    files: list[Path],
    encoder: DocumentTokenizer | None,
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
    texts = _progress(texts, f"{prefix} documents")
    shard_bytes = int(args.shard_mb * 2**20)
    if encoder is None:
        index = write_text_shards(folder, texts, prefix=prefix, shard_bytes=shard_bytes)
    else:
        index = write_token_shards(
            folder,
            encoder.encode_many(texts),
            vocab_size=encoder.vocab_size,
            tokenizer=encoder.digest,
            prefix=prefix,
            shard_bytes=shard_bytes,
            block_documents=args.docs_per_block,
        )
    print(f"{_sizes(index)} → {folder}")


def is_held_out(text: str, valid_fraction: float, seed: int) -> bool:
    """Decide by the text itself, so that copies of a text are never on both sides, and adding sources moves none."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < valid_fraction * 2**64


def index_command(args: Namespace) -> int:
    """`dstrain shards index`: scan every shard of a folder anew and write all its indexes."""
    folder = Path(args.path)
    if not folder.is_dir():
        raise CorpusError(f"{args.path}: not a folder; give the folder of the shards")
    encoder = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    index = index_folder(folder, encoder, args.field)
    print(f"{_sizes(index)} indexed in {folder}")
    return EXIT_DONE


def index_folder(folder: Path, encoder: DocumentTokenizer | None, text_field: str) -> CorpusIndex:
    """Index every shard of a folder and the folder itself. With a tokenizer, the tokens of texts are counted as well.

    Token shards are noted as made by it. Raises CorpusError when there are no shards or the folder cannot be written.
    """
    # A damaged index.json is what this is to repair, so it is not read.
    names = FolderListing(folder, read_index=False).matching("*.tar")
    summaries = []
    try:
        for name in _progress(names, "shards"):
            index = scan_shard(folder / name)
            if encoder is not None and index.summary.kind == "text":
                index = _count_tokens(folder / name, index, encoder, text_field)
            write_shard_index(folder / name, index)
            summaries.append(index.summary)
        corpus_index = CorpusIndex(tuple(summaries), encoder.digest if encoder else None)
        write_corpus_index(folder, corpus_index)
    except OSError as error:
        raise CorpusError(f"{folder}: the indexes cannot be written ({error}); make the folder writable") from error
    return corpus_index


def _count_tokens(path: Path, index: ShardIndex, encoder: DocumentTokenizer, text_field: str) -> ShardIndex:
    shard = OpenShard(LocatedShard(path, index.summary, index), text_field)

    def texts() -> Iterator[str]:
        for document in range(index.summary.documents):
            try:
                yield shard.text(document)
            except BadSample as bad:
                raise CorpusError(f"{bad}; repair or remove the sample, or index without --tokenizer") from bad

    tokens = sum(len(document) for document in encoder.encode_many(texts()))
    return replace(index, summary=replace(index.summary, tokens=tokens))


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
    encoder = load_document_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    corpus = Corpus.open(args.path, text_field=args.field)
    for shard, document in islice(_places(corpus), args.n):
        opened = corpus.shard(shard)
        place: dict[str, object] = {"shard": corpus.shard_path(shard).name, "document": document}
        if corpus.kind == "text":
            place["key"] = opened.key(document)
            try:
                content: object = opened.text(document)
            except BadSample as bad:
                raise CorpusError(f"{bad}; repair or remove the sample") from bad
        else:
            ids = corpus.document(shard, document)
            place["tokens"] = len(ids)
            content = encoder.decode(ids) if encoder is not None else ids.tolist()
        if args.json:
            print(json.dumps({**place, "content": content}, ensure_ascii=False))
        else:
            print("── " + ", ".join(f"{name} {value}" for name, value in place.items()))
            print(content)
    return EXIT_DONE


def _places(corpus: Corpus) -> Iterator[tuple[int, int]]:
    for shard, documents in enumerate(corpus.document_counts.tolist()):
        yield from ((shard, document) for document in range(documents))


def _sizes(index: CorpusIndex) -> str:
    tokens = total_tokens(index.shards)
    counted = "" if tokens is None else f", {tokens:,} tokens"
    return f"{sum(shard.documents for shard in index.shards):,} documents{counted} in {len(index.shards):,} shards"


def _progress(items: Iterable[T], what: str) -> Iterable[T]:
    """A counter on the terminal; nothing where there is none."""
    from rich.console import Console
    from rich.progress import track

    return track(
        items, what, console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal
    )
