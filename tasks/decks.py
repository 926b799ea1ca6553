"""Pages of stages: shown as a Flyte deck, and kept in the stage's MLflow run."""

from collections.abc import Callable
from typing import ParamSpec

from flytekit import Deck, current_context
from flytekit.deck.deck import TimeLineDeck

from components.pages.html import Html
from components.pages.page import document
from tasks.tracking import StageRun

P = ParamSpec("P")


class PageDeck(Deck):  # type: ignore[misc]
    """A tab with a page of a run."""

    def __init__(self, run_id: str, name: str, page: Html) -> None:
        super().__init__(name, page, auto_add_to_deck=False)
        self.run_id = run_id


def show(run: StageRun, name: str, page: Callable[P, Html], *about: P.args, **more: P.kwargs) -> None:
    """Show a page as a tab of the stage's deck, before flytekit's own, and keep it as ``pages/<name>.html``.

    A page that cannot be made is marked on the run (``page_failed``), and the stage goes on. Call this behind
    ``run.output``.

    The file is a whole document. A stage that is answered from Flyte's cache has no deck; its page is in the run that
    did the work.

    Parameters
    ----------
    run : StageRun
        The run that keeps it.
    name : str
        Name of the tab; in lower case that of the file.
    page : callable
        A function of ``components.pages``.
    *about, **more
        What it is called with.
    """
    try:
        made = page(*about, **more)
    except Exception as error:
        # Any error at all: the result that the page looks at stands, perhaps after hours of training, and what cannot
        # be drawn of it must not take it away.
        said = " ".join(str(error).split())
        run.mark("page_failed", f"{name}: {type(error).__name__}: {said}")
        return
    decks = current_context().decks
    # On one machine all stages share this list, and each would show the pages of those before it.
    mine = [deck for deck in decks if isinstance(deck, PageDeck) and deck.run_id == run.run_id]
    timeline = [deck for deck in decks if isinstance(deck, TimeLineDeck)]
    decks[:] = [*mine, PageDeck(run.run_id, name, made), *timeline]
    run.text(f"pages/{name.lower()}.html", document(name, made))
