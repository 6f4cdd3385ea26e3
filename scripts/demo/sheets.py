"""Contact sheets: several videos as rows of frames in one picture."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw


def save_sheet(path: Path, videos: torch.Tensor, captions: list[str], columns: int = 6) -> None:
    """Writes `videos` [n, 3, frames, height, width] in -1..1 as a PNG, `columns` evenly spaced frames a row."""
    count, _, frames, height, width = videos.shape
    picked = torch.linspace(0, frames - 1, columns).round().long()
    pixels = ((videos[:, :, picked].float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    label = 14
    sheet = Image.new("RGB", (columns * (width + 2), count * (height + label + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(count):
        top = row * (height + label + 2)
        draw.text((2, top), captions[row], fill="black")
        for column in range(columns):
            frame = pixels[row, :, column].permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(frame), (column * (width + 2), top + label))
    sheet.save(path)
