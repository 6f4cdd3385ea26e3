"""The folder of a run: what is finished, what is missing, whose it is. Results appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_diffusers.errors import InputError
from psa_diffusers.files import PROMPT_FILE, REPORT_FILE, RUN_FILE, check_name, check_output, write_json
from psa_diffusers.runs.prompts import slug
from psa_diffusers.runs.vbench import FOLDER as VBENCH_FOLDER

# What the page and the summary of a run read in each prompt's report.
REPORT_PARTS = {
    **dict.fromkeys(("prompt", "preset"), str),
    **dict.fromkeys(("seed", "sample"), int),
    **dict.fromkeys(("runs", "videos", "files", "bytes", "settings", "versions", "hardware"), dict),
}

# As long as what a run writes below its folder, without VBench's names; some file systems take no more than 143 bytes.
LONG_NAME = "x" * 140


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file in a prompt's folder, for its report."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


class RunFolder:
    """One folder for each prompt, `0000-slug`, below `path`; `run.json` holds the settings and prompts of the run.

    A prompt's folder is filled under a hidden name and renamed when it is complete. It is done while its report can be
    read and each file that this names still has all of its bytes.
    Several processes may work in one run's folder: each prompt has a lock, which the system frees when its holder dies.

    Args:
        launch: text that processes that were started together share; None for a single process.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], prompts: tuple[str, ...], launch: str | None = None
    ) -> None:
        self.path = Path(path)
        self.launch = launch or uuid.uuid4().hex
        self.contents: dict[str, Any] = {"format": _format(settings), "settings": settings, "prompts": list(prompts)}
        self.names = [_name(index, prompt) for index, prompt in enumerate(prompts)]
        self._replaces = False

    def missing(self) -> list[int]:
        """The indices of the prompts that have no finished folder."""
        if self._replaces:
            return list(range(len(self.names)))
        return [index for index in range(len(self.names)) if self._report(index) is None]

    def finished(self) -> list[dict[str, Any]]:
        """The reports of the finished prompts, in order, each with its folder's name under "folder"."""
        if self._replaces:
            return []
        reports = [(name, self._report(index)) for index, name in enumerate(self.names)]
        return [{**report, "folder": name} for name, report in reports if report is not None]

    def _report(self, index: int) -> dict[str, Any] | None:
        """A prompt's report; None if the prompt is not done."""
        folder = self.path / self.names[index]
        if not (folder / PROMPT_FILE).is_file():
            return None
        try:
            report = _read_json(folder / PROMPT_FILE)
        except _DamagedError:
            return None
        written = report.setdefault("bytes", {})  # without it no size is known
        if not all(isinstance(report.get(part), kind) for part, kind in REPORT_PARTS.items()):
            return None
        names = {*written, *map(str, report["videos"].values()), *map(str, report["files"].values())}
        return report if all(_is_whole(folder / name, written.get(name)) for name in names) else None

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that holds another run's results, or that cannot be written to.

        Raises:
            InputError: the settings or prompts there differ, files of the same names exist, or it cannot be written to.
        """
        self._replaces = overwrite
        check_name("--output", self.path, self.path / LONG_NAME)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output {self.path}: it is a file, not a folder")
        self._check_kinds()
        if not overwrite:
            if (self.path / RUN_FILE).is_file():
                self._must_match(_read_json(self.path / RUN_FILE))
            else:
                taken = [name for name in (*self.names, REPORT_FILE, VBENCH_FOLDER) if (self.path / name).exists()]
                if taken:
                    raise InputError(
                        f"--output {self.path}: {taken[0]} is already there; choose another folder or add --overwrite"
                    )
        check_output(self.path, self.path)

    def _check_kinds(self) -> None:
        """Refuse files where folders will be, and folders where files will be: those are nothing that a run leaves."""
        folders = (*self.names, *(self._partial(index).name for index in range(len(self.names))), VBENCH_FOLDER)
        for names, are_folders in ((folders, True), ((RUN_FILE, REPORT_FILE), False)):
            for name in names:
                if os.path.lexists(self.path / name) and (self.path / name).is_dir() != are_folders:
                    needed = "a folder" if are_folders else "a file"
                    raise InputError(f"--output {self.path}: {name} is there and is not {needed}; move it away")

    def begin(self) -> None:
        """Mark the folder as this run's; with --overwrite, remove what an earlier run of this tool left there."""
        if self._replaces:
            self._remove_old()
            self._replaces = False
        for leftover in self.path.glob(".[0-9]*.partial"):
            with self._locked(leftover.name[1:].removesuffix(".partial")) as free:
                if free:
                    shutil.rmtree(leftover, ignore_errors=True)
        # With a lock: processes that begin at the same time would rename each other's half-written file.
        with self._locked(RUN_FILE, wait=True):
            write_json(self.path / RUN_FILE, self.contents)

    @contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Whether this process is to make a prompt: nobody else is making it, it is not done, and no process of the
        same launch has failed at it or died."""
        with self._locked(self.names[index]) as free:
            tried = self._lock_folder() / f"{self.names[index]}.tried"
            mine = free and self._report(index) is None
            mine = mine and not (tried.is_file() and tried.read_text(encoding="utf-8") == self.launch)
            if mine:
                tried.write_text(self.launch, encoding="utf-8")
            yield mine

    def wait(self) -> None:
        """Wait until no process is making a prompt any more."""
        for index in self.missing():
            with self._locked(self.names[index], wait=True):
                pass

    @contextmanager
    def _locked(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold a prompt's lock. Without `wait`, yields False if another process has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._lock_folder() / f"{name}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _lock_folder(self) -> Path:
        """A folder among the system's temporary files: locks work there, and no lock files end up with the results."""
        owner = f"{getattr(os, 'getuid', str)()} {self.path.resolve()}"
        folder = Path(tempfile.gettempdir(), f"psa-generate-{hashlib.sha256(owner.encode()).hexdigest()[:24]}")
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def refusal(self, said: str | None = None) -> str | None:
        """What a process of this launch found wrong with the input; `said` writes it. The last message counts."""
        file = self._lock_folder() / f"{self.launch}.refused"
        if said is not None:
            file.write_text(said, encoding="utf-8")
            return said
        if not file.is_file():
            return None
        said = file.read_text(encoding="utf-8")
        file.unlink()
        return said

    def withdraw(self) -> None:
        """Remove the folder that `check` made, if it is still empty."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @contextmanager
    def writing(self, index: int) -> Iterator[Path]:
        """Yield a hidden folder for a prompt's files. Rename it if all went well, remove it if not."""
        partial = self._partial(index)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            # A folder that lacks something counts as missing; remove it, or the rename would fail.
            _remove_folder(self.path / self.names[index])
            os.replace(partial, self.path / self.names[index])
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _partial(self, index: int) -> Path:
        return self.path / f".{self.names[index]}.partial"

    def _must_match(self, there: dict[str, Any]) -> None:
        if not isinstance(there.get("settings"), dict):
            raise InputError(f"{self.path / RUN_FILE}: holds no settings of a run; move it away or add --overwrite")
        # Compared as text, because in Python one dense step (1) equals the share 1.0.
        if json.dumps(there, sort_keys=True) == json.dumps(self.contents, sort_keys=True):
            return
        old, new = (_flat(each["settings"]) for each in (there, self.contents))
        keys = sorted(key for key in {*old, *new} if json.dumps(old.get(key)) != json.dumps(new.get(key)))
        shown = [f"{key} was {_short(old.get(key))} and is now {_short(new.get(key))}" for key in keys[:2]]
        if len(keys) > 2:
            shown.append(f"{len(keys) - 2} more differ")
        if there.get("prompts") != self.contents["prompts"]:
            shown.append("the prompts differ")
        what = "; ".join(shown) or "its format differs"
        raise InputError(
            f"--output {self.path}: holds another run ({what}); choose another folder or add --overwrite to replace it"
        )

    def _remove_old(self) -> None:
        names = set(self.names)
        with contextlib.suppress(InputError):
            prompts = _read_json(self.path / RUN_FILE).get("prompts")
            names.add(VBENCH_FOLDER)
            if isinstance(prompts, list):
                names |= {_name(index, prompt) for index, prompt in enumerate(prompts) if isinstance(prompt, str)}
        for name in names:
            _remove_folder(self.path / name)
        for name in (REPORT_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)


def _name(index: int, prompt: str) -> str:
    return f"{index:04d}-{slug(prompt)}"


def _remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


class _DamagedError(InputError):
    """A file of a run's folder holds something else than what this tool writes."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        kind = InputError if isinstance(error, OSError) else _DamagedError
        raise kind(f"{path}: cannot be read ({type(error).__name__}); move it away or add --overwrite") from error
    if not isinstance(content, dict):
        raise _DamagedError(f"{path}: not a JSON object; move it away or add --overwrite")
    return content


def _format(settings: dict[str, Any]) -> int:
    """The format of `run.json`: 2 if a preset has rules.

    In format 1 their rules are filled with default values, so that it does not tell which keys were given.
    """
    presets = [settings.get(key) or {} for key in ("preset_rules", "preset_2_rules")]
    return 2 if any(preset.get("layers") or preset.get("steps") for preset in presets) else 1


def _is_whole(path: Path, size: int | None) -> bool:
    """Whether a file is there, with the size that it was written in if that is known."""
    try:
        found = path.stat().st_size
    except (OSError, ValueError):
        return False
    return found > 0 if size is None else found == size


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a preset's keys on the same level, so that a message can name the key that differs."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
