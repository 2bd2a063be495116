"""What the rows of a pretraining run are made of, opened: corpora, tokenizer, phases, and where each row lies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dstrain.checkpoint.data_change import changes
from dstrain.checkpoint.identity import Identity, stream_identity
from dstrain.checkpoint.manifest import Manifest
from dstrain.data.lanes import SourceLanes
from dstrain.data.layout import Layout
from dstrain.data.shards import Corpus
from dstrain.data.spec import StreamSpec
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import UserError
from dstrain.launch.prepare import open_sources
from dstrain.plan.timeline import Timeline, make_timeline
from dstrain.recipe.schema import MaskedLmRecipe


@dataclass(frozen=True)
class TrainingData:
    """The sources of a recipe, and the layout of its rows. `lanes` are those of each source, in the recipe's order."""

    recipe: MaskedLmRecipe
    tokenizer: DocumentTokenizer
    timeline: Timeline
    identity: Identity
    spec: StreamSpec
    layout: Layout
    lanes: tuple[SourceLanes, ...]

    @classmethod
    def open(cls, recipe: MaskedLmRecipe, origin: tuple[int, int] = (0, 0)) -> Self:
        """Open the data of a recipe.

        Args:
            recipe: of a run.
            origin: the data step and the row with which the run went on with this data.

        Raises:
            CorpusError: shards or tokenizer cannot be used as they are.
        """
        tokenizer = load_document_tokenizer(recipe.tokenizer)
        corpora = open_sources(recipe, tokenizer)
        timeline = make_timeline(recipe, {name: corpus.total_tokens for name, corpus in corpora.items()})
        assert timeline is not None, "all sizes are known"
        identity = stream_identity(recipe, timeline, corpora, tokenizer.digest)
        spec = StreamSpec.train(recipe, timeline, origin)
        lanes = tuple(
            SourceLanes(corpus, spec.lanes, spec.seed, spec.purpose, spec.shuffle_window) for corpus in corpora.values()
        )
        return cls(recipe, tokenizer, timeline, identity, spec, Layout(spec), lanes)

    @classmethod
    def of_run(cls, run: Path, recipe: MaskedLmRecipe, manifest: Manifest | None) -> Self:
        """Open the data of a run, as its newest checkpoint has it.

        Raises:
            CorpusError: shards or tokenizer cannot be used as they are.
            UserError: they are not what the run was trained on.
        """
        if manifest is None:
            return cls.open(recipe)
        data = cls.open(recipe, manifest.data_origin)
        base = {"base": manifest.identity["base"]} if "base" in manifest.identity else {}
        if changed := changes(manifest, data.identity | base):
            raise UserError(
                f"{run} was trained on other data than its recipe names now:\n  "
                + "\n  ".join(map(str, changed))
                + "\nput back what changed, or name the data as in data.train=PATH"
            )
        return data

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """Those of the sources, in their order."""
        return tuple(lanes.corpus for lanes in self.lanes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return self.timeline.source_names
