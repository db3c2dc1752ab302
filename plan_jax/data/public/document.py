"""The page of public datasets, docs/datasets.md, which is made from the builders' own facts."""

from collections.abc import Sequence

from plan_jax.data.public.facts import BY_HASH, Facts

_INTRODUCTION = """# Public datasets

<!-- Made by `plan-jax-prepare --document > docs/datasets.md`; edit the facts of the builders. -->

Every dataset is prepared by one command from the folder that it was downloaded to:

```sh
plan-jax-prepare NAME --source DIR --check    # reads all but the images, and prints a summary
plan-jax-prepare NAME --source DIR            # --data_dir data, --size 256, --split RULE, ...
```

or on first use, with `--config.data.name=NAME --config.data.source=DIR`.
[data.md](data.md#public-datasets) says what is stored. Every dataset also has the split rule
`hash`: a hash of the patient decides, whatever lists there are. A dataset "by image" does not tell
patients apart, so a patient may be in two splits.

"""


def describe_datasets(all_facts: Sequence[Facts]) -> str:
    """Returns the page: a table of all datasets, then one section for each."""
    head = "| name | dataset | provides | splits | licence |\n|---|---|---|---|---|\n"
    rows = "".join(f"{_describe_row(facts)}\n" for facts in all_facts)
    sections = "\n".join(_describe_section(facts) for facts in all_facts)
    return f"{_INTRODUCTION}{head}{rows}\n{sections}"


def _describe_row(facts: Facts) -> str:
    splits = f"{facts.default_split}, by {'image' if facts.is_split_by_image else 'patient'}"
    cells = (
        f"[`{facts.name}`](#{facts.name})",
        f"{facts.title}: {facts.content}",
        ", ".join(facts.provides),
        splits,
        facts.licence,
    )
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _describe_section(facts: Facts) -> str:
    """Returns the facts of one dataset."""
    counts = ", ".join(f"{count:,} {name}" for name, count in facts.counts.items())
    lines = [
        f"## {facts.name}",
        "",
        f"{facts.title}: {facts.content}. {facts.citation}. From {facts.page}; {facts.licence}.",
        "",
        f"- **Files.** {_close(facts.files)}",
        f"- **Patients.** {_close(_capitalise(facts.patients))}",
        *(f"- **Published counts.** {counts}." for _ in range(bool(counts))),
    ]
    for rule, meaning in facts.splits.items():
        default = " (default)" if rule == facts.default_split else ""
        lines.append(f"- **Split `{rule}`**{default}. {_close(_capitalise(meaning))}")
        if rule in facts.leaks:
            lines.append(f"  **Leak.** {_close(_capitalise(facts.leaks[rule]))}")
    if BY_HASH in facts.leaks:
        lines.append(f"- **Split `{BY_HASH}`.** {_close(_capitalise(facts.leaks[BY_HASH]))}")
    lines += [f"- **Known fault.** {_close(_capitalise(defect))}" for defect in facts.defects]
    return "\n".join(lines) + "\n"


def _capitalise(text: str) -> str:
    """Returns a text with a capital, unless it begins with the name of a file."""
    is_word = text.partition(" ")[0].rstrip(",.;:").isalpha()
    return text[:1].upper() + text[1:] if is_word else text


def _close(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
