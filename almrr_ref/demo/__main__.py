"""`python -m almrr_ref.demo`: write the demo set, or a check set of one's own images."""

import argparse
import sys
from pathlib import Path

from almrr_ref.data.layouts import describe, find_dataset
from almrr_ref.demo.check_set import write_check
from almrr_ref.demo.surfaces import write_demo
from almrr_ref.run.cli import make_parser, run_command
from almrr_ref.run.files import make_folder


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(
        "demo",
        "Write the procedural demo set; or, with --images, draw its defects on a part of your own good images,\n"
        "so that a network can be checked where no defective image is at hand.\n\nexamples:\n"
        "  python -m almrr_ref.demo --out demo-images\n"
        "  python -m almrr_ref.demo --images good-images/ --out check\n"
        "  python -m almrr_ref.train --data check --preset plus --backbone efficientnet_lite0",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, a MVTec category")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of good images, or any known layout")
    parser.add_argument(
        "--faint", action="store_true", help="with --images: eleven kinds, at 20 to 100%% of their strength"
    )
    parser.add_argument(
        "--parts",
        metavar="REGEX",
        help="with --images: its first group says which part a file shows, where several images show the same part; "
        "no part is then both trained on and checked; train on the set with --parts 'part([0-9]+)_'",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of everything random (default: 0)")
    return run_command(command, parser, argv)


def command(arguments: argparse.Namespace) -> int:
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out {arguments.out} is there already and not an empty folder; name another")
    make_folder(arguments.out)
    if arguments.images:
        write_check(arguments.images, arguments.out, arguments.seed, faint=arguments.faint, parts=arguments.parts)
    else:
        write_demo(arguments.out, arguments.seed)
    print(describe(find_dataset(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
