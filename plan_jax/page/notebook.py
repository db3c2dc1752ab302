"""The page of a run inside a notebook.

A notebook cannot load files by their path on every host, so the page is part of the output itself.
"""

import html
from pathlib import Path

from plan_jax.types import UserError

PAGE = "report.html"


class Report:
    """The page of a run, which a notebook shows in a frame below the cell.

        Report("runs/demo")

    The frame runs no script, as the page itself does not.
    """

    def __init__(self, run: str | Path, height: int = 700) -> None:
        """Reads the page.

        Args:
          run: the folder of a run or of an evaluation, or the page in there.
          height: height of the frame in pixels.

        Raises:
          UserError: there is no page.
        """
        path = Path(run)
        self.path, self.height = path if path.suffix == ".html" else path / PAGE, height
        try:
            self._content = self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UserError(
                f"page {self.path} cannot be read ({reason}); pass the folder of a run that has"
                " ended"
            ) from None

    def __repr__(self) -> str:
        """Returns the path of the page, for a terminal."""
        return f"Report({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Returns the frame, by a convention of IPython."""
        content = html.escape(self._content)
        return (
            f'<iframe srcdoc="{content}" sandbox width="100%" height="{self.height}"'
            ' style="border: 1px solid #ccc"></iframe>'
        )
