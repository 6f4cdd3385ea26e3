"""Mutated preset files and prompt files: each is read or refused in one line, and nothing else happens.

python scripts/campaigns/broken_files.py --rounds 12000
"""

from __future__ import annotations

import random
import re
import string
import sys
import tempfile
import time
from pathlib import Path

from rounds import campaign, parser

from psa_diffusers.errors import InputError
from psa_diffusers.runs.prompts import read_prompts, slug
from psa_presets import PresetError, load_preset

ROOT = Path(__file__).resolve().parents[2]

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
PROMPTS = (
    "a cat\n# a comment\n\n  a dog, running  \n../../etc/passwd\nCON\n<script>alert(1)</script>\n"
    "\u00fcber \u732b \U0001f431\na/b\\c:d*e?f\n" + "very " * 80 + "long\n"
)
# What breaks parsers: structure, tags, aliases, odd numbers, odd characters.
PIECES = [
    *(":", "-", "[", "]", "{", "}", "|", ">", "'", '"', "~", "&a ", "*a", "<<: *a", "? ", " ", "\n", "\r", "\t"),
    *("!!python/object/apply:os.system ['true']", "!!binary ", "%YAML 9\n", "---\n", "...\n"),
    *(".nan", "-.inf", "1e999", "0x" + "f" * 50, "9" * 400, "2001-01-01", "true", "null"),
    *("levels: ", "layers: [", "match: ", "thresholds: [0.1, 0.2, 0.3]\n", "{a: " * 30, "[" * 200),
    *("\x00", "\ufeff", "\u2028", "\x85", "\x1b[31m", "\ud7ff", "caf\u00e9"),
]
SAFE = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
MAX_SECONDS = 5.0


def mutate(chance: random.Random, text: str, donors: list[str]) -> bytes:
    """A text with a few random changes."""
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        at, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + chance.choice([1, 5, 60]))
        match chance.randrange(7):
            case 0:
                text = text[:at] + text[end:]
            case 1:
                text = text[:at] + chance.choice(PIECES) + text[at:]
            case 2:
                text = text[:at] + text[at:end] * 2 + text[end:]
            case 3:
                text = text[:at] + chance.choice(string.printable) + text[at + 1 :]
            case 4:
                donor = chance.choice(donors)
                text = text[:at] + donor[chance.randrange(len(donor)) :]
            case 5:
                lines = text.split("\n")
                chance.shuffle(lines)
                text = "\n".join(lines)
            case 6:
                text = re.sub(r"\d+", lambda found: chance.choice([found[0], found[0] * 2, "-1", "x"]), text)
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if content and chance.random() < 0.2:
        for _ in range(chance.randint(1, 5)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def one_line(error: Exception) -> None:
    message = str(error)
    assert message and message.isprintable() and len(message) < 4000, message


def check_preset(chance: random.Random, path: Path) -> str:
    texts = [file.read_text(encoding="utf-8") for file in PRESETS]
    path.write_bytes(mutate(chance, chance.choice(texts), texts))
    try:
        preset = load_preset(path)
        preset.layer_specs(30)
        preset.dense_step_count(40)
        preset.sparse_steps(40)
    except PresetError as error:
        one_line(error)
        return "preset refused"
    return "preset read"


def check_prompts(chance: random.Random, path: Path) -> str:
    path.write_bytes(mutate(chance, PROMPTS, [PROMPTS]))
    try:
        prompts = read_prompts((str(path),))
    except InputError as error:
        one_line(error)
        return "prompts refused"
    names = [f"{index:04d}-{slug(prompt)}" for index, prompt in enumerate(prompts)]
    assert len({name.lower() for name in names}) == len(names)
    for prompt, name in zip(prompts, names, strict=True):
        assert prompt == prompt.strip() and prompt and "\n" not in prompt
        assert SAFE.fullmatch(name) and ".." not in name and len(name) < 64, name
    return "prompts read"


def check(seed: int, folder: Path) -> str:
    """One file: five presets to a prompt file."""
    chance = random.Random(seed)
    started = time.monotonic()
    what = check_prompts if seed % 6 == 0 else check_preset
    word = what(chance, folder / ("prompts.txt" if what is check_prompts else "mutated.yaml"))
    assert time.monotonic() - started < MAX_SECONDS, "took too long"
    return word


def main() -> int:
    options = parser(__doc__, 1200).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return campaign(lambda seed: check(seed, Path(folder)), options)


if __name__ == "__main__":
    sys.exit(main())
