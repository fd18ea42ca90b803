"""Less noise from the libraries below, for the command line only."""


def quiet() -> None:
    """No progress bars while weights load, no advice about settings that are right."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
