"""Checkpoints damaged in every way are found, and the previous good one is taken.

    python tests/soak/corrupt.py --count 500

One run is trained; then its newest checkpoint is damaged again and again: a bit turned over, several, cut off, blocks
of zeros, another step's content under its name, another run's, other files. Each time the command's own search for a
checkpoint must refuse it and give the previous one.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.processes import SMALL


def bit(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """One bit turned over."""
    changed = bytearray(content)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def bytes_changed(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """Up to a hundred bytes, somewhere."""
    changed = bytearray(content)
    for _ in range(generator.randrange(1, 100)):
        changed[generator.randrange(len(changed))] ^= generator.randrange(1, 256)
    return bytes(changed) if bytes(changed) != content else bit(content, generator, others)


def cut(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """Cut off anywhere, also at its very start."""
    return content[: generator.randrange(len(content))]


def longer(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """Something appended."""
    return content + bytes(generator.randrange(256) for _ in range(generator.randrange(1, 5000)))


def zeros(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """A block that never reached the disk."""
    start = generator.randrange(len(content) // 4096) * 4096
    changed = content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :]
    return changed if changed != content else bit(content, generator, others)


def exchanged(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """Two blocks exchanged."""
    blocks = [content[start : start + 4096] for start in range(0, len(content), 4096)]
    first, second = generator.sample(range(len(blocks) - 1), 2)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    changed = b"".join(blocks)
    return changed if changed != content else bit(content, generator, others)


def swapped(content: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """A whole file: of another step, of another run, or none of ours."""
    return generator.choice(others)


DAMAGE: list[Callable[[bytes, random.Random, list[bytes]], bytes]] = [
    bit,
    bytes_changed,
    cut,
    longer,
    zeros,
    exchanged,
    swapped,
]


def prepare(folder: Path) -> tuple[Path, list[bytes]]:
    """A finished run of two checkpoints, and files to put in the place of one."""
    import torch

    from pirl_plugin.commands.train import main as train
    from pirl_plugin.hooks.checkpoint import checkpoints

    runs = []
    for seed in (0, 1):
        runs.append(folder / f"seed{seed}")
        code = train([*SMALL, "batch_size=8", "num_epochs=2", f"run_dir={runs[-1]}", f"seed={seed}", "hooks=null"])
        if code:
            raise RuntimeError(f"the training failed with code {code}.")
    torch.save({"a": torch.zeros(1000)}, folder / "plain.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    others = [checkpoints(runs[0])[0], checkpoints(runs[1])[-1], folder / "plain.pt", folder / "list.pt"]
    return runs[0], [path.read_bytes() for path in others] + [b"", b"cos\nsystem\n(S'true'\ntR."]


def survey(run_dir: Path, others: list[bytes], count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damages the newest checkpoint ``count`` times: how often each way was found, and what went wrong."""
    from pirl_plugin.commands.train import _recorded_identity, _saved_identity
    from pirl_plugin.hooks.checkpoint import checkpoints
    from pirl_plugin.hooks.checkpoint_files import SET_ASIDE, newest_usable

    generator, found, wrong = random.Random(seed), Counter[str](), list[str]()
    own = _recorded_identity(run_dir)
    good, newest = checkpoints(run_dir)[-2:]
    whole = newest.read_bytes()
    for index in range(count):
        damage = DAMAGE[index % len(DAMAGE)]
        newest.write_bytes(damage(whole, generator, others))
        try:
            taken = newest_usable(run_dir, lambda content: own is not None and _saved_identity(content) != own)
        except Exception as error:
            wrong.append(f"{damage.__name__}: {type(error).__name__}: {error}")
        else:
            if taken is not None and taken[0] == good:
                found[damage.__name__] += 1
            else:
                wrong.append(f"{damage.__name__}: took {taken and taken[0]}")
        newest.with_name(newest.name + SET_ASIDE).unlink(missing_ok=True)
        newest.write_bytes(whole)
    taken = newest_usable(run_dir)
    if taken is None or taken[0] != newest:
        wrong.append("the undamaged one was not taken")
    return found, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where each was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pirl_corrupt_") as scratch:
        run_dir, others = prepare(Path(scratch))
        logging.disable(logging.CRITICAL)
        found, wrong = survey(run_dir, others, options.count, options.seed)
    shutil.rmtree(scratch, ignore_errors=True)
    for name, number in found.items():
        print(f"{name:14} {number} found, the previous one taken")
    print(f"{found.total()} of {options.count} damaged checkpoints found; {len(wrong)} loaded or failed")
    for line in wrong[:10]:
        print("  " + line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
