"""python -m plugins.cpu: builds the library of the CPU kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from plugins.cpu.library import BUILD, build
from plugins.cxx import BuildFailed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plugins.cpu", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--out", type=Path, default=BUILD, help="build folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(build(args.out))
    except BuildFailed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
