"""`python -m almrr_ref.demo`: write the demo set, or a check set of one's own images."""

import argparse
import sys

from almrr_ref.data.folders import describe
from almrr_ref.data.layouts import find_dataset
from almrr_ref.demo.check_set import write_check
from almrr_ref.demo.surfaces import write_demo
from almrr_ref.run.cli import add_max_pixels_flag, make_parser, path_argument, positive, run_command
from almrr_ref.run.files import make_folder

DESCRIPTION = """\
Write the demo set; or, with --images, draw its defects on some of your own good images, to check a network with.

examples:
  python -m almrr_ref.demo --out demo-images
  python -m almrr_ref.demo --images good-images/ --out check
  python -m almrr_ref.train --data check --preset plus --backbone efficientnet_lite0
"""
HELP_PARTS = "with --images: as for train; no part is both trained on and checked; train with --parts 'part([0-9]+)_'"
HELP_PIXELS = "with --images: they are written at the area of a square of this side (default: 256); more for tiles"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("demo", DESCRIPTION)
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="new folder, a MVTec category")
    parser.add_argument(
        "--images", type=path_argument, metavar="DIR", help="folder of good images, or any known layout"
    )
    parser.add_argument("--faint", action="store_true", help="with --images: eleven kinds, at 20 to 100%% of strength")
    parser.add_argument("--parts", metavar="REGEX", help=HELP_PARTS)
    parser.add_argument("--pixels", type=positive, metavar="INT", help=HELP_PIXELS)
    add_max_pixels_flag(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of everything random (default: 0)")
    return run_command(command, parser, argv)


def command(arguments: argparse.Namespace) -> int:
    for name in ("faint", "parts", "pixels"):
        if getattr(arguments, name) and not arguments.images:
            raise ValueError(f"--{name} is for a check set of your own images; name them by --images")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
    if arguments.images and arguments.out.resolve().is_relative_to(arguments.images.resolve()):
        raise ValueError(f"--out {arguments.out} lies in --images, which holds good images alone; name another")
    out = make_folder(arguments.out)
    if any(out.iterdir()):
        raise ValueError(f"--out {out} is not an empty folder; name another")
    unreadable = 0
    if images := arguments.images:
        pixels = arguments.pixels or 256
        unreadable = write_check(images, out, arguments.seed, arguments.faint, arguments.parts, pixels)
    else:
        write_demo(out, arguments.seed)
    print(describe(find_dataset(out)))
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
