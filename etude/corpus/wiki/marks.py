"""The marks that a page carries while it is being cleaned: control characters, which XML cannot hold, so no page has them.

Each step of :mod:`etude.corpus.wiki.wikitext` leaves them for a later one, and the last takes them all away.
"""

DROPPED = "\x01"  # something was taken out here; the punctuation around it may need mending
LITERAL, LITERAL_END = "\x02", "\x03"  # around the number of a text that is kept as it is
BREAK = "\x04"  # a line end that starts no list item and no table row
PIPE, EQUALS = "\x05", "\x06"  # characters of a rendered argument, not of the call around it
OPEN_TEMPLATE, OPEN_LINK, OPEN_TABLE = "\x0e", "\x0f", "\x10"  # where something began that never ended
PLACEHOLDERS = (DROPPED, LITERAL, LITERAL_END, BREAK, PIPE, EQUALS, OPEN_TEMPLATE, OPEN_LINK, OPEN_TABLE)
