"""Pages of stages: shown as a Flyte deck, and kept in the stage's MLflow run."""

from flytekit import Deck, current_context
from flytekit.deck.deck import TimeLineDeck

from components.pages.html import Html
from components.pages.page import document
from tasks.tracking import StageRun


def show(run: StageRun, name: str, page: Html) -> None:
    """Show a page as the first tab of the stage's deck, and keep it, as a whole document, as ``pages/<name>.html``.

    A stage that is answered from Flyte's cache has no deck; its page is in the run that did the work.

    Parameters
    ----------
    run : StageRun
        The run that keeps it.
    name : str
        Name of the tab; in lower case that of the file.
    page : Html
        What a function of ``components.pages`` returned.
    """
    decks = current_context().decks
    # On one machine all stages share this list, so that each would show the pages of those before it.
    decks[:] = [
        Deck(name, page, auto_add_to_deck=False),
        *(deck for deck in decks if isinstance(deck, TimeLineDeck)),
    ]
    run.text(f"pages/{name.lower()}.html", document(name, page))
