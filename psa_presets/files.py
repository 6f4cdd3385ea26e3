"""Finds the shipped presets, and reads a preset's file safely: it may be broken, huge or hostile."""

from __future__ import annotations

import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from psa_presets.errors import PresetError, one_line, show

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
EXPECTED = "allowed: a YAML mapping of preset keys, such as configs/example.yaml"


def shipped_folder() -> Path:
    """The folder of the shipped presets: inside the package when installed, beside it in a checkout.

    Raises:
        PresetError: neither is there.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "configs", package.parent / "configs")
    for folder in candidates:
        if (folder / "psa-3.yaml").is_file():
            return folder
    raise PresetError(f"the shipped presets are missing from this installation: no psa-3.yaml in {candidates[0]}")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping with text keys: plain data only, no tags, aliases or duplicate keys.

    Raises:
        PresetError: it cannot be read or holds anything else; the message names the file and, if possible, the line.
    """
    place = str(path)
    text = _read_text(path)
    try:
        data = _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = "; ".join(part for part in (error.problem, error.note) if part)
        raise PresetError(f"not valid YAML{where}: {reason}; {EXPECTED}", place) from None
    except Exception as error:  # for `!!int x` PyYAML passes on whatever int() or a look-up raises
        raise PresetError(f"not valid YAML: {one_line(str(error), limit=200)}; {EXPECTED}", place) from None
    if data is None or data == {}:
        raise PresetError(f"the file holds no settings; {EXPECTED}", place)
    if not isinstance(data, dict):
        raise PresetError(f"the file holds {show(data)}, not a mapping; {EXPECTED}", place)
    return data


def _read_text(path: Path) -> str:
    place = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise PresetError("a folder, not a file; allowed: a YAML file or the name of a shipped preset", place)
        if not stat.S_ISREG(mode):  # a pipe or a device could block for ever
            raise PresetError("not a regular file; allowed: a YAML file", place)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, PresetError):
            raise
        raise PresetError(f"cannot be read ({getattr(error, 'strerror', None) or error})", place) from None
    if len(data) > MAX_BYTES:
        raise PresetError(f"larger than {MAX_BYTES // 1024} KiB; {EXPECTED}", place)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PresetError(f"not UTF-8 text; {EXPECTED}", place) from None


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, without aliases (a small file could grow huge), duplicate keys and endless nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"alias *{event.anchor}: not allowed", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels of nesting", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key that is not text", problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"the key {one_line(key.value, limit=80)} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_tag(loader: _PlainLoader, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    problem = f"tag {one_line(tag, limit=80)}: only text, numbers, true, false, null, lists and mappings are allowed"
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# Only JSON's types are built: no dates, sets, ordered mappings, binary data or objects.
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_PlainLoader.yaml_constructors = {
    tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag and tag.rpartition(":")[2] in _PLAIN
}
_PlainLoader.add_constructor(None, _refuse_tag)
