"""``glowflow data``: build, list, inspect and verify data sets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from glowflow.cli.output import echo_json, human_bytes, human_count, note

__all__ = ["data"]

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_cache = click.option("--cache-dir", default=None, help="Same as data.cache_dir.")


_BUILD_KEYS = (
    *("data.columns", "data.prompt", "data.template", "data.on_bad_sample", "data.max_bad_fraction", "data.tokenizer"),
    *("data.image.max_pixels", "data.audio.max_file_seconds", "data.on_bad_file", "data.cache_dir"),
)


@click.group()
def data() -> None:
    """Build, list, inspect and verify data sets."""


@data.command()
@click.argument("source")
@click.argument("out")
@click.argument("overrides", nargs=-1)
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
    overrides: tuple[str, ...],
    tokenizer: str,
    index_only: bool,
    on_bad_file: str,
    local: bool,
    cache_dir: str | None,
    as_json: bool,
) -> None:
    """Turn SOURCE into shards and a manifest in OUT.

    SOURCE is a catalogue name, a file or a folder: text, JSONL, Parquet; with media also WebDataset tar, captions, a
    folder per class, idx. OVERRIDES are key=value, as in data.columns.text=caption or data.on_bad_sample=skip.
    """
    from glowflow.config.loader import load_config
    from glowflow.data.build import BuildOptions
    from glowflow.data.build import build as build_dataset

    _refuse_idle_overrides(overrides)
    given = [f"data.on_bad_file={on_bad_file}", *([f"data.cache_dir={cache_dir}"] if cache_dir else []), *overrides]
    config = load_config(None, given)
    options = BuildOptions(index_only=index_only, on_bad_file=config.data.on_bad_file)
    tokenizer = config.data.tokenizer if tokenizer == "auto" else tokenizer
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
        told = {"path": str(manifest.root), "fingerprint": manifest.fingerprint, "splits": _totals(manifest)}
        echo_json({**told, **({"media": manifest.media} if manifest.media else {})})
        return
    skipped = manifest.source.get("skipped", [])
    for file in skipped:
        note(f"skipped {file['name']}: {file['reason']}")
    for name, total in _totals(manifest).items():
        size = human_bytes(total["text_bytes"])
        note(f"{name}: {total['documents']:,} documents, {total['tokens']:,} tokens, {size} of text")
    _tell_bad_samples(manifest.media)
    note(f"built {manifest.root}; next: glowflow data inspect {out}")


def _refuse_idle_overrides(overrides: tuple[str, ...]) -> None:
    """Keys that a build does not read would be accepted and ignored."""
    from glowflow.config.errors import ConfigError, Problem

    keys = [text.partition("=")[0] for text in overrides]
    idle = [key for key in keys if not any(key == one or key.startswith(f"{one}.") for one in _BUILD_KEYS)]
    if idle:
        hint = f"keys that count: {', '.join(_BUILD_KEYS)}"
        raise ConfigError([Problem(key, "has no effect on a build", hint=hint) for key in idle])


def _tell_bad_samples(media: dict[str, Any]) -> None:
    """What was wrong, by kind, and the first ten by name."""
    if not media:
        return
    bad = media["bad"]
    kinds = ", ".join(f"{combination} {count:,}" for combination, count in media["samples"].items() if count)
    note(f"samples: {kinds or 'none'}; {media['images']:,} pictures, {media['audio']:,} recordings")
    if bad["counts"]:
        became = f"{bad['skipped']:,} skipped, {bad['blank']:,} kept as blanks"
        note(f"bad samples: {', '.join(f'{kind} {count:,}' for kind, count in bad['counts'].items())} ({became})")
        for name, kind, reason in bad["first"]:
            note(f"  {name}: {kind}: {reason}")


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
@click.argument("overrides", nargs=-1)
@click.option("--samples", type=click.IntRange(min=0), help="Rows to show per split (default 2), or on the sheet (12).")
@click.option(
    "--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write samples with media here: .png or .html."
)
@click.option("--split", help="Of the sheet; default: data.train_split.")
@click.option("--config", help="Of the sheet: prepare media as this config says; OVERRIDES are its key=value.")
@click.option("--augment", is_flag=True, help="On the sheet, change media as in training.")
@_json
def inspect(
    path: str,
    overrides: tuple[str, ...],
    samples: int | None,
    sheet: Path | None,
    split: str | None,
    config: str | None,
    augment: bool,
    as_json: bool,
) -> None:
    """Counts, tokenizer and some rows of a built data set; of one with media, more, and a contact sheet."""
    from glowflow.cli.media_tables import media_lines
    from glowflow.config.errors import ConfigError, Problem
    from glowflow.data.inspect import inspect_dataset
    from glowflow.tracking.tables import table

    given = {"--split": split, "--config": config, "--augment": augment, "OVERRIDES": overrides}
    useless = [Problem(name, "has no effect without --sheet") for name, value in given.items() if value and not sheet]
    if useless:
        raise ConfigError(useless)
    if sheet is not None:
        _write_sheet(path, sheet, 12 if samples is None else samples, split, config, overrides, augment)
    shown = inspect_dataset(path, 0 if sheet else 2 if samples is None else samples)
    if as_json:
        echo_json({**shown, **({"sheet": str(sheet)} if sheet else {})})
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
    for line in media_lines(shown["media"]) if "media" in shown else ():
        click.echo(line)
    for name, rows in shown["samples"].items():
        for row in rows:
            text = row["text"][:160].replace("\n", "\\n")
            click.echo(f"\n[{name} {row['document_id']}, {row['num_tokens']:,} tokens] {text}")
    if sheet is not None:
        note(f"contact sheet: {sheet}")


def _write_sheet(
    path: str,
    file: Path,
    samples: int,
    split: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    augment: bool,
) -> None:
    from glowflow.config.loader import load_config
    from glowflow.data.manifest import Manifest
    from glowflow.data.sheets import SheetOptions, check_sheet, sheet_of, write_sheet

    check_sheet(file, samples)
    settings = load_config(config, list(overrides)) if config or overrides else None
    write_sheet(sheet_of(Manifest.load(path), SheetOptions(samples, split, augment), settings), file)


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
