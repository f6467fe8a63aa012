"""What each method changes in the recipe, and what it leaves alone."""

import pytest

from sparkir.compare.controls import WeightRecord
from sparkir.compare.methods import (
    choose,
    default_names,
    find,
    methods,
    missing_rows,
    recipe_of,
    requirements,
    sparks,
)
from sparkir.distill.methods import methods as distillation_methods
from sparkir.distill.methods import published
from sparkir.errors import SparkirError
from sparkir.recipe import Distill, Recipe, changed, differences, from_values
from sparkir.spark.weighting import weightings

VALUES = {
    "name": "mine",
    "data": {"train": "a", "test": "b", "scale": 2},
    "teacher": {"model": "edsr", "weights": "t.pth"},
    "student": {"model": "edsr", "weights": "s.pth"},
    "quant": {"weight_bits": 4, "activation_bits": 4},
    "distill": {"norm": "mse", "strength": 5.0},
    "weighting": {"name": "spark-paper", "options": {"grid": 4}},
    "train": {"steps": 10},
}
RECORD = WeightRecord(mean=0.625, deviation=0.1)
UNIFORM = {"weighting.name": "uniform"}
PLAIN = {"distill": None, **UNIFORM}
CHANGES = {
    "degraded": PLAIN,
    "teacher": PLAIN,
    "float": {"quant": None, **PLAIN},
    "ptq": PLAIN,
    "qat": PLAIN,
    "truth": {"distill.target": "truth", **UNIFORM},
    "truth@20": {"distill.target": "truth", "distill.strength": 20.0, **UNIFORM},
    "kd": {"distill.norm": "l1", "distill.strength": 1.0, **UNIFORM},
    "kd-mse@1": {"distill.strength": 1.0, **UNIFORM},
    "kd-mse@20": {"distill.strength": 20.0, **UNIFORM},
    "kd-mse@100": {"distill.strength": 100.0, **UNIFORM},
    "kd-matched": {"distill.norm": "matched", "distill.strength": 1.0, **UNIFORM},
    "kd-mse@2.5": {"distill.strength": 2.5, **UNIFORM},
    "kd@20": {"distill.norm": "l1", "distill.strength": 20.0, **UNIFORM},
    "kd-matched@20": {"distill.norm": "matched", "distill.strength": 20.0, **UNIFORM},
    "constant": {"weighting.name": "constant", "weighting.options.value": 0.625},
    "random": {"weighting.name": "random", "weighting.options.grid": 4},
    "constant:spark": {
        "distill.norm": "matched",
        "distill.strength": 10.0,
        "distill.target": "both",
        "weighting.name": "constant",
    },
    "truth:spark": {
        "distill.norm": "matched",
        "distill.strength": 10.0,  # in all, whatever W is
        "distill.target": "truth",
        **UNIFORM,
    },
    "truth:spark-paper": {
        "distill.norm": "mse",
        "distill.strength": 5.0,
        "distill.target": "truth",
        "weighting.name": "constant",
    },
    "random:spark": {
        "distill.norm": "matched",
        "distill.strength": 10.0,
        "distill.target": "both",
        "weighting.name": "random",
        "weighting.options.grid": 8,
    },
    "spark": {
        "distill.norm": "matched",
        "distill.strength": 10.0,
        "distill.target": "both",
        "weighting.name": "spark",
    },
    "fitnet": {
        "distill.method": "fitnet",
        "distill.norm": "l1",
        "distill.strength": 1.0,
        **UNIFORM,
    },
    "skt": {"distill.method": "skt", "distill.strength": 0.0, **UNIFORM},
    "fixed:student_error": {"weighting.name": "fixed:student_error"},
    "confidence": {"weighting.name": "confidence"},
    "spark-paper": {},
}


@pytest.fixture
def recipe() -> Recipe:
    return from_values(VALUES, "test")


def flat(recipe: Recipe) -> dict:
    found = {}

    def walk(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    walk(recipe.model_dump(mode="json"))
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_method_changes_its_own_keys_and_no_others(recipe, name):
    before, after = flat(recipe), flat(recipe_of(find(name, recipe), recipe, RECORD))
    for key, value in CHANGES[name].items():
        assert after[key] == value, key
    allowed = {key.partition(".")[0] for key in CHANGES[name]}
    for key in before.keys() | after.keys():
        if key.partition(".")[0] not in allowed:
            assert before.get(key) == after.get(key), key


def test_every_method_is_in_the_table_above_or_a_sibling_of_one():
    families = {name.partition(":")[0] for name in CHANGES} | set(distillation_methods())
    assert {name.partition(":")[0] for name in methods()} <= families
    assert set(distillation_methods()) <= methods().keys()


@pytest.mark.parametrize("name", distillation_methods())
def test_a_published_method_is_as_published(recipe, name):
    if name != "kd":
        found = recipe_of(find(name, recipe), recipe).distill.model_dump(exclude_defaults=True)
        assert found == Distill(**published(name)).model_dump(exclude_defaults=True)


def test_a_constant_has_the_mean_and_a_random_w_the_grid_of_its_spark(recipe):
    constant = recipe_of(find("constant:spark-paper", recipe), recipe, RECORD)
    assert constant.weighting.options == {"value": 0.625}
    assert constant.distill == recipe.distill
    noise = recipe_of(find("random:spark-paper", recipe), recipe, RECORD).weighting.options
    assert noise.keys() == {"mean", "sigma", "grid"}
    assert noise["mean"] == pytest.approx(0.625, abs=0.01)
    assert noise["sigma"] > 0.1  # neighbours are averaged on the way to pixels


def test_spark_is_the_recipes_own_or_else_the_published_one(recipe):
    assert recipe_of(find("spark-paper", recipe), recipe) == recipe
    other = changed(recipe, weighting={"name": "uniform"})
    published = recipe_of(find("spark-paper", other), other)
    assert (published.distill.norm, published.distill.strength) == ("mse", 1.0)
    assert published.weighting.options == {}
    constant = recipe_of(find("constant:spark-paper", other), other, RECORD)
    assert constant.distill == published.distill


def test_a_recipe_without_distill_distills_as_published(recipe):
    plain = changed(recipe, distill=None, weighting={})
    assert recipe_of(find("truth", plain), plain).distill.strength == 1.0
    assert recipe_of(find("confidence", plain), plain).distill.target == "teacher"
    assert recipe_of(find("qat", plain), plain) == plain


def test_the_truth_has_no_features(recipe):
    features = changed(recipe, distill={"method": "skt", "strength": 0.0}, weighting={})
    truth = recipe_of(find("truth", features), features).distill
    assert (truth.method, truth.strength, truth.target) == ("kd", 1.0, "truth")
    assert recipe_of(find("confidence", features), features).distill.method == "skt"


def test_every_spark_has_its_controls(recipe):
    assert set(sparks()) == {name for name in weightings() if name.startswith("spark")}
    for name in sparks():
        controls = {f"{kind}:{name}" for kind in ("truth", "constant", "random")}
        assert {name, *controls} <= methods().keys()
    other = changed(recipe, weighting={"name": "spark"}, distill={"norm": "matched"})
    assert find("constant", recipe).name == "constant:spark-paper"
    assert find("constant", other).name == "constant:spark"
    assert missing_rows(default_names(other), other) == []
    assert missing_rows([*default_names(recipe), "spark"], recipe) == [
        *("truth:spark", "constant:spark", "random:spark")
    ]


# Choosing -------------------------------------------------------------------------------------


def names(*arguments) -> list[str]:
    return [method.name for method in choose(*arguments)]


def test_the_default_is_every_row_that_a_claim_needs(recipe):
    chosen = names(None, recipe)
    assert sorted(chosen) == sorted(default_names(recipe))
    assert missing_rows(chosen, recipe) == []
    assert {"degraded", "teacher", "float", "ptq", "qat", "truth:spark-paper", "kd"} <= set(chosen)
    assert [n for n in chosen if n.startswith("kd-mse")] == ["kd-mse@1", "kd-mse@20", "kd-mse@100"]


def test_all_is_all_and_may_be_added_to(recipe):
    assert names("all", recipe) == list(methods())
    assert set(names("all,kd-mse@5", recipe)) == {*methods(), "kd-mse@5"}


def test_rows_stand_in_the_tables_order_whatever_the_order_given(recipe):
    assert names("kd-mse@20, kd-mse@5,kd@3,kd,ptq ,truth@3,truth,qat,", recipe) == [
        *("ptq", "qat", "truth", "truth@3", "kd", "kd@3", "kd-mse@5", "kd-mse@20"),
    ]
    assert names("kd-mse@20.0,kd-mse@20", recipe) == ["kd-mse@20"]


def test_a_method_brings_along_what_it_needs(recipe):
    assert names("constant", recipe) == ["constant:spark-paper", "spark-paper"]
    fresh = changed(recipe, student={"model": "edsr"})
    assert names("ptq", fresh) == ["float", "ptq"]
    assert requirements(find("ptq", recipe), recipe) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("qta", "unknown method 'qta'; did you mean 'qat'?"),
        ("kd-mes@20", "did you mean 'kd-mse@20'?"),
        ("spark-papre", "did you mean 'spark-paper'?"),
        ("fixed:student_eror", "did you mean 'fixed:student_error'?"),
        ("kd-mse@0", "unknown method 'kd-mse@0'"),
        ("kd-mse@-1", "unknown method 'kd-mse@-1'"),
        (f"kd@{'9' * 400}", "unknown method 'kd@999"),
        ("xyzzy", "known: degraded, teacher, float, ptq, qat"),
        (",", "--methods names no method"),
    ],
)
def test_names_that_are_none(recipe, given, says):
    with pytest.raises(SparkirError, match="method") as error:
        choose(given, recipe)
    assert says in str(error.value)


def test_once_is_not_another_method(recipe):
    assert names("kd@1,kd,kd-matched@1.0,kd-mse@1,truth@1", recipe) == [
        *("truth@1", "kd", "kd-mse@1", "kd-matched")
    ]


def test_a_recipe_without_a_teacher(recipe):
    alone = changed(recipe, teacher=None, distill=None, weighting={})
    assert names("ptq,qat,float,degraded", alone) == ["degraded", "float", "ptq", "qat"]
    with pytest.raises(SparkirError, match=r"no \[teacher\], which is needed by kd, truth; add"):
        choose("qat,kd,truth", alone)


def test_a_recipe_without_quantization(recipe):
    with pytest.raises(SparkirError, match=r"add a \[quant\]"):
        choose("qat", changed(recipe, quant=None))


def test_missing_rows_are_those_of_the_spark_that_is_there(recipe):
    assert missing_rows(["qat", "kd"], recipe)[:3] == ["degraded", "teacher", "float"]
    assert "spark-paper" in missing_rows(["qat", "kd"], recipe)
    rows = [name for name in default_names(recipe) if name != "random:spark-paper"]
    assert missing_rows(rows, recipe) == ["random:spark-paper"]
    rows = [name for name in default_names(recipe) if not name.startswith("fixed:")]
    assert missing_rows(rows, recipe) == ["fixed:student_error"]
    assert missing_rows([*rows, "fixed:teacher_gap"], recipe) == []


def test_a_changed_recipe_is_checked(recipe):
    assert differences(recipe, changed(recipe, seed=3)) == ["seed: 0 -> 3"]
    with pytest.raises(SparkirError, match=r"recipe mine, changed: .*add \[distill\]"):
        changed(recipe, distill=None)


@pytest.mark.parametrize("strength", ["1000000", "0.00001", "0.12345678", "2.50", "07"])
def test_a_strength_is_what_its_name_says(recipe, strength):
    """Workers find a method by its name."""
    method = find(f"kd@{strength}", recipe)
    again = find(method.name, recipe)
    assert again.name == method.name
    for one in (method, again):
        assert recipe_of(one, recipe).distill.strength == float(strength)
    assert method.label == f"KD, {method.name.partition('@')[2]} x L1"


def test_dckd_looks_through_the_recipes_own_encoder(recipe):
    own = {"method": "dckd", "encoder": "package.module:encoder"}
    for weighted in ("dckd", "spark-paper", "fixed:student_error"):
        row = recipe_of(find(weighted, recipe), changed(recipe, distill=own))
        assert row.distill.encoder == "package.module:encoder"
    assert recipe_of(find("fakd", recipe), changed(recipe, distill=own)).distill.encoder == ""
