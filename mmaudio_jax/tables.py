"""Tables as others wrote them: csv and tsv, in UTF-8 or Latin-1, and the names that stand in them."""
import csv
import io
import os
import pathlib
from typing import Iterator
import unicodedata


def read_text(path: pathlib.Path) -> str:
    """What a published listing says: UTF-8 with or without a mark, or Latin-1, as Clotho's metadata are."""
    content = path.read_bytes()
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError:
        return content.decode('latin-1')


def csv_rows(path: pathlib.Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row of `text`, which is that of `path`; tabs are between the cells of a .tsv.

    Raises:
      ValueError: quotes that are not closed, or closed within a cell: what follows would be read as part of it.
    """
    delimiter = '\t' if path.suffix == '.tsv' else ','
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f'{path}, line {line}: the row that starts there cannot be read ({error}); close its quotes, and '
                         'write those within a cell twice') from error


def composed(name: str) -> str:
    """The name with whole letters (NFC), by which names are compared: file systems of macOS take ü apart (NFD)."""
    return unicodedata.normalize('NFC', name)


def beside(path: pathlib.Path, name: str) -> pathlib.Path:
    """The file that the table at `path` names, however its letters are composed."""
    if name.isascii():
        return path.parent / name
    forms = [path.parent / form for form in (name, composed(name), unicodedata.normalize('NFD', name))]
    return next(filter(os.path.exists, forms), forms[0])
