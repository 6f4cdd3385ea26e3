"""Shows what the demo model is trained on: renders random scenes and writes them as one picture.

python scripts/demo_videos.py --output /tmp/scenes.png --count 8 --seed 1
"""

import argparse
from pathlib import Path

from demo.captions import caption
from demo.scenes import sample_scenes
from demo.sheets import save_sheet
from demo.videos import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=8, help="scenes, one a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--side", type=int, default=192, help="pixels")
    args = parser.parse_args()
    scenes = sample_scenes(args.count, args.seed)
    save_sheet(args.output, render(scenes, args.frames, args.side), [caption(scene) for scene in scenes])


if __name__ == "__main__":
    main()
