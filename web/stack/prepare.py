"""What must be done before the stack's processes start: migrations, named models, the first key.

`python -P -m web.stack.prepare NAME=SOURCE…`, a process of its own so that the supervisor stays small.
Reads the settings of the environment; what goes wrong is one line on stderr and status 2.
"""

from __future__ import annotations

import sys
from contextlib import closing

from gpu_pool.database import Database
from web import migrate
from web.stack.accounts import ensure_first_key
from web.stack.errors import StackError
from web.stack.folder import Folder
from workers.catalogue import Catalogue, ModelFolderError
from workers.settings import Settings
from workers.storage import open_storage


def main(arguments: list[str]) -> int:
    """The process."""
    try:
        settings = Settings.from_env()
        open_storage(settings)  # says what is missing for it, before four processes do
        migrate.upgrade(settings.database_url)
        name_models(Catalogue(settings), arguments)
        with closing(Database(settings.database_url)) as db:
            ensure_first_key(Folder(settings.data_dir), db)
    except (StackError, ModelFolderError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def name_models(catalogue: Catalogue, arguments: list[str]) -> None:
    """Enters the models that `--model NAME=SOURCE` named; those of earlier times stay."""
    for argument in arguments:
        name, _, source = argument.partition("=")
        try:
            # `up` has made every path absolute; what is left is a hub id.
            if source.startswith("/"):
                catalogue.add(name, source)
            else:
                catalogue.add_hub(name, source)
        except (ModelFolderError, OSError) as error:
            raise StackError(f"--model {argument}: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
