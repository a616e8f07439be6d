"""``dnc-dist export``: the model alone, for others."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write the model alone, with a model card; also as ONNX.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder for the model.")
@click.option("--checkpoint", default="best", show_default=True, metavar="best|last|NAME", help="Which checkpoint of the run.")
@click.option("--onnx", is_flag=True, help="Also write model.onnx, compared with torch before (needs the extra `onnx`).")
def export(run: Path, out: Path, checkpoint: str, onnx: bool) -> None:
    """Write the model of RUN as model.safetensors, config.yaml and README.md, a model card, into DIR.

    `dnc_dist.load(DIR)`, `embed`, `search` and `export` take DIR in place of the run. Nothing in it names folders of this machine.
    """
    from dnc_dist.embedder import load
    from dnc_dist.inference.export import export as write

    write(load(run, checkpoint=checkpoint), out, onnx=onnx, tell=click.echo)
    click.echo(f"model written to {click.format_filename(out)}")
