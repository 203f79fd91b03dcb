"""One self-contained HTML page: no script, no outside request."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from noisekit.core.errors import StorageError
from noisekit.records.files import write_bytes_atomic
from noisekit.report.page_model import page_of
from noisekit.report.results import AnalysisResult, Provenance


def build_report(
    results: Sequence[AnalysisResult], provenance: Provenance, out: Path | str
) -> Path:
    """Write the report as one HTML file and return its path.

    The first result leads the page, the others follow in order. Figures are part of
    the file; links to files under ``analyses/<name>/`` beside it are made for those
    that are there. Whatever came from a file is escaped.

    Args:
        results: What the analyses found; none for runs that claim nothing.
        provenance: Where the numbers come from.
        out: The file; one that is there is replaced as a whole.

    Raises:
        StorageError: If the file cannot be written; one that was there stays.
    """
    path = Path(out)
    page = page_of(results, provenance, beside=path.parent)
    text = _environment().get_template("template.html.j2").render(page=page)
    try:
        write_bytes_atomic(path, text.encode())
    except StorageError as error:
        raise StorageError(
            f"the report needs a file that can be written, got {path}: "
            f"{error.__cause__}. Free some space or name another file."
        ) from error
    return path


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("noisekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
