"""What the user has chosen: kept across pages, and in the address so that a link reopens the view.

The address is read once, when the page is opened (or when the browser goes back to it), and written from then on. Each
widget is told the remembered choice as its own default, in every message: a browser that has missed one, because a
click came before it was drawn, must not show another choice and send that back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import streamlit as st

LINKED = 1500  # characters of one choice that go into the address; longer texts are left out
_KEPT, _ASKED, _MADE, _BACK, _SETTLED = "kept", "asked", "made", "back", "settled"
_NOW, _DRAWING = "now", "drawing"


def recall(name: str, default: Any, read: Callable[[str], Any] = str) -> Any:
    """The choice made in this session, else the one in the address, else the default.

    A widget that the user has just changed counts at once, also above the place where it is drawn.

    Args:
        name: Its name in the address.
        default: When there is neither, or ``read`` refuses what stands in the address.
        read: From text to value; raises ValueError for what makes no sense.
    """
    kept, asked, key = _kept(), _asked(), key_of(name)
    if (value := st.session_state.get(key)) is not None:
        return value
    if name in kept:
        return kept[name]
    if name in asked:
        try:
            return read(asked[name])
        except ValueError:
            return default
    return default


def keep(name: str, value: Any) -> Any:
    """Remember a choice for other pages and for the address; gives it back."""
    _asked().pop(name, None)
    _kept()[name] = value
    return value


def choose(name: str, value: Any) -> None:
    """Make a choice from code, as if the user had made it in its widget."""
    if name not in _kept() or _kept()[name] != value:
        _renew(name)
    keep(name, value)


def forget(name: str) -> None:
    """Go back to the default of a choice."""
    _kept().pop(name, None)
    _asked().pop(name, None)
    _renew(name)


def reopen(search: str) -> None:
    """Take over another address, as when the browser goes back: nothing of what was chosen since stays.

    The page that is drawn next leaves the address as it is. Were it to add defaults, each Back would be followed by a
    step forward.
    """
    for name in list(_kept()):
        forget(name)
    for key in [k for k in st.session_state if str(k).startswith("w_")]:
        del st.session_state[key]
    st.session_state[_ASKED] = dict(parse_qsl(search.removeprefix("?")))
    st.session_state[_BACK] = _NOW


def turn() -> None:
    """Called once at the beginning of each drawing of the page."""
    if st.session_state.get(_BACK) == _NOW:
        st.session_state[_BACK] = _DRAWING
    elif st.session_state.get(_BACK) == _DRAWING:
        del st.session_state[_BACK]


def key_of(name: str) -> str:
    """The key of a choice's widget: a new one whenever code makes the choice, so that no old state comes back."""
    made = st.session_state.setdefault(_MADE, {}).get(name, 0)
    return f"w_{name}~{made}" if made else f"w_{name}"


def one_of(options: Iterable[Any]) -> Callable[[str], Any]:
    """A reader that accepts only these options.

    Example:
        >>> one_of(["a", 3])("3")
        3
    """
    by_text = {str(o): o for o in options}

    def read(text: str) -> Any:
        if text not in by_text:
            raise ValueError(text)
        return by_text[text]

    return read


def between(low: float, high: float) -> Callable[[str], Any]:
    """A reader of numbers in a range, whole ones if its ends are.

    Example:
        >>> between(1, 9)("3"), between(0.0, 1.0)("0.25")
        (3, 0.25)
    """
    kind = int if isinstance(low, int) and isinstance(high, int) else float

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return read


def select(label: str, name: str, options: list[Any], default: Any, **more: Any) -> Any:
    """A select box whose choice is remembered; what is no option any more falls back to the default."""
    value = _known(name, options, default)
    return keep(name, st.selectbox(label, options, index=options.index(value), key=key_of(name), **more))


def segmented(label: str, name: str, options: list[Any], default: Any, **more: Any) -> Any:
    """A row of buttons of which one is chosen; to unpick it is to choose the default."""
    value = _known(name, options, default)
    picked = st.segmented_control(label, options, default=value, key=key_of(name), **more)
    return keep(name, picked if picked in options else default)


def toggle(label: str, name: str, default: bool = False, **more: Any) -> bool:
    """A switch whose state is remembered."""
    value = bool(recall(name, default, lambda text: text == "1"))
    return keep(name, st.toggle(label, value=value, key=key_of(name), **more))


def line(label: str, name: str, default: str, **more: Any) -> str:
    """A line of text that is remembered."""
    value = recall(name, default)[: more.get("max_chars")]
    return keep(name, st.text_input(label, value, key=key_of(name), **more))


def area(label: str, name: str, default: str, **more: Any) -> str:
    """A longer text that is remembered; it goes into the address as far as one can hold it."""
    value = recall(name, default)[: more.get("max_chars")]
    text = keep(name, st.text_area(label, value, key=key_of(name), **more))
    if len(text) > LINKED:
        st.caption(f"A text of more than {LINKED:,} characters is not in the page's link.")
    return text


def slider(label: str, name: str, low: float, high: float, default: float, **more: Any) -> Any:
    """A slider whose value is remembered."""
    value = _inside(name, low, high, default)
    return keep(name, st.slider(label, low, high, value, key=key_of(name), **more))


def count(label: str, name: str, low: int, high: int, default: int, **more: Any) -> int:
    """A whole number that is remembered."""
    value = _inside(name, low, high, default)
    return keep(name, int(st.number_input(label, low, high, value, key=key_of(name), **more)))


def several(label: str, name: str, options: list[str], default: list[str], new: bool = True, **more: Any) -> list[str]:
    """Any of some options, and if ``new`` others that the user types; in the address with semicolons between them."""
    said = recall(name, default, lambda text: [t for t in text.split(";") if t.strip()])
    said = list(dict.fromkeys(s for s in said if new or s in options))
    known = list(dict.fromkeys([*options, *said]))
    return keep(name, st.multiselect(label, known, said, key=key_of(name), accept_new_options=new, **more))


def joined(values: list[str]) -> str:
    """Several choices as the address holds them."""
    return ";".join(values)


def show(**shown: Any) -> None:
    """Put choices into the address: those given and nothing else. None, False and what is too long are left out."""
    page = recall("page", "atlas")
    shown = {"page": None if page == "atlas" else page} | shown
    texts = {k: "1" if v is True else str(v) for k, v in shown.items() if v is not None and v is not False}
    wanted = {k: v for k, v in texts.items() if v and len(v) <= LINKED}
    if st.session_state.get(_BACK) == _DRAWING:
        st.session_state[_SETTLED] = wanted
    elif wanted != st.session_state.get(_SETTLED):
        st.session_state.pop(_SETTLED, None)
        if st.query_params.to_dict() != wanted:
            st.query_params.from_dict(wanted)


def _known(name: str, options: list[Any], default: Any) -> Any:
    default = default if default in options else options[0]
    value = recall(name, default, one_of(options))
    return value if value in options else default


def _inside(name: str, low: float, high: float, default: float) -> Any:
    value = recall(name, default, between(low, high))
    return type(default)(min(max(value, low), high))


def _kept() -> dict[str, Any]:
    return st.session_state.setdefault(_KEPT, {})


def _asked() -> dict[str, str]:
    if _ASKED not in st.session_state:
        st.session_state[_ASKED] = st.query_params.to_dict()
    return st.session_state[_ASKED]


def _renew(name: str) -> None:
    made = st.session_state.setdefault(_MADE, {})
    st.session_state.pop(key_of(name), None)
    made[name] = made.get(name, 0) + 1
