"""``python tools/convert.py``: the trunk of any checkpoint, written for another library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code
from pirl_plugin.weights import files
from pirl_plugin.weights.convert import TARGETS, ConversionReport, convert
from pirl_plugin.weights.finding import find_trunk
from pirl_plugin.weights.writing import metadata_of, write_weights

_EPILOG = """\
examples:
  python tools/convert.py runs/x/checkpoints/step_000001000.pt --to torchvision
  python tools/convert.py moco_v2_800ep_pretrain.pth.tar --to detectron2 --out r50.pkl
  python tools/convert.py downloaded.torch --report

reads: checkpoints of this package and of VISSL, classy-vision, MoCo (v1 to v3), SimSiam, SwAV, DINO, Barlow Twins,
VICReg, lightly and solo-learn, state dicts of torchvision and timm, backbones of detectron2, and any other with a
ResNet under torchvision's names and one prefix; as torch.save or safetensors wrote them. Nothing in a file is run.

Where a file holds several networks (query and key, student and teacher), the one that training followed is taken,
of DINO's two the teacher, and the report says so; --prefix takes another.

detectron2 reads .pth as well as .pkl; .pth is the default, since no code can hide in it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, 2 for a mistake in the command, 1 for a file that cannot be converted."""
    parser = Parser(
        "convert.py",
        "Take the ResNet trunk out of a checkpoint and write it for another library.",
        _EPILOG,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file of weights")
    parser.add_argument("--to", choices=TARGETS, help="library to write for")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: beside the checkpoint)")
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    parser.add_argument("--prefix", help="which trunk to take, where the checkpoint holds several")
    parser.add_argument("--report", action="store_true", help="list every entry; without --to only look, write nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    out = None
    if arguments.to is not None:
        out = arguments.out or default_out(arguments.checkpoint, arguments.to)
        problem = _problem(arguments.checkpoint, out, arguments.to, arguments.force)
        if problem:
            parser.error(problem)
    elif not arguments.report or arguments.out is not None:
        parser.error(f"--to is missing: one of {', '.join(TARGETS)} (or --report alone, to look without writing)")
    return exit_code(
        lambda: convert_file(arguments.checkpoint, arguments.to, out, arguments.prefix, arguments.report),
        arguments.debug,
    )


def default_out(checkpoint: Path, target: str) -> Path:
    """``step_1.pt`` for torchvision is ``step_1-torchvision.pth`` in the same folder."""
    stem = checkpoint.name.removesuffix(".tar").rpartition(".")[0] or checkpoint.name
    name = stem if target == "safetensors" else f"{stem}-{target}"
    return checkpoint.with_name(name + TARGETS[target].suffixes[0])


def _problem(checkpoint: Path, out: Path, target: str, force: bool) -> str:
    suffixes = TARGETS[target].suffixes
    if out.suffix not in suffixes:
        return f"--out must end in {' or '.join(suffixes)} for {target}, got {str(out)!r}"
    if out.is_dir():
        return f"--out must be a file, but {str(out)!r} is a folder"
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        return f"--out is the checkpoint itself, {str(out)!r}"
    return f"{str(out)!r} exists: give another --out, or --force to replace it" if out.exists() and not force else ""


def convert_file(
    checkpoint: Path, target: str | None, out: Path | None, prefix: str | None = None, every_entry: bool = False
) -> ConversionReport:
    """Reads, converts, prints the report and writes.

    Args:
        checkpoint: file of weights.
        target: out of ``TARGETS``; None: only look.
        out: file to write; None: only look.
        prefix: which of several trunks to take.
        every_entry: list every entry in the report.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not weights, no trunk in them, or not a whole one; nothing is written.
    """
    content = files.read_weights(checkpoint)
    found = find_trunk(content, prefix, quiet=True)
    training = files.training_config(content)
    state, report = convert(found, target or "safetensors", files.described_trunk(content))
    print(report.as_text(every_entry))
    if target is not None and out is not None:
        metadata = metadata_of(report, training, files.sha256_of_file(checkpoint))
        write_weights(state, out, target, metadata)
        print(f"wrote     {out}")
        if TARGETS[target].has_model(report.shape):
            print(f"use       {TARGETS[target].usage(str(out), report.shape)}")
    return report
