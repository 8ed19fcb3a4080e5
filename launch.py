"""Command line: flags to a config, then one job; the README has the commands."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from agr_jax import jobs
from agr_jax.config import check_field_name
from agr_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, or FILE:PROFILE.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; by default runs/<name>.")
_JOB = flags.DEFINE_enum("job", "train", list(jobs.JOBS), "What to do.")


def main(argv: list[str]) -> None:
    """Runs the job; a mistake that the user can mend is one line, without a traceback."""
    if argv[1:]:
        _fail(f"unexpected argument {argv[1]!r}: flags look like --config.epochs=10")
    if _CONFIG.value is None and _JOB.value != "report":
        _fail("give --config=configs/FILE.py, or --workdir=RUN of an existing run")
    logging.set_verbosity(logging.ERROR)  # Orbax reports every file it writes
    try:
        folder = Path(_WORKDIR.value) if _WORKDIR.value else None
        sys.exit(jobs.JOBS[_JOB.value](_CONFIG.value, folder))
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes it", status=130)
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{type(error).__name__}: {error}")


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _with_config_of_run(argv: list[str]) -> list[str]:
    """Without --config=FILE, a run folder's own config.json is the config."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    given = dict(itertools.pairwise(words))
    of_many = given.get("--job") in ("report", "sweep")
    if "--workdir" not in given or of_many or "--config" in given:
        return argv
    own = f"--config={Path(__file__).parent}/configs/from_run.py:{given['--workdir']}"
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
