"""Splits prompts into those to measure on and those to verify on."""

from psa_diffusers.errors import InputError
from psa_diffusers.runs.prompts import read_prompt_file


def split_prompts(
    file: str, verify: str | None, held_out: int, max_prompts: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to measure on and those to verify on, from one file or two.

    Args:
        verify: a file of prompts to verify on; without it the last `held_out` of `file` are.
        max_prompts: how many to measure on at most: the first ones.

    Raises:
        InputError: a file cannot be read, a number is out of range, or there are too few prompts.
    """
    if held_out < 1:
        raise InputError(f"--held-out {held_out}: must be 1 or more")
    if max_prompts < 1:
        raise InputError(f"--max-prompts {max_prompts}: must be 1 or more")
    prompts = _unique(file, "--prompts")
    if verify is not None:
        return prompts[:max_prompts], _unique(verify, "--verify")
    if len(prompts) <= held_out:
        raise InputError(
            f"--prompts {file}: {len(prompts)} different prompts are too few to hold out {held_out}; "
            "add some, or give --verify FILE"
        )
    return prompts[:-held_out][:max_prompts], prompts[-held_out:]


def _unique(file: str, option: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(read_prompt_file(file, option)))
