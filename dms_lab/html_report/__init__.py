"""Reports as one self-contained HTML file.

sources   where results come from        analysis   everything said about them, computed once
tables    cells and tables               content    what a report, a terminal and files show of it
page      tables and figures as HTML, by page.html, page.css and page.js
"""

from dms_lab.html_report.page import Cell, Details, Key, Page, Plot, Section, Table, render, write

__all__ = ["Cell", "Details", "Key", "Page", "Plot", "Section", "Table", "render", "write"]
