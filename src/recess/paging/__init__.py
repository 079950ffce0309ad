"""Pages on demand for another process's memory, and the decision how a machine's memory is brought back.

This room knows page faults, page numbers and groups of pages that are fetched together. It must know nothing of drivers,
machines, sessions or catalogs, nor of how pages are stored: whoever uses it hands in a book of pages.
"""

from recess.paging.book import Book, Piece, make_book
from recess.paging.choice import Choice, Facts, choose
from recess.paging.server import FaultServer, Report
from recess.paging.uffd import Fault, Segment, Uffd

__all__ = [
    "Book",
    "Choice",
    "Facts",
    "Fault",
    "FaultServer",
    "Piece",
    "Report",
    "Segment",
    "Uffd",
    "choose",
    "make_book",
]
