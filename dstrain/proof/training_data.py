"""What the rows of a pretraining run are made of, opened: corpora, tokenizer, phases, and where each row lies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from dstrain.checkpoint.data_change import changes, on_other_data, permitted
from dstrain.checkpoint.identity import GlobalBatches, Identity, stream_identity
from dstrain.checkpoint.manifest import Manifest, newest_manifest
from dstrain.data.lanes import SourceLanes
from dstrain.data.layout import Layout
from dstrain.data.shards import Corpus
from dstrain.data.spec import StreamSpec
from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.errors import UserError
from dstrain.plan.streams import training_stream
from dstrain.plan.timeline import Timeline, make_timeline
from dstrain.proof.data_steps import RunBatches
from dstrain.recipe.load import load_recipe
from dstrain.recipe.schema import PretrainingRecipe
from dstrain.rundir.prepare import open_sources


class OtherDataError(UserError):
    """A run was trained on other data than what its recipe names now."""


@dataclass(frozen=True)
class TrainingData:
    """The sources of a recipe, and the layout of its rows. `lanes` are those of each source, in the recipe's order."""

    recipe: PretrainingRecipe
    tokenizer: DocumentTokenizer
    timeline: Timeline
    identity: Identity
    spec: StreamSpec
    layout: Layout
    lanes: tuple[SourceLanes, ...]

    @classmethod
    def open(cls, recipe: PretrainingRecipe, origin: tuple[int, int] = (0, 0)) -> Self:
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
        spec = training_stream(recipe, timeline, origin)
        lanes = tuple(SourceLanes(corpus, spec) for corpus in corpora.values())
        return cls(recipe, tokenizer, timeline, identity, spec, Layout(spec), lanes)

    @classmethod
    def of_run(cls, run: Path, recipe: PretrainingRecipe, manifest: Manifest | None) -> Self:
        """Open the data of a run, as its newest checkpoint has it.

        Raises:
            CorpusError: shards or tokenizer cannot be used as they are.
            OtherDataError: they are not what the run was trained on.
        """
        data = cls.open(recipe)
        if manifest is None:
            return data
        base = {"base": manifest.identity["base"]} if "base" in manifest.identity else {}
        identity = data.identity | base
        manifest = on_other_data(manifest, permitted(run), identity)  # which may not have been saved yet
        if changed := changes(manifest, identity):
            raise OtherDataError(
                f"{run} was trained on other data than its recipe names now:\n  "
                + "\n  ".join(map(str, changed))
                + "\nput back what changed, or name the data as in data.train=PATH"
            )
        return data.begun_at(manifest.data_origin)

    def begun_at(self, origin: tuple[int, int]) -> Self:
        """The same data for a run that went on with it at a data step and a row."""
        spec = training_stream(self.recipe, self.timeline, origin)
        return replace(self, spec=spec, layout=Layout(spec))

    @classmethod
    def of(cls, source: str, overrides: Sequence[str]) -> tuple[Self, RunBatches]:
        """Open the data of a recipe's file or of a run's folder, and say what its global batches were or will be.

        Raises:
            UserError: there is none, its rows are of no shards, or the data cannot be opened, or is not the run's.
        """
        path = Path(source)
        is_run = path.is_dir()
        if is_run and not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is no run's folder: it has no recipe.yaml; give what `dstrain run` wrote into")
        recipe = load_recipe(path / "recipe.yaml" if is_run else source, overrides).recipe
        if not isinstance(recipe, PretrainingRecipe):
            raise UserError(
                f"{source} is of task {recipe.task}, whose rows are no parts of shards; give one of masked_lm"
            )
        data = cls.of_run(path, recipe, newest_manifest(path)) if is_run else cls.open(recipe)
        rows = GlobalBatches(data.identity, data.origin)
        return data, RunBatches(path if is_run else None, rows, recipe, data.timeline.total_steps)

    @property
    def origin(self) -> tuple[int, int]:
        """The data step and the row with which the run went on with this data."""
        return self.spec.first_step, self.spec.first_row

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """Those of the sources, in their order."""
        return tuple(lanes.corpus for lanes in self.lanes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return self.timeline.source_names
