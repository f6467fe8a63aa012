"""What the docs take from the code is current, and every page is reached."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from helpers import call
from sparkir import recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schema_is_current(generate):
    written = (DOCS / "recipe.schema.json").read_text("utf-8")
    assert written == generate.schema_text(), "run python docs/generate.py"
    assert json.loads(call("recipes", "--schema").out) == json.loads(written)


def test_reference_is_current(generate):
    written = (DOCS / "reference" / "recipe.md").read_text("utf-8")
    assert written == generate.reference_text(), "run python docs/generate.py"


def test_scripts_in_the_page_are_those_that_run(generate):
    written = (DOCS / "integrations.md").read_text("utf-8")
    assert written == generate.with_examples(written), "run python docs/generate.py"
    assert written.count("```diff") == 6


def test_tables_of_the_reproduction_are_those_of_the_records(generate):
    written = (DOCS / "reproduction.md").read_text("utf-8")
    assert written == generate.with_records(written), "run python docs/generate.py"
    tables = re.findall("<!-- record ([a-z0-9-]+) -->", written)
    records = DOCS.parent / "records" / "reproduction"
    assert sorted(tables) == sorted(folder.parent.name for folder in records.glob("*/*.json"))


def test_every_key_of_a_recipe_says_what_it_means():
    schema = recipe.json_schema()
    for name, section in {"recipe": schema, **schema["$defs"]}.items():
        for key, value in section["properties"].items():
            known = value.get("description") or "$ref" in str(value)
            assert known, f"{name}.{key}"


def accepts(schema, value, root) -> bool:
    """As much of JSON Schema as a recipe's uses, in the slowest way."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(accepts(choice, value, root) for choice in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = kinds.get(schema.get("type"))
    if kind is not None and (not isinstance(value, kind) or (kind is int and value is True)):
        return False
    if schema.get("type") == "null":
        return value is None
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return isinstance(value, list) and all(map(lambda s, v: accepts(s, v, root), items, value))
    if schema.get("type") == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        return (
            isinstance(value, dict)
            and all(key in value for key in schema.get("required", ()))
            and (more is not False or value.keys() <= known.keys())
            and all(accepts(known[key], value[key], root) for key in value.keys() & known.keys())
        )
    return True


@pytest.mark.parametrize("name", recipe.shipped())
def test_schema_accepts_the_shipped_recipes(name):
    schema, values = recipe.json_schema(), tomllib.loads(recipe.load(name).to_toml())
    assert accepts(schema, values, schema)
    assert not accepts(schema, values | {"sede": 1}, schema)
    assert not accepts(schema, values | {"train": values["train"] | {"steps": "many"}}, schema)


def test_links_between_pages_lead_somewhere():
    for page in [*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not target.startswith(("http", "mailto")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
