# Runs a command in this process.
from typer.testing import CliRunner

from rankwise.commands import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result
