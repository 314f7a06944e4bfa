"""The report: one page that a person reads, from the receipt that a machine wrote."""

from rarefy.report.page import render

__all__ = ["render"]
