"""Command line: trains and evaluates one run; the README has the commands."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from agr_jax import evaluate, mesh, run_folder, train
from agr_jax.config import Config, check_field_name, from_config_dict
from agr_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, or FILE:PROFILE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; by default runs/<name>.")
_JOB = flags.DEFINE_enum("job", "train", ["train", "evaluate"], "What to do.")


def main(argv: list[str]) -> None:
    """Runs the job; a mistake that the user can mend is one line, without a traceback."""
    if argv[1:]:
        _fail(f"unexpected argument {argv[1]!r}: flags look like --config.epochs=10")
    if _CONFIG.value is None:
        _fail("give --config=configs/FILE.py, or --workdir=RUN of an existing run")
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file it writes
    try:
        config = from_config_dict(_CONFIG.value)
        sys.exit(_run(config, Path(_WORKDIR.value or run_folder.default_folder(config))))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues", status=130)
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{type(error).__name__}: {error}")


def _run(config: Config, folder: Path) -> int:
    mesh.prepare_backend(deterministic=config.deterministic)
    if _JOB.value == "train":
        return train.run(config, folder)
    run_folder.check(folder, config)
    records = evaluate.evaluate_run(folder, config)
    print(f"{config.name}, {folder}\n\n{evaluate.table(records)}")
    return 0


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _with_config_of_run(argv: list[str]) -> list[str]:
    """Without --config=FILE, a run folder's own config.json is the config."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    folders = [after for word, after in itertools.pairwise(words) if word == "--workdir"]
    if not folders or any(a == "--config" or a.startswith("--config=") for a in argv):
        return argv
    own = f"--config={Path(__file__).parent}/configs/from_run.py:{folders[-1]}"
    return [argv[0], own, *argv[1:]]


def _parse(argv: list[str]) -> list[str]:
    try:
        for flag in argv[1:]:
            name, _, value = flag.removeprefix("--").partition("=")
            if name.startswith("config."):
                check_field_name(name)
            elif name == "config" and value and not Path(value.partition(":")[0]).is_file():
                _fail(f"--config: there is no file {value.partition(':')[0]}")
        return flags.FLAGS(_with_config_of_run(argv))
    except (flags.Error, UserError) as error:
        _fail(str(error))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
