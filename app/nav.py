"""The pages and the ways between them.

The page stands in the address as ``?page=``, like every other choice, so one link reopens everything.
"""

from __future__ import annotations

import streamlit as st

from . import components, state

TITLES = {
    "atlas": "Atlas",
    "head": "Head",
    "text": "Text",
    "map": "Map",
    "intervene": "Intervene",
    "experiments": "Experiments",
}
_KEY = "nav"


def bar(runs: list[str]) -> str:
    """Draw the bar with the pages and, if there are several, the runs; the name of the page to show."""
    state.turn()
    current = state.recall("page", "atlas", state.one_of(TITLES))
    with st.container(key="hs-nav"):
        pages = [{"name": n, "title": t} for n, t in TITLES.items()]
        run = state.recall("run", None)
        data = {"pages": pages, "current": current, "runs": runs, "run": run}
        components.nav(data, _KEY, go=_go, run=_run, went=_went)
    return state.keep("page", current)


def go(name: str) -> None:
    """Leave for another page; choices travel in the session and reappear in its address."""
    state.choose("page", name)
    st.rerun()


def _went() -> None:
    state.reopen(st.session_state[_KEY].went)


def _run() -> None:
    state.choose("run", st.session_state[_KEY].run)


def _go() -> None:
    state.choose("page", st.session_state[_KEY].go)
