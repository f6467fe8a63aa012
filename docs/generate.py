"""Writes the parts of the docs that are made from the code: python docs/generate.py

`reference/recipe.md` and `recipe.schema.json` come from the recipe's models, the scripts in
`integrations.md` from `examples/`, and the tables in `reproduction.md` from
`records/reproduction`. A test checks that all of them are current.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparkir.compare.methods import find
from sparkir.recipe import json_schema, load

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
REPRODUCTION = DOCS.parent / "records" / "reproduction"
TEST_SETS = {"lowlight_LOL_eval15": "LOLv1", "test": "PolyU"}
NOTES = ("Differences to", "Not in this table", "W of")
HEAD = """# Recipe reference

<!-- Made by docs/generate.py from the recipe's models; do not edit. -->

Every key of a recipe, from the code itself. [Recipes](../recipes.md) explains them and how they act
together. Editors that know [JSON Schema](../recipe.schema.json) complete and check a recipe as you
type; `sparkir recipes --schema` prints the schema of the version installed.

"""


def schema_text() -> str:
    """The JSON schema of a recipe."""
    return json.dumps(json_schema(), indent=1) + "\n"


def reference_text() -> str:
    """A table for each section of a recipe."""
    schema = json_schema()
    parts = [HEAD, "## Top level\n\n", _table(schema, schema)]
    for name, value in schema["properties"].items():
        section = _section(value, schema)
        if section is not None:
            parts.append(f"\n## `[{name}]`\n\n{section.get('description', '')}\n\n")
            parts.append(_table(section, schema))
    return "".join(parts)


def with_examples(page: str) -> str:
    """The page with its table, and each `<!-- example NAME -->` with its script as a whole diff."""
    table = (DOCS.parent / "records" / "integrations" / "result.md").read_text("utf-8")
    page = re.sub(
        r"(<!-- results -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n{table}\n{m[2]}",
        page,
        flags=re.DOTALL,
    )
    pattern = re.compile(r"(<!-- example (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n```diff\n{_difference(m[2])}```\n\n{m[3]}", page)


def _difference(name: str) -> str:
    before, after = (
        (EXAMPLES / f"{name}{end}.py").read_text("utf-8").splitlines(keepends=True)
        for end in ("_before", "")
    )
    whole = difflib.unified_diff(before, after, n=len(after))
    return "".join(line for index, line in enumerate(whole) if index > 2)


def with_records(page: str) -> str:
    """The page with the table of each `<!-- record NAME -->`, beside the paper's."""
    pattern = re.compile(r"(<!-- record ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n{_comparison(m[2])}\n{m[3]}", page)


def _comparison(name: str) -> str:
    """PSNR / SSIM of each row on each test set, and the difference to QAT with its interval."""
    comparison = json.loads((REPRODUCTION / name / "comparison.json").read_text("utf-8"))
    paper = tomllib.loads((REPRODUCTION / "paper.toml").read_text("utf-8")).get(name, {})
    head = [""]
    rows: dict[str, list[str]] = {}
    if paper:
        head += ["paper", "to its QAT"]
    for table in comparison["tables"]:
        head += [TEST_SETS.get(table["name"], table["name"]), "to QAT"]
        for line in table["lines"]:
            method = line["name"]
            if method not in rows:
                rows[method] = [line["label"], *_published(paper, method)]
            rows[method] += _measured(line)
    for method in paper:
        if method not in rows:
            label = find(method, load("demo")).label
            rows[method] = [label, *_published(paper, method), "not run"]
            rows[method] += [""] * (len(head) - len(rows[method]))
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows.values()]
    notes = [*comparison["tables"][0]["notes"], *comparison["notes"]]
    notes = [note for note in notes if note.startswith(NOTES)]
    rows_of_text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([*rows_of_text, "", *notes, ""])


def _published(paper: dict[str, list[float]], method: str) -> list[str]:
    if method not in paper:
        return ["", ""] if paper else []
    psnr_db, ssim = paper[method]
    to_qat = "" if method == "qat" else f"{psnr_db - paper['qat'][0]:+.2f}"
    return [f"{psnr_db:.2f} / {ssim:.3f}", to_qat]


def _measured(line: dict[str, Any]) -> list[str]:
    to_qat = ""
    if difference := line["differences"]["psnr_db"]:
        mean, low, high = difference
        to_qat = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [f"{line['psnr_db']:.3f} / {line['ssim']:.4f}", to_qat]


def _section(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    for choice in [value, *value.get("anyOf", ())]:
        if "$ref" in choice:
            found: dict[str, Any] = schema["$defs"][choice["$ref"].rpartition("/")[2]]
            return found
    return None


def _table(section: dict[str, Any], schema: dict[str, Any]) -> str:
    lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    required = section.get("required", ())
    for name, value in section["properties"].items():
        if _section(value, schema) is not None:
            continue
        default = "required" if name in required else f"`{json.dumps(value.get('default'))}`"
        meaning = " ".join(value.get("description", "").split())
        cells = (f"`{name}`", ", ".join(_types(value)), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _types(value: dict[str, Any]) -> Iterator[str]:
    """What a value may be, in a recipe's words."""
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    if "anyOf" in value:
        for choice in value["anyOf"]:
            yield from _types(choice)
    elif "enum" in value or "const" in value:
        yield from (f"`{json.dumps(one)}`" for one in value.get("enum", [value.get("const")]))
    elif value.get("type") == "array":
        inner = value.get("items") or {"anyOf": value.get("prefixItems", [{}])[:1]}
        yield f"list of {', '.join(_types(inner)) or 'values'}"
    elif value.get("type") == "object":
        yield "table"
    elif value.get("type") != "null":
        limits = [
            f"{sign} {value[key]}"
            for key, sign in (
                ("minimum", ">="),
                ("exclusiveMinimum", ">"),
                ("maximum", "<="),
                ("exclusiveMaximum", "<"),
            )
            if key in value
        ]
        kind = value.get("type", "any value")
        yield " ".join([names.get(kind, kind), *limits])


def main() -> None:
    """Write all of them."""
    (DOCS / "recipe.schema.json").write_text(schema_text(), "utf-8")
    (DOCS / "reference").mkdir(exist_ok=True)
    (DOCS / "reference" / "recipe.md").write_text(reference_text(), "utf-8")
    page = DOCS / "integrations.md"
    page.write_text(with_examples(page.read_text("utf-8")), "utf-8")
    page = DOCS / "reproduction.md"
    page.write_text(with_records(page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
