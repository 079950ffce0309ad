"""--format: the part of Docker's templates that is there, and what is refused."""

import pytest

from recess.cli.template import align, heading, render
from recess.errors import BadInput

ROW = {
    "Name": "dev",
    "State": {"Status": "running", "Pid": 7},
    "id": "mch_1",
    "tags": ["a", "b"],
    "ok": True,
    "none": None,
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{.Name}}", "dev"),
        ("{{ .name }}/{{.ID}}", "dev/mch_1"),
        ("{{.State.Status}} {{.state.pid}}", "running 7"),
        ("{{json .State}}", '{"Status": "running", "Pid": 7}'),
        ("{{upper .Name}}{{lower .Name}}{{len .tags}}", "DEVdev2"),
        ('{{join .tags ","}}', "a,b"),
        (r"{{.Name}}\t{{.ok}}\n", "dev\ttrue\n"),
        ("{{.none}} plain", "<no value> plain"),
        ("json", None),
    ],
)
def test_what_people_type(template, expected):
    out = render(template, ROW)
    assert out == expected if expected is not None else out.startswith('{"Name": "dev"')


@pytest.mark.parametrize(
    "template",
    ["{{.Nome}}", "{{range .tags}}", "{{index .tags 0}}", "{{.State.Status.Deep}}", "{{}}", "{{.Name", "{{.Name}} {{"],
)
def test_what_is_not_there_is_refused(template):
    with pytest.raises(BadInput, match="--format"):
        render(template, ROW)


def test_a_table_has_a_heading_and_columns():
    assert heading("table {{.Names}}\t{{upper .Status}}") == "NAMES\tSTATUS"
    assert heading("{{.Names}}") is None
    assert align(["A\tB", "long\tx"]) == ["A      B", "long   x"]
