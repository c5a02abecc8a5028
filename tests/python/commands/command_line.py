# Runs a command in this process.
from typer.testing import CliRunner

from rankwise.commands import app


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert code in (None, result.exit_code), result.output
    return result
