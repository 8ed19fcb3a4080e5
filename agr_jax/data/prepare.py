"""Prepares an official data set as TFDS has it: `python -m agr_jax.data.prepare cifar10`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from agr_jax.data.download import DownloadError
from agr_jax.data.sources import OFFICIAL, default_tfds_folder, find_raw_anywhere
from agr_jax.errors import DataError, UserError


def prepare(name: str, folder: Path, *, source: Path | None = None) -> Path:
    """Prepares a data set in a TFDS folder, as `array_record` files.

    Args:
        name: "cifar10", "cifar100" or "tiny_imagenet".
        folder: of TFDS; the result is `<folder>/<name>/<version>`.
        source: the official archive or folder. By default it is looked for in `folder`,
            `$TFDS_DATA_DIR`, `./data` and `~/tensorflow_datasets`, and else downloaded.

    Returns:
        The prepared folder; if it was there already it is left as it is.

    Raises:
        DataError: nothing found and no network, a damaged archive, or a missing package.
    """
    if name not in OFFICIAL:
        raise DataError(f"unknown data set {name!r}: expected {', '.join(OFFICIAL)}")
    try:
        from agr_jax.data.tfds_builders import BUILDERS
    except ImportError as error:
        raise DataError(
            f"preparing needs {error.name}: pip install tensorflow-datasets array_record pillow"
        ) from error
    if source is None:
        source = find_raw_anywhere(OFFICIAL[name], folder)
    elif not source.exists():
        raise DataError(f"{source}: expected the official archive or folder, found nothing")
    builder = BUILDERS[name](data_dir=str(folder), source=source)
    print(f"{OFFICIAL[name].title}: from {source or OFFICIAL[name].address}", flush=True)
    try:
        builder.download_and_prepare()
    except DownloadError as error:
        official = OFFICIAL[name]
        raise DataError(
            f"{error}. Put {official.archive} ({official.archive_bytes:,} bytes) into "
            f"{folder / 'downloads' / 'manual'}, or give it with --source=FILE"
        ) from error
    return Path(builder.data_dir)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m agr_jax.data.prepare", description=__doc__)
    parser.add_argument("name", choices=list(OFFICIAL))
    parser.add_argument("--dir", help="TFDS folder; by default $TFDS_DATA_DIR, or the usual one")
    parser.add_argument("--source", type=Path, help="official archive or folder")
    options = parser.parse_args(arguments)
    folder = options.dir or os.environ.get("TFDS_DATA_DIR") or default_tfds_folder()
    try:
        path = prepare(options.name, Path(folder).expanduser(), source=options.source)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command begins again", file=sys.stderr)
        return 130
    print(f"prepared: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
