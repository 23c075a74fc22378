"""The app's entry script: ``streamlit run main.py -- RUN…`` (``headscope app`` sets the flags that go with it)."""

import streamlit as st

from headscope.app import atlas, common, experiments, head, intervene, map, nav, settle, text, theme, welcome
from headscope.errors import HeadscopeError

PAGES = {
    "atlas": atlas.draw,
    "head": head.draw,
    "text": text.draw,
    "map": map.draw,
    "intervene": intervene.draw,
    "experiments": experiments.draw,
}

st.set_page_config(page_title="headscope", page_icon=theme.ICON, layout="wide", initial_sidebar_state="collapsed")
theme.apply()
settle.once()
page = nav.bar(common.run_names())
# Scans and sweeps can be started before there is any run; every other page shows one.
draw = PAGES[page] if page == "experiments" or common.shown() is not None else welcome.draw
try:
    draw()
except (HeadscopeError, OSError) as error:
    st.error(common.plain(str(error)))
