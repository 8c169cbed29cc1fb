"""Check the built site: `python docs/check_site.py site`, as `hatch run docs` does after building.

Every public name is in the reference, and the search finds what people look for. Needs no torch.
"""

import ast
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

PUBLIC_API = Path(__file__).parents[1] / "tests" / "public_api.txt"
SEARCHES = (
    "num_workers",
    "mixed precision",
    "torch.compile",
    "validation set",
    "gradient checkpointing",
    "inference",
    "glossary",
    "s3://",
    "replay",
    "out of memory",
    "tensorboard",
    "slurm",
    "kubernetes",
    # What people ask for by the name of a technique, and by the words of an error.
    "mlflow",
    "wandb",
    "early stopping",
    "several optimizers",
    "training in stages",
    "fine-tuning",
    "LoRA",
    "gradient accumulation",
    "gradient clipping",
    "confusion matrix",
    "class imbalance",
    "learning rate finder",
    "knowledge distillation",
    "transfer learning",
    "multi-GPU",
    "ONNX",
    "learning rate",
    "bf16",
    "muon",
    "schedule-free",
    "8-bit optimizers",
    "deterministic",
    "StatefulDataLoader",
    "webdataset",
    "LBFGS",
    "SAM",
    "sample weights",
    "optuna",
    "regional compile",
    "benchmarks",
    "frequently asked questions",
    "make training faster",
    "the run hangs",
    "the loss is nan",
    "CUDA out of memory",
    "Timed out waiting",
    "Expected to have finished reduction in the prior iteration",
    "stack expects each tensor to be equal size",
    "CheckpointError",
)


def public_names(listing: str) -> Iterator[str]:
    """The dotted names of tests/public_api.txt: of modules' functions, classes and values, and of their members."""
    module = owner = ""
    for line in listing.splitlines():
        if line.startswith("# "):
            module = line[2:]
        elif module and line.startswith("    "):
            member = re.match(r"\w+", line.strip())
            # The line of a constructor bears the name of its class.
            if member and member.group() != owner:
                yield f"{module}.{owner}.{member.group()}"
        elif module and line:
            owner = re.sub(r"^class ", "", line)
            owner = re.match(r"\w+", owner).group()
            yield f"{module}.{owner}"


def names_in_inventory(content: bytes) -> set[str]:
    """The names of an objects.inv, whose four lines of header are followed by compressed ones."""
    body = content.split(b"\n", 4)[4]
    return {
        line.split(" ", 1)[0]
        for line in zlib.decompress(body).decode("utf-8").splitlines()
    }


def missing_names(listing: str, inventory: bytes) -> list[str]:
    """Public names that the reference lacks."""
    found = names_in_inventory(inventory)
    return [name for name in public_names(listing) if name not in found]


def internal_entries(inventory: bytes) -> list[str]:
    """Entries of what no user reads, which docs/reference_extension.py leaves out."""
    extension = (Path(__file__).parent / "reference_extension.py").read_text(
        "utf-8"
    )
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(extension).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "INTERNAL"
    )
    return sorted(
        entry
        for entry in names_in_inventory(inventory)
        if entry.rpartition(".")[2] in names
    )


def empty_entries(page: str) -> list[str]:
    """Names of a page of the reference below which nothing stands but a signature without a type."""
    heading = r'<h\d id="([\w.]+)" class="doc doc-heading">'
    _, *parts = re.split(heading, page)
    return [
        name
        for name, part in zip(parts[::2], parts[1::2], strict=True)
        if not part.partition("</h")[2].count("<p>")
        and not re.search(r'<span class="p">:</span>', part)
        and "<td>" not in part
    ]


def missing_searches(
    index: dict, searches: tuple[str, ...] = SEARCHES
) -> list[str]:
    """Searches for which no section of the site has all words. Words are cut and trimmed as the site's own search does."""
    separator = re.compile(index["config"]["separator"])

    def words(text: str) -> set[str]:
        plain = re.sub(r"<[^>]+>", " ", text)
        trimmed = (
            re.sub(r"^\W+|\W+$", "", word)
            for word in separator.split(plain.lower())
        )
        return {word for word in trimmed if word}

    sections = [
        words(f"{section['title']} {section['text']}")
        for section in index["docs"]
    ]
    return [
        search
        for search in searches
        if not any(words(search) <= section for section in sections)
    ]


def main(site: Path) -> int:
    """Print what is missing, and return how many that are."""
    inventory = (site / "objects.inv").read_bytes()
    names = missing_names(PUBLIC_API.read_text("utf-8"), inventory)
    for name in names:
        print(
            f"{name} is public but has no entry: add `::: {name}` to a page of docs/api, and the page to mkdocs.yml."
        )
    searches = missing_searches(
        json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    )
    for search in searches:
        print(
            f"The search for {search!r} finds nothing: use these words in one section of a page."
        )
    empty = [
        name
        for page in sorted(site.glob("api/*.html"))
        for name in empty_entries(page.read_text("utf-8"))
    ]
    for name in empty:
        print(
            f"{name} has an empty entry in the reference: give it a docstring."
        )
    internal = internal_entries(inventory)
    for name in internal:
        print(
            f"{name} has an entry, and no user reads it: see INTERNAL in docs/reference_extension.py."
        )
    return len(names) + len(searches) + len(empty) + len(internal)


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
