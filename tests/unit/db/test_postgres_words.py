"""What a statement is taken for before Postgres sees it: whether it has rows to wait for, whether it may have changed any."""

import pytest

from recess.db.postgres import in_postgres


@pytest.mark.parametrize(
    ("sql", "rows", "changes"),
    [
        ("SELECT * FROM a WHERE id = ? FOR UPDATE", True, False),
        ("UPDATE a SET n = ? WHERE id = ?", False, True),
        ("UPDATE a SET n = ? WHERE id = ? RETURNING *", True, True),
        ("WITH some AS (SELECT n FROM a) SELECT n FROM some", True, False),
        ("WITH w0 AS (INSERT INTO a (n) VALUES (?)) UPDATE b SET n = ? WHERE id = ?", False, True),
        ("WITH old AS (DELETE FROM a WHERE n < ? RETURNING n) SELECT n FROM old", True, True),
    ],
)
def test_rows_and_changes(sql, rows, changes):
    text, gives_rows, may_change = in_postgres(sql)
    assert "?" not in text
    assert text.count("$") == sql.count("?")
    assert (gives_rows, may_change) == (rows, changes)
