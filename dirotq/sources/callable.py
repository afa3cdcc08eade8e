"""Whether the parts of a pipeline fit each other, where nothing else will run it."""

import logging

from dirotq.files.json_file import INDEX, read_json
from dirotq.models.rehearsal import UnreachedError, rehearse

from .generation import foreign
from .model import DiffusersModel

log = logging.getLogger(__name__)


def refuse_uncallable(model: DiffusersModel, without: str) -> None:
    """Call the pipeline once, small and with noise for weights (models/rehearsal.py).

    without  says in an error how to do without it

    Raises UnsupportedError if it fails. A pipeline that stops before its denoiser may want what
    DiRotQ does not give it: then a line of the log says that nothing is known.
    """
    folder = model.folder(weights=False)
    name = read_json(folder / INDEX)["_class_name"]
    try:
        with foreign(name, f". Noise stood for its weights; {without}"):
            rehearse(folder, **model.call_arguments())
    except UnreachedError as error:
        log.warning(
            "whether the parts of this %s fit each other is not known: it can't be called without "
            "its weights (%.300s)", name, error,
        )  # fmt: skip
