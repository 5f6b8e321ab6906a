"""``glowflow data``: build, list, inspect and verify data sets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from glowflow.cli.output import echo_json, human_bytes, human_count, note

__all__ = ["data"]

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_cache = click.option("--cache-dir", default=None, help="Same as data.cache_dir.")


@click.group()
def data() -> None:
    """Build, list, inspect and verify data sets."""


@data.command()
@click.argument("source")
@click.argument("out")
@click.option(
    "--tokenizer",
    default="auto",
    show_default=True,
    help="bytes, chars, words, bpe:SIZE, tokenizer.json, or the source's own.",
)
@click.option(
    "--index-only", is_flag=True, help="Leave Parquet files as they are; write a manifest and a length index."
)
@click.option(
    "--on-bad-file",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="Binary files among text.",
)
@click.option("--local", is_flag=True, help="Build in this process, without Ray.")
@_cache
@_json
@click.pass_context
def build(
    ctx: click.Context,
    source: str,
    out: str,
    tokenizer: str,
    index_only: bool,
    on_bad_file: str,
    local: bool,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Turn SOURCE (a catalogue name, text, JSONL, Parquet, or a folder of them) into shards and a manifest in OUT."""
    from glowflow.config.loader import load_config
    from glowflow.data.build import BuildOptions
    from glowflow.data.build import build as build_dataset

    overrides = [f"data.on_bad_file={on_bad_file}", *([f"data.cache_dir={cache_dir}"] if cache_dir else [])]
    config = load_config(None, overrides)
    options = BuildOptions(index_only=index_only, on_bad_file=on_bad_file)
    verbose = bool((ctx.obj or {}).get("verbose"))
    with contextlib.ExitStack() as stack:
        if not local:
            from glowflow.orchestration import cluster

            stack.enter_context(cluster.connected(config, verbose=verbose))
        advance = stack.enter_context(_progress_bar(f"building {source}"))
        manifest = build_dataset(
            source, out, tokenizer, config=config.data, options=options, use_ray=not local, progress=advance
        )
    if as_json:
        echo_json({"path": str(manifest.root), "fingerprint": manifest.fingerprint, "splits": _totals(manifest)})
        return
    skipped = manifest.source.get("skipped", [])
    for file in skipped:
        note(f"skipped {file['name']}: {file['reason']}")
    for name, total in _totals(manifest).items():
        size = human_bytes(total["text_bytes"])
        note(f"{name}: {total['documents']:,} documents, {total['tokens']:,} tokens, {size} of text")
    note(f"built {manifest.root}; next: glowflow data inspect {out}")


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Any]:
    """A bar on stderr that counts finished shards."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, tokens="")

        def advance(done: int, total: int, tokens: int) -> None:
            bar.update(task, completed=done, total=total, tokens=f"{human_count(tokens)} tokens")

        yield advance


def _totals(manifest: Any) -> dict[str, dict[str, int]]:
    return {
        name: {"documents": split.documents, "rows": split.rows, "tokens": split.tokens, "text_bytes": split.text_bytes}
        for name, split in manifest.splits.items()
    }


@data.command("list")
@_cache
@_json
def list_command(cache_dir: str | None, as_json: bool) -> None:
    """The catalogue: what there is, where it would come from, what is built."""
    from glowflow.config.loader import load_config
    from glowflow.data.inspect import list_datasets
    from glowflow.tracking.tables import table

    config = load_config(None, [f"data.cache_dir={cache_dir}"] if cache_dir else [])
    rows = list_datasets(config.data)
    if as_json:
        echo_json(rows)
        return
    cells = [
        [r["name"], "yes" if r["available"] else "no", len(r["built"]), r["tokenizer"], r["description"]] for r in rows
    ]
    click.echo(table(["name", "here", "built", "tokenizer", "what"], cells))


@data.command()
@click.argument("path")
@click.option("--samples", type=click.IntRange(min=0), default=2, show_default=True, help="Rows to show per split.")
@_json
def inspect(path: str, samples: int, as_json: bool) -> None:
    """Counts, tokenizer and some rows of a built data set."""
    from glowflow.data.inspect import inspect_dataset
    from glowflow.tracking.tables import table

    shown = inspect_dataset(path, samples)
    if as_json:
        echo_json(shown)
        return
    tokenizer = shown["tokenizer"]
    click.echo(f"{shown['name']} in {shown['path']}")
    click.echo(
        f"tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens; fingerprint {shown['fingerprint'][:16]}"
    )
    facts = ["documents", "rows", "tokens", "text_bytes", "shards"]
    click.echo(
        table(["split", *facts], [[name, *(split[f] for f in facts)] for name, split in shown["splits"].items()])
    )
    for name, rows in shown["samples"].items():
        for row in rows:
            text = row["text"][:160].replace("\n", "\\n")
            click.echo(f"\n[{name} {row['document_id']}, {row['num_tokens']:,} tokens] {text}")


@data.command()
@click.argument("path")
@_json
def verify(path: str, as_json: bool) -> int:
    """Read every byte of a built data set and compare it with the manifest."""
    from glowflow.config.errors import DataError
    from glowflow.data.inspect import verify_dataset

    report = verify_dataset(path)
    if as_json:
        echo_json(report)
        return 0 if report["ok"] else 2
    if not report["ok"]:
        raise DataError("\n".join([f"{report['name']} is damaged", *(f"  - {text}" for text in report["problems"])]))
    click.echo(f"{report['name']}: {report['shards']} shards, {human_bytes(report['bytes'])}, all as the manifest says")
    return 0
