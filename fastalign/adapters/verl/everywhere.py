"""Imported, it puts ours in the place of verl's functions in this process. verl imports it in every process, the
workers' included, where VERL_USE_EXTERNAL_MODULES names it."""

from fastalign.adapters.verl import ADAPTER

if ADAPTER.report is None:
    ADAPTER.patch()
