"""Every recipe that is shipped is valid, says what it needs, and can be planned at the number of ranks it declares."""

import re
from pathlib import Path

import pytest

from dstrain.plan.text import make_plan, plan_text
from dstrain.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PRETRAIN = ("bert-base", "bert-large", "bert-small", "modernbert-base", "quickstart", "roberta-base")
DEBUG = ("tiny-bert", "tiny-bert-pairs", "tiny-modernbert", "tiny-modernbert-phases", "tiny-roberta")
FINETUNE = (
    *("docstring-package", "docstring-package-scratch", "sentiment", "banking77", "mr", "imdb"),
    *("banking77-scope", "banking77-answers", "chinese-sections", "wnut17", "weibo_ner", "squad"),
    *("cranfield", "cranfield-rerank", "recommendation"),
    *("multi30k-en-de", "libreoffice-en-zh", "scitldr", "scitldr-sentences"),
)
SHIPPED = [
    *(f"pretrain/{name}" for name in PRETRAIN),
    *(f"debug/{name}" for name in DEBUG),
    *(f"finetune/{name}" for name in FINETUNE),
]


def test_the_list_above_is_complete() -> None:
    found = {str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert found == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_valid_and_plans_at_its_declared_world_size(name: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    header = path.read_text(encoding="utf-8").split("\nname:")[0]
    declared = re.search(r"^# world: (\d+)$", header, flags=re.MULTILINE)
    assert declared, "the header says for how many ranks, as in `# world: 8`"
    for heading in ("command:", "hardware:", "expected:"):
        assert f"# {heading}" in header
    assert f"dstrain run recipes/{name}.yaml" in header
    loaded = load_recipe(path, check_files=False)
    if loaded.recipe.model.pretrained is not None:  # what another recipe trains; its shape is enough to plan
        (tmp_path / "config.json").write_text("{}")
        loaded = load_recipe(path, [f"model.pretrained={tmp_path}"], check_files=False)
    text = plan_text(make_plan(loaded.recipe, int(declared.group(1)), None))
    assert text.startswith(f"{loaded.recipe.name}: {loaded.recipe.task}")
