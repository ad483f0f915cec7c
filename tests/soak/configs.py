"""Mutated configurations either run, with every key in force, or get a message of our own.

    python tests/soak/configs.py --count 1000

Each command line is a valid one with one to three mutations: other values, types and names, misspelt, moved or missing
keys, other components. A fault is an exception that escapes, a traceback, the message for errors that nobody foresaw, a
misspelt key that is accepted, or a value that is accepted and not in the run's own config.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from soak.processes import SMALL

BASE = [*SMALL, "dataset.num_images=8", "batch_size=4", "num_epochs=1", "loss.num_negatives=4", "log_every=1"]
BASE += ["hooks=[{name:memory_bank_update},{name:metrics_jsonl}]", "checkpoint={name:run_checkpoint}"]

NUMBERS = ["0", "-1", "1", "2", "3", "7", "0.5", "1.5", "-0.5", "1e-9", "1e30", ".nan", ".inf", "100"]
OTHERS = [
    "null",
    "true",
    "false",
    "abc",
    "''",
    "[]",
    "{}",
    "[1,2]",
    "[0.1,0.5]",
    "{a:1}",
    "{name:linear}",
    "'5'",
    "None",
]
NAMES = ["pirl_nce", "ema_memory_bank", "fifo_queue", "linear", "jigsaw", "mlp", "resnet_trunk", "ssl_model", "cosine"]
NAMES += [
    "nce",
    "softmax",
    "infonce",
    "shared",
    "per_image",
    "small",
    "medium",
    "standard",
    "bf16",
    "skip",
    "roll_back",
]
NAMES += ["image_view", "image_and_jigsaw_patches", "image_and_rotation", "jigsaw_collator", "view_collator", "npid"]
GROUPS = ["method", "loss", "trunk", "optimizer", "dataset"]
_NEVER = ("run_dir", "plugins", "device", "name", "about")
_SIZES = ("num_workers", "num_epochs", "width", "depth", "size", "image_size", "jigsaw_size", "patch_size")


@dataclass
class Mutated:
    """A command line, the keys that must not be accepted, and the values that must be in force if it runs."""

    overrides: list[str]
    misspelt: list[str] = field(default_factory=list)
    set_to: dict[str, str] = field(default_factory=dict)
    choices: int = 0

    @property
    def mutations(self) -> list[str]:
        """What was added to the base: choices of options before it, the rest after it."""
        return self.overrides[: self.choices] + self.overrides[self.choices + len(BASE) :]


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of all that a configuration holds, inner nodes too."""
    items: Any = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from leaves(value, here)


def resolved() -> dict[str, Any]:
    """The base configuration with every default written out."""
    from pirl_plugin.commands.train import main as train

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = train([*BASE, "--print-config"])
    if code:
        raise RuntimeError(f"the base configuration is wrong: code {code}.")
    return dict(yaml.safe_load(out.getvalue()))


def similar(value: Any, generator: random.Random) -> str:
    """Another value of the same type, most of them small."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return generator.choice(["0", "1", "2", "3", "5", "8", "13"])
    if isinstance(value, float):
        return generator.choice(["0", "0.05", "0.3", "0.5", "1.0", "2.5", "1e-6", "1e6"])
    if isinstance(value, list):
        return generator.choice(["[0.5,0.9]", "[0.1,2.0]", "[1,1]", "[2,3]", "[]", "[0.2,1.0]"])
    if isinstance(value, str):
        return generator.choice(NAMES)
    return generator.choice([*NUMBERS[:7], "true", "null", *NAMES[:4]])


def mutate(generator: random.Random, values: dict[str, Any], options: dict[str, list[str]]) -> Mutated:
    """One to three mutations of the base."""
    made, paths = Mutated(list(BASE)), list(values)
    for _ in range(generator.choice([1, 1, 2, 3])):
        path = generator.choice([p for p in paths if p.split(".")[0] not in _NEVER])
        last = path.rpartition(".")[2]
        kind = generator.choice([*["similar"] * 8, "value", "value", "name", "misspelt", "moved", "removed", "choice"])
        if kind in ("similar", "value"):
            small = [*NUMBERS[:7], *OTHERS] if last in _SIZES else [*NUMBERS, *OTHERS]
            value = generator.choice(small) if kind == "value" else similar(values[path], generator)
            made.overrides.append(f"{path}={value}")
            made.set_to[path] = value
        elif kind == "name":
            made.overrides.append(f"{path}={generator.choice(NAMES)}")
        elif kind == "misspelt":
            place = generator.randrange(len(last))
            wrong = path[: len(path) - len(last)] + last[:place] + generator.choice("xq_") + last[place + 1 :]
            if wrong not in paths and not last.isdecimal():
                made.overrides.append(f"{wrong}=1")
                made.misspelt.append(wrong)
        elif kind == "moved":
            other = generator.choice([p for p in paths if p.split(".")[0] not in _NEVER])
            made.overrides.append(f"{other}.{last}={generator.choice(NUMBERS)}")
        elif kind == "removed":
            made.overrides.append(f"~{path}")
        else:
            group = generator.choice(GROUPS)
            made.overrides.insert(0, f"{group}={generator.choice(options[group])}")
            made.choices += 1
    return made


def fault_of(made: Mutated, folder: Path) -> tuple[str, str]:
    """What became of it (``ran``, ``refused``), and what is wrong with that, if anything."""
    from pirl_plugin.commands.running import UNEXPECTED
    from pirl_plugin.commands.train import main as train

    err, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = train([*made.overrides, f"run_dir={folder}"])
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "escaped", "".join(traceback.format_exception(error))[-1500:]
        finally:
            _close_logs()
    said = err.getvalue()
    if code == 0:
        return "ran", _silently_ignored(made, folder)
    if "Traceback" in said or UNEXPECTED in said:
        return "not foreseen", said[-1500:]
    if not any(line.startswith("error: ") for line in said.splitlines()):
        return "refused", f"code {code} without a message: {said[-500:]}"
    return "refused", ""


def _silently_ignored(made: Mutated, folder: Path) -> str:
    if made.misspelt:
        return f"accepted {made.misspelt}"
    if not (folder / "config.yaml").exists():
        return "ran without a config.yaml"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for path, value in made.set_to.items():
        # one that another mutation has set again, inside or around it, proves nothing
        if sum(_related(mutation.lstrip("~").partition("=")[0], path) for mutation in made.mutations) != 1:
            continue
        found, expected = _at(config, path), yaml.safe_load(value)
        if not _same(found, expected):
            return f"{path}={value} was accepted, but {found!r} is in force"
    return ""


def _related(left: str, right: str) -> bool:
    return f"{left}.".startswith(f"{right}.") or f"{right}.".startswith(f"{left}.")


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, dict) and isinstance(expected, dict):
        return all(_same(found.get(key), value) for key, value in expected.items())  # an override merges into a mapping
    if expected is None or isinstance(expected, str):
        return True  # null leaves it to the task; text is checked by name
    return bool(found == expected or found != found)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict) and key in tree:
            tree = tree[key]
        else:
            return None
    return tree


def _close_logs() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    logging.getLogger("pirl_plugin").setLevel(logging.NOTSET)  # else a traceback for log.txt would be printed
    logging.captureWarnings(False)


def survey(count: int, seed: int, scratch: Path) -> tuple[Counter[str], list[str]]:
    """Tries mutated configurations: what became of them, and the faults."""
    from pirl_plugin import config as configs

    values, options = dict(leaves(resolved())), configs.groups()
    outcomes, faults = Counter[str](), list[str]()
    for index in range(count):
        made = mutate(random.Random(seed * 1_000_003 + index), values, options)
        outcome, fault = fault_of(made, scratch / str(index))
        outcomes[outcome] += 1
        if fault:
            faults.append(f"{index}: {' '.join(made.mutations)}\n    {fault}")
    return outcomes, faults


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 without faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pirl_configs_") as scratch:
        outcomes, faults = survey(options.count, options.seed, Path(scratch))
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())))
    print(f"{len(faults)} faults")
    for fault in faults[:40]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
