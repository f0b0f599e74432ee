"""Readers of other people's training sets, one file a set; data.SOURCES lists them by kind.

A reader is a generator: from (path, image root or None) it yields a `data.rows.Row` for each row of
its files. What a file has wrong raises `data.rows.Bad` and becomes one line that names the row; any
other exception is a bug of the reader and keeps its traceback.
"""
